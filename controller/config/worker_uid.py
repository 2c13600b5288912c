"""`--worker-uid UID` and `--worker-uid base=UID`: which users worker processes run as."""

from __future__ import annotations

from shared.errors import ConfigError
from shared.records import Record
from shared.typed import Final

# So many with `base=`: more than a VM can have devices, and its API, metrics and migration processes.
USERS: Final = 256
LAST: Final = 2**32 - 2  # 2**32 - 1 means "no change" to setresuid(2)
FORM: Final = "give --worker-uid UID, the user of all of them, or base=UID, the first of 256 users"


class WorkerUid(Record):
    """`first` and, if `each` process has its own, the USERS - 1 behind it."""

    first: int
    each: bool = False

    @property
    def last(self) -> int:
        return self.first + (USERS - 1 if self.each else 0)

    @property
    def flag(self) -> str:
        """As the user wrote it."""
        return f"--worker-uid {'base=' if self.each else ''}{self.first}"


def parse(text: str) -> WorkerUid:
    """Raises ConfigError."""
    number = text.removeprefix("base=")
    each = number != text
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(f"Error parsing --worker-uid {text}: {number!r} is no user id", FORM)
    if len(number) > len(str(LAST)) or WorkerUid(int(number), each).last > LAST:
        raise ConfigError(f"Error parsing --worker-uid {text}: user ids end at {LAST}", FORM)
    if int(number) == 0:
        raise ConfigError(f"Error parsing --worker-uid {text}: 0 is root, which workers are to be no longer", FORM)
    return WorkerUid(int(number), each)
