"""virtio-net's feature bits and configuration space against the measured ones of Cloud Hypervisor."""

from __future__ import annotations

from typing import Any

import pytest

from shared import virtio_net

SPEC: dict[str, Any] = {
    "mac": "12:34:56:78:90:ab", "mtu": 1400, "queue_pairs": 2, "queue_size": 256,
    "offload_tso": True, "offload_ufo": True, "offload_csum": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("off", "bits"),
    [
        ({}, 0x1_2063_7FAF),
        ({"offload_csum": False}, 0x1_2063_0028),
        ({"offload_tso": False}, 0x1_2063_442F),
        ({"offload_ufo": False}, 0x1_2063_3BAF),
        ({"mtu": None}, 0x1_2063_7FA7),
    ],
    ids=str,
)
def test_features(off: dict[str, Any], bits: int) -> None:
    assert virtio_net.features(SPEC | off) == bits


def test_config_space() -> None:
    assert virtio_net.config(SPEC | {"mtu": 1400}, 0).hex(" ") == "12 34 56 78 90 ab 00 00 02 00 78 05 00 00 00 00 00"
    status = virtio_net.S_LINK_UP | virtio_net.S_ANNOUNCE
    assert virtio_net.config(SPEC, status)[6:8] == b"\3\0"


@pytest.mark.parametrize(
    "text", ["", "12:34:56:78:90", "12:34:56:78:90:ab:c", "12:34:56:78:90:xy", "123:4:56:78:90:ab", "+1:34:56:78:90:ab"]
)
def test_mac_that_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        virtio_net.parse_mac(text)
