"""Versions of saved states: which of them this release reads, and how one of before becomes one of today.

    saved by an older release                                 what save() gives and load() takes
    version `oldest` ──upgrades[0]──▶ … ──upgrades[-1]──▶ version `version`

A kind of state is a worker's, by its package's name, or the VM's own, "vm" (controller/vm.py), which has vCPUs,
platform and devices in it. The steps are here and not in the workers' packages because a destination's controller must
know what its workers will read before it starts any.

To change what a save() gives: append a step, which makes a new version; never change a step. To read a version no
longer: raise `oldest` and drop its step. tests/test_golden_states.py holds every version to a stored state.
"""

from __future__ import annotations

from collections.abc import Callable

from shared.errors import ProtocolError
from shared.records import Record
from shared.typed import Any, Final

State = dict[str, Any]
Upgrade = Callable[[State], State]  # may change what it is given at the top, nothing deeper


class StateKind(Record):
    name: str
    upgrades: tuple[Upgrade, ...] = ()  # one for each version before the present one, from `oldest` on
    oldest: int = 1

    @property
    def version(self) -> int:
        return self.oldest + len(self.upgrades)

    def refusal(self, version: object) -> ProtocolError | None:
        """Why a state of this version can't be loaded here."""
        if type(version) is int and self.oldest <= version <= self.version:
            return None
        reads = str(self.version) if self.oldest == self.version else f"{self.oldest} to {self.version}"
        if type(version) is not int:
            hint = "whatever saved it is no release of Flotilla"
        elif version > self.version:
            hint = "install the release that saved it here, or a newer one"
        else:
            hint = "take it through a release that reads both"
        return ProtocolError(f"{self.name} state has version {version}, this release reads {reads}", hint)

    def upgrade(self, version: object, state: State) -> State:
        """The state as this release's load() takes it. Raises ProtocolError."""
        if (refusal := self.refusal(version)) is not None:
            raise refusal
        assert isinstance(version, int)
        upgraded = dict(state)
        for number, step in enumerate(self.upgrades[version - self.oldest :], version):
            try:
                upgraded = step(upgraded)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise ProtocolError(
                    f"{self.name} state of version {number} can't be read: {type(error).__name__}: {error}"
                ) from error
        return upgraded


VM: Final = StateKind("vm")
KINDS: Final = {
    kind.name: kind for kind in (VM, StateKind("blk_worker"), StateKind("console_worker"), StateKind("net_worker"))
}


def refusals(versions: object) -> list[ProtocolError]:
    """Of states that are announced, kind -> version, those that this release can't load, and why.

    Raises ProtocolError for what is no such map.
    """
    if not isinstance(versions, dict) or not all(isinstance(name, str) for name in versions):
        raise ProtocolError("state_versions from the peer is no map of kinds to versions")
    found = []
    for name, version in sorted(versions.items()):
        if name in KINDS:
            refusal = KINDS[name].refusal(version)
        else:
            hint = "install the release that saves it here, or a newer one"
            refusal = ProtocolError(f"{name} state is of no kind that this release knows", hint)
        if refusal is not None:
            found.append(refusal)
    return found
