"""The argument of `add-net` to the body of vm.add-net, and the descriptors that go with it.

The option string becomes Cloud Hypervisor's NetConfig without `fds`: numbers of ours mean nothing to the VMM, so the
descriptors themselves travel (SCM_RIGHTS).
"""

from __future__ import annotations

import os
from typing import Any, Final

from shared.errors import HostError
from shared.grammar import Converter, choice, integer, integer_list, parse, path, string, toggle

_NET: Final[dict[str, Converter]] = {
    **dict.fromkeys(("tap", "ip", "mask", "mac", "host_mac", "id"), string),
    **dict.fromkeys(("mtu", "num_queues", "queue_size", "pci_device_id", "pci_segment"), integer),
    **dict.fromkeys(("vhost_user", "offload_tso", "offload_ufo", "offload_csum", "iommu"), toggle),
    "socket": path,
    "vhost_mode": choice(client="Client", server="Server"),
    "fd": integer_list,
}
_FIELDS: Final = {"socket": "vhost_socket"}


def net_body(text: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Only what was given, and the descriptors: the VMM knows the defaults, and judges the values.

    Raises ConfigError, and HostError for a descriptor that is not open.
    """
    body = {_FIELDS.get(key, key): value for key, value in parse(text, _NET).items()}
    fds = body.pop("fd", ())
    for fd in fds:
        try:
            os.fstat(fd)
        except OSError as error:
            raise HostError(f"add-net: fd={fd} is not open", "let ch-remote inherit the TAP's descriptor") from error
    if fds:
        body.setdefault("num_queues", 2 * len(fds))  # as --net does
    return body, fds
