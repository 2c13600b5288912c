"""The device behind `shared.vhost_backend.Server`: settings and policy here, every request in the native loop.

stop_queue() is the fence: it waits for what is in flight, as long as the disk takes, and the process answers nothing
meanwhile. request_stop() before it lets several queues drain side by side.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

from blk_worker import native
from blk_worker.disk import Disk
from blk_worker.native import Flag, Kind
from shared import latency, log
from shared.errors import ConfigError, ProtocolError
from shared.native_ring import Step, VringError, check, regions_of, setup_of
from shared.reactor import Reactor, drain_eventfd
from shared.rehearsal import NOTHING
from shared.vhost_backend import Mapping as MemoryMapping
from shared.vhost_backend import Ring
from shared.virtio_blk import CONFIG_SIZE, WRITEBACK_OFFSET, BlkConfig, Feature, config_space, features

IO_THREADS = 16
REPORT_SECONDS = 1.0
MAX_QUEUES = 256
SUMS = (
    "inflight", "resubmitted", "syncs", "bounced", "errors", "unsupported", "malformed", "poisoned", "kicks", "calls",
)  # fmt: skip
ALWAYS = 1_000_000  # of a million requests
# Fields of struct blk_fault that go with `delay`, `fail`, `hang`.
FAULT_OPTIONS = ("first_sector", "last_sector", "seed", "after", "count", "spread_ms", "shape", "fail")
NEVER = (1 << 64) - 1  # a latency before the first request, as in Cloud Hypervisor's counters
NO_SECTOR = (1 << 64) - 1  # `poisoned_sector` of a request whose header was not to be read


class BlockBackend:
    """One disk, `num_queues` queues. `on_broken(index)` hears of a queue that the guest has made unusable."""

    protocol_features = 0

    def __init__(
        self,
        reactor: Reactor,
        disk: Disk,
        *,
        num_queues: int = 1,
        queue_size: int = 128,
        sparse: bool = True,
        io_threads: int = IO_THREADS,
        trial: bool = False,
        blame: bool = False,
        die_on_sector: int | None = None,
    ) -> None:
        """`trial`: a worker of this disk died of its own work lately; `blame`: the last one did. `die_on_sector`: a
        fault that every incarnation has, for tests."""
        if not 0 < num_queues <= MAX_QUEUES:
            raise ConfigError(f"disk path={disk.path}: num_queues={num_queues} is not within 1 to {MAX_QUEUES}")
        if not 2 < queue_size <= 32768 or queue_size & (queue_size - 1):
            raise ConfigError(f"disk path={disk.path}: queue_size={queue_size} is no power of two above 2")
        self.num_queues = num_queues
        self.features = int(features(disk.geometry, num_queues=num_queues, sparse=sparse))
        self.config = config_space(disk.geometry, num_queues=num_queues, queue_size=queue_size, sparse=sparse)
        self.disk = disk
        self.name = f"disk path={disk.path}"
        self.on_broken: Callable[[int], None] = lambda index: None
        self.on_config: Callable[[], None] = lambda: None
        self._reactor = reactor
        self._io_threads = io_threads
        self._native = native.load()
        self._acked = 0
        self._mappings: tuple[MemoryMapping, ...] = ()
        self._log = (0, 0)
        self._running: set[int] = set()
        self._trial = Flag.TRIAL * trial | Flag.BLAME * blame
        self._epoch = 0
        self._reported: dict[int, tuple[int, int, int, int]] = {}
        self._report_timer = False
        self._always: dict[str, int] = {} if die_on_sector is None else {"die_on_sector": 1, "sector": die_on_sector}
        self._device = self._create()
        self.fault("clear", 0)

    # The native device ------------------------------------------------------------------------------------------

    def _create(self) -> int:
        disk, image, flags = self.disk, self.disk.geometry, Flag(self._trial)
        if image.readonly:
            flags |= Flag.READONLY
        if disk.direct:
            flags |= Flag.DIRECT
        if image.block_device:
            flags |= Flag.BLOCK_DEVICE
        if self.features & Feature.DISCARD:
            flags |= Flag.CAN_DISCARD
        if self.features & Feature.WRITE_ZEROES:
            flags |= Flag.CAN_ZERO
        config = native.blk_config(
            sectors=self.config.capacity, fd=disk.fd, flags=flags, num_queues=self.num_queues,
            io_threads=self._io_threads, memory_align=image.memory_align, offset_align=image.offset_align,
            id=disk.identity, writeback=self._writeback(),
        )  # fmt: skip
        device: int | None = self._native.blk_create(ctypes.byref(config))
        if device is None:
            number = ctypes.get_errno()
            raise OSError(number, f"block device of {disk.path}: {os.strerror(number)}")
        self._events: int = self._native.blk_event_fd(device)
        self._counters: list[native.blk_counters] = [
            self._native.blk_counters(device, index).contents for index in range(self.num_queues)
        ]
        self._reactor.add_reader(self._events, self._on_event)
        return device

    def _destroy(self) -> None:
        self._reactor.remove_reader(self._events)
        self._counters = []
        self._native.blk_destroy(self._device)
        self._device = 0

    def close(self) -> None:
        """Stop everything, waiting for what is in flight, and close the disk. Idempotent."""
        if self._device:
            self._destroy()
            self._running.clear()
            self.disk.close()

    # Backend, for the vhost-user server -------------------------------------------------------------------------

    def set_features(self, features: int) -> None:
        self._acked = features
        self._native.blk_set_writeback(self._device, self._writeback())

    def _writeback(self) -> int:
        """Whether a completed write may still be in a cache (virtio 1.2, 5.2.6.2)."""
        if self._acked & Feature.CONFIG_WCE or not self._acked:
            return self.config.writeback
        return int(bool(self._acked & Feature.FLUSH))

    def set_memory(self, mappings: tuple[MemoryMapping, ...]) -> None:
        self._mappings = mappings
        table = regions_of(mappings)
        check(self._native.blk_set_memory(self._device, table, len(mappings)), "block device: guest memory")

    def set_log(self, address: int, size: int) -> None:
        self._log = address, size
        self._native.blk_set_log(self._device, address, size)

    def start_queue(self, ring: Ring) -> None:
        setup = setup_of(
            ring, event_idx=bool(self._acked & Feature.RING_EVENT_IDX),
            indirect=bool(self._acked & Feature.RING_INDIRECT_DESC),
        )  # fmt: skip
        check(self._native.blk_start(self._device, ctypes.byref(setup)), f"block device: queue {ring.index}")
        self._running.add(ring.index)

    def request_stop(self) -> None:
        """Let every queue finish what it has taken and take no more. stop_queue() is to follow."""
        for index in self._running:
            self._native.blk_stop_request(self._device, index)

    def quiet(self) -> None:
        """Beside its queues a disk does nothing."""

    def resumed(self) -> None:
        """See quiet()."""

    def stop_queue(self, index: int) -> int:
        base = check(self._native.blk_stop_wait(self._device, index), f"block device: queue {index}")
        self._running.discard(index)
        return base

    def get_config(self, offset: int, size: int) -> bytes:
        return self.config.pack()[offset : offset + size]

    def set_config(self, offset: int, data: bytes) -> None:
        """Only `writeback` can be written (virtio 1.2, 5.2.5); the other bytes of a wider write are ignored."""
        if offset + len(data) > CONFIG_SIZE:
            raise ProtocolError(f"block device: write of {len(data)} bytes at {offset} of its configuration space")
        if offset <= WRITEBACK_OFFSET < offset + len(data):
            self.config = self.config.with_writeback(data[WRITEBACK_OFFSET - offset])
            self._native.blk_set_writeback(self._device, self._writeback())

    # Watching ---------------------------------------------------------------------------------------------------

    def _on_event(self) -> None:
        drain_eventfd(self._events)
        if not self._report_timer:  # a guest that floods us with nonsense gets a line a second
            self._report()
            self._report_timer = True
            self._reactor.call_later(REPORT_SECONDS, self._report_late)

    def _report_late(self) -> None:
        self._report_timer = False
        if self._device:
            self._report()

    def _report(self) -> None:
        for index, counters in enumerate(self._counters):
            before = self._reported.get(index, (0, 0, 0, 0))
            # A poisoned request is an error as well, counted a moment later: `errors` is read first.
            errors, poisoned = counters.errors, counters.poisoned
            now = (counters.malformed, max(before[1], errors - poisoned), counters.broken, poisoned)
            self._reported[index] = now
            where = f"disk path={self.disk.path}, queue {index}"
            if now[0] > before[0]:
                reason = VringError(counters.last_malformed).name
                log.warn(f"{where}: {now[0] - before[0]} malformed requests of the guest, the last: {reason}")
            if now[1] > before[1]:
                cause = os.strerror(counters.io_errno) if counters.io_errno else "requests out of range"
                log.error(f"{where}: {now[1] - before[1]} requests failed: {cause}")
            if now[3] > before[3]:
                sector = counters.poisoned_sector
                last = f", the last at sector {sector}" if sector != NO_SECTOR else ""
                log.error(f"{where}: {now[3] - before[3]} requests that had killed their worker again and again were "
                          f"failed{last}")  # fmt: skip
            if now[2] and not before[2]:
                log.error(f"{where}: the guest broke the ring ({VringError(counters.broken).name}); it stays stopped")
                self.on_broken(index)

    def epoch(self) -> int:
        """Rises from call to call while every ring thread that runs and every I/O thread that has a request takes turns
        or is held by the kernel; this call asks for the next turn."""
        self._epoch += self._native.blk_alive(self._device)
        self._native.blk_nudge(self._device)
        return self._epoch

    def counters(self, index: int) -> native.blk_counters:
        """The live counters of one queue, written by the native loop."""
        return self._counters[index]

    def flush(self) -> dict[str, Any]:
        """Completed writes are on stable storage when this returns. Waits as long as the disk takes. Raises OSError."""
        if not self.disk.geometry.readonly:
            os.fdatasync(self.disk.fd)
        return {}

    def stats(self) -> dict[str, int]:
        """Sums over the queues. Latencies in µs; the minimum is 2^64-1 before the first request. `poisoned_sector` is
        there when one is known."""
        result: dict[str, int] = {}
        for kind in Kind:
            name = kind.name.lower()
            ops = [counters.op[kind] for counters in self._counters]
            buckets = [sum(parts) for parts in zip(*(op.latency_bucket for op in ops), strict=True)]
            count = sum(buckets)  # and not the sum of `ops`, which may have moved on between two looks
            result[f"{name}_ops"] = count
            if kind in (Kind.READ, Kind.WRITE):
                result[f"{name}_bytes"] = sum(op.bytes for op in ops)
            result[f"{name}_latency_min"] = min(op.latency_min_us for op in ops)
            result[f"{name}_latency_max"] = max(op.latency_max_us for op in ops) if count else NEVER
            total = sum(op.latency_sum_us for op in ops)
            result[f"{name}_latency_avg"] = total // count if count else NEVER
            if count:
                result |= latency.told(name, total, buckets)
        for name in SUMS:
            result[name] = sum(getattr(counters, name) for counters in self._counters)
        sectors = [counters.poisoned_sector for counters in self._counters if counters.poisoned]
        if known := [sector for sector in sectors if sector != NO_SECTOR]:
            result["poisoned_sector"] = known[0]
        result["broken_queues"] = sum(bool(counters.broken) for counters in self._counters)
        return result

    # State ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Keys of Cloud Hypervisor's block device state. Ring indices are the transport's."""
        return {
            "disk_path": self.disk.path,
            "disk_nsectors": self.config.capacity,
            "avail_features": self.features,
            "acked_features": self._acked,
            "config": self.config.save(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a device: the guest keeps the features and the configuration that it saw where it was.

        Raises ProtocolError for a state that can't be read, ConfigError for a disk that can't stand in.
        """
        if self._running:
            raise ProtocolError("block device: state given while queues run")
        try:
            features, acked = int(state["avail_features"]), int(state["acked_features"])
            config = BlkConfig.load(state["config"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"block device state can't be read: {error}") from error
        if config.capacity > self.disk.geometry.sectors:
            raise ConfigError(f"disk path={self.disk.path} has {self.disk.geometry.sectors} sectors, the guest's disk "
                              f"{config.capacity}")  # fmt: skip
        if self.disk.geometry.readonly and not features & Feature.RO:
            raise ConfigError(f"disk path={self.disk.path} is read-only, the guest's disk is not")
        if max(1, config.num_queues) > self.num_queues:
            raise ConfigError(f"disk path={self.disk.path}: num_queues={self.num_queues}, the guest's disk has "
                              f"{config.num_queues}")  # fmt: skip
        self.features, self._acked, self.config = features, acked, config
        self._destroy()
        self._device = self._create()
        self.set_memory(self._mappings)
        self.set_log(*self._log)
        self._reported.clear()

    # Rehearsed faults -------------------------------------------------------------------------------------------

    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None:
        """`delay` (ms), `fail` (how many requests, 0: all), `hang` (requests), `freeze` (ring threads), `withhold`
        and `repeat` (so many notifications per queue), `die-<step>` (at its n-th time), `clear`. `options`:
        FAULT_OPTIONS. Each takes the place of the one before; one that is refused leaves that as it was.

        A queue that hangs can't be stopped before `clear`, and stop_queue() would wait for it: kill the process.
        """
        fault, every = native.blk_fault(**self._always), sum(1 << kind for kind in Kind)
        if what == "clear":
            pass
        elif what == "delay":
            fault.kinds, fault.delay_ms = every, value
        elif what == "fail":
            fault.kinds, fault.fail, fault.count = every, ALWAYS, value
        elif what == "hang":
            fault.kinds, fault.delay_ms = every, native.HANG_FOR_EVER
        elif what == "freeze":
            fault.freeze = 1
        elif what == "withhold":
            fault.withhold = value
        elif what == "repeat":
            fault.repeat = value
        elif what.startswith("die-") and what[4:].upper() in Step.__members__:
            fault.die_at, fault.die_after = Step[what[4:].upper()], max(1, value)
        else:
            raise ProtocolError(f"block device: unknown fault {what!r}")
        for name, number in options.items():
            if name not in FAULT_OPTIONS or type(number) is not int or number < 0:
                raise ProtocolError(f"block device: fault {what}: {name}={number!r}")
            setattr(fault, name, number)
        self._native.blk_set_fault(self._device, ctypes.byref(fault))
