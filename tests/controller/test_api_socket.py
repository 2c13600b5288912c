"""controller.api_socket: mode, stale and live sockets, and paths that are something else."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from controller.api_socket import ApiSocket
from shared.errors import HostError


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "api")


def listener(path, backlog=8):
    """A server that is none of ours: no lock file."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen(backlog)
    return sock


def can_connect(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(path) == 0


def test_socket_is_the_owners_alone_whatever_the_umask(path):
    before = os.umask(0)
    try:
        api = ApiSocket.listen(path)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert can_connect(path)
    api.close()


def test_close_removes_every_name_and_may_come_twice(path, tmp_path):
    api = ApiSocket.listen(path)
    assert api.paths == [path, f"{path}.lock"]
    api.close()
    api.close()
    assert os.listdir(tmp_path) == []


def test_stale_socket_of_a_killed_owner_is_replaced(path):
    listener(path).close()
    assert not can_connect(path)
    api = ApiSocket.listen(path)
    assert can_connect(path)
    api.close()


def test_a_live_owner_is_refused_and_stays_reachable(path):
    owner = ApiSocket.listen(path)
    with pytest.raises(HostError, match=f"API socket {path} is already in use by another running instance"):
        ApiSocket.listen(path)
    assert can_connect(path)
    owner.close()
    ApiSocket.listen(path).close()


@pytest.mark.parametrize("full", [False, True], ids=["accepting", "backlog full"])
def test_a_live_listener_of_somebody_else_is_refused(path, full):
    with listener(path, 0 if full else 8) as foreign:
        waiting = []
        if full:
            code = 0
            while code == 0:
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                code = waiting[-1].connect_ex(path)
        with pytest.raises(HostError, match="already in use"):
            ApiSocket.listen(path)
        assert not os.path.exists(f"{path}.lock")
        foreign.accept()[0].close()
        for sock in waiting:
            sock.close()
    os.unlink(path)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_a_path_that_is_something_else_is_refused_and_untouched(path, kind):
    if kind == "file":
        with open(path, "w") as file:
            file.write("precious")
    elif kind == "directory":
        os.mkdir(path)
    else:
        os.symlink("nowhere", path)
    before = os.lstat(path)
    with pytest.raises(HostError, match=f"--api-socket {path}: the path exists and is not a socket"):
        ApiSocket.listen(path)
    assert os.lstat(path) == before
    assert not os.path.exists(f"{path}.lock")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = str(tmp_path / "none" / "api")
    with pytest.raises(HostError, match=f"--api-socket {path}: .*No such file or directory"):
        ApiSocket.listen(path)


def test_a_path_that_is_too_long_for_a_socket_is_an_error_and_leaves_nothing(tmp_path):
    name = "a" * (120 - len(str(tmp_path))) if len(str(tmp_path)) < 100 else "a" * 60
    with pytest.raises(HostError, match=r"--api-socket .*too long"):
        ApiSocket.listen(str(tmp_path / name))
    assert os.listdir(tmp_path) == []


def test_a_link_in_place_of_the_lock_file_is_not_followed(path, tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.symlink(tmp_path / "victim", f"{path}.lock")
    with pytest.raises(HostError, match="cannot create"):
        ApiSocket.listen(path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_an_inherited_socket_serves_and_its_name_is_not_ours(path):
    with listener(path) as made:
        api = ApiSocket.inherit(os.dup(made.fileno()))
        assert api.paths == []
        assert not api.sock.get_inheritable()
        api.close()
        assert os.path.exists(path)
    os.unlink(path)


def test_an_inherited_descriptor_that_does_not_listen_is_refused():
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(HostError, match=r"--api-socket fd=\d+: not a listening socket"):
        ApiSocket.inherit(theirs.detach())


def test_an_inherited_descriptor_that_is_no_socket_is_refused():
    read_end, write_end = os.pipe()
    with pytest.raises(HostError, match=f"--api-socket fd={read_end}: "):
        ApiSocket.inherit(read_end)
    os.close(read_end)
    os.close(write_end)
