"""The guest's data, seen from outside: images that the probe guest writes, and a command of the user's.

An image is looked at while the VM is paused, so that it is what the guest was told. Each sector says where it belongs,
in which write it was made, and whether it is whole (guest/pattern.py); a sector whose generation is older than at the
look before has lost a write, or got an old one back.
"""

from __future__ import annotations

import os
import signal
import subprocess
from tempfile import TemporaryFile
from typing import Final

from guest.pattern import SECTOR, Sector, decode
from shared.errors import FlotillaError, HostError

COMMAND_SECONDS: Final = 300.0
SAID_BYTES: Final = 300
_ZERO: Final = bytes(SECTOR)


class Lost(FlotillaError):
    """Data of the guest's is not what it should be."""


class Image:
    """One raw image of `mode=blkload`. Not judged: what was never written by the guest, and what it has zeroed."""

    def __init__(self, path: str) -> None:
        """Raises HostError when it can't be read."""
        self.path = path
        self._seen: dict[int, Sector] = {}
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise HostError(f"--verify {path}: {error.strerror}") from error

    def look(self) -> int:
        """The number of the guest's sectors that are right. Raises Lost for the first one that is not."""
        found: dict[int, Sector] = {}
        try:
            with open(self.path, "rb") as file:
                for start in range(0, os.fstat(file.fileno()).st_size, 1 << 20):
                    chunk = file.read(1 << 20)
                    for at in range(0, len(chunk) - SECTOR + 1, SECTOR):
                        number = (start + at) // SECTOR
                        if sector := self._judge(number, chunk[at : at + SECTOR]):
                            found[number] = sector
        except OSError as error:
            raise HostError(f"--verify {self.path}: {error.strerror}") from error
        self._seen = found
        return len(found)

    def _judge(self, number: int, data: bytes) -> Sector | None:
        """What lies there; None: nothing of the guest's. Raises Lost."""
        if data == _ZERO:
            return None
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
