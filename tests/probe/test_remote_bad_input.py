"""Every bad input of a remote migration: the reason on both sides, the guest running where it was, a retry that
works."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.network import free_port
from tests.probe.test_remote_migration import Receiver, Sending, child, hop, tcp
from tests.vmm import Vmm, poll

pytestmark = [pytest.mark.probe, pytest.mark.timeout(120)]

# shared/wire.py and shared/pages.py, written out: a test that imported them would agree with whatever they say.
HEADER = struct.Struct("<HHI")
HELLO = b"FLOTILLA" + struct.pack("<H", 1)
STATE, REFUSED, MACHINE, ACCEPTED, PAGES = 4, 6, 8, 9, 10
RAM = 128 << 20
GIGABYTE = 1 << 30


def frame(kind: int, body: bytes = b"", length: int | None = None) -> bytes:
    return HEADER.pack(kind, 0, len(body) if length is None else length) + body


def packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


@pytest.fixture
def source(tmp_path):
    with Vmm.guest(tmp_path, "mode=rng", name="one") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        yield vmm


def send(vmm: Vmm, url: str) -> str:
    """A send that must fail; what the user is told. The guest goes on."""
    sent = vmm.remote("send-migration", url, timeout=60)
    assert sent.returncode == 1, sent
    assert vmm.ask("info")["state"] == "Running"
    vmm.more("rng ok ")
    return sent.stderr


class Peer:
    """A destination that we play: the first bytes at once, the others as an answer to the source's first message."""

    def __init__(self, said: bytes, *, read_to_end: bool = True) -> None:
        self.port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                connection.sendall(said[: len(HELLO)])
                if said[len(HELLO) :]:
                    _exactly(connection, len(HELLO))
                    kind = 0
                    while kind != MACHINE:  # a heartbeat comes before it
                        kind, _, length = HEADER.unpack(_exactly(connection, HEADER.size))
                        _exactly(connection, length)
                    connection.sendall(said[len(HELLO) :])
                while read_to_end and connection.recv(65536):
                    pass
                if not read_to_end:
                    connection.close()
            os._exit(0)
        self._listener.close()

    @property
    def url(self) -> str:
        return f"tcp:127.0.0.1:{self.port}"

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


# A source with a bad destination ------------------------------------------------------------------------------------


def test_wrong_port_refused_connection(source):
    port = free_port()
    assert f"nobody listens on tcp:127.0.0.1:{port}: Connection refused" in send(source, f"tcp:127.0.0.1:{port}")


def test_host_that_does_not_exist(source):
    assert "cannot connect to tcp:nowhere.invalid:1" in send(source, "tcp:nowhere.invalid:1")


@pytest.mark.parametrize("url", ["tcp:127.0.0.1", "tcp:127.0.0.1:0", "tcp:127.0.0.1:99999", "udp:127.0.0.1:1"])
def test_url_that_is_none(source, url):
    assert url in send(source, url)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "does not speak Flotilla's migration protocol"),
        (b"FLOTILLA" + struct.pack("<H", 9), "version 9, ours 1"),
        (HELLO + frame(ACCEPTED, b"", GIGABYTE), f"of {GIGABYTE} bytes (limit"),
        (HELLO + frame(4000), "unknown type 4000"),
        (HELLO + frame(PAGES, struct.pack("<II", 0, 0)), "not for a migration's source"),
        (HELLO + frame(STATE, packed({"state": {}})), "not in state"),
        (HELLO + frame(ACCEPTED, b"\xc1"), "not msgpack"),
        (HELLO + frame(ACCEPTED, packed({})), "took_ms is missing"),
    ],
    ids=["garbage", "other version", "lying length", "unknown type", "pages the wrong way", "wrong order", "no msgpack",
         "no field"],
)  # fmt: skip
def test_destination_that_breaks_the_protocol(source, said, complaint):
    with Peer(said) as peer:
        assert complaint in send(source, peer.url)


def test_destination_that_refuses(source):
    reason = packed({"error": {"type": "MigrationError", "message": "no room here", "hint": "", "causes": []}})
    with Peer(HELLO + frame(REFUSED, reason)) as peer:
        errors = send(source, peer.url)
    assert "the destination refused it" in errors and "no room here" in errors


@pytest.mark.parametrize("said", [b"", b"FLOT", HELLO, HELLO + b"\x09", HELLO + frame(ACCEPTED, b"x", 50)])
def test_destination_that_hangs_up(source, said):
    with Peer(said, read_to_end=False) as peer:
        errors = send(source, peer.url)
    assert "closed the connection" in errors or "broke" in errors


def test_silent_destination(source):
    with Peer(b"") as peer:
        assert "the peer said nothing for 10 s" in send(source, peer.url)


# A destination with a bad source ------------------------------------------------------------------------------------


def machine(**changes: Any) -> bytes:
    body = {"config": {}, "parts": [[0, RAM, 0, 0]], "info": {}, "paused": False, **changes}
    return HELLO + frame(MACHINE, packed(body))


BAD_SOURCES = {
    "garbage": (b"\xde\xad\xbe\xef" * 4, "does not speak Flotilla's migration protocol"),
    "Cloud Hypervisor": (b"\x01\x00" + bytes(14), "Cloud Hypervisor's own migration"),
    "other version": (b"FLOTILLA" + struct.pack("<H", 7), "version 7, ours 1"),
    "lying length": (HELLO + frame(MACHINE, b"", GIGABYTE), f"MACHINE of {GIGABYTE} bytes"),
    "pages at once": (HELLO + frame(PAGES, struct.pack("<II", 0, 0)), "not in state ready"),
    "state at once": (HELLO + frame(STATE, packed({"state": {}})), "not in state ready"),
    "no configuration": (HELLO + frame(MACHINE, packed({})), "field config is missing"),
    "empty configuration": (machine(), "makes no VM of this release"),
    "a terabyte": (machine(parts=[[0, 1 << 40, 0, 0]]), "this release"),
    "regions that are none": (machine(parts=[[0, -1, 0, 0]]), "memory region"),
    "hello cut": (HELLO[:5], "in the middle of a message"),
    "header cut": (HELLO + b"\x08\x00\x00", "in the middle of a message"),
    "body cut": (HELLO + frame(MACHINE, b"x", 100), "in the middle of a message"),
    "nothing": (b"", "closed the connection"),
}


def test_receiver_survives_every_bad_source_and_receives_afterwards(tmp_path, source):
    with Vmm(tmp_path, name="two") as destination:
        for name, (said, complaint) in BAD_SOURCES.items():
            port = free_port()
            receiver = Receiver(destination, f"tcp:127.0.0.1:{port}")
            with socket.create_connection(("127.0.0.1", port)) as peer:
                peer.sendall(said)
                if "closed" in complaint or "middle" in complaint:
                    peer.shutdown(socket.SHUT_WR)
                code, errors = receiver.end()
            assert code == 1 and complaint in errors, f"{name}: {errors}"
            assert destination.ask("ping") and "migration" not in destination.fleet(), name
        with tcp(tmp_path) as urls:
            hop(source, destination, urls)
        destination.expect("rng ok ")


class Tampering:
    """A relay that lets a source's first messages pass and, instead of its first PAGES, says something else."""

    def __init__(self, there: int, lie: bytes) -> None:
        self.port = free_port()
        listener = socket.create_server(("127.0.0.1", self.port))
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(OSError):
                _tamper(listener, there, lie)
            os._exit(0)
        listener.close()

    def __enter__(self) -> Tampering:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _tamper(listener: socket.socket, there: int, lie: bytes) -> None:
    source, _ = listener.accept()
    destination = socket.create_connection(("127.0.0.1", there))
    if os.fork() == 0:
        while data := destination.recv(65536):
            source.sendall(data)
        os._exit(0)
    destination.sendall(_exactly(source, len(HELLO)))
    while True:
        head = _exactly(source, HEADER.size)
        kind, _, length = HEADER.unpack(head)
        if kind == PAGES:
            destination.sendall(lie)
            break
        destination.sendall(head + _exactly(source, length))
    while source.recv(1 << 20):
        pass


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionError("the other end closed")
        data += more
    return data


def pages(runs: list[tuple[int, int]], zero: int = 0, length: int | None = None, data: bytes = b"") -> bytes:
    body = struct.pack("<II", len(runs) - zero, zero) + b"".join(struct.pack("<QQ", *run) for run in runs) + data
    return frame(PAGES, body, length)


LIES = {
    "page outside RAM": (pages([(RAM, 1)], length=24 + 4096), f"guest address {RAM:#x}"),
    "run that leaves RAM": (pages([(RAM - 4096, 2)], length=24 + 8192), f"guest address {RAM - 4096:#x}"),
    "zeros outside RAM": (pages([(1 << 40, 1)], zero=1), f"guest address {1 << 40:#x}"),
    "too many runs": (frame(PAGES, struct.pack("<II", 5000, 0), 1 << 20), "5000 runs"),
    "length that does not fit": (pages([(0, 1)], length=24 + 100), "its list makes"),
    "length beyond the limit": (frame(PAGES, b"", GIGABYTE), f"PAGES of {GIGABYTE} bytes"),
}


@pytest.mark.parametrize("name", LIES)
def test_pages_that_lie_are_refused_by_name_on_both_sides(tmp_path, source, name):
    lie, complaint = LIES[name]
    with Vmm(tmp_path, name="two") as destination:
        port = free_port()
        receiver = Receiver(destination, f"tcp:127.0.0.1:{port}")
        with Tampering(port, lie) as relay:
            errors = send(source, f"tcp:127.0.0.1:{relay.port}")
            code, why = receiver.end()
        assert code == 1 and complaint in why
        assert complaint in errors and "the destination refused it" in errors
        with tcp(tmp_path) as urls:
            hop(source, destination, urls)
        destination.expect("rng ok ")


# Hosts that differ --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_disk(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    disk = folder / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    with Vmm.guest(tmp_path, "mode=rng", "--disk", f"path={disk}", name="one") as vmm:
        vmm.expect("rng ok 1")
        vmm.wait_api()
        yield vmm, disk


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda disk: None, "No such file or directory"),
        (lambda disk: disk.write_bytes(bytes(1 << 19)), "has 524288 bytes, at the source"),
        (lambda disk: disk.mkdir(), "neither an image file nor a block device"),
    ],
    ids=["missing", "another size", "a directory"],
)
def test_disk_that_differs_is_refused_before_a_byte_of_ram_moves(tmp_path, with_disk, change, complaint):
    """The destination has its own file system: under the source's open image the path is made another one."""
    source, disk = with_disk
    with Vmm(tmp_path, name="two") as destination, tcp(tmp_path) as urls:
        receiver = Receiver(destination, urls[1])
        disk.rename(f"{disk}.away")
        change(disk)
        errors = send(source, urls[0])
        code, why = receiver.end()
        assert code == 1 and f"path={disk}" in why and complaint in why
        assert f"path={disk}" in errors and complaint in errors
        assert source.ask("migration-progress")["pages"] == 0
        with contextlib.suppress(OSError):
            disk.rmdir()
        Path(f"{disk}.away").rename(disk)
        hop(source, destination, urls)


def test_disk_that_somebody_else_has_locked_is_refused_after_commit_and_the_source_goes_on(tmp_path, with_disk):
    """A file of its own under the same path, as on another host, which a third VM uses there."""
    source, disk = with_disk
    disk.rename(f"{disk}.away")
    disk.write_bytes(bytes(1 << 20))
    with (
        Vmm.guest(tmp_path, "mode=rng", "--disk", f"path={disk}", name="holder") as holder,
        Vmm(tmp_path, name="two") as destination,
        tcp(tmp_path) as urls,
    ):
        holder.expect("rng ok 1")
        receiver = Receiver(destination, urls[1])
        errors = send(source, urls[0])
        code, why = receiver.end()
        assert code == 1 and "the image is locked by" in why
        assert "the image is locked by" in errors and "the destination refused it" in errors
        assert destination.ask("migration-progress")["state"] == "failed"


# Two at once --------------------------------------------------------------------------------------------------------


def test_two_sends_at_once_and_a_send_while_receiving(tmp_path):
    with (
        Vmm.guest(tmp_path, "mode=ram ram.mb=64", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Sending(source, destination, tmp_path) as sending,
    ):
        second = source.remote("send-migration", f"tcp:127.0.0.1:{free_port()}")
        assert second.returncode == 1 and "VM is being migrated" in second.stderr
        while_receiving = destination.remote("send-migration", f"tcp:127.0.0.1:{free_port()}")
        assert while_receiving.returncode == 1 and "being migrated" in while_receiving.stderr
        receive_twice = destination.remote("receive-migration", f"tcp:127.0.0.1:{free_port()}")
        assert receive_twice.returncode == 1 and "being migrated" in receive_twice.stderr
        for change in ("pause", "reboot", "shutdown", "delete", "power-button"):
            refused = source.remote(change)
            assert refused.returncode == 1 and "VM is being migrated" in refused.stderr
        assert source.ask("info")["state"] == "Running"  # asking is always allowed
        source.ask("cancel-migration")
        sending.fails("was cancelled; the guest runs on here")


@pytest.mark.parametrize("side", ["source", "destination"])
def test_cancel_on_either_side(tmp_path, side):
    with (
        Vmm.guest(tmp_path, "mode=ram ram.mb=64", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Sending(source, destination, tmp_path) as sending,
    ):
        (source if side == "source" else destination).ask("cancel-migration")
        errors, why = sending.fails("the guest runs on here")
        assert "cancelled" in errors and ("cancelled" in why or "gave up" in why)


def test_ctrl_c_cancels_a_send(tmp_path):
    with (
        Vmm.guest(tmp_path, "mode=ram ram.mb=64", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Sending(source, destination, tmp_path) as sending,
    ):
        sending.sender.send_signal(signal.SIGINT)
        _, errors = sending.sender.communicate(timeout=60)
        assert sending.sender.returncode == 130 and "cancelled" in errors
        assert sending.receiver.end()[0] == 1
        source.more("ram ok ")


def test_guest_that_switches_itself_off_ends_its_migration_and_loses_nothing(tmp_path):
    """The power-off counts; the destination hears why nobody comes."""
    words = "mode=ram ram.mb=64 ram.rate=64 passes=20 off"  # a pass a second
    with (
        Vmm.guest(tmp_path, words, name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Sending(source, destination, tmp_path) as sending,
    ):
        _, errors = sending.sender.communicate(timeout=60)
        assert sending.sender.returncode == 1, errors
        code, why = sending.receiver.end()
        assert code == 1 and why
        assert source.wait() == 0
        assert b"probe: done bad=0" in source.output


def test_guest_that_resets_itself_ends_its_migration_and_boots_again_where_it_was(tmp_path):
    words = "mode=ram ram.mb=64 ram.rate=64 passes=20 reset=acpi"
    with (
        Vmm.guest(tmp_path, words, name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Sending(source, destination, tmp_path) as sending,
    ):
        _, errors = sending.sender.communicate(timeout=60)
        assert sending.sender.returncode == 1 and "here" in errors, errors
        code, why = sending.receiver.end()
        assert code == 1 and why
        first = source.expect("probe: done bad=0")
        source.expect("ram ok ", since=first.end())
        assert source.ask("info")["state"] == "Running"
        assert source.ask("migration-progress")["state"] in ("cancelled", "failed")
        assert destination.remote("info").returncode == 1 and "migration" not in destination.fleet()
        assert b"BAD" not in source.output


def test_port_that_is_taken_and_address_of_another_host(tmp_path):
    with Vmm(tmp_path, name="two") as destination, socket.create_server(("127.0.0.1", 0)) as taken:
        destination.wait_api()
        port = taken.getsockname()[1]
        refused = destination.remote("receive-migration", f"tcp:127.0.0.1:{port}")
        assert refused.returncode == 1 and "Address already in use" in refused.stderr and str(port) in refused.stderr
        foreign = destination.remote("receive-migration", f"tcp:192.0.2.1:{free_port()}")
        assert foreign.returncode == 1 and "192.0.2.1" in foreign.stderr


def test_resolve_without_a_doubt_is_refused(source):
    refused = source.remote("migration-resolve", "--here")
    assert refused.returncode == 1 and "No migration is in doubt" in refused.stderr


def test_a_lone_process_in_the_stream_that_never_speaks(tmp_path):
    """socat whose other end nobody has: it takes the connection and ends at once."""
    with Vmm.guest(tmp_path, "mode=rng", name="one") as source:
        source.expect("rng ok 1")
        source.wait_api()
        here = tmp_path / "sock1"
        with child(["socat", f"UNIX-LISTEN:{here}", f"TCP:127.0.0.1:{free_port()}"]):
            poll(here.exists)
            errors = send(source, f"unix:{here}")
        assert "closed the connection" in errors or "broke" in errors
        here.unlink(missing_ok=True)
