"""One kind of process is struck, again and again, under verified load; `python3 -m deploy.demo.faults PROCESS`.

    boot ──▶ load: fio on a disk, an echo over the card ──▶ 20 kills ──▶ 5 stops ──▶ does the load go on? ──▶ poweroff

Lost is what fio reads back wrong, and what the echo returns wrong or not at all; a new error in the log of the guest's
kernel is none, and no success either.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deploy.demo import example_faults as example
from deploy.demo import vmm
from deploy.demo.echo import Echo
from deploy.demo.example import api
from deploy.demo.play import Play, perform
from deploy.demo.report import DemoError, Events, FaultsReport, Strike
from deploy.demo.terminal import Terminal

# Seconds; they end what hangs. An API process imports for half a second, for which the loaded lab needs three quarters
# of a minute, and 20 of them are killed.
BOOT, ANSWER, CAMPAIGN = 300.0, 120.0, 1800.0
PASSES = 2  # of fio, and blocks of the echo: what must come after the last strike


class Faults(Play):
    """One guest and the strikes against one kind of its processes."""

    report: FaultsReport

    def __init__(self, process: str, folder: Path, events: Events) -> None:
        super().__init__(folder, events, FaultsReport(process=process), ("vmm", "kill", "stop"))
        self._process = process
        self._out = folder

    def play(self) -> None:
        guest = self._boot()
        self.which_boot(guest, ANSWER)
        errors = self._errors(guest)
        echo = self._start_load(guest)
        try:
            self._fleet()
            for strikes in example.STRIKES:
                self._strike(strikes)
            self._goes_on(guest, echo)
        finally:
            echo.close()
            self.report.net_bytes = echo.verified
        self.report.guest_errors = self._errors(guest) - errors
        self.which_boot(guest, ANSWER)
        self._fleet()
        self._judge(guest, echo)
        self.step("poweroff in the guest ends its VMM")
        guest.type("poweroff\n")
        self.report.vmm_exit = guest.expect_end(ANSWER)

    def _boot(self) -> Terminal:
        self.step(f"{self._process}: Debian boots")
        with open(example.LOADED, "wb") as image:
            image.truncate(example.LOADED_BYTES)
        guest = self.type("vmm", example.vmm())
        guest.await_match(r"root@focal:", BOOT, "shell prompt of the guest")
        return guest

    def _start_load(self, guest: Terminal) -> Echo:
        self.step(f"{self._process}: verified load on a disk and the network card")
        for command in (example.NETWORK, example.ECHO, example.LOAD):
            guest.type(f"{command}\n")
        guest.await_match(r"fio: ok 1\b", ANSWER, "verified pass of fio")
        try:
            echo = Echo(example.GUEST, example.ECHO_PORT, example.SEED)
        except OSError as error:
            raise DemoError(f"the guest's echo does not answer: {error}\n{guest.tail()}") from error
        self.took("until_load", self.began)
        return echo

    def _fleet(self) -> None:
        self.report.processes = vmm.ch_remote(api(1), "fleet")
        self.events.emit("fleet", name="vmm", rows=self.report.processes)

    def _strike(self, strikes: example.Strikes) -> None:
        self.step(f"{self._process}: {strikes.count} times {strikes.fault}")
        report = self._out / f"{strikes.fault}.json"
        command = example.chaos(self._process, strikes, str(self._out / "vmm.console"), str(report))
        self.type(strikes.fault, command).expect_end(CAMPAIGN)
        (row,) = json.loads(report.read_text())["rows"]
        self.report.strikes.append(
            Strike(strikes.fault, row["injected"], row["recovered"], row["median_stall_ms"], row["worst_stall_ms"])
        )
        if (row["injected"], row["recovered"]) != (strikes.count, strikes.count):
            raise DemoError(f"{self._process}: {row['recovered']} of {row['injected']} came back from {strikes.fault}")

    def _goes_on(self, guest: Terminal, echo: Echo) -> None:
        self.step(f"{self._process}: the load goes on")
        done = self._passes(guest)
        guest.await_match(rf"fio: (ok {done + PASSES}\b|BAD)", ANSWER, "verified pass of fio after the last strike")
        at = echo.verified
        vmm.await_true("echo after the last strike", ANSWER, lambda: echo.verified > at or bool(echo.failure))

    def _passes(self, guest: Terminal) -> int:
        return sum("fio: ok" in line for _, line in guest.lines)

    def _errors(self, guest: Terminal) -> int:
        """Lines of the guest's kernel that are errors."""
        since = guest.mark()
        guest.type(f"{example.ERRORS}\n")
        return int(guest.await_match(r"errors=(\d+)\.", ANSWER, "answer to the typed command", since)[1])

    def _judge(self, guest: Terminal, echo: Echo) -> None:
        """Raises DemoError at a byte or a request that is not what it should be."""
        report = self.report
        report.fio_passes = self._passes(guest)
        report.lost = sum("fio: BAD" in line for _, line in guest.lines) + bool(echo.failure)
        problems = {
            "fio has read or written wrongly": any("fio: BAD" in line for _, line in guest.lines),
            f"the echo: {echo.failure}": bool(echo.failure),
            f"{report.guest_errors} new errors in the guest's kernel log": report.guest_errors > 0,
        }
        if found := [text for text, is_so in problems.items() if is_so]:
            raise DemoError(f"{self._process}: {'; '.join(found)}\n{guest.tail()}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("faults", description="Strike one kind of process under verified load.")
    parser.add_argument("process", choices=example.PROCESSES)
    options = parser.parse_args(arguments)
    return perform(lambda folder, events: Faults(options.process, folder, events))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
