"""A kernel or initramfs file, or a part of one, as something that can be read in bounded pieces.

Offsets and lengths that come out of a file are never trusted: a read outside the file is a HostError, and nothing is
allocated before the range is known to exist.
"""

from __future__ import annotations

import os
import stat

from shared.errors import HostError
from shared.records import NamedTuple

# The kernel cuts a single read at 0x7ffff000 bytes.
MAX_READ = 1 << 30


class Payload(NamedTuple):
    """`size` bytes of the open file `fd` from `start` on. `name` is how errors call it: flag, path, section."""

    fd: int
    name: str
    start: int
    size: int

    def part(self, offset: int, size: int, label: str) -> Payload:
        """A range of this payload. Raises HostError if it does not lie within."""
        self._check(offset, size, label)
        return Payload(self.fd, f"{self.name} ({label})", self.start + offset, size)

    def read(self, offset: int, size: int, label: str) -> bytes:
        """Exactly `size` bytes; `label` names them in the HostError when the payload is too short."""
        self._check(offset, size, label)
        data = os.pread(self.fd, size, self.start + offset)
        if len(data) != size:
            raise HostError(f"{self.name}: the file shrank while {label} was read")
        return data

    def head(self, size: int) -> bytes:
        """At most the first `size` bytes."""
        return os.pread(self.fd, min(size, self.size), self.start)

    def read_into(self, offset: int, target: memoryview, label: str) -> None:
        """Fill `target` (guest RAM) straight from the file."""
        self._check(offset, len(target), label)
        position = self.start + offset
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fd, [target[done : done + MAX_READ]], position + done)
            except OSError as error:
                raise HostError(f"{self.name}: {label} can't be read: {error.strerror}") from error
            if count == 0:
                raise HostError(f"{self.name}: the file shrank while {label} was read")
            done += count

    def _check(self, offset: int, size: int, label: str) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise HostError(
                f"{self.name}: {label} should be {size} bytes at offset {offset}, but there are only {self.size} bytes",
                "the file is damaged or cut short",
            )


class OpenPayload:
    """The file that `flag` names, as a context. Raises HostError if it is missing, unreadable, empty or no file."""

    def __init__(self, flag: str, path: str) -> None:
        name = f"{flag} {path}"
        try:
            # A FIFO would block the open until somebody writes to it.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise HostError(f"{name}: no such file") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise HostError(f"{name}: can't be opened: {reason}") from error
        try:
            self._payload = Payload(self._fd, name, 0, _size(self._fd, name))
        except HostError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Payload:
        return self._payload

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _size(fd: int, name: str) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise HostError(f"{name}: is a directory, not a file")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise HostError(f"{name}: is neither a regular file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        raise HostError(f"{name}: is empty")
    return size
