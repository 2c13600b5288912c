"""A command typed at a terminal of its own: what it shows, with times, and what is typed into it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deploy.demo.report import DemoError, TooLate

ROWS, COLUMNS = 50, 200
TAIL = 3000
END_SECONDS = 30.0
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])|[\x00-\x08\x0b-\x1a\x1c-\x1f]")


def plain(text: str) -> str:
    """Without colours, cursor movements and other control characters."""
    return _ESCAPE.sub("", text)


class Terminal:
    """`bash -c COMMAND` from `cwd` (the home folder) on a pseudo-terminal. bash becomes a lone program: `pid` is its.

    What the program writes to stderr goes to a file, so that a guest's console stays what the guest wrote.
    """

    def __init__(
        self, name: str, command: str, folder: Path, on_line: Callable[[str, str], None], cwd: Path | None = None
    ) -> None:
        """`folder` gets copies of all that is shown. `on_line(name, line)` hears of each line, in a thread of ours."""
        self.name = name
        self.command = command
        self._on_line = on_line
        self._errors = folder / f"{name}.stderr"
        self._copy = folder / f"{name}.console"
        self._text = ""
        self._bell = threading.Condition()
        self._closed = False
        self.lines: list[tuple[float, str]] = []  # CLOCK_MONOTONIC of its last byte, text
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        try:
            with open(self._errors, "wb") as errors:
                self.process = subprocess.Popen(
                    ["setsid", "-c", "bash", "-c", command], stdin=slave, stdout=slave, stderr=errors,
                    cwd=cwd or Path.home(),
                )  # fmt: skip
        finally:
            os.close(slave)
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        line = ""
        with open(self._copy, "wb") as copy:
            while True:
                try:
                    data = os.read(self._master, 65536)
                except OSError:  # EIO: nobody has the terminal open any more
                    data = b""
                if not data:
                    break
                copy.write(data)
                copy.flush()
                now, text = time.monotonic(), decoder.decode(data)
                *complete, line = (line + text).split("\n")
                with self._bell:
                    self._text += text
                    self.lines += [(now, plain(each).strip()) for each in complete]
                    self._bell.notify_all()
                for each in complete:
                    self._on_line(self.name, plain(each).rstrip())
        with self._bell:
            self._closed = True
            self._bell.notify_all()

    def type(self, text: str) -> None:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._master, data) :]

    def mark(self) -> int:
        """The present end of what was shown, for `since`."""
        with self._bell:
            return len(self._text)

    def text(self, since: int = 0) -> str:
        """What was shown after a mark, as it came."""
        with self._bell:
            return self._text[since:]

    def await_match(self, pattern: str, seconds: float, what: str, since: int = 0) -> re.Match[str]:
        """Wait until a pattern is on the terminal after `since`. Raises TooLate; DemoError when the program ended."""
        with self._bell:
            found: list[re.Match[str]] = []

            def arrived() -> bool:
                found[:] = [match for match in [re.compile(pattern).search(self._text, since)] if match]
                return bool(found) or self._closed

            in_time = self._bell.wait_for(arrived, seconds)
        if found:
            return found[0]
        if in_time:
            raise DemoError(f"{self.name}: no {what}: its program has ended\n{self.tail()}")
        raise TooLate(f"{self.name}: no {what}: not within {seconds:.0f} s\n{self.tail()}")

    def await_lines(self, line: str, count: int, seconds: float, *, after_anything: bool = False) -> None:
        """Wait for so many lines that are exactly this, or that end with it."""

        def seen() -> int:
            return sum(text == line or (after_anything and text.endswith(line)) for _, text in self.lines)

        with self._bell:
            self._bell.wait_for(lambda: seen() >= count or self._closed, seconds)
        if seen() < count:
            wanted = f"{seen()} lines {line!r} instead of {count} within {seconds:.0f} s"
            raise DemoError(f"{self.name}: {wanted}\n{self.tail()}")

    def await_end(self, seconds: float) -> int:
        """The exit code of the program. Raises DemoError when it runs on."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{self.name} still runs after {seconds:.0f} s: {self.command}\n{self.tail()}") from None
        self._reader.join(END_SECONDS)
        return code

    def expect_end(self, seconds: float) -> int:
        """The same; any exit code but 0 raises DemoError."""
        if code := self.await_end(seconds):
            raise DemoError(f"{self.name} ends with {code}: {self.command}\n{self.tail()}")
        return 0

    def tail(self) -> str:
        """The ends of what it showed and of its stderr."""
        parts = []
        for title, text in (("terminal", plain(self._text)), ("stderr", self._errors.read_text(errors="replace"))):
            if text.strip():
                parts.append(f"---- {self.name}, end of its {title}:\n{text[-TAIL:].strip()}")
        return "\n".join(parts)

    def close(self) -> None:
        """End the program if it still runs, as closing the window would, then by force."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(END_SECONDS)
        os.close(self._master)
