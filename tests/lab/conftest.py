"""Tests in the lab: each is marked `lab`, has minutes instead of seconds, and says why where there is no lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import floors
from tests.lab.lab import Lab

HERE = Path(__file__).resolve().parent
LIMIT = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LIMIT))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    if reason := floors.lab_missing():
        pytest.skip(f"no lab: {reason}")
    return Lab(tmp_path_factory.mktemp("lab"))
