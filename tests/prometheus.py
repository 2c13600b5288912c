"""Scraping a VMM in tests: over its port or unix socket, by the client library's own parser."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.vmm import poll

SECONDS = 30.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def connect(target: int | Path) -> socket.socket:
    """A port of 127.0.0.1, or a unix socket's path."""
    if isinstance(target, int):
        return socket.create_connection(("127.0.0.1", target), SECONDS)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    sock.connect(str(target))
    return sock


def fetch(target: int | Path, path: str = "/metrics") -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = connect(target)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def scrape(target: int | Path) -> Samples:
    status, text = fetch(target)
    assert status == 200, text
    return parse(text)


def at(found: Samples, name: str, **labels: str) -> float | None:
    """The value of flotilla_NAME with exactly these labels."""
    return found.get((f"flotilla_{name}", frozenset(labels.items())))


def total(found: Samples, name: str, **labels: str) -> float:
    """Over all samples of flotilla_NAME that have these labels, and whatever others."""
    return sum(v for (n, have), v in found.items() if n == f"flotilla_{name}" and labels.items() <= set(have))


def until(target: int | Path, holds: Callable[[Samples], object]) -> Samples:
    """The first scrape for which `holds`; the exporter gives figures out again for half a second."""
    found: Samples = poll(lambda: (now := scrape(target)) and holds(now) and now)
    return found
