"""deploy/bundle.sh: one folder that runs on any Debian 12 with its python3; no pip, no compiler, no network.

    cloud-hypervisor, flotilla, ch-remote    start what lies beside them, from any folder and through links
    code/        our packages with their native loops, byte code and the probe guest
    python/      the locked packages, as wheels for Debian 12's Python
    README

Byte code is not checked against its source (PEP 552, unchecked hash): it stays valid however the folder is copied.
"""

from __future__ import annotations

import argparse
import compileall
import os
import py_compile
import re
import shutil
import sys
import tempfile
from pathlib import Path

from deploy import install
from deploy.install import SetupError, digest, run

PYTHON, TAG = "3.11", "cp311"
GLIBC = (2, 36)
DEVELOPMENT = {"bench", "deploy", "tests"}
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
COPIED = shutil.ignore_patterns("*.stamp", ".*", "__pycache__")

LAUNCHER = """\
#!/usr/bin/python3 -IS
import os
import sys

if sys.version_info[:2] != {version}:
    sys.exit("flotilla: this bundle is for Python {python}, Debian 12's; /usr/bin/python3 is another")
here = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [here + "/code", here + "/python"]
from {module} import main

sys.exit(main())
"""

README = """\
Flotilla for Debian 12 (x86-64). ./cloud-hypervisor, ./flotilla and ./ch-remote need nothing but its python3; copy the
folder anywhere, link the three from wherever. `./flotilla doctor` says what this host can do. Byte code is not checked
against its source: whoever changes a .py here removes the __pycache__ beside it.
"""


def packages(development: bool) -> list[Path]:
    """The folders of the checkout's packages; with or without those that only a checkout needs."""
    found = sorted(path.parent for path in install.CHECKOUT.glob("*/__init__.py"))
    return [path for path in found if path.name != "tests" and (development or path.name not in DEVELOPMENT)]


def copy_code(target: Path, development: bool) -> None:
    """The checkout's packages with their byte code, which would take an emulated machine seconds to make."""
    for package in packages(development):
        shutil.copytree(package, target / package.name, ignore=COPIED)
    compiled(target)


def compiled(folder: Path) -> None:
    """Byte code for Debian 12's Python; another Python's would be of no use there."""
    if install.TAG == TAG:
        compileall.compile_dir(folder, quiet=2, workers=0, invalidation_mode=UNCHECKED, stripdir=str(folder.parent))


def copy_packages(target: Path) -> None:
    """The runtime's locked packages for Debian 12's Python, whatever runs here. Raises SetupError."""
    if install.TAG == TAG:
        source = install.packages_folder(install.cache_folder(), "runtime")
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "bin"))
    else:
        lock = install.CHECKOUT / "deploy" / install.LOCKS["runtime"]
        with tempfile.TemporaryDirectory(prefix="flotilla-pip.") as work:
            run([sys.executable, "-m", "venv", work], "python3 -m venv", "is python3-venv complete?")
            options = ["-q", "--no-deps", "--no-compile", f"--python-version={PYTHON}", "--only-binary=:all:"]
            pip = [f"{work}/bin/python", "-m", "pip", "install", *options, "--target", str(target), "-r", str(lock)]
            run(pip, "pip install", "is there a network and a package index?")
    compiled(target)


def check_native(folder: Path) -> None:
    """Raises SetupError when a native loop of ours asks for a newer C library than Debian 12's."""
    for library in sorted(folder.rglob("*.so")):
        wanted = max(map(version, re.findall(rb"\0GLIBC_([0-9.]+)", library.read_bytes())), default=GLIBC)
        if wanted > GLIBC:
            name = library.relative_to(folder)
            raise SetupError(f"{name} needs glibc {'.'.join(map(str, wanted))}, Debian 12 has 2.36: build on Debian 12")


def version(text: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(b".") if part)


def key() -> str:
    """Of everything that a bundle is made from."""
    lock = (install.CHECKOUT / "deploy" / install.LOCKS["runtime"]).read_bytes()
    parts: list[bytes | str] = [LAUNCHER, README, install.TAG, lock]
    for package in packages(False):
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".stamp":
                parts += [str(path.relative_to(install.CHECKOUT)), path.read_bytes()]
    return digest("bundle 1", *parts)


def make(folder: Path) -> None:
    """Make the bundle; `folder` must not exist yet. Raises SetupError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle.", dir=folder.parent) as work:
        fresh = Path(work, "bundle")
        copy_code(fresh / "code", development=False)
        check_native(fresh / "code")
        copy_probe(fresh / "code" / "guest")
        copy_packages(fresh / "python")
        wanted = tuple(map(int, PYTHON.split(".")))
        for name, module in install.COMMANDS.items():
            launcher = fresh / name
            launcher.write_text(LAUNCHER.format(version=wanted, python=PYTHON, module=module))
            launcher.chmod(0o755)
        (fresh / "README").write_text(README)
        os.rename(fresh, folder)


def copy_probe(folder: Path) -> None:
    """The probe guest, built: `flotilla doctor` runs it, and there is no gcc over there."""
    from guest.build import build, prebuilt

    shutil.copyfile(build(), folder / prebuilt().name)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("bundle.sh", description="One folder that runs on any Debian 12.")
    parser.add_argument("folder", type=Path, help="is made; must not exist, or be a bundle to replace with --force")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    try:
        if folder.exists():
            if not options.force:
                raise SetupError(f"{folder} exists: choose another folder, or --force")
            if not (folder / "code" / "controller").is_dir() and any(folder.iterdir()):
                raise SetupError(f"{folder} is no bundle: choose another folder")
            shutil.rmtree(folder)
        make(folder)
    except (SetupError, OSError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
