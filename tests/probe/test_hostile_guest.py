"""A guest that programs every device at random (guest/mode_fuzz.c): the VMM lives, answers, and reboots it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.guest import campaign

pytestmark = pytest.mark.probe

STEPS = 1500


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_programming_of_all_devices_costs_at_most_those(tmp_path: Path, seed: int) -> None:
    campaign(tmp_path, seed, STEPS)
