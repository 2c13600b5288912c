"""The host side of consoles, on real terminals, sockets, pipes and files."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared import chardev
from shared.chardev import CharDev, HostEnd, Mode, host_end, open_chardev, open_host_end
from shared.errors import ConfigError, HostError
from shared.reactor import Future, Reactor


class Bench:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.devices: list[CharDev] = []
        self.typed = bytearray()

    def open(self, mode: str, file: str = "", path: str = "") -> CharDev:
        return self.serve(open_host_end(mode, file, path))

    def serve(self, end: HostEnd, limit: int = chardev.BACKLOG_LIMIT) -> CharDev:
        device = CharDev(self.reactor, end, limit)
        device.on_input = self.typed.extend
        self.devices.append(device)
        return device

    def until(self, condition: Callable[[], bool]) -> None:
        done: Future[None] = Future()

        def check() -> None:
            if condition():
                done.set_result(None)
            else:
                self.reactor.call_later(0.001, check)

        check()
        self.reactor.run_until(done, 30.0)

    def turns(self, count: int = 3) -> None:
        """Let the reactor do all that it can do now."""
        left = iter(range(count))
        self.until(lambda: next(left, None) is None)

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.reactor.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["off", "null", "Null"])
def test_nothing_takes_everything(bench: Bench, mode: str) -> None:
    device = bench.open(mode)
    device.write(b"x" * (chardev.BACKLOG_LIMIT + 1))
    assert device.backlog == b""
    assert not device.full
    assert device.size() == (0, 0)


def test_a_file_gets_the_output(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text("of the VM before")
    bench.open("file", file=str(path)).write(b"hello\n")
    assert path.read_bytes() == b"hello\n"


def test_a_file_that_cannot_be_opened_is_named(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"missing/log: No such file"):
        bench.open("file", file=str(tmp_path / "missing" / "log"))
    with pytest.raises(ConfigError):
        bench.open("file")
    with pytest.raises(ConfigError):
        bench.open("socket")


# PTY ------------------------------------------------------------------------------------------------------------


def test_a_pty_works_both_ways_raw(bench: Bench) -> None:
    device = bench.open("pty")
    user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    os.write(user, b"ls\r\x03")
    bench.until(lambda: len(bench.typed) == 4)
    assert bench.typed == b"ls\r\x03"  # neither a line nor a signal was made of it
    device.write(b"a\nb")
    assert os.read(user, 10) == b"a\nb"
    os.close(user)


def test_a_pty_outlives_its_users(bench: Bench) -> None:
    device = bench.open("pty")
    for text in (b"first", b"second"):
        user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
        os.write(user, text)
        bench.until(lambda: bytes(bench.typed) == text)  # noqa: B023  evaluated before the next round
        bench.typed.clear()
        os.close(user)
    bench.turns()


def test_a_pty_that_nobody_reads_keeps_the_newest_and_stops_nobody(bench: Bench) -> None:
    device = bench.serve(open_host_end("pty"), limit=1000)
    for n in range(20):
        device.write(b"%04d" % n * 1000)
    assert not device.full
    assert len(device.backlog) == 1000
    assert device.backlog.endswith(b"0019")
    assert device.dropped > 0


def test_the_size_of_a_pty_is_its_users(bench: Bench) -> None:
    device = bench.open("pty")
    user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(user, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    assert device.size() == (100, 30)
    os.close(user)


# Socket ---------------------------------------------------------------------------------------------------------


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(path)
    return client


def test_a_socket_keeps_output_for_its_client(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "console.sock")
    device = bench.open("socket", path=path)
    device.write(b"before anybody came\n")
    assert not device.full
    with connect(path) as client:
        bench.until(lambda: not device.backlog)
        assert client.recv(100) == b"before anybody came\n"
        client.sendall(b"typed")
        bench.until(lambda: bytes(bench.typed) == b"typed")
    bench.until(lambda: device._client is None)
    device.write(b"in between")
    with connect(path) as client:
        bench.until(lambda: not device.backlog)
        assert client.recv(100) == b"in between"


def test_a_slow_client_gets_everything_in_order(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "console.sock")
    device = bench.open("socket", path=path)
    sent = os.urandom(500_000)
    with connect(path) as client:
        bench.until(lambda: device._client is not None)
        device.write(sent)
        assert device.backlog
        client.setblocking(False)
        got = bytearray()

        def drain() -> bool:
            try:
                got.extend(client.recv(65536))
            except BlockingIOError:
                pass
            return len(got) == len(sent)

        bench.until(drain)
    assert got == sent


def test_a_socket_name_is_removed_and_a_stale_one_replaced(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    device = bench.open("socket", path=str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(HostError, match="in use"):
        open_host_end("socket", socket_path=str(path))
    device.close()
    assert not path.exists()


def test_a_file_in_the_sockets_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(HostError, match="in use"):
        open_host_end("socket", socket_path=str(path))
    assert path.read_text() == "data"


# Terminal -------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(the user's side, the terminal that stands for standard input and output)"""
    master, slave = pty.openpty()
    monkeypatch.setattr(chardev, "STDIN", slave)
    monkeypatch.setattr(chardev, "STDOUT", slave)
    yield master, slave
    os.close(master)
    os.close(slave)


def test_a_terminal_is_raw_while_in_use_and_restored(bench: Bench, terminal: tuple[int, int]) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    end = open_host_end("tty")
    device = bench.serve(end)
    assert end.termios == before
    assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    os.write(master, b"\x03q")
    bench.until(lambda: bytes(bench.typed) == b"\x03q")
    device.write(b"out")
    assert os.read(master, 10) == b"out"
    device.close()
    assert termios.tcgetattr(slave) == before
    device.close()


def test_the_shells_own_descriptors_stay_blocking(terminal: tuple[int, int]) -> None:
    _, slave = terminal
    end = open_host_end("tty")
    assert os.get_blocking(slave)
    assert not os.get_blocking(end.fds["in"])
    end.close()


def test_a_stopped_terminal_makes_the_device_full_and_then_drains(bench: Bench, terminal: tuple[int, int]) -> None:
    """Nothing that a guest prints to a terminal or file is dropped: it waits."""
    master, _ = terminal
    drained: list[bool] = []
    device = bench.serve(open_host_end("tty"), limit=10_000)
    device.on_drain = lambda: drained.append(True)
    sent = bytearray()
    while not device.full:
        sent += b"line of output\n"
        device.write(b"line of output\n")
    assert device.dropped == 0
    os.set_blocking(master, False)
    got = bytearray()

    def read() -> bool:
        try:
            got.extend(os.read(master, 4096))
        except BlockingIOError:
            pass
        return len(got) == len(sent)

    bench.until(read)
    assert got == sent
    assert drained == [True]


def test_input_that_is_a_file_is_read_to_its_end(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cloud-hypervisor … < commands`: epoll takes no regular files."""
    script = tmp_path / "commands"
    script.write_bytes(b"x" * 10_000)
    with script.open("rb") as source, (tmp_path / "out").open("wb") as out:
        monkeypatch.setattr(chardev, "STDIN", source.fileno())
        monkeypatch.setattr(chardev, "STDOUT", out.fileno())
        device = bench.open("tty")
        bench.until(lambda: len(bench.typed) == 10_000)
        bench.turns()
        device.write(b"done")
    assert (tmp_path / "out").read_bytes() == b"done"


def test_the_end_of_a_pipe_as_input_does_not_spin(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    out_read, out_write = os.pipe()
    monkeypatch.setattr(chardev, "STDIN", read_end)
    monkeypatch.setattr(chardev, "STDOUT", out_write)
    device = bench.open("tty")
    os.write(write_end, b"bye")
    os.close(write_end)
    bench.until(lambda: bytes(bench.typed) == b"bye")
    bench.until(lambda: device._reading < 0)
    device.write(b"still there")
    assert os.read(out_read, 100) == b"still there"
    for fd in (read_end, out_read, out_write):
        os.close(fd)


def test_a_reader_of_our_output_that_has_gone_costs_only_the_output(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_read, out_write = os.pipe()
    monkeypatch.setattr(chardev, "STDOUT", out_write)
    with open(os.devnull, "rb") as null:
        monkeypatch.setattr(chardev, "STDIN", null.fileno())
        device = bench.open("tty")
        os.close(out_read)
        device.write(b"nobody")
        assert device.dropped == 6
        assert not device.full
    os.close(out_write)


def test_standard_output_as_a_socket_never_blocks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "rb") as null:
        monkeypatch.setattr(chardev, "STDIN", null.fileno())
        monkeypatch.setattr(chardev, "STDOUT", theirs.fileno())
        device = bench.open("tty")
        device.write(bytes(2_000_000))
        assert device.full
        assert os.get_blocking(theirs.fileno())


# Pausing --------------------------------------------------------------------------------------------------------


def test_paused_input_stays_with_the_kernel(bench: Bench) -> None:
    device = bench.open("pty")
    user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    device.pause_input(True)
    os.write(user, b"later")
    bench.turns()
    assert bench.typed == b""
    device.pause_input(False)
    bench.until(lambda: bytes(bench.typed) == b"later")
    os.close(user)


def test_a_held_device_does_not_touch_the_host_until_released(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "console.sock")
    device = bench.open("socket", path=path)
    with connect(path) as client:
        bench.until(lambda: device._client is not None)
        device.hold()
        client.sendall(b"typed")
        device.write(b"printed")
        bench.turns()
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(10)
        assert bench.typed == b""
        assert device.backlog == b"printed"
        device.release()
        bench.until(lambda: bytes(bench.typed) == b"typed")
        assert client.recv(10) == b"printed"


def test_another_process_can_serve_the_end(bench: Bench) -> None:
    """The PTY belongs to the VM's owner: a worker that dies does not hang up on its user."""
    owner = open_host_end("pty")
    copies = {role: os.dup(fd) for role, fd in owner.fds.items()}
    device = bench.serve(host_end("pty", copies, owner.path))
    user = os.open(owner.path, os.O_RDWR | os.O_NOCTTY)
    device.close()
    bench.serve(host_end("pty", {role: os.dup(fd) for role, fd in owner.fds.items()}, owner.path))
    os.write(user, b"hello")
    bench.until(lambda: bytes(bench.typed) == b"hello")
    os.close(user)
    owner.close()


def test_open_chardev_is_both_halves_at_once(bench: Bench, tmp_path: Path) -> None:
    device = open_chardev("file", str(tmp_path / "log"), "", bench.reactor)
    bench.devices.append(device)
    assert (device.end.mode, device.path) == (Mode.FILE, str(tmp_path / "log"))


def test_the_module_is_light_enough_for_the_boot_path() -> None:
    heavy = "asyncio subprocess logging json argparse zmq msgpack"
    code = f"import sys, shared.chardev; print([m for m in {heavy!r}.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
