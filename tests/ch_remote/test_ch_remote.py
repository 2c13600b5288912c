"""ch_remote against a real server on a unix socket: requests as sent, output, exit codes."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from ch_remote import arguments, http
from ch_remote.main import main
from ch_remote.verbs import MIGRATIONS, REFUSED, VERBS
from controller.config import version
from tests.ch_remote.server import DEADLINE, OK, Server, reply, run

WITHOUT_ARGUMENT = sorted(
    name for name, verb in VERBS.items() if not verb.argument and name != "migration-resolve"
)


@pytest.mark.parametrize("name", WITHOUT_ARGUMENT)
def test_a_verb_without_argument_is_one_request_without_body(server: Server, name: str) -> None:
    assert run(server, name) == 0
    asking = ("ping", "info", "counters", "migration-estimate", "migration-progress", "fleet", "sandbox")
    method = "GET" if name in asking else "PUT"
    scope = "vmm" if name in ("ping", "shutdown-vmm", "fleet", "sandbox") else "vm"
    endpoint = "shutdown" if name == "shutdown-vmm" else name
    head = server.heads[0].split("\r\n")
    assert head[0] == f"{method} /api/v1/{scope}.{endpoint} HTTP/1.1"
    assert sorted(head[1:]) == ["Accept: */*", "Host: localhost"]
    assert server.bodies == [b""] and len(server.heads) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--api-socket", "@", "ping"),
        ("--api-socket=@", "ping"),
        ("ping", "--api-socket", "@"),
        ("ping", "--api-socket=@"),
    ],
)
def test_the_socket_may_stand_before_or_after_the_verb(server: Server, words: tuple[str, ...]) -> None:
    assert main([word.replace("@", str(server.path)) for word in words]) == 0


def test_a_tilde_in_the_socket_is_the_home_folder(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(server.path.parent))
    assert main(["--api-socket=~/api", "ping"]) == 0


def test_a_body_is_printed_verbatim_with_a_newline(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    server.handler = lambda head, body: reply(b'{"state" :  "Running"}')
    assert run(server, "info") == 0
    assert capfd.readouterr() == ('{"state" :  "Running"}\n', "")


def test_nothing_is_printed_without_a_body(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(server, "pause") == 0
    server.handler = lambda head, body: reply(b"")
    assert run(server, "shutdown-vmm") == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("answer", "close"),
    [
        (
            OK + b"Transfer-Encoding: chunked\r\n\r\n4;x=y\r\n[1,2\r\n3\r\n,3]\r\n0\r\nTrailer: 1\r\n\r\n",
            False,
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + reply(b"[1,2,3]"), False),
        (b"HTTP/1.0 200 OK\r\n\r\n[1,2,3]", True),
    ],
    ids=["chunked", "continue", "until-close"],
)
def test_every_framing_of_a_body_is_read(
    server: Server, capfd: pytest.CaptureFixture[str], answer: bytes, close: bool
) -> None:
    server.close_after = close
    server.handler = lambda head, body: answer
    assert run(server, "info") == 0
    assert capfd.readouterr().out == "[1,2,3]\n"


def test_create_sends_a_file(server: Server, tmp_path: Path) -> None:
    body = b'{"payload": {"kernel": "/vmlinux"}}' + b" " * 300_000
    (tmp_path / "vm.json").write_bytes(body)
    assert run(server, "create", str(tmp_path / "vm.json")) == 0
    assert server.bodies == [body]
    assert "Content-Type: application/json" in server.heads[0]
    assert f"Content-Length: {len(body)}" in server.heads[0]


def test_create_with_a_missing_file_names_it(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(server, "create", "/nowhere/vm.json") == 1
    assert "/nowhere/vm.json: No such file" in capfd.readouterr().err
    assert not server.heads


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (("send-migration", "--local", "unix:/s"), {"destination_url": "unix:/s", "local": True}),
        (("send-migration", "unix:/s", "--local"), {"destination_url": "unix:/s", "local": True}),
        (("--local", "send-migration", "unix:/s"), {"destination_url": "unix:/s", "local": True}),
        (("send-migration", "unix:/s"), {"destination_url": "unix:/s", "local": False}),
        (("send-migration", "tcp:host:1"), {"destination_url": "tcp:host:1", "local": False}),
        (
            ("send-migration", "destination_url=unix:/s,local=true"),
            {"destination_url": "unix:/s", "local": True},
        ),
        (("receive-migration", "unix:/s"), {"receiver_url": "unix:/s"}),
        (("receive-migration", "receiver_url=unix:/s"), {"receiver_url": "unix:/s"}),
    ],
)
def test_migration_syntaxes_of_every_release(server: Server, words: tuple[str, ...], body: object) -> None:
    assert run(server, *words) == 0
    assert json.loads(server.bodies[0]) == body
    name = next(word for word in words if word in MIGRATIONS)
    assert server.heads[0].startswith(f"PUT /api/v1/vm.{name} HTTP/1.1\r\n")


def test_a_refusal_continues_the_error_chain(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    body = json.dumps(["Error from API", "The VM could not be paused", "no VM"]).encode()
    server.handler = lambda head, _: reply(body, "500 Internal Server Error")
    assert run(server, "pause") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Error: ch-remote exited with the following chain of errors:",
        "  0: http client error",
        "  1: Server responded with InternalServerError",
        "  2: Error from API",
        "  3: The VM could not be paused",
        "  4: no VM",
    ]


def test_what_a_peer_wrote_into_a_refusal_stays_on_its_line(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    reason = "refused\n  3: all is well\x1b[2J"
    server.handler = lambda head, _: reply(json.dumps([reason]).encode(), "500 Internal Server Error")
    assert run(server, "pause") == 1
    assert capfd.readouterr().err.splitlines()[-1] == "  2: refused\\n  3: all is well\\x1b[2J"


@pytest.mark.parametrize(
    ("status", "name"),
    [
        ("400 Bad Request", "BadRequest"),
        ("404 Not Found", "NotFound"),
        ("409 Conflict", "Unknown"),
        ("429 Too Many Requests", "TooManyRequests"),
        ("501 Not Implemented", "NotImplemented"),
    ],
)
def test_status_names(server: Server, capfd: pytest.CaptureFixture[str], status: str, name: str) -> None:
    server.handler = lambda head, body: reply(b"", status)
    assert run(server, "boot") == 1
    assert capfd.readouterr().err.endswith(f"  1: Server responded with {name}\n")


@pytest.mark.parametrize("body", [b"oops", b'{"a":1}', b"[1]", b"[" * 100_000, b"\xff"])
def test_a_refusal_that_is_no_array_of_strings_is_shown_as_it_is(
    server: Server, capfd: pytest.CaptureFixture[str], body: bytes
) -> None:
    server.handler = lambda head, _: reply(body, "400 Bad Request")
    assert run(server, "boot") == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("  X: Can't get remote's error messages from JSON response: ")
    assert last.endswith(f": body='{body.decode(errors='replace')}'")


def test_nobody_listening_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--api-socket", str(tmp_path / "none"), "ping"]) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"Error opening HTTP socket: {tmp_path}/none: No such file or directory")


def test_a_stale_socket_is_named(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    assert main(["--api-socket", str(stale), "ping"]) == 1
    stale.unlink()
    assert "stale: Connection refused" in capfd.readouterr().err


def test_a_path_too_long_for_a_socket_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--api-socket", "/" + "x" * 200, "ping"]) == 1
    assert "AF_UNIX path too long" in capfd.readouterr().err


@pytest.mark.parametrize("partial", [b"", b"HTTP/1.1 200 OK\r\n", OK + b"Content-Length: 10\r\n\r\n12345"])
def test_a_server_that_dies_before_its_answer_is_told(
    server: Server, capfd: pytest.CaptureFixture[str], partial: bytes
) -> None:
    server.close_after = True
    server.handler = lambda head, body: partial
    assert run(server, "info") == 1
    assert "  1: The server closed the connection before it answered" in capfd.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"x" * (http.MAX_HEAD + 100_000),
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 99999999999999\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\n",
    ],
    ids=["ssh", "status", "endless-head", "negative", "huge", "chunk", "chunk-end", "huge-chunk"],
)
def test_a_server_that_does_not_speak_http_is_told(
    server: Server, capfd: pytest.CaptureFixture[str], answer: bytes
) -> None:
    server.handler = lambda head, body: answer
    assert run(server, "info") == 1
    assert "  1: The answer " in capfd.readouterr().err


@pytest.mark.parametrize("name", REFUSED)
def test_verbs_not_available_yet_are_refused_by_name(
    server: Server, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(server, name) == 2
    assert capfd.readouterr().err.startswith(
        f"error: {name} is not available yet in this version of Flotilla"
    )
    assert not server.heads


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-socket=/x"], "a command is missing"),
        (["--api-socket=/x", "pong"], "unrecognized subcommand 'pong'"),
        (["--api-socket=/x", "ping", "pong"], "unexpected argument 'pong' found"),
        (["--api-socket=/x", "ping", "--local"], "unexpected argument '--local' found"),
        (["--api-socket=/x", "--wrong"], "unexpected argument '--wrong' found"),
        (["--api-socket=/x", "send-migration"], "required arguments were not provided"),
        (
            ["--api-socket=/x", "receive-migration", "unix:/a", "unix:/b"],
            "unexpected argument 'unix:/b' found",
        ),
        (["--api-socket"], "a value is required for '--api-socket <PATH>'"),
        (["--api-socket=", "ping"], "a value is required for '--api-socket <PATH>'"),
        (["--api-socket=/x", "--api-socket=/y", "ping"], "cannot be used multiple times"),
        (["--dbus-service-name", "x", "ping"], "--dbus-service-name is not available yet"),
    ],
)
def test_usage_errors_exit_2(capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and "Usage: ch-remote" in err


def test_a_mistyped_verb_gets_a_tip(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["send-migraton", "unix:/x"]) == 2
    assert "a similar command exists: 'send-migration'" in capfd.readouterr().err


def test_no_arguments_print_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: ch-remote" in capfd.readouterr().err


def test_no_socket_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ping"]) == 1
    assert "--api-socket" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_lists_every_verb(capfd: pytest.CaptureFixture[str], flag: str) -> None:
    assert main([flag]) == 0
    out = capfd.readouterr().out
    assert all(f"\n  {name} " in out for name in VERBS) and all(name in out for name in REFUSED)


def test_version_is_the_vmms(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"ch-remote {arguments.VERSION}\n"
    assert arguments.VERSION == version.BUILD_VERSION


def test_fleet_as_a_table(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"kind": "vcpu", "device": None, "pid": 12}, {"kind": "blk", "device": "_disk0", "pid": 3456}]
    server.handler = lambda head, body: reply(json.dumps(rows).encode())
    assert run(server, "fleet", "--table") == 0
    assert capfd.readouterr().out == "KIND  DEVICE  PID\nvcpu  -       12\nblk   _disk0  3456\n"


def test_what_a_worker_wrote_into_a_row_stays_in_its_cell(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"kind": "blk", "last_reason": "no\n\x1b]0;moon\x07", "groups": ["a\r", 2]}]
    server.handler = lambda head, body: reply(json.dumps(rows).encode())
    assert run(server, "fleet", "--table") == 0
    assert capfd.readouterr().out.splitlines()[1:] == ["blk   no\\n\\x1b]0;moon\\x07  a\\r 2"]


@pytest.mark.parametrize("body", [b"[]", b"[1]", b"oops", b'{"a":1}'])
def test_fleet_without_rows_is_verbatim(
    server: Server, capfd: pytest.CaptureFixture[str], body: bytes
) -> None:
    server.handler = lambda head, _: reply(body)
    assert run(server, "fleet", "--table") == 0
    assert capfd.readouterr().out == body.decode() + "\n"


def test_watch_prints_each_change_until_the_end(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    states = iter(["none", "precopy", "precopy", "Completed"])
    server.handler = lambda head, body: reply(json.dumps({"state": next(states)}).encode())
    assert run(server, "migration-progress", "--watch") == 0
    assert [json.loads(line)["state"] for line in capfd.readouterr().out.splitlines()] == [
        "none",
        "precopy",
        "Completed",
    ]


def test_watch_ends_with_the_vmm(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    answers = iter([reply(b'{"state":"precopy"}')])

    def answer(head: str, body: bytes) -> bytes:
        try:
            return next(answers)
        except StopIteration:
            server.path.unlink()
            return b""

    server.handler = answer
    server.close_after = True
    assert run(server, "migration-progress", "--watch") == 0
    out, err = capfd.readouterr()
    assert out == '{"state":"precopy"}\n' and "The VMM has ended" in err


def test_watch_does_not_end_with_the_api_process(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    answers = iter([reply(b'{"state":"precopy"}'), b"", reply(b'{"state":"completed"}')])
    server.handler = lambda head, body: next(answers)
    server.close_after = True
    assert run(server, "migration-progress", "--watch") == 0
    assert capfd.readouterr() == ('{"state":"precopy"}\n{"state":"completed"}\n', "")


def test_an_answer_is_taken_though_the_server_did_not_read_the_body(server: Server, tmp_path: Path) -> None:
    """A server that refuses a large body closes early, and our sendall fails."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "early"))
        listener.listen()

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(reply(b'["too large"]', "400 Bad Request"))
                connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=refuse)
        thread.start()
        with http.Connection(str(tmp_path / "early")) as connection:
            answer = connection.request("PUT", "/x", b" " * (8 << 20))
        thread.join(DEADLINE)
    (tmp_path / "early").unlink()
    assert answer == http.Response(400, b'["too large"]')
