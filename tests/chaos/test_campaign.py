"""Campaigns against a VMM that says what a test wants: how each ends, and what is told of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.main import main
from chaos.verify import Image
from guest.pattern import SECTOR, Sector, encode
from tests.ch_remote.server import NO_CONTENT, Server, reply

REFUSAL = "500 Internal Server Error"


class Vmm(Server):
    """One disk, whose process is another one after each fault. `refuses`: by name of the request, what it says then;
    `calls`: how many there were of each. Its guest writes sector 8 again and again while it runs and `writes`."""

    def __init__(self, path: Path) -> None:
        self.calls: dict[str, int] = {}
        self.refuses: dict[str, str] = {}
        self.pid = 100
        self.image = path.parent / "disk.raw"
        self.image.write_bytes(encode(Sector(0, 5, 1)))
        self.writes, self.generation, self.seed = True, 5, 1
        self.guest, self.paused = threading.Lock(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        super().__init__(path)
        self.close_after = True
        self.handler = lambda head, _: self._answer(head.split()[1].rpartition("/")[2])

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        super().close()

    def _write(self) -> None:
        while not self._over.wait(0.001):
            with self.guest:
                if self.writes and not self.paused and self.image.exists():
                    self.generation += 1
                    with open(self.image, "r+b") as file:
                        file.seek(8 * SECTOR)
                        file.write(encode(Sector(8, self.generation, self.seed)))

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
            with self.guest:
                self.change(name)
            return reply(json.dumps({"pid": self.pid - 1}).encode())
        with self.guest:
            self.paused = self.paused or name == "vm.pause"
            self.change(name)
            self.paused = name != "vm.resume" and self.paused
        return NO_CONTENT

    def change(self, name: str) -> None:
        """What else happens at vm.pause, vm.resume and vmm.fault-inject."""


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
    put(vmm, Sector(1, 5, 1))
    assert campaign(vmm) == 1
    assert told(vmm) == ("data lost", f"{vmm.image}: sector 0 holds sector 1", 1)


def put(vmm: Vmm, sector: Sector) -> None:
    """At the image's beginning, whatever it says."""
    with open(vmm.image, "r+b") as file:
        file.write(encode(sector))


def test_guest_that_writes_nothing_from_the_beginning_is_not_struck(
    vmm: Vmm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chaos.campaign.WRITE_SECONDS", 0.0)
    with vmm.guest:
        vmm.writes = False
    assert campaign(vmm) == 1
    assert f"not recovered: the guest writes nothing to {vmm.image}: nothing new" in capsys.readouterr().out
    assert "vmm.fault-inject" not in vmm.calls


def test_guest_that_writes_nothing_any_more_has_not_recovered(vmm: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    vmm.change = lambda name: stops_for_good(vmm, name, monkeypatch)  # type: ignore[method-assign]
    assert campaign(vmm) == 1
    outcome, why, _ = told(vmm)
    assert outcome == "not recovered" and f"the guest writes nothing to {vmm.image} any more" in why
    assert vmm.calls["vm.pause"] == vmm.calls["vm.resume"]


def stops(vmm: Vmm, name: str) -> None:
    """With the second fault."""
    vmm.writes = name != "vmm.fault-inject" or vmm.calls[name] < 2


def stops_for_good(vmm: Vmm, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the second fault, and nobody has the patience to wait for it from then on."""
    stops(vmm, name)
    if not vmm.writes:
        monkeypatch.setattr("chaos.campaign.WRITE_SECONDS", 0.0)


def test_lost_data_says_more_than_a_guest_that_writes_nothing_any_more(
    vmm: Vmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(name: str) -> None:
        stops_for_good(vmm, name, monkeypatch)
        if not vmm.writes:
            put(vmm, Sector(0, 4, 1))

    vmm.change = change  # type: ignore[method-assign]
    assert campaign(vmm) == 1
    assert told(vmm) == ("data lost", f"{vmm.image}: sector 0 has generation 4, and had 5", 2)


def test_guest_that_writes_only_after_a_while_is_waited_for(vmm: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    class Slow(Image):
        def wrote(self) -> bool:
            nonlocal looks
            looks += not vmm.writes
            vmm.writes = vmm.writes or looks > 2
            return super().wrote()

    monkeypatch.setattr("chaos.main.Image", Slow)
    vmm.change = lambda name: stops(vmm, name)  # type: ignore[method-assign]
    assert campaign(vmm) == 0
    assert looks == 3


@pytest.mark.parametrize(
    ("seed", "outcome", "why"),
    [(2, "not recovered", "the guest was reset: sector 8 was written with seed 2, and the campaign began with 1"),
     (1, "data lost", "sector 8 has generation")],
    ids=["another seed", "the same seed"],
)  # fmt: skip
def test_guest_that_was_reset_is_told(vmm: Vmm, seed: int, outcome: str, why: str) -> None:
    def change(name: str) -> None:
        if name == "vm.resume":  # it takes the guest longer to get there again than the campaign to look
            vmm.seed, vmm.generation = seed, 0

    vmm.generation = 10**9
    vmm.change = change  # type: ignore[method-assign]
    assert campaign(vmm) == 1
    assert told(vmm)[0] == outcome and why in told(vmm)[1]


def test_fault_that_is_refused_at_once_is_one_line(vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    vmm.refuses["vmm.fault-inject"] = "no --allow-fault-injection"
    assert campaign(vmm) == 1
    assert capsys.readouterr() == ("", "flotilla chaos: no --allow-fault-injection\n")


def test_report_on_a_full_disk_is_one_line_after_the_table(vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign(vmm, "--report", "/dev/full") == 1
    out, err = capsys.readouterr()
    assert "ok; verified 2 times" in out
    assert err == "flotilla chaos: --report /dev/full: No space left on device\n"
