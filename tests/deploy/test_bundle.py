"""deploy/bundle.sh: the folder runs where there is Debian 12's Python and nothing else."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import bundle, floors, install
from deploy.install import SetupError

# What is bound into the bare root: Python, its library, the C library. No shell, no compiler, no dist-packages, no
# checkout, no cache.
DEBIAN = ("/usr/bin/python3", "/usr/lib/python3.11", "/usr/lib/x86_64-linux-gnu", "/lib64/ld-linux-x86-64.so.2")
HOST = ("/dev", "/proc", "/sys")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "flotilla"
    script = install.CHECKOUT / "deploy" / "bundle.sh"
    done = subprocess.run(["bash", script, folder], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    return folder


def in_bare_root(folder: Path, root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a root that holds Python, a copy of the bundle as /opt/copy and a link to its launcher."""
    if os.path.realpath("/usr/bin/python3") != "/usr/bin/python3.11":
        pytest.skip("the host's Python is not Debian 12's")
    script = ["set -e"]
    for name in (*DEBIAN, *HOST):
        source, target = os.path.realpath(name), root / name[1:]
        if os.path.isdir(source):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        script.append(f"mount --rbind {source} {target}")
    (root / "lib").symlink_to("usr/lib")
    for name in ("tmp", "run", "root"):
        (root / name).mkdir()
    shutil.copytree(folder, root / "opt/copy")
    (root / "root/remote").symlink_to("../opt/copy/ch-remote")
    script.append(f"exec env -i HOME=/root /usr/sbin/chroot {root} {shlex.join(command)}")
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c", "\n".join(script)]
    return subprocess.run(words, capture_output=True, text=True, timeout=50, check=False, cwd="/")


@pytest.mark.parametrize("name", ["/opt/copy/cloud-hypervisor", "/opt/copy/flotilla", "/root/remote"])
def test_each_command_runs_where_there_is_only_python(made: Path, tmp_path: Path, name: str) -> None:
    done = in_bare_root(made, tmp_path, name, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert "flotilla" in done.stdout


def test_every_module_loads_from_the_bundle_and_its_byte_code(made: Path, tmp_path: Path) -> None:
    """The copy has other times than the original: byte code that is checked against them would be stale."""
    code = (
        "import sys; sys.path[:0] = ['/opt/copy/code', '/opt/copy/python'];"
        "import controller.api.app, blk_worker.native, shared.atomics, zmq, msgpack, posix_ipc, uvicorn;"
        "from shared import native; [native.load(name) for name in native.LOOPS];"
        "import importlib.util as u;"
        "ours = [m for m in sys.modules.values() if str(getattr(m, '__file__', '')).startswith('/opt/copy')];"
        "assert len(ours) > 200, ours;"
        "bad = [m.__name__ for m in ours if m.__file__.endswith('.py') and open(m.__cached__, 'rb').read(8)[4] != 1];"
        "assert not bad, bad"
    )
    for path in made.rglob("*.py"):
        os.utime(path, (1, 1))
    done = in_bare_root(made, tmp_path, "/usr/bin/python3", "-IS", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.probe
def test_doctor_of_the_bundle_runs_the_probe_guest(made: Path, tmp_path: Path) -> None:
    if reason := floors.kvm_missing():
        pytest.skip(reason)
    done = in_bare_root(made, tmp_path, "/opt/copy/flotilla", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout


def test_folder_that_exists_is_left_alone(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert bundle.main([str(tmp_path)]) == 1
    assert bundle.main([str(tmp_path), "--force"]) == 1
    said = capsys.readouterr().err
    assert "exists: choose another folder, or --force" in said
    assert "is no bundle: choose another folder" in said
    assert (tmp_path / "mine").exists()


def test_force_replaces_a_bundle(made: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "code/controller").mkdir(parents=True)
    assert bundle.main([str(old), "--force"]) == 0
    assert (old / "cloud-hypervisor").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_loop_for_a_newer_c_library_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "blk.so"
    library.write_bytes(b"\0GLIBC_2.2.5\0GLIBC_2.36\0")
    bundle.check_native(tmp_path)
    library.write_bytes(b"\0GLIBC_2.2.5\0GLIBC_2.38\0")
    with pytest.raises(SetupError, match=r"blk\.so needs glibc 2\.38"):
        bundle.check_native(tmp_path)


def test_key_follows_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundle.key()
    assert bundle.key() == before
    monkeypatch.setattr(bundle, "LAUNCHER", "another")
    assert bundle.key() != before
