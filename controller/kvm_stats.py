"""KVM's own statistics of a VM and its vCPUs: the descriptors, and all that they tell, as bytes.

A vCPU's descriptor has to be asked for before it runs: the ioctl waits for the vCPU, which KVM_RUN holds. Descriptors
pin the VM in the kernel (Documentation/virt/kvm/api.rst, section 2), so they never leave this process and are closed
with it. Reading the tables is the exporter's work (metrics_exporter/kvm_stats.py).
"""

from __future__ import annotations

import os

from shared import kvm
from shared.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_TABLE: Final = 64 << 10  # the kernel's have 1 and 4 KiB


class KvmStats:
    """Of one VM. Without sources where the kernel has no statistics, or there was no descriptor to be had."""

    def __init__(self, device: kvm.Kvm, owners: Iterable[tuple[str, int]]) -> None:
        """`owners`: names (shared/figures.py) with the KVM descriptors of the VM and of vCPUs that do not run yet."""
        self._sources: list[tuple[str, int]] = []
        try:
            if device.check_extension(kvm.KVM_CAP_BINARY_STATS_FD):
                for name, fd in owners:
                    stats = kvm.ioctl(fd, kvm.KVM_GET_STATS_FD)
                    os.set_inheritable(stats, False)  # older kernels give it out without FD_CLOEXEC
                    self._sources.append((name, stats))
        except OSError:
            self.close()

    def read(self) -> list[tuple[str, bytes]]:
        """By owner, the whole table: header, descriptors, values. Raises OSError."""
        return [(name, os.pread(fd, MAX_TABLE, 0)) for name, fd in self._sources]

    def close(self) -> None:
        """Idempotent."""
        sources, self._sources = self._sources, []
        for _, fd in sources:
            os.close(fd)
