"""A unix socket's name appears once it listens, wherever a process of ours makes one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.api_socket import ApiSocket
from controller.migration.listener import Listener
from shared import vhost_program
from shared.chardev import open_host_end
from shared.listening import MAX_PATH, listen_as

PLACES: dict[str, tuple[Callable[[str], Any], int | None]] = {
    "vhost program": (vhost_program._listen, None),
    "console": (lambda path: open_host_end("socket", socket_path=path), 0o600),
    "API": (ApiSocket.listen, 0o600),
    "migration": (Listener, 0o600),
}


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_is_visible_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """What is looked at before and after each system call that makes the name: whoever waits for it may come then."""
    path = str(tmp_path / "name")
    make, mode = PLACES[place]
    seen: list[str] = []

    def looked_after(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            answer = call(*args, **keywords)
            if os.path.exists(path):
                seen.append("accepts" if connects(path) else f"refuses after {call.__name__}")
                assert mode is None or stat.S_IMODE(os.stat(path).st_mode) == mode
            return answer

        return wrapped

    class Looked(socket.socket):
        bind = looked_after(socket.socket.bind)
        listen = looked_after(socket.socket.listen)

    monkeypatch.setattr(socket, "socket", Looked)
    for name in ("chmod", "link", "rename"):
        monkeypatch.setattr(os, name, looked_after(getattr(os, name)))
    before = os.umask(0o022)
    try:
        made = make(path)
    finally:
        os.umask(before)
        monkeypatch.undo()
    assert seen and set(seen) == {"accepts"}
    assert set(os.listdir(tmp_path)) <= {"name", "name.lock"}
    made.close()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def test_what_somebody_put_there_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "name"
    path.write_text("precious")
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="Address already in use") as caught:
        listen_as(sock, str(path), 1)
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["name"]


def test_a_file_system_without_hard_links_has_the_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    path = str(tmp_path / "name")
    with socket.socket(socket.AF_UNIX) as sock:
        listen_as(sock, path, 1)
        assert connects(path) and os.listdir(tmp_path) == ["name"]
    os.unlink(path)


@pytest.mark.parametrize("length", [MAX_PATH - 9, MAX_PATH - 8, MAX_PATH])
def test_a_name_that_leaves_no_room_for_another_is_the_only_one(tmp_path: Path, length: int) -> None:
    folder = str(tmp_path)
    while (left := length - 2 - len(folder)) > 1:
        folder = os.path.join(folder, "d" * min(left - 1, 60))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "n" * (length - len(folder) - 1))
    assert len(path) == length
    with socket.socket(socket.AF_UNIX) as sock:
        listen_as(sock, path, 1)
        assert connects(path) and len(os.listdir(folder)) == 1
    os.unlink(path)


def test_a_name_that_is_too_long_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="too long"):
        listen_as(sock, str(tmp_path / ("a" * (MAX_PATH - len(str(tmp_path))))), 1)
    assert os.listdir(tmp_path) == []
