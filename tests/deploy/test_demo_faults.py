"""The fault example without its VM: commands, the echo that verifies, the table, what may be asked for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chaos.main import parse_argv
from chaos.verify import Lost, run_command
from deploy import floors
from deploy.demo import __main__ as demo
from deploy.demo import display, vmm
from deploy.demo import example_faults as example
from deploy.demo.echo import BLOCK, Echo
from deploy.lab.debian import DebianError
from shared.faults import Process

SECONDS = 30.0


def words(command: str) -> list[str]:
    return command.replace("\\\n", "").replace('"', "").split()


# ---- commands -------------------------------------------------------------------------------------------------


def test_every_kind_of_process_is_struck_but_the_one_that_is_there_for_migrations_alone() -> None:
    assert set(example.PROCESSES) == set(Process) - {Process.MIGRATION}
    assert [(strikes.fault, strikes.count) for strikes in example.STRIKES] == [("kill", 20), ("stop", 5)]


def test_vmm_may_be_struck_and_has_a_disk_and_a_card_to_load() -> None:
    command = words(example.vmm())
    assert "--allow-fault-injection" in command
    assert f"path={example.LOADED}" in command
    assert f"ip={example.HOST}" in command


@pytest.mark.parametrize("process", example.PROCESSES)
def test_campaign_is_one_that_flotilla_chaos_takes(process: str) -> None:
    (strikes, _) = example.STRIKES
    command = example.chaos(process, strikes, "/out/console", "/out/kill.json").replace("\\\n", "")
    head, _, verify = command.partition('"')
    options = parse_argv([*head.split()[2:], verify.rstrip('"')])
    assert (options.count, options.minutes, options.kinds, options.processes) == (20, None, ("kill",), (process,))
    assert options.verify_command == ["test -r /out/console && ! grep -aq '^fio: BAD' /out/console"]


def test_campaign_without_the_consoles_file_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    console = tmp_path / "console"
    command = example.chaos("blk", example.STRIKES[0], str(console), "/out/kill.json").partition('"')[2].rstrip('"')
    with pytest.raises(Lost):
        run_command(command)
    console.write_text("fio: ok 1\n")
    run_command(command)
    console.write_text("fio: ok 1\nfio: BAD pass 2\n")
    with pytest.raises(Lost):
        run_command(command)


# ---- the echo -------------------------------------------------------------------------------------------------


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                answer(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def return_all(peer: socket.socket) -> None:
    while data := peer.recv(BLOCK):
        peer.sendall(data)


def change_one(peer: socket.socket) -> None:
    """Byte 100 of the second block."""
    at = 0
    while data := bytearray(peer.recv(BLOCK)):
        if at <= BLOCK + 100 < at + len(data):
            data[BLOCK + 100 - at] ^= 1
        at += len(data)
        peer.sendall(data)


def hang_up(peer: socket.socket) -> None:
    peer.recv(BLOCK, socket.MSG_WAITALL)


def test_echo_counts_what_came_back() -> None:
    with server(return_all) as port, closing(Echo("127.0.0.1", port, 1)) as echo:
        vmm.await_true("three blocks", SECONDS, lambda: echo.verified >= 3 * BLOCK)
        echo.close()
    assert echo.failure == ""
    assert echo.verified % BLOCK == 0


def test_echo_names_the_byte_that_came_back_wrong() -> None:
    with server(change_one) as port, closing(Echo("127.0.0.1", port, 1)) as echo:
        vmm.await_true("failure", SECONDS, lambda: bool(echo.failure))
        echo.close()
    assert echo.failure.startswith(f"byte {BLOCK + 100} came back as ")
    assert echo.verified == BLOCK


def test_echo_takes_a_lost_connection_for_a_failure() -> None:
    with server(hang_up) as port, closing(Echo("127.0.0.1", port, 1)) as echo:
        vmm.await_true("failure", SECONDS, lambda: bool(echo.failure))
    assert "after 0 bytes" in echo.failure


# ---- where it runs, and what it says --------------------------------------------------------------------------


def test_fault_example_always_runs_in_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "kvm_runs_linux", lambda: True)
    monkeypatch.setattr(floors, "lab_missing", lambda: "")
    assert demo.choose(no_lab=False, name="faults")[0] == "lab"
    with pytest.raises(DebianError, match="the faults example needs a host machine of its own: leave out --no-lab"):
        demo.choose(no_lab=True, name="faults")


def test_processes_can_be_chosen() -> None:
    assert demo.parse(["faults"]).processes == list(example.PROCESSES)
    assert demo.parse(["faults", "--processes", "blk,net"]).processes == ["blk", "net"]


def test_unknown_process_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.parse(["faults", "--processes", "blk,gpu"])
    assert "--processes: unknown: gpu; there are: vcpu, blk," in capsys.readouterr().err


def run(process: str, ok: bool = True) -> dict[str, Any]:
    strikes = [
        {"fault": "kill", "injected": 20, "recovered": 20, "median_stall_ms": 41.2, "worst_stall_ms": 99.0},
        {"fault": "stop", "injected": 5, "recovered": 5, "median_stall_ms": None, "worst_stall_ms": None},
    ]
    figures = {"fio_passes": 17, "net_bytes": 3 << 20, "lost": int(not ok), "guest_errors": 0}
    return {"ok": ok, "failure": "" if ok else "blk: fio", "process": process, "strikes": strikes, **figures}


def test_summary_has_a_table_of_all_runs() -> None:
    report = demo.summed([run("vcpu"), run("blk")])
    assert (report["ok"], report["lost"], report["guest_errors"]) == (True, 0, 0)
    lines = display.summary(report)
    assert [line.split() for line in lines[2:4]] == [
        ["vcpu", "kill", "20", "20", "41", "99"], ["vcpu", "stop", "5", "5", "-", "-", "17", "3.0", "0"]
    ]  # fmt: skip
    assert lines[-1].strip() == "0 lost, 0 errors in the guest"


def test_summary_of_a_failure_has_the_table_up_to_there() -> None:
    report = demo.summed([run("vcpu"), run("blk", ok=False)])
    assert (report["ok"], report["lost"]) == (False, 1)
    lines = display.summary(report)
    assert lines[-1] == "FAILED: blk: fio"
    assert len(lines) == 6
