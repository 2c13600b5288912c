"""virtio-net's feature bits and configuration space (virtio 1.2, 5.1.3 and 5.1.4), for the front end and the worker.

Exactly Cloud Hypervisor's (machine page, section 3.2), so that a VM reads the same on both. `spec` is the one of the
worker (net_worker/__main__.py).

    queue      0    1    2    3   …  2N
               rx0  tx0  rx1  tx1    ctrl         N = `queue_pairs`
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

F_CSUM, F_GUEST_CSUM, F_CTRL_GUEST_OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO = 1 << 11, 1 << 12, 1 << 13, 1 << 14
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_GUEST_ANNOUNCE, F_MQ = 1 << 15, 1 << 16, 1 << 17, 1 << 21, 1 << 22
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32

S_LINK_UP, S_ANNOUNCE = 1, 2

_ALWAYS: Final = F_MAC | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE | F_MQ | F_EVENT_IDX | F_VERSION_1
_CSUM: Final = F_CSUM | F_GUEST_CSUM | F_CTRL_GUEST_OFFLOADS
_TSO: Final = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
_UFO: Final = F_GUEST_UFO | F_HOST_UFO
# What the worker can do beyond that. Cloud Hypervisor's guests are never offered it, those of a foreign front end are.
BACKEND_ONLY: Final = F_MRG_RXBUF | F_INDIRECT_DESC
# What CTRL_GUEST_OFFLOADS may switch (virtio 1.2, 5.1.6.5.6): each is its own feature bit.
GUEST_OFFLOADS: Final = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_UFO

# mac, status, max_virtqueue_pairs, mtu, speed, duplex
_CONFIG: Final = struct.Struct("<6sHHHIB")
CONFIG_SIZE: Final = 17
_HEX: Final = frozenset("0123456789abcdefABCDEF")
assert _CONFIG.size == CONFIG_SIZE


def features(spec: Mapping[str, Any]) -> int:
    """Offered features. Without checksums there is no segmentation offload (virtio 1.2, 5.1.3.1)."""
    bits = _ALWAYS | (F_MTU if spec["mtu"] is not None else 0)
    if spec["offload_csum"]:
        bits |= _CSUM | (_TSO if spec["offload_tso"] else 0) | (_UFO if spec["offload_ufo"] else 0)
    return bits


def config(spec: Mapping[str, Any], status: int) -> bytes:
    """The 17 bytes of `struct virtio_net_config`. `status`: S_LINK_UP, S_ANNOUNCE. ValueError for a bad `mac`."""
    return _CONFIG.pack(parse_mac(spec["mac"]), status, spec["queue_pairs"], spec["mtu"] or 0, 0, 0)


def parse_mac(text: str) -> bytes:
    """The six bytes of "52:54:00:12:34:56". Raises ValueError."""
    parts = text.split(":")
    if len(parts) != 6 or any(len(part) != 2 or not set(part) <= _HEX for part in parts):
        raise ValueError(f"{text!r} is no MAC address")
    return bytes.fromhex("".join(parts))
