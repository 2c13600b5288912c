"""A host VM of the nested example: a root shell on its serial port, and windows for what runs on behind it."""

from __future__ import annotations

import base64
import binascii
import json
import re
import shlex
from typing import Any

from deploy.demo.report import DemoError, Events
from deploy.demo.terminal import Terminal

PROMPT = "root@{name}:"
ASK_SECONDS = 120.0
_TEXT_WIDTH = 400


class HostVm:
    """Commands are typed at the serial port, one after the other; a window's lines come between theirs."""

    def __init__(self, name: str, terminal: Terminal, events: Events) -> None:
        self.name = name
        self.terminal = terminal
        self._events = events

    def await_prompt(self, seconds: float) -> None:
        self.terminal.await_match(PROMPT.format(name=self.name), seconds, "shell prompt")
        self.terminal.type("stty cols 200\n")

    def run(self, command: str, seconds: float) -> str:
        """What a command shows, whatever windows said meanwhile among it. Raises DemoError unless it ends with 0."""
        self._events.emit("command", name=self.name, text=command)
        return self.ask(command, seconds)

    def ask(self, command: str, seconds: float) -> str:
        """The same for what is no part of the example: nobody is told."""
        since = self.terminal.mark()
        self.terminal.type(f"{command}; echo status=$?\n")
        match = self.terminal.await_match(r"status=(\d+)", seconds, f"end of {command}", since)
        if match[1] != "0":
            raise DemoError(f"{self.name}: exit code {match[1]}: {command}\n{self.terminal.tail()}")
        return self.terminal.text(since)

    def api(self, path: str, endpoint: str, seconds: float) -> Any:
        """The JSON that an API socket answers, by socat, which costs an emulated machine less than a ch-remote."""
        request = f"printf 'GET /api/v1/{endpoint} HTTP/1.0\\r\\n\\r\\n'"
        connect = f"socat -t {seconds:.0f} - UNIX-CONNECT:{path},shut-none"
        return self.json(f"{request} | {connect} | sed '1,/^\\r$/d'", seconds)

    def json(self, command: str, seconds: float) -> Any:
        """The JSON that a command prints, brought here as text that no window's line can break."""
        said = self.ask(f"{command} | base64 -w {_TEXT_WIDTH} | sed 's/^/answer= /'", seconds)
        text = "".join(re.findall(r"answer= ([A-Za-z0-9+/=]{4,})", said))  # not the echo
        try:
            return json.loads(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise DemoError(f"{self.name}: no JSON from {command}\n{self.terminal.tail()}") from None

    def await_path(self, test: str, seconds: float) -> None:
        """Until a shell test is true: `-S /tmp/sock`."""
        self.ask(f"until [ {test} ]; do sleep 0.3; done", seconds)

    # Windows -------------------------------------------------------------------------------------------------------

    def window(self, name: str, command: str) -> None:
        """Start what runs on."""
        self._events.emit("command", name=f"{self.name} {name}", text=command)
        self.ask(f"./window {name} {shlex.quote(command)}", ASK_SECONDS)

    def type(self, name: str, text: str) -> None:
        """Type into a window; control characters must not get into the serial port's own shell."""
        octal = "".join(f"\\{ord(letter):03o}" for letter in text)
        self.ask(f"printf '{octal}' > \"${{WINDOWS:-/tmp}}/{name}\"", ASK_SECONDS)

    def await_text(self, name: str, pattern: str, seconds: float, since: int = 0) -> re.Match[str]:
        """Wait for text in a window's lines. Raises DemoError."""
        return self.terminal.await_match(rf"{name}\| .*?{pattern}", seconds, f"{pattern!r} in window {name}", since)

    def await_lines(self, name: str, line: str, count: int, seconds: float) -> None:
        """A window may begin to speak where the shell has just written its prompt."""
        self.terminal.await_lines(f"{name}| {line}", count, seconds, after_anything=True)

    def expect_end(self, name: str, seconds: float) -> int:
        """The exit code of a window's command, which has to be 0. Raises DemoError."""
        code = int(self.await_text(name, r"window closes with (\d+)", seconds)[1])
        if code:
            raise DemoError(f"{self.name}: window {name} ended with {code}\n{self.terminal.tail()}")
        return code

    def times(self, name: str, line: str) -> list[float]:
        """When a window showed a line; CLOCK_MONOTONIC."""
        return [time for time, text in self.terminal.lines if text.endswith(f"{name}| {line}")]
