"""controller.exporter: the real exporter process around a controller that is this test."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.api_socket import ApiSocket
from controller.doctor_sandbox import fatal
from controller.exporter import Exporter
from controller.leavings import Leavings
from shared.control import EXPORTER, Channel
from shared.errors import ProtocolError, StateError, WorkerError
from shared.figures import Figures, ProcessFigures, to_wire
from shared.messages import Verb
from shared.reactor import Event, gather, readable, sleep
from tests.controller.processes import SECONDS, running

ASK = b"GET /metrics HTTP/1.0\r\n\r\n"


def unread(sock: socket.socket) -> int:
    """Bytes that its peer has not read."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


class Rig:
    """`collections` counts what the exporter asked for; until `go_on` is set, nobody is answered."""

    def __init__(self, reactor, fleet, folder: Path) -> None:
        self.reactor, self.fleet = reactor, fleet
        self.path = folder / "figures"
        self.runtime = folder / "run"
        self.runtime.mkdir()
        self.leavings = Leavings(str(self.runtime))
        self.collections = 0
        self.asked = Event()
        self.go_on = Event()
        self.go_on.set()
        self.pids = [os.getpid()]
        self.asking: list[socket.socket] = []
        self.failure: Exception | None = None
        listening = ApiSocket.listen(str(self.path))
        self.exporter = Exporter(reactor, fleet, str(self.runtime), self.leavings, listening, self._collect)

    async def _collect(self, files):
        self.collections += 1
        self.asked.set()
        await self.go_on.wait()
        files |= {pid: os.open(f"/proc/{pid}/smaps_rollup", os.O_RDONLY) for pid in self.pids}
        if self.failure is not None:
            raise self.failure
        processes = tuple(ProcessFigures("toy", f"p{pid}", pid, "running") for pid in self.pids)
        return to_wire(Figures(version=str(self.collections), processes=processes))

    def run(self, awaitable):
        return self.reactor.run_until(awaitable, SECONDS)

    async def scrape(self, request: bytes = ASK) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(self.path))
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            client.setblocking(False)
            self.asking.append(client)
            received = b""
            while True:
                await readable(self.reactor, client.fileno(), SECONDS)
                data = client.recv(65536)
                if not data:
                    return received
                received += data

    async def _present(self):
        while not self.fleet.processes:
            await sleep(self.reactor, 0.01)
        return self.fleet.processes[0]

    @property
    def process(self):
        """Waited for: it may serve before its pid is known."""
        return self.run(self._present())

    async def read_by_the_exporter(self, count: int) -> None:
        """Until it has the requests of so many clients, which wait for their answers."""
        while sum(unread(client) == 0 for client in self.asking) < count:
            await sleep(self.reactor, 0.002)


@pytest.fixture
def rig(tmp_path) -> Iterator[Rig]:
    with running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet, tmp_path)
        made.exporter.start()
        yield made
        made.go_on.set()
        made.run(made.exporter.stop())


def test_figures_reach_a_client_with_the_memory_that_the_exporter_read(rig):
    text = rig.run(rig.scrape()).decode()
    assert text.startswith("HTTP/1.1 200 OK\r\n")
    assert 'flotilla_build_info{version="1"} 1.0' in text
    line = next(line for line in text.splitlines() if line.startswith("flotilla_process_pss_bytes{"))
    assert f'process="p{os.getpid()}"' in line and float(line.split()[-1]) > 1 << 20


def test_memory_of_more_processes_than_fit_into_one_message(rig):
    children = [os.posix_spawn("/bin/sleep", ["sleep", "60"], {}) for _ in range(130)]
    try:
        rig.pids = children
        text = rig.run(rig.scrape()).decode()
        assert text.count("flotilla_process_pss_bytes{") == 130
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_scrapes_at_the_same_time_share_one_collection(rig):
    rig.go_on.clear()
    scrapes = [rig.reactor.spawn(rig.scrape()) for _ in range(8)]
    rig.run(rig.asked.wait())
    rig.run(rig.read_by_the_exporter(len(scrapes)))
    rig.go_on.set()
    texts = rig.run(gather(rig.reactor, *scrapes))
    assert all(b'flotilla_build_info{version="1"}' in text for text in texts)
    assert rig.collections == 1


def test_figures_that_could_not_be_made_leave_no_file_open(rig):
    rig.run(rig.scrape(b"GET / HTTP/1.0\r\n\r\n"))  # it is there
    rig.failure = ZeroDivisionError("a bug in the figures")
    before = len(os.listdir("/proc/self/fd"))
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 503 ")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_later_scrape_has_figures_of_its_own(rig):
    async def until_new() -> None:
        while b'version="2"' not in await rig.scrape():
            await sleep(rig.reactor, 0.05)

    rig.run(until_new())
    assert rig.collections == 2


def test_a_controller_that_fails_is_told_to_the_client_and_asked_again(rig):
    rig.failure = WorkerError("no figures today")
    text = rig.run(rig.scrape())
    assert text.startswith(b"HTTP/1.1 503 ") and b"no figures today" in text
    rig.failure = None
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("version", ["x", "", "1.0.x"])
def test_an_accept_header_that_is_nonsense_costs_nobody_the_exporter(rig, version):
    def ask(kind):
        return f"GET /metrics HTTP/1.0\r\nAccept: {kind}; version={version}\r\n\r\n".encode()

    rig.run(rig.scrape())
    pid = rig.process.pid
    for kind in ("text/plain", "application/openmetrics-text"):
        assert rig.run(rig.scrape(ask(kind))).startswith(b"HTTP/1.1 200 ")
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 200 ")
    assert rig.process.pid == pid


def test_nothing_but_figures_can_be_asked_for(rig):
    endpoint = f"ipc://{rig.runtime}/metrics.1"
    rig.run(sleep(rig.reactor, 0))  # it is bound, and its process on its way
    assert os.path.exists(endpoint.removeprefix("ipc://"))
    channel = Channel(rig.reactor, endpoint, bind=False)
    body = {"method": "PUT", "path": "vmm.shutdown", "body": b""}
    for verb in set(Verb) - {Verb.METRICS}:
        with pytest.raises(ProtocolError):
            rig.run(channel.call(verb, **(body if verb is Verb.API else {})))
    with pytest.raises(ProtocolError, match="this process does not serve 'api'"):
        rig.run(channel.call(Verb.API, **body))
    channel.close()


def test_collections_under_way_are_bounded(rig):
    """Whoever takes the exporter over asks without waiting for answers."""
    rig.run(sleep(rig.reactor, 0))
    channel = Channel(rig.reactor, f"ipc://{rig.runtime}/metrics.1", bind=False)
    rig.go_on.clear()
    asked = [rig.reactor.spawn(channel.call(Verb.METRICS, SECONDS)) for _ in range(10)]
    for task in asked:
        task.add_done_callback(lambda _: None)

    async def refused() -> None:
        while sum(task.done() for task in asked) < 10 - EXPORTER.requests:
            await sleep(rig.reactor, 0.002)

    rig.run(refused())
    assert rig.collections == EXPORTER.requests
    assert {type(task.exception()) for task in asked if task.done()} == {StateError}
    rig.go_on.set()
    rig.run(gather(rig.reactor, *(task for task in asked if not task.done())))
    channel.close()
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 200 ")


def test_a_killed_exporter_comes_back_on_the_same_socket_and_no_client_is_refused(rig):
    rig.run(rig.scrape())
    pid = rig.process.pid
    os.kill(pid, signal.SIGKILL)
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 200 ")
    assert rig.process.pid != pid
    assert rig.process.restarts == 1


def test_it_is_confined_and_leaves_no_name_behind(rig):
    rig.run(rig.scrape())
    assert os.listdir(rig.runtime) == []
    status = Path(f"/proc/{rig.process.pid}/status").read_text()
    found = dict(line.split(":\t", 1) for line in status.splitlines())
    assert found["Name"] == "metrics"
    assert found["NoNewPrivs"] == "1" and found["Seccomp"] == "2"
    assert {int(found[name], 16) for name in ("CapEff", "CapPrm", "CapInh")} == {0}
    folder = f"/proc/{rig.process.pid}/fd"
    held = {int(fd): os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}
    assert held.pop(2)  # log lines go there
    assert not [name for name in held.values() if name.startswith("/") and name != "/dev/null"], held


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain; version=1.0.0; escaping=allow-utf-8\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: \xff\xfe, */*\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /other HTTP/1.0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0\xff\r\n\r\n",
        b"",
    ],
)
def test_no_request_makes_a_call_that_its_filter_forbids(rig, request_text):
    """Not the first and not the second time: what is imported late can't be any more."""
    for _ in range(2):
        rig.run(rig.scrape(request_text))
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 200 ")
    assert rig.process.restarts == 0


def test_a_forbidden_call_is_its_death_and_a_successor_serves(rig):
    rig.run(rig.scrape())
    assert fatal(rig.process.pid).how == "SIGSYS"
    assert rig.run(rig.scrape()).startswith(b"HTTP/1.1 200 ")
    assert rig.process.restarts == 1


def test_stop_removes_the_socket_and_ends_the_process(rig):
    rig.run(rig.scrape())
    process = rig.process
    rig.run(rig.exporter.stop())
    assert not rig.path.exists() and not Path(f"{rig.path}.lock").exists()
    assert process.ended.is_set() and rig.fleet.processes == []


def test_the_janitor_is_told_of_the_socket(rig):
    assert rig.leavings.paths[1:] == [str(rig.path), f"{rig.path}.lock"]
