"""What every example needs: commands typed at terminals, steps told to whoever watches, and a report at the end.

Events go to the file that $EVENTS names (report.py), the report to $OUT/report.json, consoles and stderr to $OUT.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from deploy.demo import vmm
from deploy.demo.report import DemoError, Events, Report, TooLate
from deploy.demo.terminal import Terminal

PRESSES = 4
# What a person types to learn which boot this is; the echo of the typed line does not match the pattern.
WHICH_BOOT = "echo boot=$(cat /proc/sys/kernel/random/boot_id) up=$(cut -d' ' -f1 /proc/uptime)\n"
BOOT_PATTERN = r"boot=([0-9a-f-]{36}) up=([0-9]+\.[0-9]{2})"  # whole, also when the line comes in pieces


class Play(ABC):
    """One example; a subclass says in `play` what is done. `consoles`: whose lines are shown, by how names begin."""

    def __init__(self, folder: Path, events: Events, report: Report, consoles: str | tuple[str, ...]) -> None:
        self._folder = folder
        self._consoles = consoles
        self._terminals: list[Terminal] = []
        self.events = events
        self.report = report
        self.began = time.monotonic()

    @abstractmethod
    def play(self) -> None:
        """Raises DemoError."""

    def run(self) -> None:
        """Raises DemoError; the report is filled as far as it went."""
        try:
            self.play()
        finally:
            self.count()
            for terminal in reversed(self._terminals):
                terminal.close()
            self.report.sum_up()
            self.took("all", self.began)
        self.report.ok = True

    def took(self, what: str, since: float) -> None:
        self.report.seconds[what] = round(time.monotonic() - since, 1)

    def type(self, name: str, command: str, cwd: str = "") -> Terminal:
        """Start a command at a terminal of its own, in a folder below the home folder."""
        self.events.emit("command", name=name, text=command)
        terminal = Terminal(name, command, self._folder, self._line, Path.home() / cwd)
        self._terminals.append(terminal)
        return terminal

    def _line(self, name: str, line: str) -> None:
        if name.startswith(self._consoles):
            self.events.emit("console", name=name, line=line)

    def step(self, text: str) -> None:
        self.events.emit("step", text=text)

    def await_socket(self, path: str, owner: Terminal, seconds: float) -> None:
        def there() -> bool:
            if owner.process.poll() is not None:
                raise DemoError(f"{owner.name} ends with {owner.await_end(1)}: {owner.command}\n{owner.tail()}")
            return Path(path).is_socket()

        vmm.await_true(f"socket {path} of {owner.name}", seconds, there)

    def which_boot(self, guest: Terminal, seconds: float) -> None:
        """Ask at the guest's own console. Raises DemoError, as booted() does."""
        since = guest.mark()
        guest.type(WHICH_BOOT)
        match = guest.await_match(BOOT_PATTERN, seconds, "answer to the typed command", since)
        self.booted(match[1], match[2])

    def interrupt(self, press: Callable[[], None], ask: Callable[[float], None], seconds: float) -> None:
        """Ctrl-C into a shell's loop, and again when the shell does not answer: as a person does it. Raises as `ask`.

        bash takes a Ctrl-C that comes as the loop's command ends for that command's own, and goes on. What was typed
        behind it is gone with the next one, which empties the terminal's input.
        """
        for left in reversed(range(PRESSES)):
            press()
            try:
                ask(seconds / PRESSES)
                return
            except TooLate:
                if not left:
                    raise

    def booted(self, boot_id: str, uptime: str) -> None:
        """Note an answer to WHICH_BOOT. Raises DemoError when the guest is not the one that it was before."""
        boots, uptimes = self.report.boot_id, self.report.uptime_s
        boots.append(boot_id)
        uptimes.append(float(uptime))
        if len(set(boots)) != 1 or uptimes != sorted(uptimes):
            raise DemoError(f"the guest did not go on: boot_id {boots}, uptime {uptimes}")

    def count(self) -> None:
        """What the guest's checksums have said so far, at all terminals."""
        lines = [line for terminal in self._terminals for _, line in terminal.lines]
        self.report.equal = sum(line == "equal" or line.endswith("| equal") for line in lines)
        self.report.not_equal = sum("not equal" in line or "verify: BAD" in line for line in lines)
        self.report.verified = sum("verify: ok" in line for line in lines)


@contextlib.contextmanager
def _output_folder() -> Iterator[Path]:
    if "OUT" in os.environ:
        yield Path(os.environ["OUT"])
        return
    with tempfile.TemporaryDirectory(prefix="flotilla-demo.") as folder:
        yield Path(folder)


def perform(make: Callable[[Path, Events], Play]) -> int:
    """Run an example: 0 if everything is as the document says, 1 (with all that is known on stderr) if not."""
    events = Events(os.environ.get("EVENTS"))
    events.emit("start")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # every VMM ends with us
    with _output_folder() as folder:
        play = make(folder, events)
        try:
            play.run()
        except DemoError as error:
            play.report.failure = str(error).splitlines()[0]
            events.emit("failure", text=str(error))
            print(f"demo: {error}", file=sys.stderr)
        report = asdict(play.report)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        events.emit("report", report=report)
    return 0 if play.report.ok else 1
