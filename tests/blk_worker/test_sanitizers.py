"""The native loop built with sanitizers, under the storm of stress.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.blk_worker.rig import image
from tests.blk_worker.stress import SECTORS
from tests.sanitized import FLAGS, run_sanitized


@pytest.mark.parametrize("name", FLAGS)
def test_storm(name: str, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk.raw", SECTORS)
    assert int(run_sanitized("blk", name, tmp_path, "tests.blk_worker.stress", disk, 2)) > 100
