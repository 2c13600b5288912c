"""The recipes: each file of the lab, what it is made from, and its key.

    kernel/           bzImage, ELF, modules, busybox, EFI stub: unpacked from Debian packages
    machine.ext4      root disk of the lab machine                                         (needs root)
    machine.initrd    its initramfs, which also carries its init: a change there rebuilds no disk
    guest.tar         a minimal Debian for guests                                          (needs root)
    workloads.ext4    ~/workloads of the lab: kernels and disk images of the documents     (needs root)
    python.ext4       the locked Python packages
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deploy import bundle, install
from deploy.lab import archive, debian, kernel
from deploy.lab.cache import digest, made, result, say

HERE = Path(__file__).resolve().parent
MIB = 1 << 20

KERNEL_PACKAGES = [debian.KERNEL, "busybox-static", "systemd-boot-efi"]
MACHINE_PACKAGES = [
    *("python3", "kmod", "iproute2", "iputils-ping", "procps", "psmisc", "socat", "strace", "fio", "curl", "jq"),
    *("iperf3", "less", "tmux", "qemu-system-x86", "qemu-utils"),
]
GUEST_PACKAGES = ["kmod", "iproute2", "iputils-ping", "procps", "socat", "iperf3", "fio"]

# Modules of an initramfs; what they depend on is added, in order.
BOOT_MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console"]
BUSYBOX_APPLETS = ["sh", "mount", "insmod", "usleep", "cp", "ls", "poweroff", "switch_root"]

MACHINE_BYTES = 3 << 30
GUEST_BYTES = 896 * MIB
PARTITION_START = MIB

GUEST_CMDLINE = "root=/dev/vda1 console=ttyS0"


@dataclass(frozen=True, slots=True)
class Images:
    """What one start of the lab machine needs, all of it read-only. more: disks behind that of the job (nested.py)."""

    bzimage: Path
    initrd: Path
    machine: Path
    workloads: Path
    python: Path
    more: tuple[Path, ...] = ()


def key_kernel() -> str:
    return digest("kernel 2", *KERNEL_PACKAGES)


def key_machine() -> str:
    return digest("machine 2", debian.SUITE, *MACHINE_PACKAGES, key_kernel())


def key_guest() -> str:
    return digest("guest 2", debian.SUITE, *GUEST_PACKAGES, key_kernel())


def key_workloads() -> str:
    files = [HERE / "init" / name for name in ("guest", "guest-off", "guest-power-button", "initrd")]
    files += [*sorted((HERE / "guest").iterdir()), HERE / "kernel.py", HERE / "archive.py"]
    return digest("workloads 2", key_guest(), *(path.read_bytes() for path in files))


def key_initrd() -> str:
    return digest("initrd 2", key_kernel(), *((HERE / "init" / name).read_bytes() for name in ("initrd", "lab")))


def key_python() -> str:
    return digest("python 3", (install.CHECKOUT / "deploy" / install.LOCKS["runtime"]).read_bytes())


def expected() -> Images:
    """The images of this checkout's recipes, whether they are there yet or not."""
    return Images(
        bzimage=result("kernel", key_kernel()) / "bzImage",
        initrd=result("machine.initrd", key_initrd()),
        machine=result("machine.ext4", key_machine()),
        workloads=result("workloads.ext4", key_workloads()),
        python=result("python.ext4", key_python()),
    )


def missing(images: Images) -> list[Path]:
    paths = (images.bzimage, images.initrd, images.machine, images.workloads, images.python)
    return [path for path in paths if not path.exists()]


def ready() -> Images:
    """All images, built where they are missing: as root, by way of sudo where that is needed."""
    images = expected()
    if missing(images):
        if os.geteuid() != 0:
            build_by_sudo()
        else:
            build()
    for path in (images.bzimage.parent, images.initrd, images.machine, images.workloads, images.python):
        os.utime(path)
    return images


def build() -> None:
    """Build what is missing, the two slow trees side by side."""
    made("kernel", key_kernel(), make_kernel, "kernel, busybox and EFI stub from Debian packages")
    made("machine.initrd", key_initrd(), make_initrd, "initramfs of the lab machine")
    made("python.ext4", key_python(), make_python, "disk of the Python packages")
    with ThreadPoolExecutor() as pool:
        machine = pool.submit(
            made, "machine.ext4", key_machine(), make_machine, "root disk of the lab machine (debootstrap)"
        )
        _make_guest_and_workloads()
        machine.result()


def build_by_sudo(*options: str) -> None:
    """`deploy/lab.sh build` with these options, as root. Raises DebianError."""
    if not shutil.which("sudo"):
        raise debian.DebianError("building the lab's images needs root; there is no sudo here")
    say("building the images needs root: sudo")
    keep = [f"{name}={os.environ[name]}" for name in ("FLOTILLA_MIRROR",) if name in os.environ]
    keep.append(f"FLOTILLA_CACHE={install.cache_folder()}")
    # -m puts the working folder in front of the path: that of the checkout, whose venv this Python is. -B, because
    # byte code of root's in the checkout could not be replaced by its owner.
    command = ["sudo", "env", *keep, sys.executable, "-B", "-m", "deploy.lab", "build", *options]
    if subprocess.run(command, cwd=install.CHECKOUT, check=False).returncode:
        raise debian.DebianError("building the lab's images as root failed")


def guest_tree() -> Path:
    return made("guest.tar", key_guest(), make_guest, "root tree of the Debian guest (debootstrap)")


def _make_guest_and_workloads() -> None:
    guest_tree()
    made("workloads.ext4", key_workloads(), make_workloads, "kernels and disk images of the guests")


# ---- recipes: each builds what its parameter names ----------------------------------------------------------


def make_kernel(target: Path) -> None:
    tree = target.with_name("packages")
    debian.download(KERNEL_PACKAGES, tree)
    target.mkdir()
    (bzimage,) = (tree / "boot").glob("vmlinuz-*")
    shutil.copy(bzimage, target / "bzImage")
    (target / "vmlinux").write_bytes(kernel.unpack_bzimage(target / "bzImage"))
    shutil.copy(tree / "bin" / "busybox", target / "busybox")
    shutil.copy(tree / "usr/lib/systemd/boot/efi/linuxx64.efi.stub", target / "stub.efi")
    os.rename(tree / "lib" / "modules", target / "modules")


def make_initrd(target: Path) -> None:
    target.write_bytes(initramfs((HERE / "init" / "lab").read_bytes()))


def make_machine(target: Path) -> None:
    tree = target.with_name("tree")
    debian.bootstrap("machine", MACHINE_PACKAGES, tree)
    add_modules(tree)
    for name in ("poweroff", "reboot", "halt"):
        install_program(HERE / "init" / "lab-off", tree / "usr/local/sbin" / name)
    filesystem(target, tree, MACHINE_BYTES)


def make_guest(target: Path) -> None:
    tree = target.with_name("tree")
    debian.bootstrap("guest", GUEST_PACKAGES, tree)
    add_modules(tree)
    debian.run(["tar", "--numeric-owner", "-C", tree, "-cf", target, "."], "tar of the guest's tree")


def make_workloads(target: Path) -> None:
    """Everything below the lab's ~/workloads."""
    folder, parts = target.with_name("workloads"), result("kernel", key_kernel())
    folder.mkdir()
    (folder / "initrd").write_bytes(initramfs())
    shutil.copy(parts / "vmlinux", folder / "vmlinux.plain")
    (folder / "vmlinux").write_bytes(vmlinux())
    shutil.copy(parts / "bzImage", folder / "bzImage")
    cmdline = target.with_name("cmdline")
    cmdline.write_text(GUEST_CMDLINE)
    kernel.unified(parts / "stub.efi", parts / "bzImage", folder / "initrd", cmdline, folder / "focal.efi")
    (folder / "tmp.img").write_bytes(os.urandom(MIB))
    make_guest_disk(folder / "focal.raw", target.with_name("tree"))
    filesystem(target, folder, 3 << 30)


def vmlinux() -> bytes:
    """The kernel as ELF that carries its initramfs: the document's commands, without --initramfs, find their disk."""
    plain = (result("kernel", key_kernel()) / "vmlinux").read_bytes()
    return kernel.with_section(plain, ".initrd", initramfs())


def make_guest_disk(disk: Path, tree: Path) -> None:
    """A partitioned disk with the Debian guest on its first partition."""
    tree.mkdir()
    source = result("guest.tar", key_guest())
    debian.run(["tar", "--numeric-owner", "-C", tree, "-xpf", source], "unpacking the guest's tree")
    install_program(HERE / "init" / "guest", tree / "sbin/init")
    for name in ("poweroff", "reboot", "halt"):
        install_program(HERE / "init" / "guest-off", tree / "usr/local/sbin" / name)
    install_program(result("kernel", key_kernel()) / "busybox", tree / "bin/busybox")
    install_program(HERE / "init" / "guest-power-button", tree / "etc/acpi/PWRF/00000080")
    for name in ("equal.sh", "fio.sh"):
        install_program(HERE / "guest" / name, tree / "root" / name)
    verify = tree / "usr/local/bin/verify"
    debian.run(["gcc", "-std=gnu11", "-O2", "-static", "-o", verify, HERE / "guest" / "verify.c"], "gcc on verify.c")
    filesystem(disk, tree, GUEST_BYTES - PARTITION_START, offset=PARTITION_START)
    partition(disk, (PARTITION_START, GUEST_BYTES - PARTITION_START))


def make_python(target: Path) -> None:
    """The runtime's locked packages for the lab's Python, which is Debian 12's whatever runs here."""
    packages = target.with_name("packages")
    bundle.copy_packages(packages)
    filesystem(target, packages, 128 * MIB)


# ---- parts of recipes -----------------------------------------------------------------------------------------


def filesystem(target: Path, tree: Path, size: int, offset: int = 0) -> None:
    """An ext4 of `size` bytes at `offset` of a sparse file, holding the tree."""
    with open(target, "wb") as file:
        file.truncate(offset + size)
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", f"offset={offset}"]
    debian.run(["mkfs.ext4", *options, "-d", tree, target, f"{size >> 10}k"], f"mkfs.ext4 of {target.name}")


def partition(disk: Path, *parts: tuple[int, int]) -> None:
    """A master boot record with Linux partitions (sfdisk is not on every machine): start and size of each, in bytes."""
    no_chs = b"\xfe\xff\xff"
    table = b"".join(
        struct.pack("<B3sB3sII", 0x80 if n == 0 else 0, no_chs, 0x83, no_chs, start // 512, size // 512)
        for n, (start, size) in enumerate(parts)
    )
    with open(disk, "r+b") as file:
        file.seek(446)
        file.write(table.ljust(64, b"\0") + b"\x55\xaa")


def initramfs(next_init: bytes | None = None) -> bytes:
    """busybox, the virtio modules, init/initrd as /init, and what it shall run instead of the root disk's init."""
    parts = result("kernel", key_kernel())
    entries = [archive.folder(name) for name in ("bin", "dev", "proc", "sys", "new", "modules")]
    entries += [archive.node("dev/console", 5, 1), archive.node("dev/null", 1, 3)]
    entries.append(archive.file("bin/busybox", (parts / "busybox").read_bytes(), 0o755))
    entries += [archive.symlink(f"bin/{name}", "busybox") for name in BUSYBOX_APPLETS]
    for n, path in enumerate(in_loading_order(parts / "modules", BOOT_MODULES)):
        entries.append(archive.file(f"modules/{n:02}-{path.name}", path.read_bytes()))
    entries.append(archive.file("init", (HERE / "init" / "initrd").read_bytes(), 0o755))
    if next_init is not None:
        entries.append(archive.file("next", next_init, 0o755))
    return archive.pack(entries)


def in_loading_order(modules: Path, wanted: Iterable[str]) -> list[Path]:
    """The .ko files of some modules, each behind those that it depends on by its own `depends=` word.

    Read from the files, because the order changes between kernels and modules.dep is only made on installation.
    """
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        if name not in files:
            raise debian.DebianError(f"the kernel package has no module {name}")
        found = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for dependency in found[1].decode().split(",") if found and found[1] else []:
            add(dependency.replace("-", "_"))
        if files[name] not in order:
            order.append(files[name])

    for name in wanted:
        add(name)
    return order


def add_modules(tree: Path) -> None:
    source = result("kernel", key_kernel()) / "modules"
    (version,) = source.iterdir()
    debian.run(["cp", "-a", source, tree / "lib"], "copying kernel modules")
    debian.run(["chroot", tree, "depmod", version.name], "depmod")


def install_program(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)
