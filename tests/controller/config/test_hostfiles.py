"""controller.config.hostfiles: files that a VM needs, checked with real files."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from controller.config.hostfiles import check_files, detect_image_types, missing_files
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    DiskConfig,
    DiskLock,
    ImageType,
    NetConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from shared.errors import ConfigError, HostError
from shared.records import replace


@pytest.fixture
def base(tmp_path: Path) -> VmConfig:
    for name in ("kernel", "initrd", "disk"):
        (tmp_path / name).write_bytes(b"\0" * 4096)
    return VmConfig(
        payload=PayloadConfig(str(tmp_path / "kernel"), None, str(tmp_path / "initrd")),
        disks=(DiskConfig(str(tmp_path / "disk")),),
    )


def refusal(config: VmConfig) -> str:
    with pytest.raises(HostError) as caught:
        check_files(config)
    assert not isinstance(caught.value, ConfigError)
    return str(caught.value)


def with_disk(base: VmConfig, **changes: Any) -> VmConfig:
    return replace(base, disks=(replace(base.disks[0], **changes),))


def test_files_that_are_there_pass(base: VmConfig, tmp_path: Path) -> None:
    check_files(base)
    check_files(with_disk(base, readonly=True))
    check_files(with_disk(base, path=None, vhost_user=True, vhost_socket="/nowhere"))
    check_files(replace(base, serial=SerialConfig(ConsoleMode.FILE, str(tmp_path / "new.log"))))


def test_nothing_is_created_or_changed(base: VmConfig, tmp_path: Path) -> None:
    before = {path: path.stat() for path in tmp_path.iterdir()}
    (tmp_path / "old.log").write_text("kept")
    check_files(replace(base, serial=SerialConfig(ConsoleMode.FILE, str(tmp_path / "old.log"))))
    check_files(replace(base, console=ConsoleConfig(ConsoleMode.SOCKET, None, str(tmp_path / "sock"))))
    assert {path.name for path in tmp_path.iterdir()} == {"kernel", "initrd", "disk", "old.log"}
    assert (tmp_path / "old.log").read_text() == "kept"
    assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in before.items())


@pytest.mark.parametrize("flag", ["--kernel", "--initramfs"])
@pytest.mark.parametrize(
    ("what", "message"), [("none", "No such file"), ("dir", "this is a directory"), ("pipe", "pipe")]
)
def test_bad_payloads_are_named(base: VmConfig, tmp_path: Path, flag: str, what: str, message: str) -> None:
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / what)
    field = flag.removeprefix("--")
    text = refusal(replace(base, payload=replace(base.payload, **{field: path})))
    assert text.startswith(f"{flag} {path}: ") and message in text


@pytest.mark.parametrize(
    ("what", "message"),
    [("none", "No such file"), ("dir", "this is a directory"), ("pipe", "this is a named pipe")],
)
def test_bad_disks_are_named(base: VmConfig, tmp_path: Path, what: str, message: str) -> None:
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    text = refusal(with_disk(base, path=str(tmp_path / what)))
    assert text.startswith(f"--disk path={tmp_path}/{what}: ") and message in text


def test_a_character_device_is_no_disk(base: VmConfig) -> None:
    assert refusal(with_disk(base, path="/dev/null")).startswith(
        "--disk path=/dev/null: this is a character device"
    )


def test_a_relative_path_says_from_where(
    base: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(with_disk(base, path="none.raw")).endswith(f"(looked for from {tmp_path})")


@pytest.fixture
def unprivileged() -> Any:
    """Permissions count for everybody but root: give up root's exemption for the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def reachable(tmp_path: Path) -> None:
    """Let the unprivileged user walk down to the test's folder."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)


def test_an_unreadable_kernel_is_named(
    base: VmConfig, reachable: None, unprivileged: None, tmp_path: Path
) -> None:
    text = unreadable(base, tmp_path / "kernel")
    assert text == f"--kernel {tmp_path}/kernel: Permission denied"


def test_an_unreadable_disk_is_named(
    base: VmConfig, reachable: None, unprivileged: None, tmp_path: Path
) -> None:
    text = unreadable(base, tmp_path / "disk")
    assert text.startswith(f"--disk path={tmp_path}/disk: Permission denied (readonly=on")


def unreadable(base: VmConfig, path: Path) -> str:
    user = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(0)
    os.seteuid(user)
    return refusal(base)


def test_the_same_image_twice_for_writing_is_refused(base: VmConfig, tmp_path: Path) -> None:
    os.link(tmp_path / "disk", tmp_path / "alias")
    disk, alias = base.disks[0], DiskConfig(str(tmp_path / "alias"))
    text = refusal(replace(base, disks=(disk, alias)))
    assert f"{tmp_path}/alias" in text and f"{tmp_path}/disk" in text
    check_files(replace(base, disks=(disk, replace(alias, readonly=True))))
    check_files(replace(base, disks=(disk, replace(alias, lock=DiskLock.SHARED))))


@pytest.mark.parametrize(("src", "message"), [("/nowhere", "No such file"), ("/", "this is a directory")])
def test_a_bad_entropy_source_is_named(base: VmConfig, src: str, message: str) -> None:
    text = refusal(replace(base, rng=RngConfig(src)))
    assert text.startswith(f"--rng src={src}: ") and message in text


def test_bad_console_files_are_named(base: VmConfig, tmp_path: Path) -> None:
    missing = SerialConfig(ConsoleMode.FILE, str(tmp_path / "none" / "log"))
    assert f"--serial file={tmp_path}/none/log: its folder" in refusal(replace(base, serial=missing))
    folder = ConsoleConfig(ConsoleMode.FILE, str(tmp_path))
    assert refusal(replace(base, console=folder)) == f"--console file={tmp_path}: this is a directory"
    through = SerialConfig(ConsoleMode.FILE, str(tmp_path / "disk" / "log"))
    assert "disk is a regular file" in refusal(replace(base, serial=through))


def test_a_socket_replaces_a_socket_and_nothing_else(base: VmConfig, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    check_files(replace(base, serial=SerialConfig(ConsoleMode.SOCKET, None, str(stale))))
    stale.unlink()
    text = refusal(replace(base, serial=SerialConfig(ConsoleMode.SOCKET, None, str(tmp_path / "disk"))))
    assert text.startswith(f"--serial socket={tmp_path}/disk: this is a regular file")


def test_an_image_of_unknown_type_is_found_to_be_raw(base: VmConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("disk", "empty"):
        found = detect_image_types(with_disk(base, path=str(tmp_path / name)))
        assert found.disks[0].image_type is ImageType.RAW


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"QFI\xfb" + b"\0" * 508, "Qcow2"),
        (b"vhdxfile" + b"\0" * 504, "Vhdx"),
        (b"\0" * 512 + b"conectix" + b"\0" * 504, "FixedVhd"),
    ],
)
def test_other_image_formats_are_recognised_and_refused(
    base: VmConfig, tmp_path: Path, content: bytes, kind: str
) -> None:
    (tmp_path / "disk").write_bytes(content)
    with pytest.raises(HostError, match=f"this is a {kind} image"):
        detect_image_types(base)
    raw = with_disk(base, image_type=ImageType.RAW)
    assert detect_image_types(raw) == raw


def test_vhost_user_disks_have_no_image_to_look_at(base: VmConfig) -> None:
    config = with_disk(base, path=None, vhost_user=True, vhost_socket="/s")
    assert detect_image_types(config) == config


def test_all_that_an_arriving_vm_lacks_is_found_at_once(base: VmConfig, tmp_path: Path) -> None:
    """But for its images, which are compared with the source's."""
    (tmp_path / "kernel").unlink()
    config = replace(
        with_disk(base, path=str(tmp_path / "none")),
        rng=RngConfig(str(tmp_path)),
        console=ConsoleConfig(ConsoleMode.FILE, str(tmp_path / "none" / "log")),
    )
    kernel, rng, console = map(str, missing_files(config))
    assert kernel.startswith("--kernel ") and "this is a directory" in rng and "--console file=" in console


def test_back_end_of_an_arriving_vm_is_looked_for_and_not_disturbed(base: VmConfig, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    config = replace(
        with_disk(base, path=None, vhost_user=True, vhost_socket=path),
        net=(NetConfig(vhost_user=True, vhost_socket=str(tmp_path / "disk")),),
    )
    disk, net = map(str, missing_files(config))
    assert disk == f"--disk socket={path}: No such file or directory"
    assert net.startswith(f"--net socket={tmp_path}/disk: this is a regular file")
    with socket.socket(socket.AF_UNIX) as back_end:
        back_end.bind(path)
        back_end.listen()
        back_end.setblocking(False)
        assert missing_files(replace(config, net=())) == []
        with pytest.raises(BlockingIOError):
            back_end.accept()
    os.unlink(path)
