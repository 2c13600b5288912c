"""virtio-console and virtio-rng in process: our front end, real guest memory, a PTY or file at the host's side."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from console_worker.console import IN_BUFFER_LIMIT, RECEIVEQ, TRANSMITQ, Console
from console_worker.rng import Rng, open_source
from console_worker.worker import ConsoleWorker
from controller.vhost_frontend import Frontend
from controller.vhost_user_device import CONSOLE, RNG, VhostUserDevice
from shared.chardev import CharDev, open_host_end
from shared.errors import GuestError, HostError, ProtocolError
from shared.memory import GuestMemory
from shared.reactor import Future, Reactor
from shared.vhost_backend import Server
from shared.vhost_device import Ring
from tests.echo_backend import drained
from tests.virtqueue import WRITE, Driver, queue_of
from tests.vmm import SECONDS

RAM = 4 << 20
CONSOLE_FEATURES, RNG_FEATURES = 0x1_0000_0001, 0x1_0000_0000


class Bench:
    """Both devices of one worker, each behind its own front end."""

    def __init__(self, folder: Path, mode: str = "pty") -> None:
        self.reactor = Reactor()
        self.memory = GuestMemory.create(RAM)
        self.drivers = [Driver(self.memory, 0x10000 + 0x20000 * n, n % 2, size=16) for n in range(3)]
        self.rx, self.tx, self.entropy = self.drivers
        self.log = folder / "console.log"
        self.end = open_host_end(mode, str(self.log))
        self.user = os.open(self.end.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK) if mode == "pty" else -1
        self.frontends = {name: Frontend(self.reactor, self.memory, f"__{name}") for name in ("console", "rng")}
        self.servers: list[Server] = []
        self.source = open_source("/dev/urandom")
        self.start_worker()

    def start_worker(self) -> None:
        self.host = CharDev(self.reactor, self.end)
        self.console = Console(self.reactor, "__console", self.host)
        self.rng = Rng(self.reactor, "__rng", self.source)
        self.worker = ConsoleWorker(self.console, self.rng)
        for name, device in self.worker.devices.items():
            ours, theirs = socket.socketpair()
            device.server = Server(self.reactor, theirs, device)
            self.servers.append(device.server)
            self.run(self.frontends[name].replay(ours))

    def kill_worker(self) -> None:
        """It dies; the host end belongs to the VM's owner and stays."""
        for server in self.servers:
            server.close()
        self.servers.clear()
        self.host.hold()

    def activate_console(self) -> None:
        self.run(self.frontends["console"].activate(CONSOLE_FEATURES, (queue_of(self.rx), queue_of(self.tx))))

    def activate(self) -> None:
        self.activate_console()
        self.run(self.frontends["rng"].activate(RNG_FEATURES, (queue_of(self.entropy),)))

    def run(self, awaitable: Awaitable[object]) -> object:
        return self.reactor.run_until(awaitable, SECONDS)

    def until(self, condition: Callable[[], bool]) -> None:
        done: Future[None] = Future()

        def check() -> None:
            if condition():
                done.set_result(None)
            else:
                self.reactor.call_later(0.001, check)

        check()
        self.run(done)

    def turns(self, count: int = 4) -> None:
        left = iter(range(count))
        self.until(lambda: next(left, None) is None)

    def completed(self, d: Driver, count: int = 1) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []

        def enough() -> bool:
            done.extend(d.completed())
            return len(done) >= count

        self.until(enough)
        return done

    def printed(self, size: int) -> bytes:
        got = bytearray()

        def read() -> bool:
            try:
                got.extend(os.read(self.user, 65536))
            except BlockingIOError:
                pass
            return len(got) >= size

        self.until(read)
        return bytes(got)

    def close(self) -> None:
        for frontend in self.frontends.values():
            frontend.close()
        for server in self.servers:
            server.close()
        self.host.close()
        if self.user >= 0:
            os.close(self.user)
        os.close(self.source)
        for d in self.drivers:
            d.close()
        del self.console, self.rng, self.worker
        self.memory.close()
        self.reactor.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.activate()
    yield made
    made.close()


# Console --------------------------------------------------------------------------------------------------------


def test_output_reaches_the_host_in_order(bench: Bench) -> None:
    for n in range(5):
        bench.tx.add([b"line %d\n" % n])
    bench.tx.kick()
    assert bench.printed(35) == b"".join(b"line %d\n" % n for n in range(5))
    assert [written for _, written in bench.completed(bench.tx, 5)] == [0] * 5
    assert drained(bench.tx.call_fd)


def test_input_fills_the_guests_buffers_and_what_is_left_waits(bench: Bench) -> None:
    _, (first,) = bench.rx.add([], [4])
    bench.rx.kick()
    bench.turns()
    os.write(bench.user, b"hello")
    assert bench.completed(bench.rx) == [(0, 4)]
    assert bench.memory.read(first, 4) == b"hell"
    _, (second,) = bench.rx.add([], [4])
    bench.rx.kick()
    ((_, written),) = bench.completed(bench.rx)
    assert bench.memory.read(second, written) == b"o"


def test_input_beyond_the_limit_stays_with_the_host(bench: Bench) -> None:
    sent = 0
    for _ in range(IN_BUFFER_LIMIT):  # far more than the worker and the PTY hold together
        try:
            sent += os.write(bench.user, b"x" * 1000)
        except BlockingIOError:
            bench.turns(2)
            if len(bench.console._in_buffer) >= IN_BUFFER_LIMIT:
                break
    assert IN_BUFFER_LIMIT <= len(bench.console._in_buffer) <= IN_BUFFER_LIMIT + 4096


def test_the_configuration_is_cloud_hypervisors(bench: Bench) -> None:
    config = bench.run(bench.frontends["console"].get_config(12))
    assert config == bytes.fromhex("00000000 01000000 00000000")
    assert bench.frontends["console"].features & 0x1_0000_0001 == 0x1_0000_0001


def test_a_resize_interrupts_the_driver_once(bench: Bench) -> None:
    device = bench.run(
        VhostUserDevice.attach(bench.reactor, bench.frontends["console"], "__console", CONSOLE, (256, 256))
    )
    assert isinstance(device, VhostUserDevice)
    interrupts: list[bytes] = []
    device.on_config_changed = lambda: interrupts.append(device.config)
    fcntl.ioctl(bench.user, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    bench.console.resized()
    bench.until(lambda: bool(interrupts))
    bench.console.resized()
    bench.turns()
    assert interrupts == [struct.pack("<HHII", 80, 24, 1, 0)]
    assert device.read_config(0, 2) == 80


def test_a_driver_that_breaks_its_queue_again_and_again_does_not_fill_the_log(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    device = bench.worker.devices["console"]
    for _ in range(9):
        device._kicks[1] = os.eventfd(0)
        bench.reactor.add_reader(device._kicks[1], lambda: None)
        kick = device._kicks[1]
        device._fail(1, GuestError("a chain that makes no sense"))
        os.close(kick)
    said = [line for line in capfd.readouterr().err.splitlines() if "the queue is dead" in line]
    assert [line.rpartition("(")[2] for line in said] == [f"{n} such errors in all)" for n in (1, 2, 4, 8)]


def test_a_malformed_chain_costs_its_queue_and_nothing_else(bench: Bench) -> None:
    bench.tx.describe(0, RAM, 8, 0)
    bench.tx.offer(0)
    bench.tx.kick()
    bench.until(lambda: bench.worker.stats()["console_errors"] == 1)
    bench.tx.kick()
    bench.turns()
    assert bench.worker.stats()["console_errors"] == 1
    bench.entropy.add([], [16])
    bench.entropy.kick()
    assert bench.completed(bench.entropy)[0][1] == 16
    bench.run(bench.frontends["console"].reset())
    for d in (bench.rx, bench.tx):
        bench.memory.write(d.avail, bytes(64))
        bench.memory.write(d.used, bytes(64))
        d.avail_index = d.used_index = d.next_desc = 0
    bench.activate_console()
    bench.tx.add([b"alive"])
    bench.tx.kick()
    assert bench.printed(5) == b"alive"


def test_a_writable_buffer_on_the_transmit_queue_prints_nothing(bench: Bench) -> None:
    bench.tx.describe(0, 0x80000, 8, WRITE)
    bench.tx.offer(0)
    bench.tx.kick()
    assert bench.completed(bench.tx) == [(0, 0)]
    assert bench.worker.stats()["console_bytes_out"] == 0


def test_a_guest_that_fills_the_queue_does_not_starve_the_other_device(bench: Bench) -> None:
    """The transmit queue is refilled from within; the rng is served all the same."""
    original = bench.host.write
    refilled = 0

    def refill(data: bytes) -> None:
        nonlocal refilled
        original(b"")
        if refilled < 5000:
            refilled += 1
            bench.tx.reset_buffers()
            bench.tx.add([b"again"])

    bench.host.write = refill  # type: ignore[method-assign]
    bench.tx.add([b"first"])
    bench.tx.kick()
    bench.entropy.add([], [16])
    bench.entropy.kick()
    assert bench.completed(bench.entropy)[0][1] == 16
    assert refilled < 5000


def test_a_full_host_makes_the_transmit_queue_wait(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "file")
    try:
        bench.activate()
        bench.host._limit = 0  # as if the file's device had stalled with its backlog full
        bench.tx.add([b"waits"])
        bench.tx.kick()
        bench.turns()
        assert bench.tx.completed() == []
        bench.host._limit = 1000
        bench.console._drained()
        bench.completed(bench.tx)
        assert bench.log.read_bytes() == b"waits"
    finally:
        bench.close()


def test_a_chain_is_given_back_before_its_bytes_go_out(bench: Bench) -> None:
    """In the other order, a death in between would make the successor print them again."""
    published: list[int] = []
    bench.host.write = lambda data: published.append(bench.tx.used_idx())  # type: ignore[method-assign]
    bench.tx.add([b"once"])
    bench.tx.kick()
    bench.completed(bench.tx)
    assert published == [1]


# Death and quiesce ----------------------------------------------------------------------------------------------


def test_output_is_printed_exactly_once_over_a_death(bench: Bench) -> None:
    bench.tx.add([b"one "])
    bench.tx.kick()
    assert bench.printed(4) == b"one "
    bench.kill_worker()
    bench.tx.add([b"two "])
    bench.tx.kick()
    bench.start_worker()
    bench.tx.add([b"three"])
    bench.tx.kick()
    assert bench.printed(9) == b"two three"
    assert len(bench.completed(bench.tx, 3)) == 3


def test_a_quiet_worker_uses_neither_guest_memory_nor_host(bench: Bench) -> None:
    bench.rx.add([], [8])
    bench.rx.kick()
    bench.tx.add([b"before"])
    bench.tx.kick()
    bench.printed(6)
    bench.completed(bench.tx)
    assert bench.worker.quiesce() == {"bases": {"console.0": 0, "console.1": 1, "rng.0": 0}}
    for d in bench.drivers:
        drained(d.call_fd)
    ram = bench.memory.read(0, RAM)
    os.write(bench.user, b"typed")
    for d in bench.drivers:
        d.kick()
    bench.turns()
    assert bench.memory.read(0, RAM) == ram
    assert [drained(d.call_fd) for d in bench.drivers] == [0, 0, 0]
    bench.worker.resume()
    assert bench.completed(bench.rx) == [(0, 5)]


def test_save_carries_what_was_typed_and_not_read(bench: Bench, tmp_path: Path) -> None:
    os.write(bench.user, b"typed")
    bench.until(lambda: len(bench.console._in_buffer) == 5)
    with pytest.raises(ProtocolError):
        bench.worker.save()
    bench.worker.quiesce()
    state = bench.worker.save()
    assert state == {"console": {"in_buffer": list(b"typed"), "out_buffer": []}}
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other")
    try:
        other.worker.load(state)
        other.activate()
        other.worker.resume()
        _, (target,) = other.rx.add([], [8])
        other.rx.kick()
        assert other.completed(other.rx) == [(0, 5)]
        assert other.memory.read(target, 5) == b"typed"
    finally:
        other.close()


@pytest.mark.parametrize("state", [
    {"in_buffer": [256]}, {"in_buffer": "text"}, {}, {"in_buffer": None}, {"in_buffer": 1 << 30},
    {"in_buffer": [], "out_buffer": 1 << 30},
])  # fmt: skip
def test_a_state_that_makes_no_sense_is_refused_and_changes_nothing(bench: Bench, state: dict[str, object]) -> None:
    os.write(bench.user, b"typed")
    bench.until(lambda: len(bench.console._in_buffer) == 5)
    with pytest.raises(ProtocolError):
        bench.worker.load({"console": state})
    assert bench.console._in_buffer == b"typed"


def test_queue_whose_kick_can_not_be_waited_for_does_not_run(tmp_path: Path) -> None:
    """And can be started again with an eventfd."""
    bench = Bench(tmp_path)
    with open(os.memfd_create("no-eventfd"), "rb") as file:
        ring = Ring(TRANSMITQ, 16, 0, 0, 0, 0, file.fileno(), -1, False, 0, 0, 0)
        with pytest.raises(PermissionError):
            bench.console.start_queue(ring)
    assert not bench.console.rings and not bench.console._kicks
    bench.activate_console()
    bench.tx.add([b"still here"])
    bench.tx.kick()
    assert bench.printed(10) == b"still here"
    bench.close()


def test_rings_started_while_quiet_wait_for_resume(bench: Bench) -> None:
    """A VM that arrives: its devices are activated before it is decided who runs the guest."""
    bench.worker.quiesce()
    bench.run(bench.frontends["console"].stop())
    bench.tx.add([b"after resume"])
    bench.run(bench.frontends["console"].resume())
    bench.turns()
    assert bench.tx.completed() == []
    bench.worker.resume()
    assert bench.printed(12) == b"after resume"


# Rng ------------------------------------------------------------------------------------------------------------


def test_rng_fills_the_whole_buffer_and_differently_each_time(bench: Bench) -> None:
    got = set()
    for _ in range(3):
        _, targets = bench.entropy.add([], [16, 48])
        bench.entropy.kick()
        assert bench.completed(bench.entropy)[0][1] == 64
        got.add(b"".join(bench.memory.read(gpa, size) for gpa, size in zip(targets, (16, 48), strict=True)))
    assert len(got) == 3
    assert bench.worker.stats()["rng_bytes"] == 192


def test_rng_has_no_configuration_and_cloud_hypervisors_features(bench: Bench) -> None:
    device = bench.run(VhostUserDevice.attach(bench.reactor, bench.frontends["rng"], "__rng", RNG, (256,)))
    assert isinstance(device, VhostUserDevice)
    assert (device.features, device.has_config) == (0x1_0000_0000, False)


def test_a_dry_source_is_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "entropy"
    os.mkfifo(fifo)
    bench = Bench(tmp_path)
    try:
        source = open_source(str(fifo))
        writer = os.open(fifo, os.O_WRONLY)
        bench.rng._source = source
        bench.activate()
        _, (target,) = bench.entropy.add([], [8])
        bench.entropy.kick()
        bench.turns()
        assert bench.entropy.completed() == []
        os.write(writer, b"random!!")
        assert bench.completed(bench.entropy) == [(0, 8)]
        assert bench.memory.read(target, 8) == b"random!!"
        bench.entropy.add([], [8])
        bench.entropy.kick()
        bench.turns()
        assert bench.rng._waiting
        assert bench.worker.quiesce()["bases"]["rng.0"] == 1
        assert not bench.rng._waiting
        os.write(writer, b"too late")
        bench.turns()
        assert bench.entropy.completed() == []
    finally:
        bench.close()
        os.close(source)
        os.close(writer)


def test_a_source_that_does_not_exist_is_named() -> None:
    with pytest.raises(HostError, match=r"--rng src=/no/such/source: No such file"):
        open_source("/no/such/source")


def test_queue_numbers_are_the_specifications() -> None:
    assert (RECEIVEQ, TRANSMITQ) == (0, 1)
