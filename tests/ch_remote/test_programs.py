"""ch-remote as a program of its own: signals, standard input, a closed standard output, what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.ch_remote.server import DEADLINE, NO_CONTENT, Server, reply

ROOT = Path(__file__).resolve().parents[2]


def program(server: Server, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ch_remote", f"--api-socket={server.path}", *words]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, timeout=DEADLINE, check=False)


def start(server: Server, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ch_remote", f"--api-socket={server.path}", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("words", [["create"], ["create", "-"]])
def test_create_reads_stdin(server: Server, words: list[str]) -> None:
    done = program(server, *words, stdin=b'{"payload": {}}')
    assert done.returncode == 0 and server.bodies == [b'{"payload": {}}']


class Migration:
    """Server side of a migration that ends when it is cancelled (or at once, when `finishes`)."""

    def __init__(self, server: Server, answer: bytes, cancel_answer: bytes = NO_CONTENT) -> None:
        self.cancelled = threading.Event()
        self.cancel_answer = cancel_answer
        self.answer = answer
        server.handler = self.handle

    def handle(self, head: str, body: bytes) -> bytes:
        if "cancel-migration" in head:
            self.cancelled.set()
            return self.cancel_answer
        assert self.cancelled.wait(DEADLINE)
        return self.answer


CANCELLED = reply(b'["Error from API","The migration was cancelled"]', "500 Internal Server Error")


@pytest.mark.parametrize(
    "words", [("send-migration", "--local", "unix:/s"), ("receive-migration", "unix:/s")]
)
def test_ctrl_c_cancels_a_migration_and_waits_for_its_end(server: Server, words: tuple[str, ...]) -> None:
    Migration(server, CANCELLED)
    with start(server, *words) as process:
        assert server.arrived.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert [head.split(" ")[1] for head in server.heads] == [
        f"/api/v1/vm.{words[0]}",
        "/api/v1/vm.cancel-migration",
    ]
    assert server.heads[1].startswith("PUT ") and server.bodies[1] == b""
    assert out == "" and "  3: The migration was cancelled\n" in err


def test_ctrl_c_too_late_says_that_the_migration_was_completed(server: Server) -> None:
    refusal = reply(b'["Error from API","no migration to cancel"]', "500 Internal Server Error")
    Migration(server, NO_CONTENT, refusal)
    with start(server, "send-migration", "unix:/s") as process:
        assert server.arrived.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert "no migration to cancel" in err and "completed before it could be cancelled" in err


def test_a_second_ctrl_c_gives_up_waiting(server: Server) -> None:
    """The server takes the cancel and then says nothing more."""
    cancelling, release = threading.Event(), threading.Event()

    def handle(head: str, body: bytes) -> bytes:
        if "cancel-migration" in head:
            cancelling.set()
        assert release.wait(DEADLINE)
        return NO_CONTENT

    server.handler = handle
    with start(server, "send-migration", "unix:/s") as process:
        assert server.arrived.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        assert cancelling.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)
    release.set()
    assert process.returncode == 130


def test_ctrl_c_elsewhere_just_ends(server: Server) -> None:
    release = threading.Event()

    def handle(head: str, body: bytes) -> bytes:
        assert release.wait(DEADLINE)
        return NO_CONTENT

    server.handler = handle
    with start(server, "info") as process:
        assert server.arrived.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    release.set()
    assert (process.returncode, out, err) == (130, "", "")
    assert len(server.heads) == 1


def test_an_ignored_sigint_stays_ignored(server: Server) -> None:
    """As a shell script's background jobs have it: a Ctrl-C meant for the script cancels nothing."""
    release = threading.Event()

    def handle(head: str, body: bytes) -> bytes:
        assert release.wait(DEADLINE)
        return NO_CONTENT

    server.handler = handle
    command = f"trap '' INT; exec {sys.executable} -m ch_remote --api-socket={server.path} receive-migration unix:/s"
    with subprocess.Popen(["sh", "-c", command], cwd=ROOT) as process:
        assert server.arrived.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        release.set()
        assert process.wait(DEADLINE) == 0
    assert len(server.heads) == 1


def test_a_reader_that_is_gone_makes_no_noise(server: Server) -> None:
    server.handler = lambda head, body: reply(b"x" * 200_000)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ch_remote", f"--api-socket={server.path}", "info"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=DEADLINE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_import_needs_the_standard_library_only_and_little_of_it() -> None:
    code = "import sys; before = set(sys.modules); import ch_remote.main; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "argparse",
        "asyncio",
        "json",
        "logging",
        "subprocess",
        "http",
        "zmq",
        "msgpack",
    }
    assert loaded - {"ch_remote", "shared"} <= sys.stdlib_module_names
