"""controller.events: the event monitor's file as a reader sees it."""

from __future__ import annotations

import json
import os
import time

import pytest

from controller.events import EventMonitor
from shared.errors import HostError


def records(text):
    return [json.loads(part) for part in text.split("\n\n") if part]


def test_records_are_cloud_hypervisors(tmp_path):
    path = tmp_path / "events"
    monitor = EventMonitor(time.monotonic())
    monitor.open(str(path))
    monitor.emit("vmm", "starting")
    monitor.emit("vm", "migration-phase", {"phase": "building"})
    text = path.read_text()
    assert text.endswith("}\n\n")
    assert '{\n  "timestamp": {\n    "secs": 0,\n' in text
    first, second = records(text)
    assert list(first) == ["timestamp", "source", "event", "properties"]
    assert (first["source"], first["event"], first["properties"]) == ("vmm", "starting", None)
    assert second["properties"] == {"phase": "building"}
    assert (first["timestamp"]["secs"], first["timestamp"]["nanos"]) <= (
        second["timestamp"]["secs"], second["timestamp"]["nanos"],
    )  # fmt: skip


def test_time_counts_from_the_start_of_the_vmm(tmp_path):
    path = tmp_path / "events"
    monitor = EventMonitor(time.monotonic() - 100)
    monitor.open(str(path))
    monitor.emit("vmm", "starting")
    assert 100 <= records(path.read_text())[0]["timestamp"]["secs"] < 130


def test_a_reader_that_is_too_slow_loses_events_and_stops_nobody():
    read_end, write_end = os.pipe()
    monitor = EventMonitor(time.monotonic())
    monitor.open(fd=write_end)
    for _ in range(3000):
        monitor.emit("vm", "migration-phase", {"phase": "x" * 100})
    arrived = os.read(read_end, 1 << 20)
    assert records(arrived[: arrived.rindex(b"}\n\n") + 3].decode())
    os.close(read_end)
    os.close(write_end)


def test_a_reader_that_is_gone_stops_nobody():
    read_end, write_end = os.pipe()
    monitor = EventMonitor(time.monotonic())
    monitor.open(fd=write_end)
    os.close(read_end)
    monitor.emit("vm", "booted")
    os.close(write_end)


def test_the_descriptor_is_not_inherited():
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    EventMonitor(0).open(fd=write_end)
    assert not os.get_inheritable(write_end) and not os.get_blocking(write_end)
    os.close(read_end)
    os.close(write_end)


def test_subscribers_hear_with_and_without_a_file():
    heard = []
    monitor = EventMonitor(0)
    monitor.subscribers.append(lambda *event: heard.append(event))
    monitor.emit("vm", "paused")
    monitor.emit("vm", "resumed", {"a": 1})
    assert heard == [("vm", "paused", None), ("vm", "resumed", {"a": 1})]


def test_a_path_that_cannot_be_opened_is_named(tmp_path):
    path = tmp_path / "none" / "events"
    with pytest.raises(HostError, match=f"--event-monitor path={path}: No such file or directory"):
        EventMonitor(0).open(str(path))


def test_a_descriptor_that_is_not_open_is_named():
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(HostError, match=f"--event-monitor fd={write_end}: Bad file descriptor"):
        EventMonitor(0).open(fd=write_end)
