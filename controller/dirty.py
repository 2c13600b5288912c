"""Which pages of a running guest have been written: KVM's log for its vCPUs, one shared bitmap for its device workers.

KVM sees no write of another process's and no worker sees a guest's, so a page is dirty when either says so. Order, at
the start: the workers' logs, then KVM's, then the caller looks at what RAM holds; whatever is written after its look is
in a log. At the end the rings are stopped before the last harvest, so that nothing can be marked after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Awaitable, Callable, Iterable, Mapping

from controller.vhost_frontend import Frontend
from shared import log
from shared.errors import FlotillaError, HostError
from shared.kvm import KvmVm
from shared.linux import memfd
from shared.memory import GuestMemory
from shared.pages import WORD_PAGES, Bitmap, data_ranges
from shared.reactor import describe

PAGE_SIZE = 4096


def bitmap_for(ends: Iterable[int], name: str) -> Bitmap:
    """A zeroed bitmap for regions that end at these guest addresses. Raises OSError when the host has no memory."""
    size = Bitmap.bytes_for(max(ends))
    return Bitmap(memfd(name, size), size)


class DirtyLog:
    """All methods belong to the reactor's thread; close() after stop(), or alone when the VM is gone."""

    def __init__(
        self,
        kvm_vm: KvmVm,
        memory: GuestMemory,
        frontends: Mapping[str, Frontend],
        serving: Callable[[], Awaitable[None]],
    ) -> None:
        """`serving` waits until the back ends are up, so that it is known what each can do; it raises WorkerError."""
        self._kvm_vm = kvm_vm
        self._memory = memory
        self._frontends = dict(frontends)
        self._serving = serving
        self._shared = bitmap_for((region.end for region in memory.regions), "dirty-log")
        self._words = {r.slot: -(-r.size // (PAGE_SIZE * WORD_PAGES)) for r in memory.regions}
        self._slots = {slot: (ctypes.c_uint64 * words)() for slot, words in self._words.items()}
        self._on = False

    async def start(self) -> None:
        """Raises HostError that names the device whose back end keeps no log, WorkerError."""
        await self._serving()
        self._on = True
        for frontend in self._frontends.values():
            await frontend.start_logging(self._shared.fd, self._shared.size)
        self._log_kvm(True)

    def _log_kvm(self, on: bool) -> None:
        for r in self._memory.regions:
            try:
                self._kvm_vm.set_memory(r.slot, r.gpa, r.size, r.address, log_dirty=on)
            except OSError as error:
                raise HostError("KVM keeps no dirty log") from error

    def harvest(self, into: Bitmap) -> None:
        """Move what has been marked since the last time into a bitmap."""
        for r in self._memory.regions:
            words = self._slots[r.slot]
            self._kvm_vm.dirty_log(r.slot, words)
            into.add(r.gpa, ctypes.addressof(words), len(words))
        into.take(self._shared)

    def mark_all(self, into: Bitmap) -> None:
        """What a first round has to send: everything but RAM's holes, which read as zeros at both sides."""
        for r in self._memory.regions:
            for start, size in data_ranges(r.fd, r.offset, r.size):
                into.set(r.gpa + start, size)

    async def stop(self) -> None:
        """The guest goes on here. What can't be switched off costs speed and nothing else."""
        if not self._on:
            return
        self._on = False
        try:
            self._log_kvm(False)
            for frontend in self._frontends.values():
                await frontend.stop_logging()
        except FlotillaError as error:
            log.warn(f"dirty logs stay on: {describe(error)}")

    def close(self) -> None:
        self._shared.close()
