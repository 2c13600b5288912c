"""The guest's data, seen from outside: images that the probe guest writes, and a command of the user's.

An image is looked at while the VM is paused, so that it is what the guest was told. Each sector says where it belongs,
in which write it was made, and whether it is whole (guest/pattern.py); a sector whose generation is older than at the
look before has lost a write, or got an old one back.

A guest that writes nothing loses nothing: before each look it must have written something more, and always with the
same seed, which is the run's.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import Final

from guest.pattern import SECTOR, Sector, decode, header
from shared.errors import FlotillaError, HostError

COMMAND_SECONDS: Final = 300.0
SAID_BYTES: Final = 300
_ZERO: Final = bytes(SECTOR)


class Lost(FlotillaError):
    """Data of the guest's is not what it should be."""


class BegunAnew(FlotillaError):
    """The guest that writes is not the one that wrote before: it was reset."""


class Image:
    """One raw image of `mode=blkload`. Not judged: what was never written by the guest, and what it has zeroed."""

    def __init__(self, path: str) -> None:
        """Raises HostError when it can't be read."""
        self.path = path
        self._seen: dict[int, Sector] = {}  # by the last look
        self._noted: dict[int, Sector] = {}  # by note()
        self._before: dict[int, Sector] | None = None  # by the first note() or the last look
        self._seed: int | None = None  # of the guest that writes
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise HostError(f"--verify {path}: {error.strerror}") from error

    def note(self) -> None:
        """What is there now, for wrote(). The VM may run: nothing is judged. Raises HostError."""
        self._noted = {}
        for number, data in self._sectors():
            if (sector := header(data)) and sector.number == number:
                self._noted[number] = sector
        if self._before is None:
            self._before = self._noted

    def wrote(self) -> bool:
        """Whether the guest has written since note(). The VM may run. Raises HostError."""
        for number, data in self._sectors():
            sector = header(data)
            if sector is None or sector.number != number or sector == self._noted.get(number):
                continue
            try:
                decode(data)
            except ValueError:
                continue  # it is being written
            if self._seed is None:
                self._seed = sector.seed
            return True
        return False

    def look(self) -> int:
        """The number of the guest's sectors that are right. Raises Lost for the first one that is not, BegunAnew, and
        HostError."""
        found: dict[int, Sector] = {}
        for number, data in self._sectors():
            if sector := self._judge(number, data):
                found[number] = sector
        if self._seed is not None and self._before is not None:
            for number, sector in found.items():
                if sector.seed != self._seed and sector != self._before.get(number):
                    raise BegunAnew(f"{self.path}: the guest was reset: sector {number} was written with seed "
                                    f"{sector.seed}, and the campaign began with {self._seed}")  # fmt: skip
        self._seen = self._before = found
        return len(found)

    def _sectors(self) -> Iterator[tuple[int, bytes]]:
        """Those that hold anything, with their numbers. Raises HostError."""
        try:
            with open(self.path, "rb") as file:
                for start in range(0, os.fstat(file.fileno()).st_size, 1 << 20):
                    chunk = file.read(1 << 20)
                    for at in range(0, len(chunk) - SECTOR + 1, SECTOR):
                        if (data := chunk[at : at + SECTOR]) != _ZERO:
                            yield (start + at) // SECTOR, data
        except OSError as error:
            raise HostError(f"--verify {self.path}: {error.strerror}") from error

    def _judge(self, number: int, data: bytes) -> Sector | None:
        """What lies there; None: nothing of the guest's. Raises Lost."""
        try:
            sector = decode(data)
        except ValueError as error:
            raise Lost(f"{self.path}: at sector {number}: {error}") from None
        before = self._seen.get(number)
        if sector is None:
            if before is not None:
                raise Lost(f"{self.path}: sector {number} is no sector of the guest's, and had generation "
                           f"{before.generation}")  # fmt: skip
        elif sector.number != number:
            raise Lost(f"{self.path}: sector {number} holds sector {sector.number}")
        elif before is not None and before.seed == sector.seed and sector.generation < before.generation:
            raise Lost(f"{self.path}: sector {number} has generation {sector.generation}, and had {before.generation}")
        return sector


def run_command(command: str) -> None:
    """The user's own check. Raises Lost when it ends with anything but 0, or not in time: then all of it is ended.

    Into a file, so that nothing is waited for but the command: what it leaves in the background may hold a pipe.
    """
    with (
        TemporaryFile() as output,
        subprocess.Popen(
            command, shell=True, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            status = process.wait(COMMAND_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Lost(f"--verify-command: not done within {COMMAND_SECONDS:.0f} s") from None
            raise
        if status:
            output.seek(max(0, output.seek(0, os.SEEK_END) - SAID_BYTES))
            said = " ".join(output.read().decode(errors="replace").split())
            raise Lost(f"--verify-command ended with {status}: {said or 'it said nothing'}")
