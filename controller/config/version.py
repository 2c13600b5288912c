"""Names that `--version` and vmm.ping tell the outside world."""

from __future__ import annotations

from shared.typed import Any

FLOTILLA_VERSION = "0.1.0"
# The release of Cloud Hypervisor whose command line, API and guest-visible machine are implemented.
CH_VERSION = "53.0"
# Of the form that `git describe` gives a changed build, so that tools which parse CH's own version cut it at
# the dash.
BUILD_VERSION = f"v{CH_VERSION}-flotilla-{FLOTILLA_VERSION}"
# Cloud Hypervisor prints the numbers of its own stream here (0); ours is another stream and must not claim
# to be that.
MIGRATION_PROTOCOLS = "flotilla-1"
FEATURES = ("kvm",)


def ping(pid: int) -> dict[str, Any]:
    """The answer of vmm.ping by the VMM with this pid."""
    version = f"{CH_VERSION}.0"
    return {"build_version": BUILD_VERSION, "version": version, "pid": pid, "features": list(FEATURES)}
