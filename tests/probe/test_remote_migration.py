"""Remote migration of the probe guest on /dev/kvm: by tcp, and by unix sockets that two socats join."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.handover import Message
from tests.controller.migration.relay import Cut, Relay
from tests.network import free_port
from tests.vmm import REMOTE, SECONDS, Vmm, environment, events, poll

pytestmark = [pytest.mark.probe, pytest.mark.timeout(300)]

HOPS = int(os.environ.get("FLOTILLA_REMOTE_HOPS", "4"))
DISK_SIZE = 16 << 20
SO_ACCEPTCON = 1 << 16  # <linux/net.h>, among the flags of /proc/net/unix


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_SIZE))
    return path


class Receiver:
    """`ch-remote receive-migration`, which blocks until the guest is there."""

    def __init__(self, vmm: Vmm, url: str) -> None:
        vmm.wait_api()
        command = [sys.executable, "-c", REMOTE, "--api-socket", str(vmm.api), "receive-migration", url]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        poll(lambda: listens(vmm, url) or self.process.poll() is not None)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def listens(vmm: Vmm, url: str) -> bool:
    if url.startswith("unix:"):
        return os.path.exists(url[5:])
    return listens_on(int(url.rpartition(":")[2]))


@contextlib.contextmanager
def tcp(_folder: Path) -> Iterator[tuple[str, str]]:
    """(what the source sends to, what the destination receives on)."""
    url = f"tcp:127.0.0.1:{free_port()}"
    yield url, url


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[tuple[str, str]]:
    """After a migration that has succeeded they end by themselves, before anybody listens at the same names again."""
    with socats(folder) as (urls, both):
        yield urls
        for process in both:
            process.wait(SECONDS)


@contextlib.contextmanager
def socats(folder: Path) -> Iterator[tuple[tuple[str, str], list[subprocess.Popen[bytes]]]]:
    """The document's two socats, unix ─▶ tcp ─▶ unix; the URLs, and both, the one at the source last."""
    here, there, port = folder / "sock1", folder / "sock2", free_port()
    commands = [
        ["socat", f"TCP-LISTEN:{port},reuseaddr,bind=127.0.0.1", f"UNIX-CLIENT:{there}"],
        ["socat", f"UNIX-LISTEN:{here},reuseaddr", f"TCP:127.0.0.1:{port}"],
    ]
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(child(command)) for command in commands]
        poll(lambda: listens_at(here))
        poll(lambda: listens_on(port))
        yield (f"unix:{here}", f"unix:{there}"), both
    here.unlink(missing_ok=True)


def listens_on(port: int) -> bool:
    with open("/proc/net/tcp") as file:
        return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in list(file)[1:])


def listens_at(path: Path) -> bool:
    """Whether somebody does; socat's name is there before."""
    with open("/proc/net/unix") as file:
        sockets = [line.split() for line in file]
    return any(words[-1] == str(path) and int(words[3], 16) & SO_ACCEPTCON for words in sockets[1:])


@contextlib.contextmanager
def child(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


WAYS = {"tcp": tcp, "socat": joined}


def hop(source: Vmm, destination: Vmm, urls: tuple[str, str], *options: str) -> None:
    """One migration; both commands and the source end with 0."""
    there, here = urls
    receiver = Receiver(destination, here)
    sent = source.remote("send-migration", ",".join([f"destination_url={there}", *options]), timeout=120)
    code, errors = receiver.end()
    assert (sent.returncode, code) == (0, 0), f"{sent.stderr}\n{errors}\n{source.errors}\n{destination.errors}"
    assert source.wait() == 0
    assert not source.api.exists()
    assert destination.ask("info")["state"] == "Running"


@pytest.mark.timeout(90 + 15 * HOPS)
@pytest.mark.parametrize("way", WAYS)
def test_back_and_forth_with_ram_and_disk_verified(tmp_path, disk, way):
    """The guest verifies its RAM pattern and every block of its disk all the time; its lines go on across the hops."""
    words = "mode=blkload,ram blkload.depth=4 ram.mb=16 ram.rate=100"
    with Vmm.guest(tmp_path, words, "--disk", f"path={disk}", name="hop0") as first:
        first.expect("blk ok ")
        first.wait_api()
        here, opened, output = first, [], b""
        try:
            for number in range(1, HOPS + 1):
                there = Vmm(tmp_path, name=f"hop{number}")
                opened.append(there)
                with WAYS[way](tmp_path) as urls:
                    hop(here, there, urls)
                there.expect(r"ram ok \d+ ")
                there.expect(r"blk ok \d+ ")
                progress = there.ask("migration-progress")
                assert progress["state"] == "completed" and progress["fds_passed"] == 0
                output += here.output
                here = there
            output += here.output
        finally:
            for vmm in opened:
                vmm.__exit__()
        assert b"BAD" not in output and b"panic" not in output and b"error" not in output


def test_a_guest_with_two_vcpus_moves(tmp_path, disk):
    words = "mode=equal cpus=2 ap=ram ap.mb=8 ap.rate=50"
    arguments = ["--disk", f"path={disk}", "--cpus", "boot=2"]
    with Vmm.guest(tmp_path, words, *arguments, name="one") as source, Vmm(tmp_path, name="two") as destination:
        source.expect("equal 1 ")
        source.wait_api()
        with tcp(tmp_path) as urls:
            hop(source, destination, urls)
        destination.expect("equal ")
        destination.expect("cpu1: ram ok ")
        assert b"not equal" not in destination.output and b"BAD" not in destination.output


def test_progress_has_rounds_pages_and_rates(tmp_path):
    told = tmp_path / "events"
    more = ["-v", "--event-monitor", f"path={told}"]
    with Vmm.guest(tmp_path, "mode=ram ram.mb=32 ram.rate=200", *more, name="one") as source:
        source.expect("ram ok ")
        source.wait_api()
        with Vmm(tmp_path, name="two") as destination, tcp(tmp_path) as urls:
            receiver = Receiver(destination, urls[1])
            with child([sys.executable, "-c", REMOTE, "--api-socket", str(source.api), "send-migration", urls[0]]):
                code, errors = receiver.end()
                assert code == 0, errors
                assert source.wait() == 0
            progress = destination.ask("migration-progress")
            assert progress["ram_bytes"] == 128 << 20 and progress["direction"] == "receive"
            assert progress["pages"] >= (32 << 20) // 4096
            assert progress["page_bytes"] >= progress["pages"] * 4096
            assert 0 < progress["downtime_ms"] < progress["total_ms"]
            assert {"build_ms", "load_ms", "start_ms"} <= set(progress["breakdown"])
            figures = progress["breakdown"]["source"]
            assert {"pause", "save_ms", "final_pass_ms", "prepare"} <= set(figures)
            assert 0 < figures["pause"]["workers"]["vcpus"] <= figures["pause"]["total_ms"]
            moved = re.search(r"migration: moved in [\d.]+ s, downtime \d+ ms, (\d+) rounds", source.errors)
            assert moved, source.errors
            rounds = [properties["id"] for _, properties in events(told, "migration-memory-iteration")]
            assert rounds == [str(number) for number in range(int(moved[1]))]
            cost = destination.ask("migration-estimate")["fixed_cost"]
            assert list(cost["measured_ms"]) == ["load", "start"] and cost["guessed"] == ["pause", "save"]


def test_zero_pages_are_not_sent(tmp_path):
    """128 MiB of RAM, of which the guest has touched little."""
    with (
        Vmm.guest(tmp_path, "mode=rng", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        tcp(tmp_path) as urls,
    ):
        source.expect("rng ok 1")
        source.wait_api()
        hop(source, destination, urls)
        destination.expect("rng ok ")
        assert destination.ask("migration-progress")["bytes_transferred"] < 8 << 20


def test_estimate_knows_how_fast_the_guest_writes_and_leaves_it_running(tmp_path):
    with Vmm.guest(tmp_path, "mode=ram ram.mb=32", name="one") as vmm:
        vmm.expect("ram ok ")
        vmm.wait_api()
        answer = vmm.ask("migration-estimate")
        assert 16 << 20 < answer["dirty_bytes_per_s"] < 48 << 20  # its working set, however often it is rewritten
        assert 32 << 20 <= answer["ram_bytes_to_copy"] <= 128 << 20
        assert [row["gbit_per_s"] for row in answer["forecasts"]] == [1, 10, 25]
        assert answer["fixed_cost"]["guessed"] == ["pause", "save", "load", "start"]
        vmm.more("ram ok ")
        vmm.ask("pause")
        vmm.ask("resume")
        assert list(vmm.ask("migration-estimate")["fixed_cost"]["measured_ms"]) == ["pause"]
        vmm.ask("pause")
        refused = vmm.remote("migration-estimate")
        assert refused.returncode == 1 and "Paused" in refused.stderr


def test_paused_guest_arrives_paused(tmp_path):
    with (
        Vmm.guest(tmp_path, "mode=rng", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        tcp(tmp_path) as urls,
    ):
        source.expect("rng ok 1")
        source.wait_api()
        source.ask("pause")
        receiver = Receiver(destination, urls[1])
        source.ask("send-migration", urls[0])
        assert receiver.end()[0] == 0
        assert destination.ask("info")["state"] == "Paused"
        destination.ask("resume")
        destination.expect("rng ok ")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", ["source", "destination", "relay"])
def test_kill_while_ram_is_copied_leaves_the_guest_at_the_source_and_a_retry_works(tmp_path, victim):
    """A bound that can't be met keeps the migration in its rounds, so that it can be disturbed."""
    with (
        Vmm.guest(tmp_path, "mode=ram ram.mb=64", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
        Sending(source, destination, tmp_path) as sending,
    ):
        if victim == "relay":
            sending.relay.kill()
        else:
            os.kill((source if victim == "source" else destination).pid_of("migration"), signal.SIGKILL)
        sending.fails("the guest runs on here")
        with tcp(tmp_path) as urls:
            hop(source, destination, urls, "downtime_ms=5000")
        destination.expect("ram ok ")
        assert b"BAD" not in destination.output + source.output


def test_stream_that_ends_between_commit_and_started_is_a_doubt_until_somebody_resolves_it(tmp_path, disk):
    """Through a relay that dies over STARTED: the guest runs at the destination, and its source can't know."""
    with (
        Vmm.guest(tmp_path, "mode=equal", "--disk", f"path={disk}", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
    ):
        source.expect("equal 1 ")
        source.wait_api()
        receiver = Receiver(destination, f"unix:{tmp_path}/sock2")
        relay = Relay(f"{tmp_path}/sock1", f"{tmp_path}/sock2", Cut(Message.STARTED))
        sent = source.remote("send-migration", f"unix:{tmp_path}/sock1")
        relay.close()
        assert sent.returncode == 1 and "in doubt" in sent.stderr and "migration-resolve" in sent.stderr
        assert receiver.end()[0] == 0
        destination.expect("equal ")
        info = source.ask("info")
        assert (info["state"], info["migration"]) == ("Paused", "in-doubt")
        assert source.ask("migration-progress")["state"] == "in-doubt"
        for change in ("resume", "reboot", "shutdown", "delete"):
            refused = source.remote(change)
            assert refused.returncode == 1 and "migration-resolve" in refused.stderr, change
        early = source.remote("migration-resolve", "--here")
        assert early.returncode == 1 and "may still take the guest" in early.stderr
        source.ask("migration-resolve", "--there")
        assert source.wait() == 0 and not source.api.exists()
        destination.more("equal ")
        assert b"not equal" not in source.output + destination.output


def test_cancel_that_comes_after_commit_is_told_that_it_is_too_late(tmp_path):
    with Vmm.guest(tmp_path, "mode=rng", name="one") as source, Vmm(tmp_path, name="two") as destination:
        source.expect("rng ok 1")
        source.wait_api()
        receiver = Receiver(destination, f"unix:{tmp_path}/sock2")
        relay = Relay(f"{tmp_path}/sock1", f"{tmp_path}/sock2", Cut(Message.STARTED, hold=True))
        with child([sys.executable, "-c", REMOTE, "--api-socket", str(source.api), "send-migration",
                    f"unix:{tmp_path}/sock1"]):  # fmt: skip
            poll(lambda: source.ask("migration-progress").get("phase") == "committed")
            assert receiver.end()[0] == 0
            late = source.remote("cancel-migration")
            relay.close()
            words = "Too late to cancel: the destination has been told to run the guest"
            assert late.returncode == 1 and words in late.stderr
            poll(lambda: source.ask("info").get("migration") == "in-doubt")
        source.ask("migration-resolve", "--there")
        assert source.wait() == 0


@pytest.mark.parametrize("cut", [Cut(Message.STARTED), Cut(Message.COMMIT)], ids=["runs there", "never will"])
def test_source_in_doubt_asks_the_destination_and_settles_it_by_itself(tmp_path, disk, cut):
    """When there is a way to it again."""
    with (
        Vmm.guest(tmp_path, "mode=equal", "--disk", f"path={disk}", name="one") as source,
        Vmm(tmp_path, name="two") as destination,
    ):
        source.expect("equal 1 ")
        source.wait_api()
        here, there = f"{tmp_path}/sock1", f"{tmp_path}/sock2"
        receiver = Receiver(destination, f"unix:{there}")
        relay = Relay(here, there, cut)
        sent = source.remote("send-migration", f"unix:{here}")
        relay.close()
        assert sent.returncode == 1 and "in doubt" in sent.stderr
        assert source.ask("info")["migration"] == "in-doubt"
        arrives = cut.message is Message.STARTED
        assert receiver.end()[0] == (0 if arrives else 1)
        # One that takes every connection: the source may come before the destination is ready for it.
        with child(["socat", f"UNIX-LISTEN:{here},fork", f"UNIX-CONNECT:{there}"]):
            if arrives:
                assert source.wait() == 0 and not source.api.exists()
                destination.more("equal ")
            else:
                poll(lambda: source.ask("info")["state"] == "Running")
                source.more("equal ")
                assert source.ask("migration-progress")["state"] == "failed"
        Path(here).unlink(missing_ok=True)
        poll(lambda: not os.path.exists(there) and "migration" not in destination.fleet())
        assert b"not equal" not in source.output + destination.output


class Sending:
    """A migration that is in its rounds and stays there, through two socats."""

    def __init__(self, source: Vmm, destination: Vmm, folder: Path, url: str = "") -> None:
        self.source, self.destination = source, destination
        self._stack = contextlib.ExitStack()
        source.expect("ram ok ")
        source.wait_api()
        self.urls, (_, self.relay) = self._stack.enter_context(socats(folder))
        self.receiver = Receiver(destination, self.urls[1])
        argument = f"destination_url={self.urls[0]},downtime_ms=1"
        command = [sys.executable, "-c", REMOTE, "--api-socket", str(source.api), "send-migration", argument]
        self.sender = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        poll(lambda: source.ask("migration-progress").get("round", 0) >= 2)

    def fails(self, because: str) -> tuple[str, str]:
        """What both commands said; the guest runs on at the source."""
        _, errors = self.sender.communicate(timeout=60)
        code, why = self.receiver.end()
        assert self.sender.returncode == 1 and because in errors, errors
        assert code == 1 and why
        assert self.source.ask("info")["state"] == "Running"
        self.source.more("ram ok ")
        return errors, why

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
