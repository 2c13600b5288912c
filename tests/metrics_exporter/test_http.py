"""metrics_exporter.http: one path, one method, and clients that try to keep it from the others."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack

import pytest

from metrics_exporter import http
from shared.errors import Timeout
from shared.reactor import Event, Reactor, gather, readable

SECONDS = 20.0
ASK = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


class Rig:
    """A server on a port of its own; `scrape` may be replaced."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.listening.bind(("127.0.0.1", 0))
        self.listening.listen(128)
        self.accepts: list[str] = []
        self.scrape: Callable[[], Awaitable[bytes]] = self._plain
        self.clients = ExitStack()

        async def scrape(accept: str) -> tuple[bytes, str]:
            self.accepts.append(accept)
            return await self.scrape(), "text/plain"

        self.server = http.Server(self.reactor, self.listening, scrape)

    async def _plain(self) -> bytes:
        return b"figures\n"

    def connect(self, data: bytes = b"") -> socket.socket:
        client = self.clients.enter_context(socket.create_connection(self.listening.getsockname(), SECONDS))
        client.setblocking(False)
        client.sendall(data)
        return client

    async def rest(self, client: socket.socket) -> bytes:
        """All that it says until it hangs up."""
        received = b""
        while True:
            await readable(self.reactor, client.fileno(), SECONDS)
            try:
                data = client.recv(65536)
            except ConnectionResetError:
                return received
            if not data:
                return received
            received += data

    def ask(self, data: bytes = ASK) -> tuple[int, bytes]:
        """Status and whole answer to a request in bytes."""
        answer = self.reactor.run_until(self.rest(self.connect(data)), SECONDS)
        return (int(answer.split()[1]) if answer else 0), answer


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    with made.clients:
        yield made
    # Clients that have gone are let go of.
    made.reactor.run_until(drained(made), SECONDS)
    made.listening.close()
    made.reactor.close()


async def drained(rig: Rig) -> None:
    while rig.server._open:
        turn = Event()
        rig.reactor.call_later(0.001, turn.set)
        await turn.wait()


def test_metrics_are_answered_and_the_connection_closed(rig: Rig) -> None:
    status, answer = rig.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: a/b;q=1\r\nAccept: c\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert (status, body) == (200, b"figures\n")
    assert b"Content-Length: 8" in head and b"Connection: close" in head
    assert rig.accepts == ["a/b;q=1,c"]


@pytest.mark.parametrize("target", [b"/metrics?x=1", b"/metrics?"])
def test_a_query_is_ignored(rig: Rig, target: bytes) -> None:
    assert rig.ask(b"GET " + target + b" HTTP/1.0\r\n\r\n")[0] == 200


@pytest.mark.parametrize("target", [b"/", b"/metrics/", b"/metricsx", b"/api/v1/vmm.ping", b"*"])
def test_another_path_is_404(rig: Rig, target: bytes) -> None:
    assert rig.ask(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 404


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"HEAD", b"NONSENSE"])
def test_another_method_is_405_and_names_the_right_one(rig: Rig, method: bytes) -> None:
    status, answer = rig.ask(method + b" /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
    assert status == 405 and b"Allow: GET\r\n" in answer
    assert rig.accepts == []


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    ],
    ids=["tls", "nonsense", "no host", "bad length"],
)
def test_what_is_no_request_is_refused(rig: Rig, data: bytes) -> None:
    assert rig.ask(data)[0] == 400
    assert rig.ask()[0] == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * (60 << 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + bytes(90000), 413),
    ],
    ids=["head", "body"],
)
def test_what_is_too_long_is_not_read_to_its_end(rig: Rig, data: bytes, status: int) -> None:
    assert rig.ask(data)[0] in (status, 0)  # 0: the reset for what was not read has overtaken the answer
    assert rig.accepts == []
    assert rig.ask()[0] == 200


def test_a_request_in_pieces_is_one(rig: Rig) -> None:
    async def slowly() -> bytes:
        client = rig.connect()
        for number in range(len(ASK)):
            client.send(ASK[number : number + 1])
            turn = Event()
            rig.reactor.call_soon(turn.set)
            await turn.wait()
        return await rig.rest(client)

    assert rig.reactor.run_until(slowly(), SECONDS).startswith(b"HTTP/1.1 200 ")


def test_a_request_that_never_ends_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.05)
    assert rig.ask(ASK[:-2])[0] == 408


def test_a_client_that_does_not_read_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SEND_SECONDS", 0.05)

    async def much() -> bytes:
        return bytes(32 << 20)

    rig.scrape = much
    client = rig.connect(ASK)

    async def waited() -> None:
        while not rig.accepts:
            turn = Event()
            rig.reactor.call_soon(turn.set)
            await turn.wait()
        await drained(rig)

    rig.reactor.run_until(waited(), SECONDS)
    assert len(rig.reactor.run_until(rig.rest(client), SECONDS)) < 32 << 20


def test_idle_connections_keep_nobody_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more than are served at once; the oldest of them are dropped."""
    monkeypatch.setattr(http, "REQUEST_SECONDS", 60.0)  # not for being slow
    idle = [rig.connect(b"GET /met") for _ in range(3 * http.MAX_CONNECTIONS)]
    assert rig.ask()[0] == 200
    assert len(rig.server._open) < http.MAX_CONNECTIONS
    assert rig.reactor.run_until(rig.rest(idle[0]), SECONDS) == b""


def test_a_client_that_goes_away_while_it_waits_harms_nobody(rig: Rig) -> None:
    asked, go_on = Event(), Event()

    async def late() -> bytes:
        asked.set()
        await go_on.wait()
        return b"late\n"

    rig.scrape = late
    gone, stays = rig.connect(ASK), rig.connect(ASK)
    rig.reactor.run_until(asked.wait(), SECONDS)
    gone.close()
    go_on.set()
    assert rig.reactor.run_until(rig.rest(stays), SECONDS).endswith(b"late\n")


def test_a_controller_that_does_not_answer_is_503_with_the_reason(rig: Rig) -> None:
    async def never() -> bytes:
        raise Timeout("no answer within 10 s: metrics")

    rig.scrape = never
    status, answer = rig.ask()
    assert status == 503 and b"no answer within 10 s" in answer


def test_a_bug_is_the_clients_500_and_the_next_one_is_served(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    async def bug() -> bytes:
        raise ZeroDivisionError("a bug in the figures")

    rig.scrape = bug
    status, answer = rig.ask()
    assert status == 500 and answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert "ZeroDivisionError: a bug in the figures" in capfd.readouterr().err
    rig.scrape = rig._plain
    assert rig.ask()[0] == 200


def test_many_clients_side_by_side(rig: Rig) -> None:
    clients = [rig.connect(ASK) for _ in range(http.MAX_CONNECTIONS)]
    answers = rig.reactor.run_until(gather(rig.reactor, *(rig.rest(client) for client in clients)), SECONDS)
    assert all(answer.endswith(b"figures\n") for answer in answers)
