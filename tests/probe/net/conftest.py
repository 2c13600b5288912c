"""Network devices of the whole VMM: the probe guest as a host on a TAP, in a network namespace of the test's own."""

from __future__ import annotations

import pytest

from tests.netns import network_namespace


@pytest.fixture(autouse=True)
def network():
    with network_namespace():
        yield
