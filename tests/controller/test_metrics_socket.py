"""controller.metrics_socket: a port or a unix socket of the exporter's, and what may be in the way."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from controller.config.metrics import MetricsTarget
from controller.metrics_socket import listen
from shared.errors import HostError
from tests.network import free_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_listens_at_the_given_address_alone_and_can_do_so_again_at_once(host: str) -> None:
    port = free_port(host)
    for _ in range(2):
        made = listen(MetricsTarget(host=host, port=port))
        assert made.paths == []
        assert made.sock.getsockname()[:2] == (host, port)
        with socket.create_connection((host, port), 10) as client:
            served, _ = made.sock.accept()
            served.close()  # the server's end closes first: its port stays in TIME_WAIT
            assert client.recv(1) == b""
        made.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_named(host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind((host, 0))
        taken.listen()
        target = MetricsTarget(host=host, port=taken.getsockname()[1])
        with pytest.raises(HostError) as refused:
            listen(target)
    assert str(refused.value).startswith(f"{target.flag}: Address already in use")
    assert "choose another port" in str(refused.value)


def test_an_address_of_another_host_is_named() -> None:
    with pytest.raises(HostError, match=r"--metrics 192\.0\.2\.1:9100: .*this host has no such address"):
        listen(MetricsTarget(host="192.0.2.1", port=9100))


def test_a_host_without_ipv6_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr("controller.metrics_socket.socket.socket", lacks)
    with pytest.raises(HostError, match=r"--metrics \[::1\]:9100: .*this host has no IPv6"):
        listen(MetricsTarget(host="::1", port=9100))


def test_a_unix_socket_is_the_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "figures")
    made = listen(MetricsTarget(path=path))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert made.paths == [path, f"{path}.lock"]
    with pytest.raises(HostError, match=f"Metrics socket {path} is already in use by another running instance"):
        listen(MetricsTarget(path=path))
    made.close()
    assert os.listdir(tmp_path) == []


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "figures")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(path)
        killed.listen()
    made = listen(MetricsTarget(path=path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(path)
    made.close()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_path_that_is_something_else_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "figures"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(HostError, match=f"--metrics-socket {path}: the path exists and is not a socket"):
        listen(MetricsTarget(path=str(path)))
    assert path.is_dir() if kind == "directory" else path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["figures"]
