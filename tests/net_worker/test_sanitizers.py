"""The native loop built with sanitizers, under the storm of stress.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sanitized import FLAGS, run_sanitized


@pytest.mark.parametrize("name", FLAGS)
def test_storm(name: str, tmp_path: Path) -> None:
    assert int(run_sanitized("net", name, tmp_path, "tests.net_worker.stress", 2)) > 100
