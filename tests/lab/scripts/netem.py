"""Debian moves between two network namespaces while netem makes the cable bad: `python3 netem.py SEED COUNT`.

A migration that arrives takes the guest to the other host; one that fails leaves it running where it is, and the same
VMM receives the next try. A line of JSON for each on stdout: weather, cut, to, exit codes, checksums.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from deploy.demo import vmm
from deploy.demo.example import Example
from deploy.demo.play import Play, perform
from deploy.demo.report import DemoError, Events, Report
from deploy.demo.terminal import Terminal

PORT = 6000
ADDRESSES = {"a": "192.168.50.11", "b": "192.168.50.12"}
BOOT, ANSWER, MIGRATION = 300.0, 120.0, 400.0
# What the source is told to wait at most: with 36 ms of delay and 3 % of loss, TCP carries some 100 KB/s.
PATIENCE = 180
GUEST = Example(cpus=1, memory="512M", disks=3, cmdline="root=/dev/vda1 console=ttyS0 quiet")
WRITTEN_BYTES = 4 << 20
# What a cut is shorter, or longer, than: the silence after which a side gives up (30 s).
BLINK, CUT = (1.0, 8.0), (45.0, 50.0)


@dataclass(frozen=True, slots=True)
class Weather:
    """`netem`: for both directions. `cut`: seconds into the migration, and for how long nothing passes at all."""

    netem: str
    cut: tuple[float, float] | None = None


def weather(chance: random.Random) -> Weather:
    """One that the seed decides."""
    netem = chance.choice(
        [
            f"delay {chance.randrange(5, 200)}ms {chance.randrange(1, 50)}ms",
            f"delay {chance.randrange(5, 50)}ms reorder 25% 50%",
            f"loss {chance.randrange(1, 15)}%",
            f"rate {chance.randrange(40, 400)}mbit",
            f"duplicate {chance.randrange(1, 30)}%",
            f"corrupt {chance.randrange(1, 5)}%",
            f"delay {chance.randrange(1, 50)}ms loss {chance.randrange(1, 5)}% rate {chance.randrange(60, 300)}mbit",
        ]
    )
    how_long = chance.choice([None, None, BLINK, CUT])
    return Weather(netem, (chance.uniform(0.5, 15.0), chance.uniform(*how_long)) if how_long else None)


def sh(*words: str) -> str:
    """Raises DemoError with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def hosts() -> None:
    """Two namespaces and a cable."""
    sh("modprobe", "-a", "veth", "sch_netem")
    for host in ADDRESSES:
        sh("ip", "netns", "add", host)
    sh("ip", "link", "add", "port", "netns", "a", "type", "veth", "peer", "name", "port", "netns", "b")
    for host, address in ADDRESSES.items():
        sh("ip", "-n", host, "link", "set", "lo", "up")
        sh("ip", "-n", host, "address", "add", f"{address}/24", "dev", "port")
        sh("ip", "-n", host, "link", "set", "port", "up")


def cable(netem: str) -> None:
    """What the cable does from now on."""
    for host in ADDRESSES:
        sh("tc", "-n", host, "qdisc", "replace", "dev", "port", "root", "netem", "limit", "10000", *netem.split())


def listens(host: str) -> bool:
    return f":{PORT:04X} 00000000:0000 0A " in sh("ip", "netns", "exec", host, "cat", "/proc/net/tcp")


class Wanderer(Play):
    """One guest, two hosts, COUNT tries."""

    def __init__(self, seed: int, count: int, folder: Path, events: Events) -> None:
        super().__init__(folder, events, Report(), "vmm")
        self._chance = random.Random(seed)
        self._count = count
        self._vmms = 0
        self._at, self._elsewhere = "a", "b"

    def play(self) -> None:
        hosts()
        os.truncate(os.open(Path.home() / "workloads/written.img", os.O_CREAT | os.O_WRONLY, 0o644), WRITTEN_BYTES)
        guest = self._vmm(self._at, GUEST.source().partition("--api-socket")[0])
        guest.await_match(r"root@focal:", BOOT, "shell prompt of the guest")
        self.which_boot(guest, ANSWER)
        guest.type("verify /dev/vdc &\n")
        guest.await_match(r"verify: ok \d", ANSWER, "verified block of the third disk")
        guest.type("./equal.sh /dev/vdb\n")
        guest.await_lines("equal", 1, ANSWER)
        target = self._vmm(self._elsewhere)
        for number in range(self._count):
            if self._migrate(number, guest, target):
                guest = target
                self._at, self._elsewhere = self._elsewhere, self._at
                target = self._vmm(self._elsewhere)
        guest.type("\x03")
        self.which_boot(guest, ANSWER)
        guest.type("poweroff\n")
        self.report.destination_exit = guest.expect_end(ANSWER)

    def _vmm(self, host: str, command: str = "cloud-hypervisor ") -> Terminal:
        self._vmms += 1
        api = f"/tmp/api{self._vmms}"
        terminal = self.type(f"vmm{self._vmms}", f"ip netns exec {host} {command}--api-socket={api}")
        self.await_socket(api, terminal, ANSWER)
        return terminal

    def _migrate(self, number: int, guest: Terminal, target: Terminal) -> bool:
        """Whether the guest is at the target now. Raises DemoError when it is not whole at exactly one of the two."""
        apis = [f"/tmp/api{terminal.name.removeprefix('vmm')}" for terminal in (guest, target)]
        sky = weather(self._chance)
        cable("delay 0ms")
        listen = f"receive-migration tcp:0.0.0.0:{PORT}"
        receive = self.type(f"receive{number}", f"ch-remote --api-socket={apis[1]} {listen}")
        vmm.await_true("listener", ANSWER, lambda: listens(self._elsewhere))
        cable(sky.netem)
        url = f"tcp:{ADDRESSES[self._elsewhere]}:{PORT}"
        within = f"timeout_s={PATIENCE},timeout_strategy=cancel"
        command = f"ch-remote --api-socket={apis[0]} send-migration destination_url={url},{within}"
        send = self.type(f"send{number}", command)
        timers = self._cuts(sky)
        try:
            sent = send.await_end(MIGRATION)
        finally:
            for timer in timers:
                timer.cancel()
                timer.join()
        cable("delay 0ms")
        owner = target if sent == 0 else guest
        if sent == 0:
            received = receive.expect_end(ANSWER)
            guest.expect_end(ANSWER)
        else:
            if listens(self._elsewhere):  # they have not met: it waits for another
                sh("ch-remote", f"--api-socket={apis[1]}", "cancel-migration")
            received = receive.await_end(ANSWER)
        self._goes_on(owner, apis[1] if sent == 0 else apis[0])
        self.count()
        row = {"weather": sky.netem, "cut": sky.cut, "to": self._elsewhere, "send": sent, "receive": received}
        print(json.dumps({**row, "equal": self.report.equal, "not_equal": self.report.not_equal}), flush=True)
        if sent and not received:
            raise DemoError(f"try {number}: the source has the guest, and the destination says that it has it, too")
        return sent == 0

    def _cuts(self, sky: Weather) -> list[threading.Timer]:
        if sky.cut is None:
            return []
        begin, length = sky.cut
        timers = [threading.Timer(begin, cable, ["loss 100%"]), threading.Timer(begin + length, cable, [sky.netem])]
        for timer in timers:
            timer.start()
        return timers

    def _goes_on(self, owner: Terminal, api: str) -> None:
        state = vmm.ask(api, "vm.info").get("state")
        if state != "Running":
            raise DemoError(f"the guest at {api} is {state}, not Running\n{owner.tail()}")
        since = owner.mark()
        owner.await_match(r"(?<!not )equal", ANSWER, "checksum after the migration", since)
        owner.await_match(r"verify: ok \d", ANSWER, "verified block after the migration", since)


def main(arguments: list[str]) -> int:
    seed, count = map(int, arguments)
    return perform(lambda folder, events: Wanderer(seed, count, folder, events))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
