"""Which floors of tests can run on this machine: `python -m deploy.floors probe|lab` says why not and exits 1."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys

KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12


def kvm_missing() -> str:
    """Why /dev/kvm can't be used, or an empty string."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm is no KVM: {error.strerror}"
    finally:
        os.close(fd)
    return "" if version == KVM_API_VERSION else f"/dev/kvm has API version {version}, not {KVM_API_VERSION}"


def kvm_runs_linux() -> bool:
    """True where KVM stands on hardware; a software KVM (kvm_pvm) runs the probe guest but no stock kernel."""
    hardware = any(os.path.isdir(f"/sys/module/{name}") for name in ("kvm_intel", "kvm_amd"))
    return hardware and not kvm_missing()


def lab_missing() -> str:
    """Why the lab can't be built or started, or an empty string."""
    for program in ("qemu-system-x86_64", "debootstrap", "mkfs.ext4", "apt-get"):
        if not shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"):
            return f"{program} is missing; bash deploy/setup.sh installs it"
    if os.geteuid() != 0 and not shutil.which("sudo"):
        return "building its images needs root or sudo"
    return ""


FLOORS = {"probe": kvm_missing, "lab": lab_missing}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in FLOORS:
        print(f"usage: python -m deploy.floors {'|'.join(FLOORS)}", file=sys.stderr)
        return 2
    reason = FLOORS[arguments[0]]()
    print(reason or "can run")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
