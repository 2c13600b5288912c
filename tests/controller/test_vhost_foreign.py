"""The front end against a stranger's back end: qemu-storage-daemon."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.foreign import ForeignBackend
from controller.pci.virtio import Virtqueue
from controller.supervision import Supervision
from controller.vhost_frontend import Frontend, dial
from shared.errors import Timeout, WorkerError
from shared.linux import memfd
from tests.controller.vhost_rig import RAM, Rig, pages

QSD = shutil.which("qemu-storage-daemon")
IMAGE_SIZE = 1 << 20
QSD_FEATURES = 1 << 32 | 1 << 9  # VERSION_1, FLUSH


class Daemon:
    """qemu-storage-daemon with one raw image, on a socket that it listens on."""

    def __init__(self, folder: Path) -> None:
        assert QSD is not None
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(n % 251 for n in range(IMAGE_SIZE)))
        self.socket = str(folder / "blk.sock")
        self.start()

    def start(self) -> None:
        assert QSD is not None
        export = f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={self.socket}"
        self.process = subprocess.Popen(
            [
                QSD,
                *("--blockdev", f"driver=file,node-name=disk,filename={self.image}"),
                *("--export", f"{export},writable=on,num-queues=1"),
            ]
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        Path(self.socket).unlink(missing_ok=True)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if QSD is None:
        pytest.skip("qemu-storage-daemon is not installed")
    made = Daemon(tmp_path)
    yield made
    made.close()


class Disk(Rig):
    """The front end of a foreign disk, and its driver."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend.close()
        self.frontend = Frontend(self.reactor, self.memory, "_disk0", own=False)
        self.frontend.on_lost = self.lost.append

    def queues(self) -> tuple[Virtqueue, ...]:
        return super().queues()[:1]

    def up_on(self, daemon: Daemon) -> None:
        (sock,) = self.run(dial(self.reactor, daemon.socket))
        assert isinstance(sock, socket.socket)
        self.run(self.frontend.connect(sock), self.frontend.activate(QSD_FEATURES, self.queues()))

    def request(self, kind: int, sector: int, readable: list[bytes], writable: list[int]) -> tuple[int, bytes]:
        """(status, what the disk wrote)"""
        d = self.drivers[0]
        head = struct.pack("<IIQ", kind, 0, sector)
        _, targets = d.add([head, *readable], [*writable, 1])
        d.kick()
        d.wait()
        data = b"".join(self.memory.read(gpa, n) for gpa, n in zip(targets, writable, strict=False))
        return self.memory.read(targets[-1], 1)[0], data

    def kept_on(self, daemon: Daemon) -> tuple[ForeignBackend, Supervision, list[str]]:
        """It is dialled again whenever it is lost; what supervision says of that."""
        events: list[str] = []
        supervision = Supervision(lambda _source, event, _properties: events.append(event))
        foreign = ForeignBackend(self.reactor, self.frontend, "_disk0", daemon.socket, supervision)
        self.run(foreign.connect(attached))
        self.run(self.frontend.activate(QSD_FEATURES, self.queues()))
        return foreign, supervision, events


async def attached() -> None:
    """Nothing more is to be known of the device."""


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.close()


def test_qsd_disk_is_read_written_and_flushed(disk: Disk, daemon: Daemon) -> None:
    disk.up_on(daemon)
    (config,) = disk.run(disk.frontend.get_config(60))
    assert isinstance(config, bytes)
    assert struct.unpack_from("<Q", config) == (IMAGE_SIZE // 512,)
    content = daemon.image.read_bytes()
    assert disk.request(0, 3, [], [1024]) == (0, content[3 * 512 : 5 * 512])
    assert disk.request(1, 7, [b"\xa5" * 512], []) == (0, b"")
    assert disk.request(4, 0, [], []) == (0, b"")
    assert daemon.image.read_bytes()[7 * 512 : 8 * 512] == b"\xa5" * 512


def test_qsd_stops_resumes_and_is_replaced(disk: Disk, daemon: Daemon, tmp_path: Path) -> None:
    disk.up_on(daemon)
    disk.request(0, 0, [], [512])
    assert disk.run(disk.frontend.stop()) == [{0: 1}]
    disk.run(disk.frontend.resume())
    assert disk.request(0, 1, [], [512])[0] == 0
    daemon.close()
    disk.until(lambda: bool(disk.lost))
    second = tmp_path / "second"
    second.mkdir()
    successor = Daemon(second)
    try:
        (sock,) = disk.run(dial(disk.reactor, successor.socket))
        assert isinstance(sock, socket.socket)
        disk.run(disk.frontend.replay(sock))
        assert disk.request(0, 2, [], [512]) == (0, successor.image.read_bytes()[1024:1536])
    finally:
        successor.close()


def test_qsd_marks_what_it_writes(disk: Disk, daemon: Daemon) -> None:
    log = memfd("log", RAM // 4096 // 8)
    disk.up_on(daemon)
    assert disk.frontend.can_log
    disk.run(disk.frontend.start_logging(log, RAM // 4096 // 8))
    d = disk.drivers[0]
    d.next_buffer = 0x200FF0  # the header lies on a page that is only read; data and status on the next
    assert disk.request(0, 0, [], [512])[0] == 0
    assert {d.used >> 12, 0x201} <= pages(log)
    assert 0x200 not in pages(log)
    os.close(log)


def test_foreign_back_end_is_dialled_until_one_makes_sense(disk: Disk, daemon: Daemon) -> None:
    """First nobody listens, then somebody talks nonsense, then somebody serves: none of it ends the attempts."""
    foreign, _, events = disk.kept_on(daemon)
    daemon.process.kill()
    daemon.process.wait()
    disk.until(lambda: "refused" in str(foreign.absence()))
    os.unlink(daemon.socket)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(daemon.socket)
        listener.listen()
        listener.setblocking(False)
        met: list[socket.socket] = []

        def babble() -> bool:
            try:
                met.append(listener.accept()[0])
            except BlockingIOError:
                return False
            met[-1].sendall(b"\xff" * 64)
            return True

        disk.until(babble)
        disk.until(lambda: "went away before it answered" in str(foreign.absence()))
    for sock in met:
        sock.close()
    os.unlink(daemon.socket)
    daemon.start()
    disk.until(lambda: foreign.absence() is None)
    assert disk.request(0, 3, [], [512])[0] == 0
    assert events == ["worker-lost", "worker-restarted"]
    foreign.close()


def test_back_end_that_wakes_after_its_stop_took_too_long_serves_again(disk: Disk, daemon: Daemon) -> None:
    """It stops its rings then, for nobody: it has to be told anew to run them."""
    foreign, supervision, events = disk.kept_on(daemon)
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)
        with pytest.raises(Timeout, match="_disk0: stopping the rings"):
            disk.run(disk.frontend.stop(0.2))
        disk.run(disk.frontend.resume())  # what follows a pause that failed; it has nothing to wait for
        assert foreign.absence() is not None
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    disk.until(lambda: foreign.absence() is None)
    assert disk.request(0, 3, [], [512]) == (0, daemon.image.read_bytes()[3 * 512 : 4 * 512])
    assert events == ["worker-lost", "worker-restarted"]
    assert supervision.columns("vhost-user", "_disk0")["last_cause"] == "hung"
    foreign.close()


def test_back_end_that_goes_away_before_its_configuration_was_read_is_told(disk: Disk, daemon: Daemon) -> None:
    """Nobody would dial it again: there is no device yet that could wait."""

    async def attach() -> bytes:
        daemon.close()
        return await disk.frontend.get_config(60)

    foreign = ForeignBackend(disk.reactor, disk.frontend, "_disk0", daemon.socket, Supervision(lambda *_: None))
    with pytest.raises(WorkerError, match=f"_disk0: its vhost-user back end at {daemon.socket} does not serve: "):
        disk.run(foreign.connect(attach))
    assert not disk.frontend.connected
