"""The guest's data, seen from outside: images that the probe guest writes, and a command of the user's.

An image is looked at while the VM is paused, so that it is what the guest was told. Each sector says where it belongs,
in which write it was made, and whether it is whole (guest/pattern.py); a sector whose generation is older than at the
look before has lost a write, or got an old one back.
"""

from __future__ import annotations

import os
import struct
import subprocess
from typing import Final

from guest.pattern import MAGIC, SECTOR, decode
from shared.errors import FlotillaError, HostError

COMMAND_SECONDS: Final = 300.0
_HEADER: Final = struct.Struct("<4Q")


class Lost(FlotillaError):
    """Data of the guest's is not what it should be."""


class Image:
    """One raw image of `mode=blkload`. Sectors that were never written, or zeroed by the guest, are not judged."""

    def __init__(self, path: str) -> None:
        """Raises HostError when it can't be read."""
        self.path = path
        self._seen: dict[int, tuple[int, int]] = {}  # sector: generation and seed
        self.sectors = 0
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise HostError(f"--verify {path}: {error.strerror}") from error

    def look(self) -> int:
        """The number of the guest's sectors that are right. Raises Lost for the first one that is not."""
        found: dict[int, tuple[int, int]] = {}
        try:
            with open(self.path, "rb") as file:
                for start in range(0, os.fstat(file.fileno()).st_size, 1 << 20):
                    chunk = file.read(1 << 20)
                    for at in range(0, len(chunk) - SECTOR + 1, SECTOR):
                        self._judge((start + at) // SECTOR, chunk, at, found)
        except OSError as error:
            raise HostError(f"--verify {self.path}: {error.strerror}") from error
        self._seen, self.sectors = found, len(found)
        return self.sectors

    def _judge(self, number: int, chunk: bytes, at: int, found: dict[int, tuple[int, int]]) -> None:
        magic, said, generation, seed = _HEADER.unpack_from(chunk, at)
        if magic != MAGIC:
            return
        found[number] = (generation, seed)
        before = self._seen.get(number)
        if before == (generation, seed):
            return  # judged when it was new
        if said != number:
            raise Lost(f"{self.path}: sector {number} holds sector {said}")
        try:
            decode(chunk[at : at + SECTOR])
        except ValueError as error:
            raise Lost(f"{self.path}: {error}") from None
        if before is not None and before[1] == seed and generation < before[0]:
            raise Lost(f"{self.path}: sector {number} has generation {generation}, and had {before[0]}")


def run_command(command: str) -> None:
    """The user's own check. Raises Lost when it ends with anything but 0."""
    try:
        done = subprocess.run(command, shell=True, timeout=COMMAND_SECONDS, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise Lost(f"--verify-command: not done within {COMMAND_SECONDS:.0f} s") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-300:]
        raise Lost(f"--verify-command ended with {done.returncode}: {said or 'it said nothing'}")
