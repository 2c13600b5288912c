"""Bad input on the command line and at the API, through the real program (test_bad_peers.py: of a migration).

Each is refused with Cloud Hypervisor's class of status or exit code and a message that names the thing at fault; the
guest that runs meanwhile goes on, and what failed can be tried again.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.probe.requests import SECONDS, ask, config, goes_on
from tests.vmm import PROGRAM, Vmm, environment, probe

pytestmark = pytest.mark.probe

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


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


@pytest.mark.parametrize("flag", ["--cpus", "--memory", "--disk", "--net", "--serial", "--console", "--rng"])
def test_unknown_key(flag: str) -> None:
    refused(1, f"Error parsing {flag}", "colour", arguments=("--kernel", probe(), flag, "colour=blue"))


def test_unknown_flag() -> None:
    refused(2, "--colour", arguments=machine("--colour", "blue"))


def test_flag_of_cloud_hypervisor_that_is_not_there_yet() -> None:
    refused(2, "--vsock is not available yet", arguments=machine("--vsock", "cid=3,socket=/s"))


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
    vmm.expect("tick [01] ")


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


def test_a_running_vm_is_never_harmed(ticking: Vmm, tmp_path: Path) -> None:
    """Everything at once, against a guest that must not miss it."""
    for method, name, body in [
        ("PUT", "vm.create", "{"), ("PUT", "vm.create", config()), ("PUT", "vm.boot", None), ("PUT", "vm.resume", None),
        ("PUT", "vm.delete", "{}"), ("GET", "vm.delete", None), ("PUT", "vm.cancel-migration", None),
        ("PUT", "vm.send-migration", "{}"), ("PUT", "vm.receive-migration", '{"receiver_url":"unix:/nowhere/x"}'),
        ("PUT", "vm.dance", None), ("PUT", "vm.send-migration", '{"destination_url":"unix:/nowhere/x","local":true}'),
    ]:  # fmt: skip
        assert ask(ticking, method, name, body)[0] >= 400, name
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(SECONDS)
        raw.connect(str(ticking.api))
        raw.sendall(b"\x00\xff garbage\r\n\r\n")
        raw.recv(65536)
    goes_on(ticking)
