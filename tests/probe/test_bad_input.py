"""Bad input, through the real program.

Each is refused with Cloud Hypervisor's class of status or exit code and a message that names the thing at fault; the
guest that runs meanwhile goes on, and what failed can be tried again.
"""

from __future__ import annotations

import ctypes
import errno
import http.client
import json
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.vmm import PROGRAM, REMOTE, Vmm, environment, poll, probe, run_remote

pytestmark = pytest.mark.probe

SECONDS = 30
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
# shared/wire.py, written out: a test that imported it would agree with whatever it says.
HELLO = b"FLOTILLA" + struct.pack("<H", 1)
BUILD, BUILT, STARTED = 2, 3, 5
GIGABYTE = 1 << 30


def without_override() -> None:
    """In the child: file modes count for root, too."""
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program, which is expected to end by itself."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=environment(), stdin=subprocess.DEVNULL,
        check=False, **options,
    )  # fmt: skip


def refused(code: int, *words: str, arguments: tuple[str, ...], **options: Any) -> None:
    """It ends with that exit code, and each of `words` is in what it says. Never a traceback."""
    done = start(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, f"no {word!r} in {done.stderr}"


def machine(*more: str, kernel: str = "") -> tuple[str, ...]:
    own = ["--kernel", kernel or probe(), "--serial", "null", "--console", "off"]
    if "--memory" not in more:
        own += ["--memory", "size=128M"]
    return (*own, *more)


def ask(vmm: Vmm, method: str, name: str, body: bytes | str | None = None) -> tuple[int, list[str]]:
    """One request as bytes: the status and the error array."""
    connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SECONDS)
    connection.sock.connect(str(vmm.api))
    try:
        connection.request(method, f"/api/v1/{name}", body)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    return response.status, json.loads(content) if content else []


def config(**changes: Any) -> str:
    """A VmConfig that boots the probe guest, changed."""
    plain = {
        "payload": {"kernel": probe(), "cmdline": "mode=tick"},
        "memory": {"size": 128 << 20},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    }
    return json.dumps({**plain, **changes})


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Vmm]:
    """A VMM without a VM."""
    with Vmm(tmp_path) as made:
        made.wait_api()
        yield made


@pytest.fixture
def ticking(tmp_path: Path) -> Iterator[Vmm]:
    """A VMM whose guest says so ten times a second; at the end it must still do so."""
    with Vmm.guest(tmp_path, "mode=tick", name="running") as made:
        made.expect("tick 1 ")
        made.wait_api()
        yield made
        goes_on(made)


def goes_on(vmm: Vmm) -> None:
    assert vmm.ask("info")["state"] == "Running"
    vmm.more("tick ")


# The command line ------------------------------------------------------------------------------------------------


def test_missing_kernel(tmp_path: Path) -> None:
    kernel = str(tmp_path / "vmlinux")
    refused(1, f"--kernel {kernel}", "No such file", arguments=machine(kernel=kernel))


def test_missing_initramfs(tmp_path: Path) -> None:
    path = str(tmp_path / "initrd")
    refused(1, f"--initramfs {path}", "No such file", arguments=machine("--initramfs", path))


def test_missing_disk(tmp_path: Path) -> None:
    disk = str(tmp_path / "disk.raw")
    refused(1, f"--disk path={disk}", "No such file", arguments=machine("--disk", f"path={disk}"))


def test_directory_as_disk(tmp_path: Path) -> None:
    refused(1, f"--disk path={tmp_path}", "directory", arguments=machine("--disk", f"path={tmp_path}"))


def test_directory_as_kernel(tmp_path: Path) -> None:
    refused(1, f"--kernel {tmp_path}", "directory", arguments=machine(kernel=str(tmp_path)))


@pytest.mark.parametrize("flag", ["--kernel", "--disk"])
def test_unreadable_file(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0)
    arguments = machine(kernel=str(path)) if flag == "--kernel" else machine("--disk", f"path={path}")
    refused(1, str(path), "Permission denied", arguments=arguments, preexec_fn=without_override)


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(100), bytes(1 << 20), b"MZ" + bytes(600)],
    ids=["empty", "text", "four bytes of ELF", "ELF header of zeros", "zeros", "PE without a header"],
)
def test_kernel_that_is_no_kernel(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(content)
    refused(1, str(path), arguments=machine(kernel=str(path)))


def test_kernel_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    whole = Path(probe()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(1, str(path), arguments=machine(kernel=str(path)))


def test_memory_size_0() -> None:
    refused(1, "--memory size=", "0", arguments=machine("--memory", "size=0"))


def test_memory_that_the_kernel_does_not_fit_into() -> None:
    refused(1, "--memory size=4096: too little RAM", arguments=machine("--memory", "size=4K"))


def test_boot_0() -> None:
    refused(1, "--cpus boot=", "0", arguments=machine("--cpus", "boot=0"))


@pytest.mark.parametrize("flag", ["--cpus", "--memory", "--disk", "--serial", "--console", "--rng"])
def test_unknown_key(flag: str) -> None:
    refused(1, f"Error parsing {flag}", "colour", arguments=("--kernel", probe(), flag, "colour=blue"))


def test_unknown_flag() -> None:
    refused(2, "--colour", arguments=machine("--colour", "blue"))


def test_flag_of_cloud_hypervisor_that_is_not_there_yet() -> None:
    refused(2, "--net is not available yet", arguments=machine("--net", "tap="))


def test_same_id_twice(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(4096))
    disks = [f"path={tmp_path}/{name},id=data" for name in "ab"]
    refused(1, "Identifier data is not unique", arguments=machine("--disk", *disks))


def test_same_image_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    refused(1, f"--disk path={tmp_path}/a", "same image", arguments=machine("--disk", *[f"path={tmp_path}/a"] * 2))


def test_disk_of_a_running_vm(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(16 << 20))
    with Vmm.guest(tmp_path, "mode=blkload depth=4", "--disk", f"path={disk}") as first:
        first.expect("blk ok ")
        refused(1, f"--disk path={disk}", f"pid {first.process.pid}", arguments=machine("--disk", f"path={disk}"))
        first.more("blk ok ")
        assert b"BAD" not in first.output


# The API socket --------------------------------------------------------------------------------------------------


def test_api_socket_in_use(ticking: Vmm) -> None:
    refused(1, str(ticking.api), "already in use", arguments=("--api-socket", str(ticking.api)))
    assert ticking.ask("ping")["pid"] == ticking.process.pid


def test_stale_api_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "vmm.api"))
    with Vmm(tmp_path) as vmm:
        vmm.wait_api()
        assert vmm.ask("ping")["pid"] == vmm.process.pid


def test_api_path_that_is_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    refused(1, f"--api-socket {path}", "not a socket", arguments=("--api-socket", str(path)))
    assert path.read_text() == "precious"


def test_api_path_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none" / "api"
    refused(1, f"--api-socket {path}", "No such file", arguments=("--api-socket", str(path)))


# Requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    ["", "{", "null{", '{"payload":', b"\xff\xfe", "[" * 100000],
    ids=["nothing", "cut", "trailing", "cut later", "no text", "too deep"],
)
def test_malformed_json(vmm: Vmm, body: str | bytes) -> None:
    status, said = ask(vmm, "PUT", "vm.create", body)
    assert status == 400 and "JSON" in " ".join(said), said
    assert ask(vmm, "PUT", "vm.create", config())[0] == 204


@pytest.mark.parametrize("body", ["null", "[]", '"text"', "7"])
def test_json_that_is_no_config(vmm: Vmm, body: str) -> None:
    assert ask(vmm, "PUT", "vm.create", body)[0] == 400


def test_body_where_none_belongs(ticking: Vmm) -> None:
    for name in ("vm.pause", "vm.shutdown", "vm.delete", "vmm.shutdown", "vm.reboot"):
        status, said = ask(ticking, "PUT", name, "{}")
        assert status == 400 and f"{name}: takes no request body" in said, said


def test_body_that_is_too_large(vmm: Vmm) -> None:
    status, said = ask(vmm, "PUT", "vm.create", b" " * (5 << 20))
    assert status == 400 and "larger than" in said[1]


def test_unknown_request_and_wrong_method(vmm: Vmm) -> None:
    assert ask(vmm, "PUT", "vm.dance")[0] == 404
    status, said = ask(vmm, "GET", "vm.boot")
    assert status == 400 and "GET" in said[1]


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"colour": "blue"}, 400, "colour"),
        ({"memory": {"size": 0}}, 400, "memory.size"),
        ({"memory": {"size": "1G"}}, 400, "size"),
        ({"cpus": {"boot_vcpus": 0, "max_vcpus": 0}}, 400, "boot_vcpus"),
        ({"payload": {}}, 400, "kernel"),
        ({"disks": [{"path": "a", "id": "data"}, {"path": "b", "id": "data"}]}, 409, "Identifier data is not unique"),
    ],
    ids=["unknown key", "memory size 0", "size as text", "boot 0", "no kernel", "same id twice"],
)
def test_config_that_makes_no_sense(vmm: Vmm, changes: dict[str, Any], status: int, word: str) -> None:
    answered, said = ask(vmm, "PUT", "vm.create", config(**changes))
    assert answered == status and word in " ".join(said), said
    assert ask(vmm, "GET", "vm.info")[0] == 404


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"payload": {"kernel": "/nowhere/vmlinux"}}, "/nowhere/vmlinux"),
        ({"disks": [{"path": "/nowhere/disk.raw"}]}, "/nowhere/disk.raw"),
        ({"disks": [{"path": "/"}]}, "directory"),
        ({"payload": {"kernel": "/dev/null"}}, "/dev/null"),
    ],
    ids=["missing kernel", "missing disk", "directory as disk", "device as kernel"],
)
def test_boot_that_fails_can_be_tried_again(vmm: Vmm, changes: dict[str, Any], word: str) -> None:
    assert ask(vmm, "PUT", "vm.create", config(**changes))[0] == 204
    status, said = ask(vmm, "PUT", "vm.boot")
    assert status == 500 and word in " ".join(said), said
    assert ask(vmm, "PUT", "vm.delete")[0] == 204
    assert ask(vmm, "PUT", "vm.create", config())[0] == 204
    assert ask(vmm, "PUT", "vm.boot")[0] == 204
    vmm.expect("tick 1 ")


def test_vm_created_twice(ticking: Vmm) -> None:
    status, said = ask(ticking, "PUT", "vm.create", config())
    assert status == 500 and "VM is already created" in said[1]


def test_vm_booted_twice(ticking: Vmm) -> None:
    status, said = ask(ticking, "PUT", "vm.boot")
    assert status == 500 and "Running" in said[1]


def test_requests_without_a_vm(vmm: Vmm) -> None:
    for name in ("vm.boot", "vm.pause", "vm.resume", "vm.shutdown", "vm.reboot", "vm.power-button"):
        assert ask(vmm, "PUT", name)[0] in (404, 500), name
    assert ask(vmm, "PUT", "vm.cancel-migration")[0] == 500


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
        source.expect("tick 1 ")
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


def test_a_running_vm_is_never_harmed(ticking: Vmm, tmp_path: Path) -> None:
    """Everything at once, against a guest that must not miss it."""
    for method, name, body in [
        ("PUT", "vm.create", "{"), ("PUT", "vm.create", config()), ("PUT", "vm.boot", None), ("PUT", "vm.resume", None),
        ("PUT", "vm.delete", "{}"), ("GET", "vm.delete", None), ("PUT", "vm.cancel-migration", None),
        ("PUT", "vm.send-migration", "{}"), ("PUT", "vm.receive-migration", '{"receiver_url":"unix:/nowhere/x"}'),
        ("PUT", "vm.dance", None), ("PUT", "vm.send-migration", '{"destination_url":"unix:/nowhere/x","local":true}'),
    ]:  # fmt: skip
        assert ask(ticking, method, name, body)[0] >= 400, name
    with connect(ticking.api) as raw:  # type: ignore[arg-type]
        raw.sendall(b"\x00\xff garbage\r\n\r\n")
        raw.recv(65536)
    goes_on(ticking)
