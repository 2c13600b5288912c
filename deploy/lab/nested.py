"""The images of the document's nested example: two host VMs and the guest that moves between them.

    host.tar       a Debian with systemd and udev, Python, socat                            (needs root)
    nested.ext4    ~/nested of the lab: vmlinux, focal-1.raw, focal-2.raw, focal-nested.raw (needs root)
    bundle.ext4    deploy/bundle.py's folder: the content of the host VMs' second partition

The bundle follows every change of the code; so it is no part of the disks, and the lab's init copies it into them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from deploy import bundle
from deploy.lab import debian, images
from deploy.lab.cache import digest, made, result
from deploy.lab.images import MIB, Images

__all__ = ["BUNDLE_START", "MIB", "ready"]

OVERLAY = images.HERE / "host"

PACKAGES = [
    *("systemd-sysv", "udev", "kmod", "iproute2", "iputils-ping", "procps", "python3", "socat", "sudo"),
]
# What a host VM can do without, and the emulated machine takes seconds for.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("systemd-tmpfiles-clean.timer", "systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service"),
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
    *("systemd-journald-audit.socket", "systemd-journal-flush.service", "systemd-journal-catalog-update.service"),
    *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-random-seed.service"),
    *("systemd-logind.service", "systemd-user-sessions.service", "systemd-sysusers.service", "systemd-pstore.service"),
    *("systemd-machine-id-commit.service", "systemd-update-done.service", "ldconfig.service", "e2scrub_reap.service"),
    *("systemd-ask-password-console.path", "systemd-ask-password-wall.path", "systemd-hwdb-update.service"),
    *("systemd-binfmt.service", "systemd-sysctl.service", "systemd-remount-fs.service", "systemd-repart.service"),
    *("proc-sys-fs-binfmt_misc.automount", "getty@tty1.service", "getty-static.service", "remote-fs.target"),
    *("dev-hugepages.mount", "dev-mqueue.mount", "sys-fs-fuse-connections.mount", "sys-kernel-config.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-initctl.socket", "dbus.service", "dbus.socket"),
    *("modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service"),
    *("kmod-static-nodes.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service"),
    *("modprobe@fuse.service", "modprobe@loop.service", "systemd-boot-system-token.service"),
)

PARTITION_START = MIB
BUNDLE_START = 1024 * MIB
BUNDLE_SPACE = 256 * MIB


def key_host() -> str:
    return digest("host 1", debian.SUITE, *PACKAGES, images.key_kernel())


def key_disks() -> str:
    overlay = [path for path in sorted(OVERLAY.rglob("*")) if path.is_file()]
    files: list[bytes | str] = []
    for path in overlay:
        files += [str(path.relative_to(OVERLAY)), path.read_bytes()]
    return digest("nested 1", key_host(), images.key_workloads(), *MASKED, str(BUNDLE_START), *files)


def ready() -> Images:
    """The lab's images and these; like images.ready()."""
    common = images.ready()
    disks = result("nested.ext4", key_disks())
    if not disks.exists() and os.geteuid() != 0:
        images.build_by_sudo("--nested")
    build_disks()
    moving = made("bundle.ext4", bundle.key(), make_bundle, "the bundle for the host VMs")
    return replace(common, more=(disks, moving))


def build_disks() -> Path:
    return made("nested.ext4", key_disks(), make_disks, "disks of the nested example")


# ---- recipes --------------------------------------------------------------------------------------------------


def make_host(target: Path) -> None:
    tree = target.with_name("tree")
    debian.bootstrap("host", PACKAGES, tree)
    images.add_modules(tree)
    debian.run(["tar", "--numeric-owner", "-C", tree, "-cf", target, "."], "tar of the host VM's tree")


def make_disks(target: Path) -> None:
    """tmp.img is missing on purpose: the document makes it by a command of its own."""
    host = made("host.tar", key_host(), make_host, "root tree of the host VMs (debootstrap)")
    images.guest_tree()
    folder = target.with_name("nested")
    folder.mkdir()
    (folder / "vmlinux").write_bytes(images.vmlinux())
    images.make_guest_disk(folder / "focal-nested.raw", target.with_name("guest"))
    tree = target.with_name("tree")
    tree.mkdir()
    debian.run(["tar", "--numeric-owner", "-C", tree, "-xpf", host], "unpacking the host VM's tree")
    settle(tree)
    shutil.copy(folder / "vmlinux", tree / "root/vmlinux")
    for number in (1, 2):
        (tree / "etc/hostname").write_text(f"vm-{number}\n")
        (tree / "etc/hosts").write_text(f"127.0.0.1 localhost vm-{number}\n")
        make_host_disk(folder / f"focal-{number}.raw", tree)
    images.filesystem(target, folder, 4 << 30)


def settle(tree: Path) -> None:
    """Everything in a host VM that is not Debian's: the overlay, masked units, links to the bundle's commands."""
    shutil.copytree(OVERLAY, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "root/window").chmod(0o755)
    units = tree / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "opt-flotilla.mount").symlink_to("../opt-flotilla.mount")
    (tree / "opt/flotilla").mkdir()
    for name in ("cloud-hypervisor", "ch-remote", "flotilla"):
        (tree / "root" / name).symlink_to(f"/opt/flotilla/{name}")


def make_host_disk(disk: Path, tree: Path) -> None:
    """Debian on the first partition, room for the bundle in the second."""
    size = BUNDLE_START - PARTITION_START
    images.filesystem(disk, tree, size, offset=PARTITION_START)
    os.truncate(disk, BUNDLE_START + BUNDLE_SPACE)
    images.partition(disk, (PARTITION_START, size), (BUNDLE_START, BUNDLE_SPACE))


def make_bundle(target: Path) -> None:
    folder = target.with_name("folder")
    bundle.make(folder)
    used = sum(path.lstat().st_size + 4096 for path in folder.rglob("*"))
    images.filesystem(target, folder, (int(used * 1.1) // MIB + 8) * MIB)
