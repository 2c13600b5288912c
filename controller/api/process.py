"""The API process's main: uvicorn on the listening socket that the controller made, a DEALER to the controller."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import signal
from collections.abc import Callable, Generator, Sequence
from typing import Any

import uvicorn
import zmq
import zmq.asyncio

from controller.api.app import build
from controller.api.descriptors import Listener, protocol
from shared import messages
from shared.linux import die_with_parent, set_name
from shared.messages import Verb


class Controller:
    """Requests to the controller; answers are matched by number, so that any of them may take its time."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 200)
        self._socket.connect(endpoint)
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.on_shutdown: Callable[[], None] = lambda: None

    async def handle(self, method: str, name: str, body: bytes, fds: Sequence[int]) -> tuple[int, bytes]:
        """One request; the controller's status and JSON. It fetches `fds` from us before it answers."""
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
        await self._socket.send(messages.encode({"event": "ready", "args": {}}))
        while True:
            message = messages.decode(await self._socket.recv())
            if message.get("event") == "goodbye":
                self.on_shutdown()
            elif (future := self._pending.get(message.get("id", 0))) and not future.done():
                future.set_result(message)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: when to end is the controller's decision."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        yield


async def serve(listener: Listener, endpoint: str) -> None:
    """Until told to stop; requests under way are answered first."""
    controller = Controller(endpoint)
    config = uvicorn.Config(
        build(controller.handle),
        http=protocol(listener),
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=2,
    )
    server = Server(config)

    def stop() -> None:
        server.should_exit = True

    controller.on_shutdown = stop
    receiver = asyncio.create_task(controller.receive())
    await server.serve(sockets=[listener])
    receiver.cancel()


def main(listen_fd: int, endpoint: str, parent: int) -> int:
    die_with_parent(parent)
    gc.freeze()  # what has been imported stays
    gc.enable()
    set_name("api")
    for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(serve(Listener(listen_fd), endpoint))
    return 0
