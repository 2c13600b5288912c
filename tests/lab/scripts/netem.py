"""Debian moves between two network namespaces while netem makes the cable bad: `python3 netem.py SEED COUNT`.

A migration that arrives takes the guest to the other host; one that fails leaves it running where it is, and the same
VMM receives the next try. A line of JSON for each on stdout: weather, cut, to, exit codes, checksums.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from deploy.demo import example, vmm
from deploy.demo.example import Example, Way
from deploy.demo.inside import ANSWER, Local
from deploy.demo.play import perform
from deploy.demo.report import DemoError, Events
from deploy.demo.terminal import Terminal

ADDRESSES = {"a": "192.168.50.11", "b": "192.168.50.12"}
MIGRATION = 400.0
# What the source is told to wait at most: with 36 ms of delay and 3 % of loss, TCP carries some 100 KB/s.
PATIENCE = 90
GUEST = Example(cpus=1, memory="512M", disks=3, cmdline="root=/dev/vda1 console=ttyS0 quiet")
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
    return f":{example.PORT:04X} 00000000:0000 0A " in sh("ip", "netns", "exec", host, "cat", "/proc/net/tcp")


class Cut:
    """`with Cut(weather):` the cable is cut as it says. What is still to come at the end does not come.

    Raises DemoError at the end when a `tc` has failed.
    """

    def __init__(self, sky: Weather) -> None:
        self._failed: list[DemoError] = []
        self._timers: list[threading.Timer] = []
        if sky.cut is not None:
            begin, length = sky.cut
            self._timers = [threading.Timer(after, self._becomes, [netem]) for after, netem in
                            ((begin, "loss 100%"), (begin + length, sky.netem))]  # fmt: skip

    def _becomes(self, netem: str) -> None:
        try:
            cable(netem)
        except DemoError as error:  # in a thread that nobody asks
            self._failed.append(error)

    def __enter__(self) -> None:
        for timer in self._timers:
            timer.start()

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()
        if self._failed:
            raise self._failed[0]


class Wanderer(Local):
    """One guest, two hosts, COUNT tries."""

    def __init__(self, seed: int, count: int, folder: Path, events: Events) -> None:
        super().__init__(GUEST, count, 1, Way.TCP, folder, events)
        self._chance = random.Random(seed)
        self._at, self._elsewhere = "a", "b"

    def play(self) -> None:
        hosts()
        guest = self._boot()
        self.which_boot(guest, ANSWER)
        self._start_load(guest)
        here, there = 1, 2
        target = self._destination(there)
        for number in range(self._hops):
            if self._migrate(number, here, there, guest, target):
                guest, here, there = target, there, there + 1
                self._at, self._elsewhere = self._elsewhere, self._at
                target = self._destination(there)
        self._check_load(guest)
        self._power_off(guest)

    def _vmm(self, number: int, command: str) -> Terminal:
        """The first has the guest; each of the others waits for it where it is not."""
        host = self._at if number == 1 else self._elsewhere
        return super()._vmm(number, f"ip netns exec {host} {command} -vv")

    def _migrate(self, number: int, here: int, there: int, guest: Terminal, target: Terminal) -> bool:
        """Whether the guest is at the target now. Raises DemoError when it is not whole at exactly one of the two."""
        source, destination = example.api(here), example.api(there)
        sky = weather(self._chance)
        cable("delay 0ms")
        receive = self.type(f"receive{number}", example.receive(there, Way.TCP))
        try:
            vmm.await_true("listener", ANSWER, lambda: listens(self._elsewhere))
        except DemoError as error:
            raise DemoError(f"{error}\n{receive.tail()}\n{target.tail()}") from error
        cable(sky.netem)
        url = f"tcp:{ADDRESSES[self._elsewhere]}:{example.PORT}"
        within = f"timeout_s={PATIENCE},timeout_strategy=cancel"
        command = f"ch-remote --api-socket={source} send-migration destination_url={url},{within}"
        send = self.type(f"send{number}", command)
        with Cut(sky):
            sent = send.await_end(MIGRATION)
        cable("delay 0ms")
        owner = target if sent == 0 else guest
        if sent == 0:
            received = receive.expect_end(ANSWER)
            guest.expect_end(ANSWER)
        else:
            if listens(self._elsewhere):  # they have not met: it waits for another
                sh("ch-remote", f"--api-socket={destination}", "cancel-migration")
            received = receive.await_end(ANSWER)
        self._goes_on(owner, destination if sent == 0 else source)
        self.count()
        row = {"weather": sky.netem, "cut": sky.cut, "to": self._elsewhere, "send": sent, "receive": received}
        print(json.dumps({**row, "equal": self.report.equal, "not_equal": self.report.not_equal}), flush=True)
        if sent and not received:
            raise DemoError(f"try {number}: the source has the guest, and the destination says that it has it, too")
        return sent == 0

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
