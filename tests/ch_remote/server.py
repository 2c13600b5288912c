"""The other end of ch-remote: a real server on a unix socket that answers as a test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

from ch_remote.main import main

DEADLINE = 20.0
OK = b"HTTP/1.1 200 OK\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nConnection: keep-alive\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


class Server:
    """Answers each request by `handler(head, body)`: bytes to send as they are; connections stay open until closed.

    `heads` and `bodies` hold what came in, in order; `arrived` is set by every request.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.arrived = threading.Event()
        self.handler: Callable[[str, bytes], bytes] = lambda head, body: NO_CONTENT
        self.close_after = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(DEADLINE)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (piece := connection.recv(65536)):
                    return
                data += piece
            head, _, body = data.partition(b"\r\n\r\n")
            text = head.decode()
            fields = dict(line.lower().split(": ", 1) for line in text.split("\r\n")[1:])
            while len(body) < int(fields.get("content-length", "0")):
                body += connection.recv(65536)
            self.heads.append(text)
            self.bodies.append(body)
            self.arrived.set()
            try:
                connection.sendall(self.handler(text, body))
                if not self.close_after:
                    connection.recv(1)  # keep-alive: it is the client that ends the connection
            except OSError:
                return  # the client left first, which some tests are about

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        self.path.unlink(missing_ok=True)  # some tests are about a VMM that ends


def run(server: Server, *words: str) -> int:
    return main([f"--api-socket={server.path}", *words])
