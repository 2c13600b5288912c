"""The nested example without its VMs: commands, serial port and windows (a bash here), images, what is reported."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import floors
from deploy.demo import __main__ as demo
from deploy.demo import display
from deploy.demo import example_nested as example
from deploy.demo import nested as steps
from deploy.demo.host_vm import HostVm
from deploy.demo.report import DemoError, Events, NestedReport
from deploy.demo.terminal import Terminal
from deploy.lab import __main__ as lab
from deploy.lab import nested
from deploy.lab.debian import DebianError
from deploy.lab.run import Job

SECONDS = 30.0
SHELL = "env -u PROMPT_COMMAND TERM=vt220 PS1='root@vm-1:~# ' bash --norc -i 2>&1"


def words(command: str) -> list[str]:
    return command.replace("\\\n", "").split()


# ---- commands -------------------------------------------------------------------------------------------------


def test_commands_on_the_host_machine_are_those_of_the_document() -> None:
    assert words(example.host(2)) == [
        "cloud-hypervisor", "--serial", "tty", "--console", "off", "--cpus", "boot=1", "--memory", "size=512M",
        "--kernel", "vmlinux", "--cmdline", '"root=/dev/vda1', 'console=ttyS0"',
        "--disk", "path=focal-2.raw", "path=focal-nested.raw", "path=tmp.img", "--net", "ip=192.168.102.1",
    ]  # fmt: skip
    assert "path=tmp.img\\\n" in example.host(1)


def test_commands_inside_are_those_of_the_document() -> None:
    assert words(example.source()) == [
        "sudo", "./cloud-hypervisor", "--serial", "tty", "--console", "off", "--memory", "size=128M",
        "--kernel", "vmlinux", "--cmdline", '"console=ttyS0', 'root=/dev/vda1"', "--disk", "path=/dev/vdb",
        "path=/dev/vdc", "--api-socket=/tmp/api1", "--net", "ip=192.168.100.1",
    ]  # fmt: skip
    assert example.DESTINATION == "sudo ./cloud-hypervisor --api-socket=/tmp/api2"
    assert example.RECEIVE == "sudo ./ch-remote --api-socket=/tmp/api2 receive-migration unix:/tmp/sock2"
    assert example.RECEIVE_RELAY == "sudo socat TCP-LISTEN:6000,reuseaddr UNIX-CLIENT:/tmp/sock2"
    assert example.SEND_RELAY == "sudo socat UNIX-LISTEN:/tmp/sock1,reuseaddr TCP:192.168.102.2:6000"
    assert example.SEND == "sudo ./ch-remote --api-socket=/tmp/api1 send-migration unix:/tmp/sock1"
    assert example.network(1) == [
        "sudo ip addr add 192.168.101.2/24 dev ens4",
        "sudo ip link set up dev ens4",
        "sudo ip r add default via 192.168.101.1",
    ]


# ---- the serial port and its windows --------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostVm]:
    """A host VM whose console is a bash of this machine, with the window script that the images have."""
    shutil.copy(nested.OVERLAY / "root/window", tmp_path)
    (tmp_path / "window").chmod(0o755)
    terminal = Terminal("vm-1", f"WINDOWS={shlex.quote(str(tmp_path))} {SHELL}", tmp_path, lambda *_: None, tmp_path)
    vm = HostVm("vm-1", terminal, Events(None))
    vm.await_prompt(SECONDS)
    yield vm
    terminal.type("exit 0\n")  # an interactive bash ignores SIGTERM
    terminal.await_end(SECONDS)
    terminal.close()


def test_command_tells_what_it_shows_and_how_it_ends(host: HostVm) -> None:
    assert "sum 3" in host.run("echo sum $((1 + 2))", SECONDS)
    with pytest.raises(DemoError, match=r"vm-1: exit code 3: \(exit 3\)"):
        host.run("(exit 3)", SECONDS)


def test_window_shows_its_lines_and_its_end(host: HostVm) -> None:
    host.window("one", "test -t 0 && test -t 1 && echo \\\n'a terminal'; echo disk ended with 9; exit 4")
    host.await_text("one", "a terminal", SECONDS)
    with pytest.raises(DemoError, match="window one ended with 4"):
        host.expect_end("one", SECONDS)


def test_what_is_typed_into_a_window_reaches_its_command_alone(host: HostVm) -> None:
    # A shell takes no notice of a Ctrl-C that comes as `cat` ends: hence the word, and a trap that no `sleep` outlives.
    host.window("one", "stty -echo; cat; trap 'exit 130' INT; echo and now; while sleep 0.1; do :; done")
    host.type("one", "50%s \"it's\" \\ $x\n")
    host.await_lines("one", "50%s \"it's\" \\ $x", 1, SECONDS)
    host.type("one", "\x04")
    host.await_lines("one", "and now", 1, SECONDS)
    host.type("one", "\x03")
    host.await_text("one", "window closes with 130", SECONDS)
    assert "still here" in host.ask("echo still here", SECONDS)


def test_a_window_that_draws_a_bar_closes_on_a_line_of_its_own(host: HostVm) -> None:
    """The bar of a long migration is one line, longer than what a terminal takes at once: another's may cut it."""
    host.window("one", "head -c 9000 /dev/zero | tr '\\0' x; exit 7")
    host.terminal.await_lines("one| window closes with 7", 1, SECONDS)


def test_line_of_a_window_counts_after_the_prompt_too(host: HostVm) -> None:
    host.terminal.type("printf 'root@vm:~# one| not equal\\nroot@vm:~# one| equal\\n'\n")
    host.await_lines("one", "equal", 1, SECONDS)
    with pytest.raises(DemoError, match=r"1 lines 'one\| equal' instead of 2"):
        host.await_lines("one", "equal", 2, 0.01)


def test_answer_in_json_survives_a_window_that_talks_all_the_time(host: HostVm, tmp_path: Path) -> None:
    answer = {"rows": [{"name": "_disk0", "text": "  equal\n" * 50}] * 20}
    (tmp_path / "answer").write_text(json.dumps(answer))
    host.window("one", "trap exit INT; while sleep 0.01; do echo equal; done")
    host.await_lines("one", "equal", 1, SECONDS)
    assert host.json("cat answer", SECONDS) == answer
    host.type("one", "\x03")
    host.await_text("one", r"window closes with \d+", SECONDS)
    assert host.times("one", "equal")
    with pytest.raises(DemoError, match="no JSON from echo no"):
        host.json("echo no", SECONDS)


def test_api_socket_is_asked_without_a_program_of_ours(host: HostVm, tmp_path: Path) -> None:
    answer = tmp_path / "http"
    answer.write_bytes(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + b'{"state": "Running"}')
    listen = f"socat UNIX-LISTEN:{tmp_path}/api SYSTEM:'head -n 1 > asked; cat http'"
    host.window("one", listen)
    # Listening: its name is there earlier, and refuses.
    host.ask(f"until grep -q ' 00010000 .* {tmp_path}/api$' /proc/net/unix; do sleep 0.1; done", SECONDS)
    assert host.api(f"{tmp_path}/api", "vm.info", SECONDS) == {"state": "Running"}
    assert (tmp_path / "asked").read_text().startswith("GET /api/v1/vm.info HTTP/1.0")
    host.expect_end("one", SECONDS)


# ---- images ---------------------------------------------------------------------------------------------------


def test_disk_has_room_for_the_bundle_behind_its_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "BUNDLE_START", 16 << 20)
    monkeypatch.setattr(nested, "BUNDLE_SPACE", 8 << 20)
    tree, disk = tmp_path / "tree", tmp_path / "disk"
    tree.mkdir()
    nested.make_host_disk(disk, tree)
    data = disk.read_bytes()
    entries = [data[at : at + 16] for at in (446, 462)]
    places = [(int.from_bytes(e[8:12], "little") * 512, int.from_bytes(e[12:16], "little") * 512) for e in entries]
    assert places == [(1 << 20, 15 << 20), (16 << 20, 8 << 20)]
    assert len(data) == 24 << 20
    assert data[510:512] == b"\x55\xaa"


def test_host_vm_has_what_the_document_types_and_no_idle_units(tmp_path: Path) -> None:
    for folder in ("root", "etc/systemd/system", "opt"):
        (tmp_path / folder).mkdir(parents=True)
    nested.settle(tmp_path)
    for name in ("cloud-hypervisor", "ch-remote"):
        assert os.readlink(tmp_path / "root" / name) == f"/opt/flotilla/{name}"
    assert (tmp_path / "root/window").stat().st_mode & stat.S_IXUSR
    assert "/dev/vda2" in (tmp_path / "etc/systemd/system/opt-flotilla.mount").read_text()
    assert os.readlink(tmp_path / "etc/systemd/system/systemd-journald.service") == "/dev/null"


def test_key_of_the_disks_follows_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    before = nested.key_disks()
    monkeypatch.setattr(nested, "MASKED", ("some.service",))
    assert nested.key_disks() != before


def test_nested_images_are_built_only_when_asked_for() -> None:
    assert not lab.parse(["build"]).nested
    assert lab.parse(["run", "--nested", "script"]).nested
    assert not Job().nested


# ---- where it runs, and what it says --------------------------------------------------------------------------


def test_nested_example_always_runs_in_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "kvm_runs_linux", lambda: True)
    monkeypatch.setattr(floors, "lab_missing", lambda: "")
    assert demo.choose(no_lab=False, name="nested")[0] == "lab"
    with pytest.raises(DebianError, match="leave out --no-lab"):
        demo.choose(no_lab=True, name="nested")
    monkeypatch.setattr(floors, "lab_missing", lambda: "debootstrap is missing")
    with pytest.raises(DebianError, match="debootstrap is missing"):
        demo.choose(no_lab=False, name="nested")


def test_local_example_is_the_default() -> None:
    assert demo.parse([]).example == "local"
    assert demo.parse(["nested"]).example == "nested"


def test_summary_of_the_nested_example_has_ping_and_exit_codes() -> None:
    report: dict[str, Any] = {
        "ok": True, "downtime_ms": 210.4, "total_ms": 9000.0, "equal": 12, "not_equal": 0, "source_exit": 0,
        "destination_exit": 0, "boot_id": ["b", "b"], "uptime_s": [10.0, 20.0], "processes": [],
        "hosts": [0, 0], "ping": [3, 3], "seconds": {"send_to_source_exit": 31.5},
    }  # fmt: skip
    text = "\n".join(display.summary(report))
    for part in ("it was not restarted", "ping 3 of 3", "poweroff 0 and 0", "32 s from send-migration"):
        assert part in text


def test_failed_example_leaves_a_report_with_both_reports_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without images the first VM can't start."""
    (tmp_path / "nested").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("EVENTS", raising=False)
    assert steps.main([]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failure"].startswith("vm-1: no shell prompt: its program has ended")
    assert set(report) == set(NestedReport.__dataclass_fields__)
    assert {"ping", "hosts", "equal", "downtime_ms", "processes"} <= set(report)
    assert (tmp_path / "nested/tmp.img").stat().st_size == 1 << 20
