"""The document's nested example, step by step, in the lab; `python3 -m deploy.demo.nested [--equal N]`.

    lab (the document's host machine)
     ├─ VM 1 ── nested source ······ socat ─┐     one serial port each: the steps inside are typed there, and
     └─ VM 2 ── nested destination · socat ─┘     what runs on speaks through windows (host_vm.py)

The steps are the document's, in its order, but for one: the nested destination starts before the guest's checksums do,
because two VMs share an emulated CPU here and everything is slow beside that load.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deploy.demo import example_nested as example
from deploy.demo.host_vm import HostVm
from deploy.demo.play import BOOT_PATTERN, WHICH_BOOT, Play, perform
from deploy.demo.report import DemoError, Events, Hop, NestedReport

# Seconds; they end what hangs. An emulated machine boots two Debians at once, starts our VMM in each, and in one of
# them a third Debian: every exit of that costs several of the machine's own.
BOOT, START, ANSWER, MIGRATION = 900.0, 300.0, 240.0, 900.0
LOOK_SECONDS = 15.0  # each look costs both VMs what the guest could have
PINGS = 3
PING_PATTERN = r"(\d+) packets transmitted, (\d+) received"


class Nested(Play):
    """Two host VMs and a guest that moves from one to the other."""

    report: NestedReport

    def __init__(self, each: int, words: str, folder: Path, events: Events) -> None:
        """`each`: how many lines "equal" are waited for before and after. `words`: more for all kernels."""
        super().__init__(folder, events, NestedReport(), "vm-")
        self._each = each
        self._words = words and f" {words}"

    def play(self) -> None:
        one, two = self._hosts()
        self._start_source(one)
        self._network(one, 1)
        self._start_destination(two)
        self._network(two, 2)
        self._ping(two)
        self._start_load(one)
        hop = Hop(1)
        self.report.hops.append(hop)
        self._migrate(hop, one, two)
        self._check(hop, one, two)
        self._power_off(one, two)

    # Before --------------------------------------------------------------------------------------------------------

    def _hosts(self) -> tuple[HostVm, HostVm]:
        self.step("VM 1 and VM 2 boot Debian")
        self.type("host", example.DUMMY, example.FOLDER).expect_end(ANSWER)
        hosts = []
        for number in (1, 2):
            terminal = self.type(f"vm-{number}", example.host(number, self._words), example.FOLDER)
            hosts.append(HostVm(f"vm-{number}", terminal, self.events))
        for host in hosts:
            host.await_prompt(BOOT)
        self.took("hosts", self.began)
        return hosts[0], hosts[1]

    def _start_source(self, one: HostVm) -> None:
        self.step("in VM 1: the nested source boots")
        began = time.monotonic()
        one.window("source", example.source(self._words))
        one.await_text("source", "focal login", BOOT)
        self.took("nested_boot", began)

    def _start_destination(self, two: HostVm) -> None:
        self.step("in VM 2: the nested destination")
        two.window("destination", example.DESTINATION)
        two.await_path(f"-S {example.DESTINATION_API}", START)

    def _network(self, host: HostVm, number: int) -> None:
        self.step(f"in VM {number}: the network")
        for command in example.network(number):
            host.run(command, ANSWER)

    def _ping(self, two: HostVm) -> None:
        said = two.run(example.ping(PINGS), ANSWER)
        if counted := re.search(PING_PATTERN, said):
            self.report.ping = [int(counted[1]), int(counted[2])]
        if self.report.ping != [PINGS, PINGS]:
            raise DemoError(f"the ping from VM 2 to VM 1 lost packets: {self.report.ping}\n{two.terminal.tail()}")

    def _which_boot(self, host: HostVm, window: str, seconds: float = ANSWER) -> None:
        since = host.terminal.mark()
        host.type(window, WHICH_BOOT)
        match = host.await_text(window, BOOT_PATTERN, seconds, since)
        self.booted(match[1], match[2])

    def _start_load(self, one: HostVm) -> None:
        self.step("the nested guest checksums its second disk in a loop")
        self._which_boot(one, "source")
        one.type("source", "./equal.sh /dev/vdb\n")
        one.await_lines("source", "equal", self._each, ANSWER)
        self.report.processes = one.api(example.SOURCE_API, "vmm.fleet", ANSWER)
        self.events.emit("fleet", name="source", rows=self.report.processes)
        self.took("until_load", self.began)

    # The migration -------------------------------------------------------------------------------------------------

    def _migrate(self, hop: Hop, one: HostVm, two: HostVm) -> None:
        self.step("the nested guest moves from VM 1 to VM 2, through two socats")
        two.window("receive", example.RECEIVE)
        two.await_path(f"-S {example.DESTINATION_SOCKET}", ANSWER)
        two.window("relay", example.RECEIVE_RELAY)
        listening = f"grep -q ':{example.PORT:04X} 0.*:0000 0A' /proc/net/tcp"
        two.ask(f"until {listening}; do sleep 0.3; done", ANSWER)
        one.window("relay", example.SEND_RELAY)
        one.await_path(f"-S {example.SOURCE_SOCKET}", ANSWER)
        began = time.monotonic()
        one.window("send", example.SEND)
        self._follow(hop, one)
        hop.send = one.expect_end("send", MIGRATION)
        hop.source_exit = one.expect_end("source", MIGRATION)
        self.took("send_to_source_exit", began)
        hop.receive = two.expect_end("receive", MIGRATION)
        two.await_lines("destination", "equal", self._each, ANSWER)

    def _follow(self, hop: Hop, one: HostVm) -> None:
        """Phases and rounds of the sending side, until its command is done or the time is up."""
        end, shown = time.monotonic() + MIGRATION, ""
        while time.monotonic() < end and not re.search(r"send\| .*?window closes with", one.terminal.text()):
            with contextlib.suppress(DemoError):  # its VMM has ended meanwhile
                progress = one.api(example.SOURCE_API, "vm.migration-progress", ANSWER)
                if (phase := str(progress.get("phase"))) != shown:
                    shown = phase
                    self.events.emit("migration", hop=hop.hop, phase=phase, total_ms=progress.get("total_ms"))
            with contextlib.suppress(DemoError):
                one.await_text("send", "window closes with", LOOK_SECONDS)

    def _check(self, hop: Hop, one: HostVm, two: HostVm) -> None:
        """The figures, then the guest itself: Ctrl-C ends its loop, and it says which boot this is."""
        progress = two.api(example.DESTINATION_API, "vm.migration-progress", ANSWER)
        hop.downtime_ms, hop.total_ms = progress.get("downtime_ms"), progress.get("total_ms")
        hop.bytes_transferred = progress.get("bytes_transferred")
        hop.breakdown = progress.get("breakdown") or {}
        if hop.downtime_ms is None or hop.bytes_transferred is None:
            raise DemoError(f"the destination's progress has no figures: {progress}")
        before, after = one.times("source", "equal"), two.times("destination", "equal")
        hop.gap_ms = round((after[0] - before[-1]) * 1000, 1)
        self.events.emit("hop", **asdict(hop))
        self.report.processes = two.api(example.DESTINATION_API, "vmm.fleet", ANSWER)
        self.events.emit("fleet", name="destination", rows=self.report.processes)
        self.step("Ctrl-C into the console; is it the same boot?")
        press, ask = partial(two.type, "destination", "\x03"), partial(self._which_boot, two, "destination")
        self.interrupt(press, ask, ANSWER)
        self.count()
        if self.report.not_equal:
            raise DemoError(f"the disk says something else than before:\n{two.terminal.tail()}")

    def _power_off(self, one: HostVm, two: HostVm) -> None:
        self.step("poweroff in the nested guest, then in both host VMs")
        two.type("destination", "poweroff\n")
        self.report.destination_exit = two.expect_end("destination", ANSWER)
        for host in (one, two):
            host.terminal.type("poweroff\n")
        self.report.hosts = [host.terminal.expect_end(ANSWER) for host in (one, two)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("nested", description="The document's nested migration, step by step.")
    parser.add_argument("--equal", type=int, default=3, metavar="N", help='lines "equal" before and after (default 3)')
    text = "more words for the kernels' command lines; `quiet` saves the emulated machine minutes (default: none)"
    parser.add_argument("--words", default="", metavar="WORDS", help=text)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    return perform(lambda folder, events: Nested(options.equal, options.words, folder, events))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
