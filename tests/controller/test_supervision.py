"""Deaths, hangs and refusals of real workers, noticed by the real watchdog; what remains in events and statistics."""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller import watchdog
from controller.backends import Backend, BackendState
from controller.fleet import Fleet, ProcessState, WorkerSpec
from controller.statistics import NONE_YET, merge
from controller.supervision import OFTEN, Cause, Supervision, process_state
from controller.watchdog import Limits, Watch, Watchdog
from shared.errors import HostError, Timeout
from shared.reactor import SETTLED_ROUNDS, Future, Reactor, sleep
from shared.vhost_user import INFLIGHT_ENTRY_SIZE, INFLIGHT_HEADER_SIZE
from tests.controller.processes import running
from tests.controller.supervised import SECTOR, VERSION_1, Supervised
from tests.network import Network, frame

SECTORS = 64
OK, IO_ERROR = 0, 1
POISON = 13
LIMITS = Limits(period=0.2, answer={}, other=0.5)


class Rig(Supervised):
    """Any worker, watched with short limits."""

    def __init__(self, reactor: Reactor, fleet: Fleet, folder: Path) -> None:
        super().__init__(reactor, fleet, folder)
        self.watchdog = Watchdog(reactor, fleet, LIMITS)
        self.network: Network | None = None
        self.buffers: dict[int, list[int]] = {}

    def toy(self) -> Rig:
        spec = WorkerSpec("toy", "_toy0", "tests.toy_worker", "worker", {"count": 5})
        self.backend = Backend(self.reactor, self.fleet, spec, {}, {})
        self.run(self.backend.start())
        self.watchdog.start()
        return self

    def disk(self, **spec: Any) -> Rig:
        self.serve_disk(b"".join(bytes([n]) * SECTOR for n in range(SECTORS)), VERSION_1, **spec)
        self.watchdog.start()
        return self

    def card(self, **spec: Any) -> Rig:
        """Only its sending queue has a driver."""
        self.network = Network()
        self.driver.index = 1
        spec = {
            "mac": "52:54:00:12:34:56", "mtu": 1500, "queue_pairs": 1, "queue_size": 64, "offload_tso": True,
            "offload_ufo": True, "offload_csum": True, **spec,
        }  # fmt: skip
        made = WorkerSpec("net", "_net1", "net_worker.__main__", "worker", spec)
        self.serve(made, VERSION_1, {"tap0": self.network.fds[0]})
        self.watchdog.start()
        return self

    def read(self, *sectors: int) -> list[int]:
        """Ask for each; the heads."""
        heads = []
        with self.driver.at_once():  # a ring thread that finds the first alone carries it out itself
            for sector in sectors:
                header = bytes(8) + sector.to_bytes(8, "little")
                head, targets = self.driver.add([header], [SECTOR, 1])
                self.memory.write(targets[1], b"\xff")
                self.buffers[head] = targets
                heads.append(head)
        self.driver.kick()
        return heads

    def done(self, count: int) -> None:
        finished: list[tuple[int, int]] = []

        def enough() -> bool:
            finished.extend(self.driver.completed())
            return len(finished) >= count

        self.until(enough)

    def result(self, head: int) -> tuple[int, bytes]:
        """(status, what was read)"""
        data, status = self.buffers[head]
        return self.memory.read(status, 1)[0], self.memory.read(data, SECTOR)

    def fault(self, what: str, value: int = 0) -> int:
        """Let the worker go wrong; its pid. It may not live to answer."""
        assert self.backend.process is not None
        pid = self.backend.process.pid
        task = self.reactor.spawn(self.backend.process.call("fault", None, what=what, value=value), what)
        task.add_done_callback(lambda _: None)
        self.run(sleep(self.reactor, 0.0))
        return pid

    def close(self) -> None:
        self.watchdog.stop()
        super().close()
        if self.network is not None:
            self.network.close()

    def replaced(self, pid: int) -> dict[str, Any]:
        """Wait for another process than `pid` to serve; what `vmm.fleet` says of its loss."""
        backend = self.backend
        self.until(lambda: backend.state is BackendState.SERVING and backend.process and backend.process.pid != pid)
        kind, name = next(iter(self.fleet.supervision.accounts))
        return self.fleet.supervision.columns(kind, name)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(str(tmp_path)) as (reactor, fleet):
        made = Rig(reactor, fleet, tmp_path)
        yield made
        made.close()


# Three detections -------------------------------------------------------------------------------------------------


def test_killed_worker_is_told_as_ended_with_its_stall(rig: Rig) -> None:
    process = rig.toy().backend.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    columns = rig.replaced(process.pid)
    assert columns["last_cause"] == "ended" and f"pid {process.pid}" in columns["last_reason"]
    assert columns["last_stall_ms"] > 0
    (lost, told), (restarted, again) = rig.events
    assert (lost, restarted) == ("worker-lost", "worker-restarted")
    assert (told["name"], told["kind"], told["pid"], told["cause"]) == ("_toy0", "toy", process.pid, "ended")
    assert told["stall_ms"] is None and again["stall_ms"] == columns["last_stall_ms"]
    assert again["pid"] == rig.backend.process.pid  # type: ignore[union-attr]


def test_worker_that_refuses_to_resume_is_ended_and_its_successor_was_never_quiesced(rig: Rig) -> None:
    process = rig.toy().backend.process
    assert process is not None
    rig.run(rig.backend.call("fault", what="refuse", value=0))
    rig.run(rig.backend.call("quiesce"))
    with pytest.raises(HostError, match="not any more"):
        rig.run(rig.backend.resume())
    rig.run(rig.backend.resume())  # of one that is ending: nobody is asked
    columns = rig.replaced(process.pid)
    assert (columns["last_cause"], columns["last_reason"]) == ("refused", "resume: not any more")
    assert rig.run(rig.backend.stats())["count"] == 5
    rig.run(rig.backend.resume())
    assert rig.run(rig.backend.stats())["count"] == 6


def test_stopped_worker_is_hung_and_its_successor_comes_after_its_death(rig: Rig) -> None:
    process = rig.toy().backend.process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    columns = rig.replaced(process.pid)
    assert (columns["last_cause"], columns["last_reason"]) == ("hung", "stopped by a signal")
    assert process.ended.is_set() and not process.blameable


def test_worker_that_answers_no_more_is_hung(rig: Rig) -> None:
    """A verb whose answer is awaited may take its time; here the watchdog's question is the only one."""
    process = rig.toy().backend.process
    assert process is not None and process.channel is not None
    rig.reactor.spawn(process.channel.call("fault", None, what="sleep"), "sleep").add_done_callback(lambda _: None)
    columns = rig.replaced(process.pid)
    assert columns["last_cause"] == "hung" and "no heartbeat for" in columns["last_reason"]
    assert process.blameable


def test_worker_whose_epoch_stands_still_is_hung(rig: Rig) -> None:
    pid = rig.toy().fault("stall")
    columns = rig.replaced(pid)
    assert columns["last_cause"] == "hung" and "took no turn" in columns["last_reason"]


def test_heartbeat_that_is_none_is_a_refusal(rig: Rig) -> None:
    pid = rig.toy().fault("nonsense")
    assert rig.replaced(pid)["last_cause"] == "refused"


def test_counters_that_are_none_are_a_refusal_and_keep_no_successor_from_starting(rig: Rig) -> None:
    """They come when somebody asks, not with a heartbeat, whose counters the watchdog looks at."""
    pid = rig.toy().fault("lie")
    rig.watchdog.stop()
    assert rig.run(rig.backend.stats()) == {}
    assert rig.replaced(pid)["last_cause"] == "refused"
    assert rig.run(rig.backend.stats()) == {"count": 5}


def test_zygote_that_cannot_be_started_again_does_not_end_the_watch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    process, zygote = rig.toy().backend.process, rig.fleet.zygote
    assert process is not None
    tried: list[int] = []

    def full() -> bool:
        tried.append(zygote.pid)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(zygote, "renew", full)
        os.kill(zygote.pid, signal.SIGKILL)
        rig.until(lambda: len(tried) >= 2)
    rig.until(lambda: process_state(zygote.pid)[0] not in "ZX")
    os.kill(process.pid, signal.SIGSTOP)
    assert rig.replaced(process.pid)["last_cause"] == "hung"


def test_a_zygotes_death_is_not_told_with_the_reason_of_another(rig: Rig) -> None:
    """Of one that hung and was replaced by a fork that waited for it."""
    rig.toy()
    rig.fleet.condemn_zygote(Cause.HUNG, "for a test")
    rig.fleet.zygote.renew()
    pid = rig.fleet.zygote.pid
    os.kill(pid, signal.SIGKILL)
    rig.until(lambda: rig.fleet.zygote.pid != pid)
    assert rig.fleet.supervision.columns("zygote", "zygote")["last_cause"] == "ended"


def test_control_message_that_is_none_is_a_refusal(rig: Rig) -> None:
    pid = rig.toy().fault("garbage")
    columns = rig.replaced(pid)
    assert (columns["last_cause"], columns["last_reason"]) == ("refused", "control message is not msgpack")


def test_worker_that_asks_its_controller_for_something_is_a_refusal(rig: Rig) -> None:
    columns = rig.replaced(rig.toy().fault("ask"))
    assert (columns["last_cause"], columns["last_reason"]) == (
        "refused", "request 'hello' of one that has nothing to ask",
    )  # fmt: skip


def test_worker_whose_answer_is_there_is_not_hung_when_the_controller_had_no_time_to_read_it(rig: Rig) -> None:
    """Asked, it gets no time until the next tick; then the controller gets none until it is to judge."""
    process = rig.toy().backend.process
    assert process is not None
    tick, signals, ticks = rig.watchdog._tick, [signal.SIGSTOP, signal.SIGCONT], 0

    def starved() -> None:
        nonlocal ticks
        ticks += 1
        tick()
        if signals:
            os.kill(process.pid, number := signals.pop(0))
            if number == signal.SIGCONT:
                time.sleep(2 * LIMITS.other)

    rig.watchdog._tick = starved  # type: ignore[method-assign]
    rig.until(lambda: ticks >= 6)
    assert rig.events == []


def test_answer_that_comes_while_the_threads_are_looked_at_is_in_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow host a look takes as long as an answer, and whoever is looked at last is at rest again."""
    process = rig.toy().backend.process
    assert process is not None
    call, real, there, looked, answered = process.call, watchdog.thread_states, False, Future[None](), 0

    async def late(verb: str, seconds: float | None, **arguments: Any) -> Any:
        nonlocal answered, there
        answer = await call(verb, seconds, **arguments)
        there = True
        if verb == "heartbeat" and not looked.done():
            await looked
        answered += 1
        return answer

    def look(pid: int, but: int = 0) -> str:
        if not there or answered:  # a worker that has no CPU is not hung
            return real(pid, but)
        looked.set_result(None)
        return "S"

    monkeypatch.setattr(process, "call", late)
    monkeypatch.setattr(watchdog, "thread_states", look)
    rig.until(lambda: answered >= 3)
    assert looked.done() and rig.events == []


def test_turn_that_is_taken_after_the_answer_was_made_is_in_the_next_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = rig.toy().backend.process
    assert process is not None
    call, real, looked, answered = process.call, watchdog.thread_states, False, 0

    async def before_its_turn(verb: str, seconds: float | None, **arguments: Any) -> Any:
        nonlocal answered
        answer = await call(verb, seconds, **arguments)
        answered += looked
        return answer if looked else {**answer, "epoch": 0}

    def look(pid: int, but: int = 0) -> str:
        nonlocal looked
        if rig.watchdog._watches[process.pid].asked is not None or answered:  # a worker that has no CPU is not hung
            return real(pid, but)
        looked = True
        return "S"

    monkeypatch.setattr(process, "call", before_its_turn)
    monkeypatch.setattr(watchdog, "thread_states", look)
    rig.until(lambda: answered >= 3)
    assert rig.events == []


def test_worker_that_is_asked_for_something_long_is_not_hung(rig: Rig) -> None:
    """A quiesce waits for the disk; whoever waits has a time limit of his own."""
    process = rig.toy().backend.process
    assert process is not None and process.channel is not None
    rig.fault("sleep")
    seen: list[float] = []
    rig.fleet.patients.append(lambda: seen.append(0.0) or ())
    rig.until(lambda: len(seen) >= 8)  # rounds of the watchdog
    assert rig.backend.process is process and rig.events == []
    rig.fleet.kill(process)


def by_hand(rig: Rig) -> None:
    """The watchdog looks when the test says so, and a stall of the test's own is no hang."""
    rig.watchdog._timer.cancel()  # type: ignore[union-attr]
    rig.watchdog._limits = Limits(period=LIMITS.period, answer={}, other=30.0)


def settle(rig: Rig) -> None:
    for _ in range(2 * SETTLED_ROUNDS):
        rig.run(sleep(rig.reactor, 0))


def test_worker_that_was_busy_for_long_has_its_time_to_answer_afterwards(rig: Rig) -> None:
    """The heartbeat's answer stands behind the stop of the rings, which took a minute: nobody hangs when that ends."""
    process = rig.toy().backend.process
    assert process is not None
    by_hand(rig)
    watch = Watch(asked=time.monotonic() - 60)
    process.busy = lambda: True
    rig.watchdog._question(process, watch)
    process.busy = lambda: False
    rig.watchdog._question(process, watch)
    settle(rig)
    assert process.state is ProcessState.RUNNING and rig.events == []


def test_worker_that_was_stopped_with_a_question_open_is_no_hang_at_the_first_look(rig: Rig) -> None:
    """Nor to blame: what stopped it was not its work."""
    process = rig.toy().backend.process
    assert process is not None
    by_hand(rig)
    watch = Watch(asked=time.monotonic() - 60, stopped=time.monotonic())
    rig.watchdog._question(process, watch)
    settle(rig)
    assert process.state is ProcessState.RUNNING and rig.events == []


def test_stop_that_ends_soon_is_no_hang(rig: Rig) -> None:
    process = rig.toy().backend.process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    rig.until(lambda: process_state(process.pid)[0] == "T")
    os.kill(process.pid, signal.SIGCONT)
    rounds: list[int] = []
    rig.fleet.patients.append(lambda: rounds.append(0) or ())
    rig.until(lambda: len(rounds) >= 4)
    assert rig.events == []


def test_hung_again_and_again_gets_more_time_each_time(rig: Rig) -> None:
    process = rig.toy().backend.process
    assert process is not None
    patience = [rig.watchdog._patience(process)]
    for _ in range(2):
        rig.fleet.supervision.lost("toy", "_toy0", 1, Cause.HUNG, "for a test")
        patience.append(rig.watchdog._patience(process))
    assert patience == [0.5, 1.0, 2.0]


def test_ring_thread_that_hangs_is_replaced_and_its_request_is_done(rig: Rig) -> None:
    process = rig.disk().backend.process
    assert process is not None
    rig.run(process.call("fault", what="hang"))
    (head,) = rig.read(3)
    columns = rig.replaced(process.pid)
    assert columns["last_cause"] == "hung" and "took no turn" in columns["last_reason"]
    rig.done(1)
    assert rig.result(head) == (OK, bytes([3]) * SECTOR)


@pytest.mark.parametrize("requests", [1, 4], ids=["ring-thread", "io-threads"])
def test_slow_disk_is_no_hang(rig: Rig, requests: int) -> None:
    """Each request takes six times as long as a worker may be silent."""
    process = rig.disk().backend.process
    assert process is not None
    rig.run(process.call("fault", what="delay", value=3000))
    heads = rig.read(*range(requests))
    rig.done(requests)
    assert rig.backend.process is process and rig.events == []
    assert [rig.result(head)[0] for head in heads] == [OK] * requests


def deaths(rig: Rig) -> list[int]:
    """For which each request that is in flight is blamed."""
    session = rig.frontend._session
    assert session is not None and session.inflight is not None
    region = os.pread(session.inflight.fd, session.inflight.area.mmap_size, 0)
    entries = region[INFLIGHT_HEADER_SIZE:][: 64 * INFLIGHT_ENTRY_SIZE]
    return [blamed for busy, blamed in struct.iter_unpack("BB14x", entries) if busy]


def test_nobody_is_to_blame_when_a_slow_disk_takes_longer_than_a_pause_waits(rig: Rig) -> None:
    """Its worker is replaced all the same: it may stop its rings when nobody waits for that any more."""
    process = rig.disk().backend.process
    assert process is not None
    rig.run(process.call("fault", what="delay", value=60_000))
    heads = rig.read(1, 2, 3, 4)
    rig.until(lambda: len(deaths(rig)) == 4)
    with pytest.raises(Timeout, match="_disk0: stopping the rings"):
        rig.run(rig.frontend.stop(0.2))
    rig.run(rig.frontend.resume())
    columns = rig.replaced(process.pid)
    assert not process.blameable and not any(deaths(rig))
    assert columns["last_cause"] == "hung" and "start or stop its rings in time" in columns["last_reason"]
    rig.done(4)
    assert [rig.result(head) for head in heads] == [(OK, bytes([sector]) * SECTOR) for sector in (1, 2, 3, 4)]
    assert [event for event, _ in rig.events] == ["worker-lost", "worker-restarted"]


# States -----------------------------------------------------------------------------------------------------------


def test_worker_that_had_to_be_replaced_often_is_degraded(rig: Rig) -> None:
    rig.toy()
    for _ in range(OFTEN):
        assert rig.backend.row() is None and rig.backend.process is not None
        pid = rig.backend.process.pid
        os.kill(pid, signal.SIGKILL)
        rig.replaced(pid)
    row = rig.backend.row()
    assert row is not None and row["state"] == "degraded" and row["restarts"] == OFTEN
    assert rig.backend.process is not None and row["pid"] == rig.backend.process.pid
    assert [event for event, _ in rig.events].count("worker-lost") == OFTEN


def test_quarantine_is_told_once_with_its_reason() -> None:
    events: list[str] = []
    supervision = Supervision(lambda _source, event, _properties: events.append(event))
    for _ in range(3):
        supervision.quarantined("blk", "_disk0", "no such disk")
    assert events == ["worker-quarantined"] and supervision.columns("blk", "_disk0")["last_reason"] == "no such disk"
    supervision.restored("blk", "_disk0", 7)
    supervision.restored("blk", "_disk0", 7)
    assert events == ["worker-quarantined", "worker-restarted"]


def test_losses_are_counted_by_cause_and_quarantines_by_reason() -> None:
    supervision = Supervision()
    assert supervision.counts("blk", "_disk0") == ({str(cause): 0 for cause in Cause}, 0)
    for cause in (Cause.HUNG, Cause.ENDED, Cause.HUNG):
        supervision.lost("blk", "_disk0", 7, cause, "for a test")
    for reason in ("no such disk", "no such disk", "no memory"):
        supervision.quarantined("blk", "_disk0", reason)
    supervision.restored("blk", "_disk0", 8)
    losses, quarantines = supervision.counts("blk", "_disk0")
    assert losses == {"ended": 1, "disconnected": 0, "hung": 2, "refused": 0} and quarantines == 2


def test_stopped_and_dead_zygote_is_replaced_before_anybody_needs_it(rig: Rig) -> None:
    rig.toy()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        zygote = rig.fleet.zygote.pid
        os.kill(zygote, number)
        rig.until(lambda zygote=zygote: rig.fleet.zygote.pid != zygote)
    causes = [properties["cause"] for event, properties in rig.events if event == "worker-lost"]
    assert causes == ["hung", "ended"]


# Statistics -------------------------------------------------------------------------------------------------------


def test_counters_never_go_backwards_over_a_death(rig: Rig) -> None:
    rig.disk()
    rig.read(*range(8))
    rig.done(8)
    before = rig.run(rig.backend.stats())
    assert before["read_ops"] == 8 and rig.backend.process is not None
    os.kill(rig.backend.process.pid, signal.SIGKILL)
    rig.replaced(rig.backend.process.pid)
    after = rig.run(rig.backend.stats())
    assert {name: value for name, value in after.items() if name.endswith(("_ops", "_bytes"))} == {
        name: value for name, value in before.items() if name.endswith(("_ops", "_bytes"))
    }
    rig.read(1)
    rig.done(1)
    assert rig.run(rig.backend.stats())["read_ops"] == 9


def test_merged_counters() -> None:
    before = {"read_ops": 3, "read_latency_min": 5, "read_latency_max": 9, "read_latency_avg": 6, "inflight": 4}
    now = {"read_ops": 1, "read_latency_min": 2, "read_latency_max": 2, "read_latency_avg": 2, "inflight": 0, "new": 1}
    assert merge(before, now) == {
        "read_ops": 4, "read_latency_min": 2, "read_latency_max": 9, "read_latency_avg": 5, "inflight": 0, "new": 1,
    }  # fmt: skip


def test_merged_counters_of_a_successor_that_has_done_nothing() -> None:
    before = {"read_ops": 3, "read_latency_min": 5, "read_latency_max": 9, "read_latency_avg": 6}
    now = {"read_ops": 0, "read_latency_min": NONE_YET, "read_latency_max": NONE_YET, "read_latency_avg": NONE_YET}
    assert merge(before, now) == before
    assert merge(now, before) == before


# Poison -----------------------------------------------------------------------------------------------------------


def test_request_that_kills_three_workers_is_failed_alone(rig: Rig) -> None:
    """Another fault that comes and goes takes away nothing from the one that every incarnation has."""
    rig.disk(die_on_sector=POISON)
    assert rig.backend.process is not None
    rig.run(rig.backend.process.call("fault", what="clear"))
    sectors = [2, 4, POISON, 6, 8]
    heads = rig.read(*sectors)
    rig.done(len(sectors))
    for sector, head in zip(sectors, heads, strict=True):
        status, data = rig.result(head)
        assert status == (IO_ERROR if sector == POISON else OK)
        assert sector == POISON or data == bytes([sector]) * SECTOR
    assert sum(event == "worker-lost" for event, _ in rig.events) == 3
    rig.until(lambda: rig.events[-1][0] == "worker-request-failed")
    told = rig.events[-1][1]
    assert (told["name"], told["requests"]) == ("_disk0", 1) and f"sector {POISON}" in told["reason"]
    (head,) = rig.read(9)
    rig.done(1)
    assert rig.result(head)[0] == OK


def test_frame_that_kills_three_workers_is_dropped_alone(rig: Rig) -> None:
    lethal = 0x88B6
    rig.card(lethal=lethal)
    assert rig.network is not None
    wire = rig.network.wire()
    frames = [frame(number) for number in range(5)]
    bad = frames[2][:12] + lethal.to_bytes(2, "big") + frames[2][14:]
    for content in (*frames[:2], bad, *frames[3:]):
        rig.driver.add([bytes(12) + content])
    rig.driver.kick()
    rig.done(5)
    assert sum(event == "worker-lost" for event, _ in rig.events) == 3
    rig.until(lambda: rig.backend.state is BackendState.SERVING)
    stats = rig.run(rig.backend.stats())
    assert (stats["poisoned"], stats["tx_dropped"]) == (1, 1)
    seen = set()
    while frames[4] not in seen:
        seen.add(wire.receive())
    wire.close()
    assert seen == {*frames[:2], *frames[3:]}
    rig.until(lambda: any(event == "worker-request-failed" for event, _ in rig.events))


def test_request_whose_workers_somebody_kills_is_never_failed(rig: Rig) -> None:
    """SIGKILL is no crash: the request is innocent, however often it was in flight."""
    rig.disk()
    assert rig.backend.process is not None
    for _ in range(4):
        process = rig.backend.process
        rig.run(process.call("fault", what="hang"))
        if not rig.buffers:
            (head,) = rig.read(5)
        os.kill(process.pid, signal.SIGKILL)
        rig.replaced(process.pid)
    rig.done(1)
    assert rig.result(head) == (OK, bytes([5]) * SECTOR)
