"""Load a kernel, its initramfs and its command line, and say where the first vCPU starts."""

from controller.machine.boot.loader import BootEntry, BootProtocol, load

__all__ = ["BootEntry", "BootProtocol", "load"]
