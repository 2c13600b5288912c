"""The device behind `shared.vhost_backend.Server`: settings and policy here, every packet in the native loop.

Nothing is done to the TAP before the first queue starts: in a local migration two processes have it open, and until the
source has gone quiet it is the source's alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from net_worker import control, native
from net_worker.announce import Announcer, rarp
from net_worker.settings import Settings
from net_worker.tap import Taps
from shared import log, virtio_net
from shared.errors import ConfigError, FlotillaError, ProtocolError
from shared.native_ring import Pulse, Step, VringError, check, regions_of, setup_of
from shared.reactor import Reactor, describe, drain_eventfd
from shared.rehearsal import NOTHING
from shared.vhost_backend import Mapping as MemoryMapping
from shared.vhost_backend import Ring

MAX_PAIRS: Final = 128
# Sums over the queues of a direction, beside its frames and bytes.
_SUMS: Final = ("dropped", "stalls")
_SUMS_OF_ALL: Final = ("kicks", "calls", "malformed", "tap_gone", "poisoned")


class NetBackend:
    """One network card on `taps`, which become its own. `spec` as in net_worker/__main__.py."""

    protocol_features = 0

    def __init__(self, reactor: Reactor, spec: Mapping[str, Any], taps: Sequence[int], name: str = "net") -> None:
        pairs = spec["queue_pairs"]
        if not 0 < pairs <= MAX_PAIRS:
            raise ConfigError(f"{name}: queue_pairs={pairs} is not within 1 to {MAX_PAIRS}")
        if len(taps) != pairs:
            raise ConfigError(f"{name}: {len(taps)} TAP descriptors for {pairs} queue pairs", "give one for each")
        try:
            self.mac = virtio_net.parse_mac(spec["mac"])
        except ValueError as error:
            raise ConfigError(f"{name}: mac={error}") from error
        self.name = name
        self.pairs: int = pairs
        self.num_queues = 2 * pairs + 1
        self.features = virtio_net.features(spec) | virtio_net.BACKEND_ONLY
        self.on_broken: Callable[[int], None] = lambda index: None
        self.on_config: Callable[[], None] = lambda: None
        self.settings = Settings()
        self._spec = dict(spec)
        self._reactor = reactor
        self._acked = 0
        self._loaded = False  # settings came by load() and no queue has run with them yet
        self._quiet = False
        self._running: set[int] = set()
        self._attached: dict[int, bool] = {}  # TAP queues as this process has switched them
        self._region = 0
        self._control_kick = -1
        self._pulse = Pulse()
        self._commands = self._announcements = 0
        self._reported: dict[int, int] = {}
        self._refusals = 0  # frames from the guest that were reported as dropped
        self._announcer = Announcer(reactor, self._send_rarp)
        self._taps = Taps(taps)
        self._native = native.load()
        device: int | None = self._native.net_create(pairs, (ctypes.c_int32 * pairs)(*taps))
        if device is None:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")
        self._device = device
        if spec.get("trial"):
            self._native.net_set_trial(device, int(bool(spec.get("blame"))))
        self._native.net_set_lethal(device, spec.get("lethal", 0))
        self._counters: list[native.net_counters] = [
            self._native.net_counters(device, index).contents for index in range(self.num_queues)
        ]
        self._events: int = self._native.net_event_fd(device)
        reactor.add_reader(self._events, self._on_event)

    def close(self) -> None:
        """Stop everything and close the TAPs. Idempotent."""
        if self._device:
            self._announcer.stop()
            self._let_go_of_control()
            self._reactor.remove_reader(self._events)
            self._counters = []
            self._native.net_destroy(self._device)
            self._device = 0
            self._running.clear()
            self._taps.close()

    # Backend, for the vhost-user server -------------------------------------------------------------------------

    def set_features(self, features: int) -> None:
        self._acked = features
        if not self._loaded:
            self.settings = Settings.initial(features)
        mergeable = bool(features & virtio_net.F_MRG_RXBUF)
        check(self._native.net_set_format(self._device, self._header, mergeable), self.name)
        if self._running:
            self._configure_tap()

    @property
    def _header(self) -> int:
        modern = self._acked & (virtio_net.F_VERSION_1 | virtio_net.F_MRG_RXBUF)
        return native.HEADER if modern else native.LEGACY_HEADER

    @property
    def _controlled(self) -> bool:
        """Whether the control queue is ours. A front end that keeps it (QEMU) just starts the pairs in use."""
        return bool(self._acked & virtio_net.F_CTRL_VQ)

    def set_memory(self, mappings: tuple[MemoryMapping, ...]) -> None:
        check(self._native.net_set_memory(self._device, regions_of(mappings), len(mappings)), f"{self.name}: memory")

    def set_log(self, address: int, size: int) -> None:
        self._native.net_set_log(self._device, address, size)

    def start_queue(self, ring: Ring) -> None:
        if ring.index == 0:
            self._adopt_settings(ring.inflight)
        if not self._running:
            self._configure_tap()
        setup = setup_of(
            ring, event_idx=bool(self._acked & virtio_net.F_EVENT_IDX),
            indirect=bool(self._acked & virtio_net.F_INDIRECT_DESC),
        )  # fmt: skip
        check(self._native.net_start(self._device, ctypes.byref(setup)), f"{self.name}: queue {ring.index}")
        self._running.add(ring.index)
        try:
            self._attend(ring)
        except (FlotillaError, OSError):
            self.stop_queue(ring.index)
            raise

    def _attend(self, ring: Ring) -> None:
        """What the native loop does not do for a queue that it has begun to serve."""
        if ring.index == self.num_queues - 1:
            self._reactor.add_reader(ring.kick_fd, self._on_control_kick)
            self._control_kick = ring.kick_fd
            self._serve_control()
        else:
            self._attach_queues()

    def _adopt_settings(self, region: int) -> None:
        """At the first receive queue's start: a predecessor's settings, or those of a driver that has just begun."""
        if not self._loaded and region:
            kept = Settings.kept(region, self.pairs)
            self.settings = kept if kept is not None else Settings.initial(self._acked)
        self._loaded = False
        self._region = region
        self.settings.keep(region)
        if self._running:
            self._configure_tap()

    def _configure_tap(self) -> None:
        self._taps.set_header(self._header)
        self._taps.set_offloads(self.settings.offloads)

    def _attach_queues(self) -> None:
        """Packets come to the queues that somebody serves. The first one is always attached."""
        for pair in range(1, self.pairs):
            used = pair < self.settings.pairs if self._controlled else 2 * pair in self._running
            if self._attached.get(pair) is not used:  # a switch makes the whole interface wait
                self._taps.attach(pair, used)
                self._native.net_set_attached(self._device, pair, used)
                self._attached[pair] = used

    def request_stop(self) -> None:
        """stop_queue() waits for no more than a batch."""
        self._quiet = True

    def stop_queue(self, index: int) -> int:
        if index == self.num_queues - 1:
            self._let_go_of_control()
        base = check(self._native.net_stop(self._device, index), f"{self.name}: queue {index}")
        self._running.discard(index)
        if not self._quiet and not self._controlled and self._running:
            self._attach_queues()
        if index == 0:
            self._region = 0
        return base

    def quiet(self) -> None:
        self._announcer.stop()

    def resumed(self) -> None:
        self._quiet = False
        self._attached.clear()  # the TAP may have been another process's meanwhile

    def get_config(self, offset: int, size: int) -> bytes:
        status = virtio_net.S_LINK_UP | (virtio_net.S_ANNOUNCE if self.settings.announce else 0)
        return virtio_net.config(self._spec, status)[offset : offset + size]

    def set_config(self, offset: int, data: bytes) -> None:
        raise ProtocolError(f"{self.name}: nothing of its configuration is the driver's to write")

    # The control queue ------------------------------------------------------------------------------------------

    def _on_control_kick(self) -> None:
        drain_eventfd(self._control_kick)
        self._serve_control()

    def _let_go_of_control(self) -> None:
        if self._control_kick >= 0:
            self._reactor.remove_reader(self._control_kick)
            self._control_kick = -1

    def _serve_control(self) -> None:
        """One command a turn, so that a guest that never stops asking keeps nobody waiting."""
        if self._control_kick < 0:
            return
        command = ctypes.create_string_buffer(control.LONGEST)
        size: int = self._native.net_ctrl_take(self._device, command, control.LONGEST)
        if size < 0:
            self._let_go_of_control()
        elif size > 0:
            self._commands += 1
            self._native.net_ctrl_answer(self._device, self._obey(command.raw[:size]))
            self._reactor.call_soon(self._serve_control)

    def _obey(self, command: bytes) -> int:
        wanted = control.decide(command, self.settings, self._acked, self.pairs)
        if wanted is None:
            log.debug(f"{self.name}: control command {command.hex()} is refused")
            return control.ERR
        before, self.settings = self.settings, wanted
        try:
            if wanted.offloads != before.offloads:
                self._taps.set_offloads(wanted.offloads)
            if wanted.pairs != before.pairs:
                self._attach_queues()
        except FlotillaError as error:
            log.error(f"{self.name}: {describe(error)}")
            self.settings = before
            return control.ERR
        self.settings.keep(self._region)
        if wanted.announce != before.announce:
            self.on_config()
        return control.OK

    # Announcement -----------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """The guest lives here now: tell it, if it wants to be told, and the network. ProtocolError while quiet."""
        if self._quiet:
            raise ProtocolError(f"{self.name}: announce while quiesced")
        if self._acked & virtio_net.F_GUEST_ANNOUNCE:
            self.settings = Settings(self.settings.pairs, self.settings.offloads, announce=True)
            self.settings.keep(self._region)
            self.on_config()
        self._announcer.start()

    def _send_rarp(self) -> None:
        self._announcements += self._taps.send(self._header, rarp(self.mac))

    # Watching ---------------------------------------------------------------------------------------------------

    def _on_event(self) -> None:
        drain_eventfd(self._events)
        for index, counters in enumerate(self._counters):
            where = f"{self.name}, queue {index}"
            if counters.malformed > self._reported.get(index, 0):
                self._reported[index] = counters.malformed
                if not counters.malformed & (counters.malformed - 1):  # the 1st, 2nd, 4th, 8th … time
                    reason = VringError(counters.last_malformed).name
                    log.error(f"{where}: the guest broke the ring ({reason}); it stays stopped until the driver resets "
                              f"the device; {counters.malformed} in all")  # fmt: skip
                self.on_broken(index)
            if counters.poisoned > self._reported.get(-1000 - index, 0):
                log.error(f"{where}: {counters.poisoned} frames that had killed their worker again and again were "
                          f"dropped")  # fmt: skip
                self._reported[-1000 - index] = counters.poisoned
            if counters.tap_gone > self._reported.get(-1 - index, 0):
                self._reported[-1 - index] = counters.tap_gone
                reason = os.strerror(counters.tap_errno) if counters.tap_errno else "it is gone"
                log.error(f"{where}: the TAP can't be read: {reason}")

    def epoch(self) -> int:
        """Rises from call to call while every running pair's thread takes turns; this call asks for the next turn."""
        data = self._running - {self.num_queues - 1}
        epoch = self._pulse.take({index: self._counters[index].epoch for index in data})
        self._native.net_nudge(self._device)
        self._report_refusals()
        return epoch

    def _report_refusals(self) -> None:
        """Frames that the host did not take, each time that they have doubled: a guest may send any number."""
        queues = self._counters[1:-1:2]
        dropped, last = sum(counters.dropped for counters in queues), self._refusals
        if dropped and dropped >= 2 * last:
            self._refusals = dropped
            reason = next((os.strerror(counters.tap_errno) for counters in queues if counters.tap_errno), "dropped")
            log.warn(f"{self.name}: the TAP refuses frames ({reason}; is it up?): {dropped} dropped so far")

    def counters(self, index: int) -> native.net_counters:
        """The live counters of one queue, written by the native loop."""
        return self._counters[index]

    def stats(self) -> dict[str, int]:
        """rx: to the guest, tx: from it. Sums over the queues."""
        result: dict[str, int] = {}
        data = self._counters[:-1]
        for direction, queues in (("rx", data[0::2]), ("tx", data[1::2])):
            for name in ("bytes", "frames", *_SUMS):
                result[f"{direction}_{name}"] = sum(getattr(counters, name) for counters in queues)
        for name in _SUMS_OF_ALL:
            result[name] = sum(getattr(counters, name) for counters in self._counters)
        result["broken_queues"] = sum(bool(counters.broken) for counters in self._counters)
        result["commands"] = self._commands
        result["announcements"] = self._announcements
        return result

    # State ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """What is in no ring and no configuration. Ring indices are the transport's."""
        return {**self.settings.save(), "avail_features": self.features, "acked_features": self._acked}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a device. ProtocolError for a state that can't be read, ConfigError for one that is larger."""
        if self._running:
            raise ProtocolError(f"{self.name}: state given while queues run")
        settings = Settings.load(state, self.pairs)
        acked = state.get("acked_features")
        if type(acked) is not int or acked & ~self.features:
            raise ProtocolError(f"{self.name}: state with features that this device lacks")
        self.set_features(acked)
        self.settings, self._loaded = settings, True

    # Rehearsed faults -------------------------------------------------------------------------------------------

    def fault(self, what: str, value: int, options: Mapping[str, Any] = NOTHING) -> None:
        """`die-<step>`: end at the step's n-th time in a queue, as a kill there would. `freeze`: the pairs' threads;
        `delay`: ms before each of their turns; `withhold` and `repeat`: so many notifications per queue. `clear`.
        Each takes the place of the one before; one that is refused leaves that as it was."""
        if options:
            raise ProtocolError(f"{self.name}: fault {what} has no {', '.join(options)}")
        fault = native.net_fault()
        if what == "clear":
            pass
        elif what == "freeze":
            fault.freeze = 1
        elif what == "delay":
            fault.delay_ms = value
        elif what == "withhold":
            fault.withhold = value
        elif what == "repeat":
            fault.repeat = value
        elif what.startswith("die-") and what[4:].upper() in Step.__members__:
            fault.die_at, fault.die_after = Step[what[4:].upper()], max(1, value)
        else:
            raise ProtocolError(f"{self.name}: unknown fault {what!r}")
        self._native.net_set_fault(self._device, ctypes.byref(fault))
