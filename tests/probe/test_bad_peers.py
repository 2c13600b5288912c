"""Bad input of a migration, through the real program: sockets, URLs, and what a peer says or does not say.

Each is refused with Cloud Hypervisor's class of status or exit code and a message that names the thing at fault; the
guest that runs meanwhile goes on, and a VMM that failed to receive can receive again.
"""

from __future__ import annotations

import errno
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgpack
import pytest

from tests.probe.requests import SECONDS, ask, goes_on
from tests.vmm import REMOTE, Vmm, environment, poll, run_remote

pytestmark = pytest.mark.probe

# migration_agent/wire.py, written out: a test that imported it would agree with whatever it says.
HELLO = b"FLOTILLA" + struct.pack("<H", 1)
BUILD, BUILT, STARTED = 2, 3, 5
GIGABYTE = 1 << 30


# Sending ---------------------------------------------------------------------------------------------------------


def test_send_to_a_socket_nobody_listens_on(ticking: Vmm, tmp_path: Path) -> None:
    path = tmp_path / "nobody"
    for stale in (False, True):
        if stale:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.bind(str(path))
        done = ticking.remote("send-migration", "--local", f"unix:{path}")
        assert done.returncode == 1 and str(path) in done.stderr and "nobody listens" in done.stderr, done.stderr
        goes_on(ticking)
    path.unlink()


def test_send_to_a_file(ticking: Vmm, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    done = ticking.remote("send-migration", "--local", f"unix:{path}")
    assert done.returncode == 1 and str(path) in done.stderr
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "body",
    ["{}", '{"destination_url":7}', '{"destination_url":"carrier-pigeon:x","local":true}',
     '{"destination_url":"unix:/tmp/x","local":"yes"}', '{"destination_url":"unix:/tmp/x","local":true,"colour":1}',
     '{"destination_url":"unix:","local":true}', '{"destination_url":"unix:/%s","local":true}' % ("x" * 200)],
    ids=["no url", "url of a wrong type", "unknown scheme", "local of a wrong type", "unknown key", "no path", "long"],
)  # fmt: skip
def test_send_that_makes_no_sense(ticking: Vmm, body: str) -> None:
    status, said = ask(ticking, "PUT", "vm.send-migration", body)
    assert status == 400, said


def test_send_without_a_vm(vmm: Vmm, tmp_path: Path) -> None:
    assert vmm.remote("send-migration", "--local", f"unix:{tmp_path}/x").returncode == 1
    assert vmm.ask("ping")


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A destination that is this test."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen(1)
        sock.settimeout(SECONDS)
        try:
            yield sock
        finally:
            path.unlink()


def remote(vmm: Vmm, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", REMOTE, "--api-socket", str(vmm.api), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def header(kind: int, length: int) -> bytes:
    return struct.pack("<HHI", kind, 0, length)


def bad_words(kind: int) -> dict[str, bytes]:
    """What a peer can say instead of a message of that kind."""
    return {
        "garbage": b"\x00\xff" * 500,
        "http": b"GET / HTTP/1.1\r\n\r\n",
        "gigabyte length": HELLO + header(kind, GIGABYTE),
        "a message out of turn": HELLO + header(STARTED, 0),
        "an unknown message": HELLO + header(999, 0),
        "another version": b"FLOTILLA\xff\xff",
        "nothing and goodbye": b"",
        "half a hello": HELLO[:5],
        "half a message": HELLO + header(kind, 100) + b"x",
        "a body that is no msgpack": HELLO + header(kind, 4) + b"\xc1\xc1\xc1\xc1",
        "a map whose key is a list": HELLO + header(kind, 3) + b"\x81\x90\x00",
    }


def say(connection: socket.socket, words: bytes) -> None:
    """Say it, then listen until the other side has hung up."""
    with connection, suppress(ConnectionError):
        connection.settimeout(SECONDS)
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("words", bad_words(BUILT).values(), ids=bad_words(BUILT))
def test_destination_that_sends(ticking: Vmm, tmp_path: Path, words: bytes) -> None:
    """A running VM is never harmed: whatever the destination says, the guest goes on at the source."""
    path = tmp_path / "peer"
    with listening(path) as sock, remote(ticking, "send-migration", "--local", f"unix:{path}") as send:
        connection, _ = sock.accept()
        say(connection, words)
        _, err = send.communicate(timeout=SECONDS)
    assert send.returncode == 1 and "Server responded" in err, err
    assert "Traceback" not in ticking.errors


def test_destination_that_says_nothing_at_all(ticking: Vmm, tmp_path: Path) -> None:
    """It is given up after a while, and ping is answered meanwhile."""
    path = tmp_path / "peer"
    with listening(path) as sock, remote(ticking, "send-migration", "--local", f"unix:{path}") as send:
        connection, _ = sock.accept()
        with connection:
            assert ticking.ask("ping")["pid"] == ticking.process.pid
            _, err = send.communicate(timeout=2 * SECONDS)
    assert send.returncode == 1 and "said nothing" in err, err


# Receiving -------------------------------------------------------------------------------------------------------


@contextmanager
def receiving(vmm: Vmm, path: Path) -> Iterator[subprocess.Popen[str]]:
    """`ch-remote receive-migration`, waiting for a peer."""
    process = remote(vmm, "receive-migration", f"unix:{path}")

    def listens() -> bool:
        assert process.poll() is None, process.communicate()
        # A socket of another type is told of a listener by EPROTOTYPE, and is not taken for the peer.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            return sock.connect_ex(str(path)) == errno.EPROTOTYPE

    try:
        poll(listens)
        yield process
    finally:
        if process.poll() is None:
            run_remote("--api-socket", str(vmm.api), "cancel-migration")
        process.communicate(timeout=SECONDS)


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    sock.connect(str(path))
    return sock


def takes_in(vmm: Vmm, tmp_path: Path) -> None:
    """The proof that a VMM can receive: a running guest comes in and goes on."""
    path = tmp_path / "again"
    with Vmm.guest(tmp_path, "mode=tick", name="source") as source:
        source.expect(r"tick \d")
        source.wait_api()
        with receiving(vmm, path) as receive:
            sent = source.remote("send-migration", "--local", f"unix:{path}")
            assert sent.returncode == 0, sent.stderr + source.errors[-2000:] + vmm.errors[-2000:]
            assert receive.wait(SECONDS) == 0
        assert source.wait() == 0
        goes_on(vmm)


def test_receive_where_a_stale_socket_is_replaces_it(vmm: Vmm, tmp_path: Path) -> None:
    path = tmp_path / "in"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
    with receiving(vmm, path), connect(path):
        pass


def test_receive_where_somebody_listens_is_refused(vmm: Vmm, tmp_path: Path) -> None:
    with listening(tmp_path / "in") as sock:
        done = vmm.remote("receive-migration", f"unix:{tmp_path}/in")
        assert done.returncode == 1 and f"{tmp_path}/in" in done.stderr and "listens" in done.stderr, done.stderr
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.accept()  # the one who listens was not even disturbed
        with connect(tmp_path / "in"):
            pass


def test_receive_where_another_file_is_refused(vmm: Vmm, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("precious")
    done = vmm.remote("receive-migration", f"unix:{path}")
    assert done.returncode == 1 and str(path) in done.stderr and "not a socket" in done.stderr
    assert path.read_text() == "precious"


def test_receive_in_a_folder_that_is_not_there(vmm: Vmm, tmp_path: Path) -> None:
    done = vmm.remote("receive-migration", f"unix:{tmp_path}/none/in")
    assert done.returncode == 1 and f"{tmp_path}/none/in" in done.stderr


def test_receive_where_a_vm_runs_is_refused(ticking: Vmm, tmp_path: Path) -> None:
    done = ticking.remote("receive-migration", f"unix:{tmp_path}/in")
    assert done.returncode == 1 and "already created" in done.stderr
    assert not (tmp_path / "in").exists()


EMPTY_BUILD = msgpack.packb({"config": {}, "parts": [], "disks": [], "info": {}, "paused": False})
RECEIVED = {
    **bad_words(BUILD),
    "cloud hypervisor": struct.pack("<H6xQ", 1, 0),
    "build without descriptors": HELLO + header(BUILD, len(EMPTY_BUILD)) + EMPTY_BUILD,
}


@pytest.mark.parametrize("words", RECEIVED.values(), ids=RECEIVED)
def test_source_that_sends(vmm: Vmm, tmp_path: Path, words: bytes) -> None:
    """The receive fails with a reason, the path is gone, and the VMM answers and can listen again."""
    path = tmp_path / "in"
    with receiving(vmm, path) as receive:
        say(connect(path), words)
        _, err = receive.communicate(timeout=SECONDS)
    assert receive.returncode == 1 and "Server responded" in err, err
    assert not path.exists()
    assert "Traceback" not in vmm.errors
    with receiving(vmm, path), connect(path):
        pass


def test_source_that_sends_garbage_and_then_a_real_one(vmm: Vmm, tmp_path: Path) -> None:
    """Receive after a failed receive works."""
    with receiving(vmm, tmp_path / "in") as receive:
        say(connect(tmp_path / "in"), bad_words(BUILD)["garbage"])
        assert receive.wait(SECONDS) == 1
    takes_in(vmm, tmp_path)


def test_source_that_says_nothing_at_all(vmm: Vmm, tmp_path: Path) -> None:
    """It is given up after a while, and ping is answered meanwhile."""
    with receiving(vmm, tmp_path / "in") as receive, connect(tmp_path / "in") as peer:
        assert vmm.ask("ping")["pid"] == vmm.process.pid
        _, err = receive.communicate(timeout=SECONDS)
        assert receive.returncode == 1 and "said nothing" in err, err
        with suppress(ConnectionError):
            assert peer.recv(1) == b""


def test_a_gigabyte_length_is_not_allocated(vmm: Vmm, tmp_path: Path) -> None:
    """The peer keeps the line open, so that whoever believed the length would sit and wait for the bytes."""
    before = resident(vmm)
    with receiving(vmm, tmp_path / "in") as receive, connect(tmp_path / "in") as peer:
        peer.sendall(HELLO + header(BUILD, GIGABYTE))
        _, err = receive.communicate(timeout=SECONDS)
        assert receive.returncode == 1 and f"{GIGABYTE} bytes (limit" in err, err
    assert resident(vmm) < before + (256 << 20)


def resident(vmm: Vmm) -> int:
    """Bytes of the controller in memory."""
    fields = Path(f"/proc/{vmm.process.pid}/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()
