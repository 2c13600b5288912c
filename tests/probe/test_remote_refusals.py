"""A destination that lacks what a guest needs: the reason on both sides before a byte of RAM moves, and a retry that
works once it is there."""

from __future__ import annotations

import shutil

import pytest

from bench.hosts import TAP, Hosts
from controller.config.model import NetConfig
from controller.taps import open_tap
from tests.netns import ip
from tests.probe.test_remote_migration import Receiver, hop, tcp
from tests.probe.test_remote_network import guest_and_destination, moves, receive
from tests.vmm import Vmm, probe

pytestmark = [pytest.mark.probe, pytest.mark.timeout(120)]

WORDS = "mode=ram ram.mb=16 ram.rate=5"


@pytest.fixture
def hosts():
    made = Hosts()
    yield made
    made.close()


def refused(source: Vmm, receiver: Receiver, url: str, *complaints: str) -> None:
    sent = source.remote("send-migration", url, timeout=60)
    code, why = receiver.end()
    assert (sent.returncode, code) == (1, 1), f"{sent.stderr}{why}"
    assert "the destination refused it" in sent.stderr
    for complaint in complaints:
        assert complaint in sent.stderr and complaint in why
    progress = source.ask("migration-progress")
    assert (progress["state"], progress["pages"], progress["zero_pages"]) == ("failed", 0, 0)
    assert source.ask("info")["state"] == "Running"
    source.more("ram ok ")


@pytest.mark.parametrize("pairs", [1, 2])
def test_tap_that_somebody_holds_at_the_destination(hosts, tmp_path, pairs):
    several = ["multi_queue"] if pairs > 1 else []
    for name in hosts.names.values():
        ip("-n", name, "tuntap", "add", TAP, "mode", "tap", *several)
    card = {"tap": TAP, "num_queues": 2 * pairs}
    arguments = ["--net", f"tap={TAP},num_queues={2 * pairs}", "--cpus", "boot=2"]
    source, destination = guest_and_destination(hosts, tmp_path, WORDS, *arguments)
    with source, destination:
        source.expect("ram ok ")
        source.wait_api()
        with hosts.inside("two"):
            holder = open_tap(NetConfig(**card))
        try:
            taken = f"--net tap={TAP}: another process has this TAP open"
            refused(source, receive(hosts, destination), "tcp:10.99.0.2:7000", taken)
        finally:
            holder.close()
        moves(hosts, source, destination)


def test_kernel_console_folder_and_entropy_that_are_not_there(tmp_path):
    """The destination has its own file system: the folder is away while it looks. All is named at once."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(probe(), folder / "kernel")
    (folder / "entropy").write_bytes(bytes(4096))
    arguments = ["--kernel", f"{folder}/kernel", "--cmdline", WORDS, "--serial", "tty", "--memory", "size=128M"]
    arguments += ["--console", f"file={folder}/console.log", "--rng", f"src={folder}/entropy"]
    with Vmm(tmp_path, *arguments, name="one") as source, Vmm(tmp_path, name="two") as destination:
        source.expect("ram ok ")
        source.wait_api()
        with tcp(tmp_path) as urls:
            receiver = Receiver(destination, urls[1])
            folder.rename(f"{folder}.away")
            try:
                refused(
                    source, receiver, urls[0],
                    f"--kernel {folder}/kernel: No such file or directory",
                    f"--rng src={folder}/entropy: No such file or directory",
                    f"--console file={folder}/console.log: its folder {folder}: No such file or directory",
                )  # fmt: skip
            finally:
                (tmp_path / "here.away").rename(folder)
        with tcp(tmp_path) as urls:
            hop(source, destination, urls)
        destination.expect("ram ok ")
        destination.ask("reboot")
        destination.more("ram ok ")
