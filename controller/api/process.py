"""The API process's main: uvicorn on the listening socket that the controller made, a DEALER to the controller.

Whoever can open the socket talks to an HTTP parser, so this process gives up what a device worker does
(shared/sandbox.py): the file system once everything is imported, all but the calls of its list once it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any

import uvicorn
import zmq
import zmq.asyncio
from fastapi import FastAPI

from controller.api.app import build
from controller.api.descriptors import Carrier, Listener, protocol
from controller.api.endpoints import ENDPOINTS, ROOT
from shared import messages, sandbox
from shared.messages import Verb
from shared.worker import Start

CONNECT_SECONDS = 20.0


class Controller:
    """Requests to the controller; answers are matched by number, so that any of them may take its time."""

    def __init__(self) -> None:
        self._socket: zmq.asyncio.Socket | None = None
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.on_shutdown: Callable[[], None] = lambda: None

    async def connect(self, endpoint: str) -> None:
        """Returns when the connection is there. There is only one, for life: a controller does not come back."""
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 200)
        self._socket.set(zmq.RECONNECT_IVL, -1)
        self._socket.set(zmq.IMMEDIATE, 1)  # a message waits for the connection, and so do we
        self._socket.connect(endpoint)
        await self._socket.send(messages.encode({"event": "ready", "args": {}}))

    async def handle(self, method: str, name: str, body: bytes, fds: Sequence[int]) -> tuple[int, bytes]:
        """One request; the controller's status and JSON. It fetches `fds` from us before it answers."""
        if self._socket is None:  # rehearse()
            return 204, b""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        arguments = {"method": method, "path": name, "body": body, "fds": list(fds)}
        await self._socket.send(messages.encode({"id": number, "verb": Verb.API, "args": arguments}))
        try:
            message = await future
        finally:
            self._pending.pop(number, None)
        if "ok" in message:
            return int(message["ok"]["status"]), bytes(message["ok"]["body"])
        error = messages.error_from_wire(message.get("error"))
        return 500, json.dumps(["Error from API", str(error)]).encode()

    async def receive(self) -> None:
        """Take answers in until the controller says goodbye."""
        assert self._socket is not None
        while True:
            message = messages.decode(await self._socket.recv())
            if message.get("event") == "goodbye":
                self.on_shutdown()
            elif (future := self._pending.get(message.get("id", 0))) and not future.done():
                future.set_result(message)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: when to end the controller decides. Sealed before the first request."""

    def __init__(self, config: uvicorn.Config, seal: Callable[[], None]) -> None:
        super().__init__(config)
        self._seal = seal

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._seal()
        await super().startup(sockets)


async def rehearse(app: FastAPI) -> None:
    """Two requests to nobody: what answering them imports must be there before the file system goes."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Any) -> None:
        pass

    nobody, peer = socket.socketpair()
    with peer, Carrier(nobody.detach()) as carrier:
        for path in (f"{ROOT}{ENDPOINTS[0].name}", "/"):
            scope: dict[str, Any] = {
                "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
                "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": [],
                "client": None, "server": None, "descriptors": carrier,
            }  # fmt: skip
            await app(scope, receive, send)


async def serve(listener: Listener, endpoint: str, box: sandbox.Sandbox) -> None:
    """Until told to stop; requests under way are answered first."""
    controller = Controller()
    app = build(controller.handle)
    config = uvicorn.Config(
        app,
        http=protocol(listener),
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=2,
    )
    config.load()
    await rehearse(app)
    with box.leave_files(endpoint) as name:
        await asyncio.wait_for(controller.connect(name), CONNECT_SECONDS)  # else a successor tries
    server = Server(config, box.seal)

    def stop() -> None:
        server.should_exit = True

    controller.on_shutdown = stop
    receiver = asyncio.create_task(controller.receive())
    await server.serve(sockets=[listener])
    receiver.cancel()


def run(start: Start) -> int:
    """Until told to stop; the exit code."""
    gc.freeze()  # what has been imported stays
    gc.enable()
    listener = Listener(start.fds["listening"])
    asyncio.run(serve(listener, start.spec["controller"], start.sandbox))
    return 0
