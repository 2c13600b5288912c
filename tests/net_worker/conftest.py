from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.network import Network


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()
