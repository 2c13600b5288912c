"""What deploy/setup.sh does. Runs on any bare Python 3.11+: nothing but the standard library is imported here.

The cache folder holds, each published by one rename, so that checkouts can share it and a kill leaves no half:

    python/<hash>/         one set of locked packages; the hash covers the lock file and the Python version
    checkouts/<hash>/bin/  what this checkout's commands are; the hash covers the checkout's path
    lab/                   see deploy/lab

The folder of a checkout is a virtual environment of a few lines (pyvenv.cfg, a link to the interpreter and one
.pth file that names the checkout and the packages), so the checkout's code is what runs, without a copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
LOCKS = {"runtime": "requirements.lock", "tools": "requirements-dev.lock"}

# Debian package -> the program or file by which one sees that it is there.
PACKAGES = {
    "gcc": "gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "linux-libc-dev": "/usr/include/linux/kvm.h",
    "binutils": "objcopy",
    "qemu-system-x86": "qemu-system-x86_64",
    "qemu-utils": "qemu-img",
    "debootstrap": "debootstrap",
    "e2fsprogs": "mkfs.ext4",
    "iproute2": "ip",
    "socat": "socat",
    "acpica-tools": "iasl",
}

# name -> module with main()
COMMANDS = {
    "cloud-hypervisor": "controller.main",
    "flotilla": "controller.main",
    "ch-remote": "ch_remote.main",
}

# What each starts with, so that it can be bundled (shared/bundle.py).
BUNDLES = {"controller.main": ("controller.main", "controller.vmm"), "ch_remote.main": ("ch_remote.main",)}

# -I and -S save a third of the interpreter's start: no environment, no .pth files, no site module.
# Whoever runs for long switches the garbage collector on when it has started: until then there is no garbage.
LAUNCHER = """\
#!{python} -IS
import gc
import sys

gc.disable()

sys.path[:0] = {paths!r}
from shared import bundle

bundle.use({bundle!r})
from {module} import main

sys.exit(main())
"""


class SetupError(Exception):
    """The message says what is missing and what to do about it."""


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    if chosen := os.environ.get("FLOTILLA_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base).absolute() / "flotilla"


def digest(*parts: bytes | str) -> str:
    """A short name for content: the first 16 hex digits of a SHA-256 over the parts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; says so when another set-up makes us wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work in this cache; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], what: str, hint: str, env: dict[str, str] | None = None) -> None:
    """Run quietly; on failure say what failed, the end of what it printed, and what to do."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        tail = "\n".join("  " + line for line in done.stdout.splitlines()[-12:])
        raise SetupError(f"{what} failed (exit code {done.returncode}): {hint}\n{tail}")


def present(probe: str) -> bool:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return os.path.exists(probe) if probe.startswith("/") else shutil.which(probe, path=path) is not None


def system_packages() -> None:
    missing = [package for package, probe in PACKAGES.items() if not present(probe)]
    if importlib.util.find_spec("ensurepip") is None:
        missing.append("python3-venv")
    if missing:
        apt_install(missing)
    else:
        say(f"system packages: all {len(PACKAGES) + 1} are there")


def apt_install(missing: list[str]) -> None:
    """Raises SetupError."""
    names = " ".join(missing)
    if shutil.which("apt-get") is None:
        raise SetupError(f"no apt-get here; install what Debian calls: {names}")
    prefix: list[str] = []
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            raise SetupError(f"neither root nor sudo; ask an administrator for: apt-get install {names}")
        prefix = ["sudo"]
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive"]
    say(f"system packages: apt-get update, then install {names}")
    run([*prefix, *quiet, "apt-get", "-q", "update"], "apt-get update", "is there a network and a Debian mirror?")
    run(
        [*prefix, *quiet, "apt-get", "-q", "-y", "install", "--no-install-recommends", *missing],
        "apt-get install",
        f"try by hand: apt-get install {names}",
    )


def packages_folder(cache: Path, kind: str) -> Path:
    """Where a locked set of Python packages is, or will be."""
    lock = (CHECKOUT / "deploy" / LOCKS[kind]).read_bytes()
    return cache / "python" / f"{kind}-{TAG}-{digest(lock)}"


def python_packages(cache: Path) -> None:
    wanted = {kind: packages_folder(cache, kind) for kind in LOCKS}
    missing = [kind for kind in LOCKS if not wanted[kind].is_dir()]
    if not missing:
        say("python packages: as locked")
        return
    (cache / "python").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp.", dir=cache / "python") as work:
        say("python packages: a virtual environment for pip")
        run([sys.executable, "-m", "venv", f"{work}/venv"], "python3 -m venv", "is python3-venv complete?")
        for kind in missing:
            say(f"python packages: pip install of deploy/{LOCKS[kind]}")
            pip = [f"{work}/venv/bin/python", "-m", "pip", "install", "-q", "--no-deps", "--no-input"]
            pip += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", f"{work}/{kind}"]
            pip += ["-r", str(CHECKOUT / "deploy" / LOCKS[kind])]
            run(pip, "pip install", "is there a network and a package index?")
            os.rename(f"{work}/{kind}", wanted[kind])


def launchers(cache: Path) -> Path:
    """This checkout's folder of commands; written only where something differs."""
    home = cache / "checkouts" / digest(str(CHECKOUT))
    python = home / "bin" / "python"
    paths = [str(CHECKOUT), *(str(packages_folder(cache, kind)) for kind in LOCKS)]
    version = "{}.{}".format(*sys.version_info)
    interpreter = os.path.realpath(sys.executable)
    files = {
        home / "pyvenv.cfg": f"home = {os.path.dirname(interpreter)}\ninclude-system-site-packages = false\n",
        home / "lib" / f"python{version}" / "site-packages" / "flotilla.pth": "\n".join(paths) + "\n",
        home / "checkout": f"{CHECKOUT}\n",
    }
    for name, module in COMMANDS.items():
        bundle = str(home / f"{module}.bundle")
        files[home / "bin" / name] = LAUNCHER.format(python=python, paths=paths[:2], module=module, bundle=bundle)
    if len(f"#!{python} -IS") > 250:
        raise SetupError(f"the cache folder's name is too long for a #! line: {cache}; set FLOTILLA_CACHE")
    changed = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(files[path])
        fresh.chmod(0o755 if path.parent.name == "bin" else 0o644)
        os.replace(fresh, path)
    if not python.is_symlink() or os.readlink(python) != interpreter:
        fresh = python.with_name("python.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(interpreter)
        os.replace(fresh, python)
        changed.append(python)
    say(f"commands: {'written' if changed else 'unchanged'}")
    return home / "bin"


def native_loops() -> None:
    sys.path.insert(0, str(CHECKOUT))
    from shared import native
    from shared.errors import FlotillaError

    try:
        built = [name for name in native.available() if native.build(name)]
    except FlotillaError as error:
        raise SetupError(str(error)) from error
    say(f"native loops: {'built ' + ' '.join(built) if built else 'up to date'}")


def bundles(cache: Path, commands: Path) -> None:
    start = f"import sys; sys.path[:0] = {[str(CHECKOUT), str(packages_folder(cache, 'runtime'))]!r}"
    for module, programs in BUNDLES.items():
        words = (str(commands.parent / f"{module}.bundle"), *programs)
        call = f"{start}; from shared import bundle; bundle.refresh(*{words!r})"
        run([str(commands / "python"), "-IS", "-c", call], f"bundling {module}", "does it import?")
    say("bundles: up to date")


def probe_guest(commands: Path) -> None:
    if not (CHECKOUT / "guest" / "build.py").exists():
        return
    call = "from guest.build import build; build()"
    run([str(commands / "python"), "-c", call], "building the probe guest", "guest/build.py says why:")
    say("probe guest: up to date")


def main() -> int:
    began = time.monotonic()
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "setup.lock"):
            system_packages()
            python_packages(cache)
            commands = launchers(cache)
            native_loops()
            bundles(cache, commands)
            probe_guest(commands)
    except SetupError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"{error}; is {cache} a folder that you may write? (FLOTILLA_CACHE chooses another)")
        return 1
    say(f"done in {time.monotonic() - began:.1f} s")
    print(commands)
    return 0


if __name__ == "__main__":
    sys.exit(main())
