"""The argument of `add-net` to the body of vm.add-net: option string to Cloud Hypervisor's NetConfig."""

from __future__ import annotations

from typing import Any, Final

from shared.grammar import Converter, choice, integer, not_yet, parse, path, string, toggle

_NET: Final[dict[str, Converter]] = {
    **dict.fromkeys(("tap", "ip", "mask", "mac", "host_mac", "id"), string),
    **dict.fromkeys(("mtu", "num_queues", "queue_size", "pci_device_id", "pci_segment"), integer),
    **dict.fromkeys(("vhost_user", "offload_tso", "offload_ufo", "offload_csum", "iommu"), toggle),
    "socket": path,
    "vhost_mode": choice(client="Client", server="Server"),
    "fd": not_yet(),  # it would have to travel with the request
}
_FIELDS: Final = {"socket": "vhost_socket"}


def net_body(text: str) -> dict[str, Any]:
    """Only what was given: the VMM knows the defaults, and judges the values. Raises ConfigError."""
    return {_FIELDS.get(key, key): value for key, value in parse(text, _NET).items()}
