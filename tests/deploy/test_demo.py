"""The demo without a guest: its terminals, its commands, what it shows and reports, where it chooses to run."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy import floors, install
from deploy.demo import __main__ as demo
from deploy.demo import display, example, inside, vmm
from deploy.demo.play import PRESSES, Play
from deploy.demo.report import DemoError, Events, Hop, Report
from deploy.demo.terminal import Terminal, plain
from deploy.lab.debian import DebianError

FLEET = [
    {"kind": "blk", "device": "_disk0", "pid": 12, "state": "running", "restarts": 0, "pss_kib": 2048},
    {"kind": "vcpu", "device": "vcpu0", "pid": 11, "state": "running", "restarts": 0, "pss_kib": 0},
]
DONE: dict[str, Any] = {"event": "hop", "hop": 1, "downtime_ms": 21.4, "total_ms": 300.0, "ram_stayed": True}
DONE["bytes_transferred"] = 21131
REPORT: dict[str, Any] = {
    "ok": True, "downtime_ms": 21.4, "total_ms": 300.0, "equal": 12, "not_equal": 0, "source_exit": 0,
    "destination_exit": 0, "boot_id": ["b", "b"], "uptime_s": [10.0, 20.0], "processes": FLEET,
}  # fmt: skip
EVENTS: list[dict[str, Any]] = [
    {"event": "start"},
    {"event": "step", "text": "the source VMM boots Debian"},
    {"event": "command", "name": "vmm1", "text": "cloud-hypervisor \\\n    --kernel ~/workloads/vmlinux"},
    {"event": "console", "name": "vmm1", "line": "equal"},
    {"event": "fleet", "name": "vmm1", "rows": FLEET},
    {"event": "migration", "hop": 1, "phase": "building", "total_ms": 3.0},
    DONE,
    {"event": "report", "report": REPORT},
]


def stream(events: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_terminal(command: str, seen: list[str] | None = None) -> Terminal:
        lines = [] if seen is None else seen
        opened.append(Terminal(f"t{len(opened)}", command, tmp_path, lambda _, line: lines.append(line)))
        return opened[-1]

    yield open_terminal
    for terminal in opened:
        terminal.close()


# ---- terminals ------------------------------------------------------------------------------------------------


def test_command_runs_at_home_on_a_terminal_and_its_stderr_stays_apart(terminals: Any) -> None:
    terminal = terminals("test -t 0 && test -t 1 && pwd; echo no >&2; exit 3")
    assert terminal.await_end(20) == 3
    assert [line for _, line in terminal.lines] == [str(Path.home())]
    assert "stderr:\nno" in terminal.tail()


def test_lone_program_has_the_pid_of_its_terminal(terminals: Any) -> None:
    terminal = terminals("sleep 100")
    vmm.await_true("sleep", 20, lambda: Path(f"/proc/{terminal.pid}/comm").read_text() == "sleep\n")


def test_typed_text_is_answered_and_its_echo_does_not_count(terminals: Any) -> None:
    terminal = terminals("cat")
    terminal.type("equal\n")
    terminal.await_lines("equal", 2, 20)  # the terminal's echo, and cat's
    since = terminal.mark()
    terminal.type("again\n")
    assert terminal.await_match("again\r\nagain", 20, "answer", since).start() >= since
    terminal.type("\x04")
    assert terminal.expect_end(20) == 0


def test_wait_ends_at_once_when_the_program_does(terminals: Any) -> None:
    with pytest.raises(DemoError, match=r"no prompt: its program has ended(.|\n)*sorry"):
        terminals("echo sorry").await_match("never", 60, "prompt")


def test_wait_ends_at_its_limit_with_what_was_seen(terminals: Any) -> None:
    terminal = terminals("echo hello; sleep 100")
    terminal.await_match("hello", 20, "greeting")
    with pytest.raises(DemoError, match=r"not within 0 s(.|\n)*hello"):
        terminal.await_match("never", 0.01, "prompt")
    with pytest.raises(DemoError, match="0 lines 'equal' instead of 3"):
        terminal.await_lines("equal", 3, 0.01)
    with pytest.raises(DemoError, match="still runs"):
        terminal.await_end(0.01)


class Loop(Play):
    """A shell that takes no notice of the first Ctrl-C, as bash does not when its loop's command has just ended."""

    def play(self) -> None:
        loop = "while [ ${#heard} -lt 2 ]; do sleep 0.05; done"
        shell = self.type("shell", f"trap 'heard=x$heard' INT; echo loop; {loop}; read line; eval \"$line\"")
        shell.await_match("loop", 20, "loop")
        self.interrupt(partial(shell.type, "\x03"), partial(self.which_boot, shell), 60)


@pytest.mark.timeout(120)
def test_ctrl_c_that_a_shell_did_not_hear_is_pressed_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path, Events(None), Report(), "shell")
    loop.run()
    assert loop.report.ok and len(loop.report.boot_id) == 1


def test_shell_that_never_hears_a_ctrl_c_is_told(tmp_path: Path, terminals: Any) -> None:
    deaf = terminals("trap '' INT; echo loop; while sleep 0.05; do :; done")
    deaf.await_match("loop", 20, "loop")
    loop = Loop(tmp_path, Events(None), Report(), "shell")

    def press() -> None:
        """The next one would empty the terminal of an echo that nobody has fetched yet."""
        since = deaf.mark()
        deaf.type("\x03")
        deaf.await_match(r"\^C", 20, "echo", since)

    with pytest.raises(DemoError, match="no answer to the typed command: not within"):
        loop.interrupt(press, partial(loop.which_boot, deaf), 0.2)
    assert deaf.text().count("^C") == PRESSES


def test_exit_code_that_is_not_0_is_an_error_with_the_command(terminals: Any) -> None:
    with pytest.raises(DemoError, match=r"t0 ends with 4: echo why >&2; exit 4(.|\n)*why"):
        terminals("echo why >&2; exit 4").expect_end(20)


def test_lines_are_shown_without_control_characters(terminals: Any) -> None:
    seen: list[str] = []
    terminal = terminals(r"printf '\033[?2004hroot@focal:~# \033[1mls\033[0m\r\n'", seen)
    terminal.await_end(20)
    assert seen == ["root@focal:~# ls"]
    assert plain("\x1b(Ba\x07b") == "ab"


# ---- commands -------------------------------------------------------------------------------------------------


def test_commands_are_those_of_the_document() -> None:
    with_one_disk = example.Example(disks=1).source()
    assert with_one_disk.replace("\\\n", "").split() == [
        "cloud-hypervisor", "--kernel", "~/workloads/vmlinux", "--disk", "path=~/workloads/focal.raw",
        "--cpus", "boot=1", "--memory", "size=1G,shared=on", "--cmdline", '"root=/dev/vda1', 'console=ttyS0"',
        "--serial", "tty", "--console", "off", "--api-socket=/tmp/api1",
    ]  # fmt: skip
    assert example.destination(2) == "cloud-hypervisor --api-socket=/tmp/api2"
    assert example.receive(2) == "ch-remote --api-socket=/tmp/api2 receive-migration unix:/tmp/sock"
    assert example.send(1) == "ch-remote --api-socket=/tmp/api1 send-migration --local unix:/tmp/sock"


def test_defaults_of_inside_are_the_document_with_a_second_disk() -> None:
    options = inside.parse([])
    assert (options.cpus, options.memory, options.disks, options.hops) == (1, "1G,shared=on", 2, 1)
    assert options.cmdline == "root=/dev/vda1 console=ttyS0"


def test_failed_example_says_why_and_leaves_a_report(tmp_path: Path) -> None:
    """With no cloud-hypervisor in PATH the first command fails, and that is what is reported."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OUT": str(tmp_path)}
    environment["EVENTS"] = str(tmp_path / "events")
    environment["PYTHONPATH"] = str(install.CHECKOUT)
    words = ["/usr/bin/python3", "-m", "deploy.demo.inside"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "vmm1: no shell prompt of the guest: its program has ended" in done.stderr
    assert "cloud-hypervisor: command not found" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["ok"]
    assert report["failure"].startswith("vmm1: no shell prompt")
    assert report["source_exit"] is None
    events = [json.loads(line)["event"] for line in (tmp_path / "events").read_text().splitlines()]
    assert events == ["start", "step", "command", "failure", "report"]


# ---- report ---------------------------------------------------------------------------------------------------


def test_report_sums_up_the_worst_of_all_hops() -> None:
    report = Report(hops=[Hop(1, 10.0, 100.0, source_exit=0), Hop(2, 30.0, 90.0, source_exit=7), Hop(3)])
    report.sum_up()
    assert (report.downtime_ms, report.total_ms, report.source_exit) == (30.0, 100.0, 7)


def test_report_without_a_hop_has_no_figures() -> None:
    report = Report()
    report.sum_up()
    assert (report.downtime_ms, report.total_ms, report.source_exit) == (None, None, None)


def test_events_are_whole_lines(tmp_path: Path) -> None:
    events = Events(str(tmp_path / "events"))
    events.emit("console", name="vmm1", line="x\ny")
    events.emit("start")
    read = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert read == [{"event": "console", "name": "vmm1", "line": "x\ny"}, {"event": "start"}]
    events.close()


def test_events_to_nowhere_are_no_error() -> None:
    Events(None).emit("start")


# ---- display --------------------------------------------------------------------------------------------------


def test_plain_lines_tell_everything() -> None:
    out = io.StringIO()
    feed = display.Feed(display.Lines(out))
    data = stream(EVENTS)
    for at in range(0, len(data), 7):  # in pieces, as ports give them
        feed(data[at : at + 7])
    assert feed.report == REPORT
    said = out.getvalue()
    for text in ("boots Debian", "$ cloud-hypervisor", "vmm1 | equal", "_disk0", "2.0", "hop 1: building"):
        assert text in said
    assert "hop 1: downtime 21 ms, whole migration 300 ms, 21 KiB of state sent, no RAM" in said


def test_picture_has_fleet_console_progress_and_downtime() -> None:
    picture = display.Picture()
    for event in EVENTS:
        picture.show(event)
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(picture.draw())
    said = console.export_text()
    for text in ("the source VMM boots Debian", "_disk0", "PSS MiB", "vmm1  equal", "downtime 21 ms", "--kernel ~/w"):
        assert text in said


def test_another_start_forgets_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    picture = display.Picture()
    feed = display.Feed(picture)
    feed(stream([*EVENTS, {"event": "failure", "text": "why"}, {"event": "start"}]))
    assert feed.report is None
    assert feed.failure == ""
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(picture.draw())
    assert "_disk0" not in console.export_text()


def test_pipe_gets_plain_lines() -> None:
    assert isinstance(display.display(io.StringIO()), display.Lines)


def test_summary_has_the_figures_or_the_failure() -> None:
    text = "\n".join(display.summary(REPORT))
    assert "21 ms" in text
    assert "12 times equal, 0 times not equal" in text
    assert display.summary({"ok": False, "failure": "no room"}) == ["FAILED: no room"]


# ---- where it runs --------------------------------------------------------------------------------------------


def test_hardware_kvm_is_used_and_software_kvm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "kvm_runs_linux", lambda: True)
    assert demo.choose(no_lab=True)[0] == "host"
    monkeypatch.setattr(floors, "kvm_runs_linux", lambda: False)
    monkeypatch.setattr(floors, "lab_missing", lambda: "")
    monkeypatch.setattr(floors, "kvm_missing", lambda: "")
    where, why = demo.choose(no_lab=False)
    assert where == "lab"
    assert "software KVM" in why
    monkeypatch.setattr(floors, "kvm_missing", lambda: "/dev/kvm: Permission denied")
    assert demo.choose(no_lab=False)[1].startswith("/dev/kvm: Permission denied, so the lab is started")
    with pytest.raises(DebianError, match="Permission denied"):
        demo.choose(no_lab=True)
    monkeypatch.setattr(floors, "lab_missing", lambda: "debootstrap is missing")
    with pytest.raises(DebianError, match="Permission denied; and the lab can't be started: debootstrap is missing"):
        demo.choose(no_lab=False)


def test_no_lab_where_linux_needs_it_fails_and_reports(tmp_path: Path) -> None:
    if floors.kvm_runs_linux():
        pytest.skip("this host's KVM runs Linux")
    file = tmp_path / "report.json"
    words = ["bash", str(install.CHECKOUT / "deploy" / "demo.sh"), "--no-lab", "--report", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False, env=os.environ)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert json.loads(file.read_text())["ok"] is False
