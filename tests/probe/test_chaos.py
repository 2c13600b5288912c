"""Campaigns on /dev/kvm: any process but the controller may die at any moment, and the guest's data stays whole.

    FLOTILLA_KILLS=1000               random kills over all kinds of processes (default 60)
    FLOTILLA_CHAOS_MIGRATIONS=200     migrations during which a process is killed (default 6)
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys

import pytest

from chaos.client import Api
from chaos.schedule import DEFAULT_PROCESSES
from controller.migration.progress import Phase
from shared.errors import FlotillaError
from tests.netns import network_namespace
from tests.netpeer import Flow, ping
from tests.network import free_port
from tests.probe.net.rig import GUEST, HOST
from tests.probe.test_remote_migration import listens
from tests.vmm import Vmm, environment, poll

pytestmark = pytest.mark.probe

KILLS = int(os.environ.get("FLOTILLA_KILLS", "60"))
SEED = int(os.environ.get("FLOTILLA_CHAOS_SEED", "3"))  # with 60, it strikes every kind
DISK_SIZE = 16 << 20
MIGRATIONS = int(os.environ.get("FLOTILLA_CHAOS_MIGRATIONS", "6"))
CHAOS = "import sys; from controller.main import main; sys.exit(main(['chaos', *sys.argv[1:]]))"


def chaos(vmm: Vmm, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHAOS, "--api-socket", str(vmm.api), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


@pytest.fixture
def network():
    with network_namespace():
        yield


@pytest.fixture
def loaded(tmp_path, disk, network):
    """A guest that verifies disk, network and RAM, with every kind of process."""
    words = "mode=blkload,net,rng rng.every_ms=20 depth=8 lost_irq_ticks=100 cpus=2 ap=ram ap.mb=4 ap.rate=20"
    devices = ["--disk", f"path={disk}", "--net", f"ip={HOST}", "--console", f"file={tmp_path}/console"]
    devices += ["--metrics-socket", f"{tmp_path}/metrics"]
    with Vmm.guest(
        tmp_path, words, *devices, "--cpus", "boot=2", "--memory", "size=128M", "--allow-fault-injection"
    ) as vmm:
        vmm.expect("blk ok ")
        vmm.wait_api()
        poll(lambda: {row["kind"] for row in vmm.fleet().values()} >= set(DEFAULT_PROCESSES))
        ping(GUEST)
        yield vmm


@pytest.mark.timeout(300 + 6 * KILLS)
def test_random_kills_over_all_kinds_lose_nothing(tmp_path, loaded, disk):
    """The guest verifies every block and datagram, and the image is verified from outside with the VM paused."""
    report = tmp_path / "report.json"
    with Flow(GUEST) as flow:
        done = chaos(
            loaded, "--seed", str(SEED), "--count", str(KILLS), "--kinds", "kill", "--rate", "50",
            "--verify", str(disk), "--verify-every", "25", "--report", str(report), seconds=200 + 6 * KILLS,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr}\n{loaded.errors[-3000:]}"
        flow.goes_on()
        loaded.more("blk ok ", 120)
        loaded.more("blk ok ", 120)
    print(done.stdout[-900:])
    found = json.loads(report.read_text())
    assert found["outcome"] == "ok" and found["verifications"] == -(-KILLS // 25)
    assert sum(row["injected"] for row in found["rows"]) == KILLS
    assert all(row["recovered"] == row["injected"] and not row["lost"] for row in found["rows"])
    assert {row["process"] for row in found["rows"]} == set(DEFAULT_PROCESSES)
    assert b"BAD" not in loaded.output


# Migrations ---------------------------------------------------------------------------------------------------------

VICTIMS = ("vcpu0", "_disk0", "console", "api", "zygote", "janitor", "migration", "controller")
STATES = {
    ("send", True): "connecting building pausing saving offered handed-over",
    ("send", False): "connecting proposing copying pausing saving final-pass preparing committed",
    ("receive", True): "ready building built loading claimed running",
    ("receive", False): "ready checking building built loading prepared committed running",
}
PATIENCE = 180.0
FINAL = ("completed", "failed", "cancelled", "none", "in-doubt")


class Traveller:
    """One guest that moves from VMM to VMM; at each hop one process of either side is killed in some state."""

    def __init__(self, folder, disk) -> None:
        self.folder, self.disk = folder, disk
        self.number = 0
        self.opened: list[Vmm] = []
        self.here = self.boot()

    def boot(self) -> Vmm:
        words = "mode=blkload,rng,ram blkload.depth=4 rng.every_ms=20 ram.mb=4 ram.rate=10 report_ms=100"
        words += " lost_irq_ticks=100"  # a worker that is killed owes the guest interrupts
        devices = ["--disk", f"path={self.disk}", "--console", f"file={self.folder}/console"]
        vmm = self._open(lambda name: Vmm.guest(self.folder, words, *devices, *self._flags(name), name=name))
        vmm.expect("blk ok ")
        vmm.wait_api()
        poll(lambda: {row["device"] for row in ask(vmm, "vmm.fleet")} >= {"janitor", "console", "_disk0"})
        return vmm

    def _flags(self, name: str) -> list[str]:
        return ["--allow-fault-injection", "--event-monitor", f"path={self.folder}/{name}.events"]

    def _open(self, make) -> Vmm:
        self.number += 1
        vmm = make(f"v{self.number}")
        self.opened.append(vmm)
        return vmm

    def close(self) -> None:
        for vmm in self.opened:
            vmm.__exit__()

    def hop(self, choice: random.Random) -> str:
        """How it ended, once that is verified."""
        source = self.here
        destination = self._open(lambda name: Vmm(self.folder, *self._flags(name), name=name))
        poll(lambda: ask(destination, "vmm.ping"), PATIENCE)
        local = choice.random() < 0.5
        side = choice.choice(["send", "receive"])
        victim, state = choice.choice(VICTIMS), choice.choice(STATES[side, local].split())
        struck = source if side == "send" else destination
        if victim != "controller":
            body = {"process": victim, "fault": "kill", "at": {"state": state}}
            assert Api(str(struck.api)).put("vmm.fault-inject", body)["waits"] == f"state {state}"
        where = f"{'local' if local else 'remote'}: {victim} of the {side} side killed at {state}"
        print(where, end="", flush=True)
        url = f"unix:{self.folder}/s{self.number}" if local else f"tcp:127.0.0.1:{free_port()}"
        receiver = destination.start_remote("receive-migration", url)
        poll(lambda: receiver.poll() is not None or listens(destination, url), PATIENCE)
        sender = source.start_remote("send-migration", *(["--local"] if local else []), url)
        try:
            if victim == "controller":
                self._kill_controller(struck, state)
            sender.wait(PATIENCE)  # with its API process it ends before the migration does
            outcome = self._settle(source, destination)
        finally:
            for process in (sender, receiver):
                process.kill()
                process.wait()
        return outcome

    def _kill_controller(self, vmm: Vmm, state: str) -> None:
        """As soon as its events tell the state, or its part is over."""
        path = self.folder / vmm.api.name.replace(".api", ".events")
        wanted = re.compile(rf'"phase": "({state}|completed|failed|cancelled|lost)"')
        poll(lambda: vmm.process.poll() is not None or wanted.search(path.read_text()), PATIENCE)
        if vmm.process.poll() is None:
            vmm.process.kill()
            vmm.process.wait()

    def _settle(self, source: Vmm, destination: Vmm) -> str:
        """Wait for the truth of both sides; exactly one runs the guest, unless the only owner was killed."""
        said = final(source)
        if ask(source, "vm.migration-progress").get("phase") == "lost":  # it says so, and ends
            source.wait(PATIENCE)
        # Nobody comes any more; whose connection is accepted only now fails by itself.
        poll(lambda: not listening(destination) or destination.remote("cancel-migration").returncode == 0)
        arrived = final(destination) == "completed"
        if said == "in-doubt":
            assert source.ask("info")["state"] == "Paused"
            source.ask("migration-resolve", "--there" if arrived else "--here")
            poll(lambda: progress(source) in ("none", "completed", "failed"), PATIENCE)
        assert not (arrived and runs(source)), f"two runners\n{source.errors}\n{destination.errors}"
        if arrived:
            self.here = destination
        elif runs(source):
            assert not has_vm(destination)
        else:
            assert killed(source) or killed(destination), f"no runner\n{source.errors}\n{destination.errors}"
            self._check(source, destination)
            self.here = self.boot()
            return "its only owner was killed, and the guest with it"
        self._check(source, destination)
        self.here.more("blk ok ", PATIENCE)
        self.here.more("ram ok ", PATIENCE)
        assert runs(self.here)
        if not arrived and destination.process.poll() is None:
            destination.ask("shutdown-vmm")
            assert destination.wait() == 0
        why = "" if arrived else f": {(ask(source, 'vm.migration-progress').get('error') or ['?'])[-1]}"
        return ("in doubt, settled: " if said == "in-doubt" else "") + ("moved" if arrived else "stayed") + why

    @staticmethod
    def _check(*vmms: Vmm) -> None:
        for vmm in vmms:
            assert b"BAD" not in vmm.output, vmm.output[-2000:]


def killed(vmm: Vmm) -> bool:
    return vmm.process.poll() is not None and vmm.process.returncode < 0


def ask(vmm: Vmm, name: str) -> dict:
    """Without a process per question; {} while there is no answer, or none to have."""
    try:
        return Api(str(vmm.api)).get(name)
    except FlotillaError:
        return {}


def progress(vmm: Vmm) -> str:
    """Of a VMM that has ended: completed, or failed if it was killed."""
    if vmm.process.poll() is None:
        return ask(vmm, "vm.migration-progress").get("state", "")
    return "failed" if vmm.process.returncode < 0 else "completed"


def listening(vmm: Vmm) -> bool:
    return ask(vmm, "vm.migration-progress").get("phase") == "listening"


def final(vmm: Vmm) -> str:
    return poll(lambda: progress(vmm) in FINAL and progress(vmm), PATIENCE)


def has_vm(vmm: Vmm) -> bool:
    return bool(ask(vmm, "vm.info"))


def runs(vmm: Vmm) -> bool:
    """Waits for an API process that is on its way back. A guest that has left is Running until its VMM has ended."""
    poll(lambda: vmm.process.poll() is not None or ask(vmm, "vmm.ping"), PATIENCE)
    gone = ask(vmm, "vm.migration-progress")
    if (gone.get("direction"), gone.get("state")) == ("send", "completed"):
        return False
    return ask(vmm, "vm.info").get("state") == "Running"


@pytest.mark.timeout(120 + 30 * MIGRATIONS)
def test_migrations_with_a_random_kill_never_have_two_runners(tmp_path, disk):
    assert {state for words in STATES.values() for state in words.split()} <= set(Phase)
    choice = random.Random(SEED)
    traveller = Traveller(tmp_path, disk)
    try:
        for number in range(MIGRATIONS):
            print(number, end=" ")
            print(f": {traveller.hop(choice)}", flush=True)
    finally:
        traveller.close()
