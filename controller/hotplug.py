"""vm.add-net: the configuration with one more card, checked, and the card in the running VM, if there is one."""

from __future__ import annotations

import os

from controller.config.codec import net_from_json
from controller.config.identity import assign_ids
from controller.config.model import VmConfig
from controller.config.validate import validate
from controller.taps import check_given
from controller.vm import Vm
from shared.errors import ConfigError
from shared.records import replace
from shared.typed import Any


async def add_net(vm: Vm | None, config: VmConfig, body: Any) -> tuple[VmConfig, dict[str, str] | None]:
    """And what vm.add-net answers. `fds` of the body are the new configuration's. Raises FlotillaError: as before."""
    net = net_from_json(body)
    more = assign_ids(replace(config, net=(*config.net, net)))
    validate(more)
    check_given(net.fds)
    return more, await vm.add_net(more) if vm is not None else None


def refuse_numbers(config: VmConfig) -> None:
    """Of descriptors in the body of vm.create: they would be ours, whatever they are. Raises ConfigError."""
    for index, net in enumerate(config.net):
        if net.fds:
            raise ConfigError(f"net[{index}]: fds in the body", "give --net fd= at the start, or add-net fd=")


def forget(config: VmConfig) -> None:
    """Close the descriptors that came with --net fd= or add-net: a VM that is deleted needs them for no reboot."""
    for net in config.net:
        for fd in net.fds:
            os.close(fd)
