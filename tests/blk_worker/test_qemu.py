"""QEMU as the front end: `vhost-user-blk-pci` with SeaBIOS, whose own virtio-blk driver boots from our disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from guest.lines import Bad, BlkOk
from tests.guest.conftest import Machine
from tests.vmm import until_socket

HERE = Path(__file__).resolve().parent
QEMU = "qemu-system-x86_64"
TEXT = b"read through vhost-user\n"
PROGRAM_LEFT_IT = (0 << 1) | 1  # isa-debug-exit

pytestmark = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    flat = tmp_path / "boot.bin"
    elf = tmp_path / "boot.o"
    subprocess.run(["as", "--32", "-o", elf, HERE / "boot_sector.S"], check=True)
    subprocess.run(
        ["ld", "-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary", "-o", flat, elf], check=True, timeout=20
    )
    path = tmp_path / "disk.raw"
    path.write_bytes(flat.read_bytes() + TEXT.ljust(512, b"\0") + bytes((2048 - 2) * 512))
    return path


@pytest.fixture
def backend(disk: Path, runtime_folder: Path) -> Iterator[Path]:
    path = runtime_folder / "qemu.sock"
    program = subprocess.Popen(
        [sys.executable, "-m", "blk_worker", "--socket-path", path, "--path", disk, "--num-queues", "2"]
    )
    yield path
    program.send_signal(signal.SIGTERM)
    assert program.wait(20) == 0


def qemu(sock: Path, *more: str) -> subprocess.CompletedProcess[bytes]:
    command = [
        QEMU, "-accel", "tcg", "-m", "64", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-machine", "q35,memory-backend=ram",
        "-chardev", f"socket,id=disk,path={sock},reconnect=1",
        "-device", "vhost-user-blk-pci,chardev=disk,num-queues=2,bootindex=1",
        "-device", "isa-debug-exit,iobase=0xf4,iosize=1", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=50, check=False)


def test_bios_boots_from_our_disk_and_writes_to_it(disk: Path, backend: Path) -> None:
    for _ in range(2):  # the second QEMU finds the same back end again
        done = qemu(backend)
        assert TEXT in done.stdout, done.stdout + done.stderr
        assert done.returncode == PROGRAM_LEFT_IT
        with disk.open("r+b") as file:
            file.seek(1024)
            assert file.read(512) == TEXT.ljust(512, b"\0")
            file.seek(1024)
            file.write(bytes(512))


def ops(machine: Machine) -> int:
    line = machine.line(BlkOk)
    assert isinstance(line, BlkOk)
    return line.ops


def standstill(machine: Machine) -> int:
    """How many requests were done in all, when five reports in a row say the same: the disk is gone."""
    seen = [-1, ops(machine)]
    while len(set(seen[-5:])) > 1:
        seen.append(ops(machine))
    return seen[-1]


def spawn(sock: Path, disk: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "blk_worker", "--socket-path", sock, "--path", disk, "--num-queues", "2"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_probe_guest_verifies_its_blocks_across_kills(tmp_path: Path, runtime_folder: Path) -> None:
    """A foreign front end, its inflight region, our device; the guest finds every stale, torn or lost block."""
    disk = tmp_path / "load.raw"
    disk.touch()
    os.truncate(disk, 8 << 20)
    sock = runtime_folder / "load.sock"
    worker = spawn(sock, disk)
    try:
        until_socket(sock, worker)  # QEMU does not wait for it
        with closing(Machine(
            "tcg", "mode=blkload span=4m report_ms=20 queues=2",
            "-object", "memory-backend-memfd,id=ram,size=128M,share=on", "-machine", "memory-backend=ram",
            "-chardev", f"socket,id=disk,path={sock},reconnect=1",
            "-device", "vhost-user-blk-pci,disable-legacy=on,chardev=disk,num-queues=2",
        )) as machine:  # fmt: skip
            done = 0
            for life in range(4):
                while ops(machine) < done + 200:
                    pass
                if life < 3:
                    worker.send_signal(signal.SIGKILL)
                    worker.wait()
                    done = standstill(machine)
                    worker = spawn(sock, disk)
            assert not [event for event in machine.events if isinstance(event, Bad)]
    finally:
        worker.terminate()
        assert worker.wait(20) == 0


def test_program_prints_its_capabilities() -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-m", "blk_worker", "--print-capabilities"], capture_output=True, check=True, timeout=20
    )
    assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--path", "/nowhere/disk.raw", "--socket-path", "x"], "/nowhere/disk.raw: No such file"),
        (["--socket-path", "x"], "--path is missing"),
        (["--path", "x"], "neither --socket-path nor --fd"),
    ],
)
def test_program_names_what_is_wrong(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blk_worker", *arguments], capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert says in done.stderr
