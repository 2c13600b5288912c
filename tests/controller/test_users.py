"""controller.users and `--worker-uid`: what is understood, what is refused by name, who gets which number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from controller.config.cli import parse_argv
from controller.config.worker_uid import LAST, USERS, WorkerUid, parse
from controller.users import Users
from shared.errors import ConfigError, WorkerError
from tests.vmm import PROGRAM, environment

NOBODY: frozenset[str] = frozenset()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1", WorkerUid(1)),
        ("54000", WorkerUid(54000)),
        ("base=100000", WorkerUid(100000, each=True)),
        (str(LAST), WorkerUid(LAST)),
        (f"base={LAST - USERS + 1}", WorkerUid(LAST - USERS + 1, each=True)),
    ],
)
def test_both_forms(text: str, wanted: WorkerUid) -> None:
    options = parse_argv(["--api-socket=x", "--worker-uid", text])
    assert options.worker_uid == wanted and wanted.flag == f"--worker-uid {text}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "0 is root"),
        ("base=0", "0 is root"),
        ("00", "0 is root"),
        ("", "'' is no user id"),
        ("base=", "'' is no user id"),
        ("-1", "'-1' is no user id"),
        ("nobody", "'nobody' is no user id"),
        ("1000+", "'1000+' is no user id"),
        ("0x10", "'0x10' is no user id"),
        ("\u0661", "is no user id"),
        ("Base=5", "'Base=5' is no user id"),
        (str(LAST + 1), f"user ids end at {LAST}"),
        (f"base={LAST}", f"user ids end at {LAST}"),
        ("9" * 5000, f"user ids end at {LAST}"),
    ],
)
def test_what_is_no_user_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert says in str(refused.value) and f"--worker-uid {text}" in str(refused.value)


def test_without_a_wish_nobody_changes() -> None:
    assert Users().of("_disk0", NOBODY) == 0


@needs_root
def test_one_user_for_all() -> None:
    users = Users(WorkerUid(54000))
    assert {users.of(name, NOBODY) for name in ("_disk0", "api", "_net1")} == {54000}


@needs_root
def test_each_has_its_own_and_keeps_it() -> None:
    users = Users(WorkerUid(54000, each=True))
    first = [users.of(name, NOBODY) for name in ("_disk0", "api", "_net1")]
    assert first == [54000, 54001, 54002]
    assert [users.of(name, NOBODY) for name in ("_disk0", "api", "_net1")] == first


@needs_root
def test_numbers_of_processes_that_are_gone_are_given_out_again_and_no_others() -> None:
    users = Users(WorkerUid(54000, each=True))
    names = [f"disk{number}" for number in range(USERS)]
    for name in names:
        users.of(name, NOBODY)
    with pytest.raises(WorkerError, match=rf"all {USERS} users of --worker-uid base=54000 are taken"):
        users.of("more", set(names))
    assert users.of("more", set(names) - {"disk7"}) == 54007
    assert users.of("disk9", set(names)) == 54009


CLONE_NEWUSER = 0x1000_0000


def start_as_another(prepare: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The program, after these lines of Python in its process."""
    return subprocess.run(
        [sys.executable, "-c", f"import os\n{prepare}\n{PROGRAM}", "--api-socket", "none", *words],
        env=environment(), capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip


@needs_root
def test_an_unprivileged_vmm_refuses_the_flag_and_leaves_nothing() -> None:
    # The file system stays readable: imports come after the change.
    done = start_as_another(
        "from shared.sandbox import drop_capabilities; drop_capabilities((1,))", "--worker-uid", "54000"
    )
    assert done.returncode == 1
    assert "--worker-uid 54000: this process lacks CAP_KILL, CAP_SETGID, CAP_SETUID" in done.stderr
    assert not os.path.exists("/none")


@needs_root
def test_users_that_this_user_namespace_lacks_are_refused_by_name() -> None:
    if not os.path.exists("/proc/self/ns/user"):
        pytest.skip("this kernel has no user namespaces")
    done = start_as_another(
        "from shared.linux import libc\n"
        f"assert libc.unshare({CLONE_NEWUSER}) == 0\n"
        "open('/proc/self/uid_map', 'w').write('0 0 1')\n"
        "open('/proc/self/setgroups', 'w').write('deny')\n"
        "open('/proc/self/gid_map', 'w').write('0 0 1')",
        "--worker-uid", "base=54000",
    )  # fmt: skip
    assert done.returncode == 1
    assert "--worker-uid base=54000: not all of uid 54000 to 54255 are mapped in this user namespace" in done.stderr
    assert not os.path.exists("/none")
