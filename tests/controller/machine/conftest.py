"""Guest RAM for the tests of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controller.machine.layout import Layout, compute
from shared.memory import GuestMemory

RAM_SIZE = 64 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory.create(RAM_SIZE)
    yield ram
    ram.close()


@pytest.fixture
def layout() -> Layout:
    return compute(RAM_SIZE, 46)
