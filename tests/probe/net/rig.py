"""What the tests of network devices share: a VMM whose probe guest has a card, and what the host sees of its TAP."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess

from controller import taps
from tests.netns import ip
from tests.vmm import Vmm

HOST, GUEST = "192.168.249.1", "192.168.249.2"


def link(name="vmtap0"):
    """What iproute2 says of an interface; None when there is none."""
    done = subprocess.run(["ip", "-json", "address", "show", "dev", name], capture_output=True, check=False)
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def guest(folder, words="mode=net", *arguments, net=(f"ip={HOST}",), **options):
    return Vmm.guest(folder, words, "--net", *net, *arguments, **options)


def inherited_tap(name, host=HOST):
    """A TAP as a manager would open it for a VMM without privileges."""
    fd = os.open(taps.TUN_DEVICE, os.O_RDWR)
    request = taps.ifreq(ifr_name=name.encode())
    request.ifru_flags = taps.IFF_TAP | taps.IFF_NO_PI | taps.IFF_VNET_HDR
    fcntl.ioctl(fd, taps.TUNSETIFF, request)
    ip("address", "add", f"{host}/24", "dev", name)
    ip("link", "set", name, "up")
    return fd
