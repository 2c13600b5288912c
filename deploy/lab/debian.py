"""Packages and root trees from the Debian mirror that apt is set up with (or FLOTILLA_MIRROR)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from deploy.lab.cache import lab_folder, say

SUITE = "bookworm"
KERNEL = "linux-image-cloud-amd64"

# What dpkg reads in the new tree: no fsync (the tree becomes an image or is thrown away), nothing that nobody reads.
DPKG_CONFIG = """\
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/lintian/*
"""


class DebianError(Exception):
    """A package tool failed; the message has the end of its output and what to do."""


def run(command: list[str | Path], what: str, hint: str = "", cwd: Path | None = None) -> str:
    """Run a tool quietly and return its output."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8",
             "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}, check=False,
    )  # fmt: skip
    if done.returncode:
        tail = "\n".join("  " + line for line in done.stdout.splitlines()[-15:])
        raise DebianError(f"{what} failed (exit code {done.returncode}){hint and ': ' + hint}\n{tail}")
    return done.stdout


def mirror() -> str:
    """The archive that debootstrap shall use."""
    if chosen := os.environ.get("FLOTILLA_MIRROR"):
        return chosen
    targets: list[str | Path] = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    listing = run(targets, "apt-get indextargets")
    if not listing.split():
        raise DebianError("apt has no mirror; set FLOTILLA_MIRROR to a Debian archive, or write a sources.list")
    return listing.split()[0]


def download(packages: list[str], into: Path) -> None:
    """Fetch packages and unpack them into a folder, without installing them. Reads apt's lists anew if need be."""
    debs = into.with_name(into.name + ".debs")
    debs.mkdir()
    command: list[str | Path] = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"]
    try:
        run([*command, *_resolved(packages)], "apt-get download", cwd=debs)
    except DebianError:
        say("apt's lists are missing or old: apt-get update")
        run(["apt-get", "-q", "update"], "apt-get update", "is there a network and a Debian mirror?")
        run([*command, *_resolved(packages)], "apt-get download", "is there a network?", cwd=debs)
    into.mkdir()
    for deb in sorted(debs.glob("*.deb")):
        run(["dpkg-deb", "-x", deb, into], f"unpacking {deb.name}")
    shutil.rmtree(debs)


def _resolved(packages: list[str]) -> list[str]:
    """The same list with the kernel's metapackage replaced by the kernel that it stands for."""
    names = []
    for package in packages:
        if package == KERNEL:
            lines = run(["apt-cache", "depends", KERNEL], "apt-cache depends").splitlines()
            found = [line.split()[1] for line in lines if line.strip().startswith("Depends: linux-image")]
            if not found:
                raise DebianError(f"apt knows no {KERNEL}")
            package = found[0]
        names.append(package)
    return names


def bootstrap(name: str, packages: list[str], tree: Path) -> None:
    """A minimal Debian with these packages in `tree`. Needs root."""
    config = tree / "etc" / "dpkg" / "dpkg.cfg.d" / "flotilla"
    config.parent.mkdir(parents=True)
    config.write_text(DPKG_CONFIG)
    debs = lab_folder() / f"debs-{name}"
    debs.mkdir(exist_ok=True)
    # In a mount namespace of its own: what debootstrap mounts in the tree is gone when it ends, however it ends.
    command: list[str | Path] = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--cache-dir={debs}"]
    command += [f"--include={','.join(packages)}", SUITE, tree, mirror()]
    run(command, f"debootstrap of {name}", "FLOTILLA_MIRROR chooses another archive")
    for leftover in (tree / "var/cache/apt/archives", tree / "var/lib/apt/lists"):
        shutil.rmtree(leftover)
        (leftover / "partial").mkdir(parents=True)
    for unread in ("doc", "man", "info", "locale"):
        shutil.rmtree(tree / "usr/share" / unread, ignore_errors=True)
