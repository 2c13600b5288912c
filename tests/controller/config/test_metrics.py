"""controller.config.metrics: where the figures are served, as the command line says it."""

from __future__ import annotations

import pytest

from controller.config.cli import parse_argv
from controller.config.metrics import MetricsTarget
from shared.errors import ConfigError

API = "--api-socket=/tmp/api"


def target(*words: str) -> MetricsTarget | None:
    return parse_argv([API, *words]).metrics


def test_without_the_flags_there_is_none() -> None:
    assert target() is None


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:9100", "127.0.0.1", 9100), ("[::1]:1", "::1", 1), ("192.0.2.7:65535", "192.0.2.7", 65535)],
)
def test_address_and_port(text: str, host: str, port: int) -> None:
    found = target("--metrics", text)
    assert found == MetricsTarget(host=host, port=port)
    assert found.flag == f"--metrics {text}"


def test_path_of_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    found = target("--metrics-socket", "~/figures")
    assert found == MetricsTarget(path="/h/figures")
    assert found.flag == "--metrics-socket /h/figures"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "127.0.0.1:9100"),
        ("9100", "127.0.0.1:9100"),
        (":9100", "127.0.0.1:9100"),
        ("127.0.0.1", "127.0.0.1:9100"),
        ("127.0.0.1:", "port '' is not within 1 to 65535"),
        ("127.0.0.1:0", "port '0' is not within 1 to 65535"),
        ("127.0.0.1:65536", "port '65536' is not within 1 to 65535"),
        ("127.0.0.1:-1", "port '-1' is not within 1 to 65535"),
        ("127.0.0.1:٣", "port '٣' is not within 1 to 65535"),
        ("127.0.0.1:http", "port 'http' is not within 1 to 65535"),
        ("localhost:9100", "localhost is no numeric address"),
        ("127.0.0.256:9100", "127.0.0.256 is no numeric address"),
        ("[127.0.0.1]:9100", "127.0.0.1:9100"),
        ("::1:9100", "[::1]:9100"),
        ("[::1", "[::1]:9100"),
        ("[fe80::1%eth0]:9100", "fe80::1%eth0 is no numeric address"),
        ("0.0.0.0:9100", "0.0.0.0 is every address of this host"),
        ("[::]:9100", ":: is every address of this host"),
        ("[::ffff:0.0.0.0]:9100", "::ffff:0.0.0.0 is every address of this host"),
    ],
)
def test_what_is_no_address_and_port_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        target(f"--metrics={text}")
    assert str(refused.value).startswith(f"Error parsing --metrics {text}")
    assert says in str(refused.value)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="--metrics-socket: the path is empty"):
        target("--metrics-socket=")


def test_both_at_once_are_a_mistake_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        target("--metrics", "127.0.0.1:9100", "--metrics-socket", "/tmp/figures")
    assert ended.value.code == 2
    assert "'--metrics <ADDRESS>' cannot be used with '--metrics-socket <PATH>'" in capsys.readouterr().err


def test_they_are_no_way_to_ask_for_a_vm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_argv(["--metrics", "127.0.0.1:9100"])
    assert ended.value.code == 2
    assert "--kernel <PATH> or --api-socket <PATH>" in capsys.readouterr().err
