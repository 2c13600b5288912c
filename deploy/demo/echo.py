"""Verified load on a network card: a TCP connection to the guest, on which every byte has to come back as it went."""

from __future__ import annotations

import random
import socket
import threading

BLOCK = 16 << 10
CONNECT_SECONDS = 60.0
SILENCE_SECONDS = 120.0


class Echo:
    """One connection for as long as it lives: a lost one is a failure, as a wrong byte is."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        """Raises OSError when the guest does not answer."""
        self.verified = 0  # bytes
        self.failure = ""
        self._random = random.Random(seed)
        self._ends = threading.Event()
        self._socket = socket.create_connection((host, port), CONNECT_SECONDS)
        self._socket.settimeout(SILENCE_SECONDS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends after the block that is under way."""
        self._ends.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            while not self._ends.is_set() and not self.failure:
                self._block()
        except OSError as error:
            self.failure = f"the connection broke after {self.verified} bytes: {error}"

    def _block(self) -> None:
        sent = self._random.randbytes(BLOCK)
        self._socket.sendall(sent)
        got = bytearray()
        while len(got) < BLOCK:
            data = self._socket.recv(BLOCK - len(got))
            if not data:
                self.failure = f"the guest closed the connection after {self.verified} bytes"
                return
            got += data
        if got != sent:
            wrong = next(at for at in range(BLOCK) if got[at] != sent[at])
            self.failure = f"byte {self.verified + wrong} came back as {got[wrong]}, not {sent[wrong]}"
            return
        self.verified += BLOCK
