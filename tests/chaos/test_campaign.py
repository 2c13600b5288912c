"""Campaigns against a VMM that says what a test wants: how each ends, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.main import main
from guest.pattern import Sector, encode
from tests.ch_remote.server import NO_CONTENT, Server, reply

REFUSAL = "500 Internal Server Error"


class Vmm(Server):
    """One disk, whose process is another one after each fault. `refuses`: by name of the request, what it says then;
    `calls`: how many there were of each."""

    def __init__(self, path: Path) -> None:
        self.calls: dict[str, int] = {}
        self.refuses: dict[str, str] = {}
        self.pid = 100
        self.image = path.parent / "disk.raw"
        self.image.write_bytes(encode(Sector(0, 5, 1)))
        super().__init__(path)
        self.close_after = True
        self.handler = lambda head, _: self._answer(head.split()[1].rpartition("/")[2])

    def _answer(self, name: str) -> bytes:
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in self.refuses:
            return reply(json.dumps(["failed", self.refuses[name]]).encode(), REFUSAL)
        if name == "vm.info":
            return reply(b'{"state": "Running"}')
        if name == "vmm.fleet":
            row = {"kind": "blk", "device": "_disk0", "pid": self.pid, "state": "running"}
            return reply(json.dumps([row]).encode())
        if name == "vmm.fault-inject":
            self.pid += 1
            return reply(json.dumps({"pid": self.pid - 1}).encode())
        self.change(name)
        return NO_CONTENT

    def change(self, name: str) -> None:
        """What happens to the image at vm.pause and vm.resume."""


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Vmm]:
    server = Vmm(tmp_path / "api")
    yield server
    server.close()


def campaign(vmm: Vmm, *words: str) -> int:
    return main([
        "--api-socket", str(vmm.path), "--kinds", "kill", "--rate", "1000", "--count", "2", "--verify", str(vmm.image),
        "--verify-every", "1", "--report", str(vmm.path.parent / "report"), *words,
    ])  # fmt: skip


def told(vmm: Vmm) -> tuple[str, str, int]:
    """Outcome, why, how many processes came back: the report's."""
    report = json.loads((vmm.path.parent / "report").read_text())
    return report["outcome"], report["why"], report["rows"][0]["recovered"]


def test_campaign_that_loses_nothing(vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign(vmm) == 0
    assert told(vmm) == ("ok", None, 2)
    assert "ok; verified 2 times" in capsys.readouterr().out


@pytest.mark.parametrize(("every", "looks"), [("1", 2), ("2", 1), ("3", 1)])
def test_what_was_verified_after_the_last_fault_is_not_verified_again(vmm: Vmm, every: str, looks: int) -> None:
    assert campaign(vmm, "--verify-every", every) == 0
    assert vmm.calls["vm.pause"] == vmm.calls["vm.resume"] == looks


def test_image_that_can_not_be_read_any_more_ends_it_with_table_and_report(
    vmm: Vmm, capsys: pytest.CaptureFixture[str]
) -> None:
    vmm.change = lambda name: vmm.image.unlink() if name == "vm.pause" else None  # type: ignore[method-assign]
    assert campaign(vmm) == 1
    assert told(vmm) == ("the campaign failed", f"--verify {vmm.image}: No such file or directory", 1)
    out = capsys.readouterr().out
    assert "blk      1         1" in out and "the campaign failed: --verify" in out
    assert vmm.calls["vm.resume"] == 1


def test_vm_that_refuses_to_go_on_ends_it_with_the_reason(vmm: Vmm) -> None:
    vmm.refuses["vm.resume"] = "the guest is stuck"
    assert campaign(vmm) == 1
    assert told(vmm) == ("the campaign failed", "the guest is stuck", 1)


def test_lost_data_is_told_also_when_the_vm_refuses_to_go_on(vmm: Vmm) -> None:
    vmm.refuses["vm.resume"] = "the guest is stuck"
    vmm.image.write_bytes(encode(Sector(1, 5, 1)))
    assert campaign(vmm) == 1
    assert told(vmm) == ("data lost", f"{vmm.image}: sector 0 holds sector 1", 1)


def test_fault_that_is_refused_at_once_is_one_line(vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    vmm.refuses["vmm.fault-inject"] = "no --allow-fault-injection"
    assert campaign(vmm) == 1
    assert capsys.readouterr() == ("", "flotilla chaos: no --allow-fault-injection\n")


def test_report_on_a_full_disk_is_one_line_after_the_table(vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign(vmm, "--report", "/dev/full") == 1
    out, err = capsys.readouterr()
    assert "ok; verified 2 times" in out
    assert err == "flotilla chaos: --report /dev/full: No space left on device\n"
