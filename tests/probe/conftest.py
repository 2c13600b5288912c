"""VMMs that the tests of bad input send their requests to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.probe.requests import goes_on
from tests.vmm import Vmm


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Vmm]:
    """A VMM without a VM."""
    with Vmm(tmp_path) as made:
        made.wait_api()
        yield made


@pytest.fixture
def ticking(tmp_path: Path) -> Iterator[Vmm]:
    """A VMM whose guest says so ten times a second; at the end it must still do so."""
    with Vmm.guest(tmp_path, "mode=tick", name="running") as made:
        made.expect(r"tick \d")
        made.wait_api()
        yield made
        goes_on(made)
