"""What the guest has set by its control queue, and where that outlives this process.

The front end keeps the inflight region of vhost-user for a back end's successor. The native loop has no use for it
(net.h says why), so 32 bits of the first receive queue's part carry the settings: the low half of desc[0].counter,
which the protocol leaves to the back end. One store, so a kill leaves the old ones or the new ones.

    bit     0 … 10                      11 … 25    30         31
            GUEST_… feature bits        pairs      announce   written
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared.atomics import load32, store32
from shared.errors import ConfigError, ProtocolError
from shared.virtio_net import F_GUEST_CSUM, GUEST_OFFLOADS

WORD_AT: Final = 24  # of the region: 16 bytes of header, then desc[0] with its counter at 8
_PAIRS_SHIFT: Final = 11
_MAX_PAIRS: Final = (1 << 15) - 1
_ANNOUNCE: Final = 1 << 30
_WRITTEN: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Settings:
    """`pairs`: in use. `offloads`: GUEST_… feature bits. `announce`: the guest is to announce itself."""

    pairs: int = 1
    offloads: int = 0
    announce: bool = False

    @classmethod
    def initial(cls, acked: int) -> Settings:
        """As the driver finds the device after negotiating `acked` (virtio 1.2, 5.1.5 and 5.1.6.5.6)."""
        return cls(offloads=acked & GUEST_OFFLOADS if acked & F_GUEST_CSUM else 0)

    def keep(self, region: int) -> None:
        """Write to the first receive queue's inflight region, an address here; 0: there is none."""
        if region:
            word = _WRITTEN | (_ANNOUNCE if self.announce else 0) | self.pairs << _PAIRS_SHIFT | self.offloads
            store32(region + WORD_AT, word)

    @classmethod
    def kept(cls, region: int, most_pairs: int) -> Settings | None:
        """What a predecessor kept, if there was one and what it left makes sense."""
        word = load32(region + WORD_AT) if region else 0
        pairs, offloads = word >> _PAIRS_SHIFT & _MAX_PAIRS, word & (1 << _PAIRS_SHIFT) - 1
        if not word & _WRITTEN or not 1 <= pairs <= most_pairs or offloads & ~GUEST_OFFLOADS:
            return None
        return cls(pairs, offloads, bool(word & _ANNOUNCE))

    def save(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "offloads": self.offloads, "announce": self.announce}

    @classmethod
    def load(cls, state: Mapping[str, Any], most_pairs: int) -> Settings:
        """Raises ProtocolError for a state that can't be read, ConfigError for one of a larger device."""
        try:
            pairs, offloads, announce = state["pairs"], state["offloads"], state["announce"]
        except KeyError as error:
            raise ProtocolError(f"network device state: {error} is missing") from error
        if type(pairs) is not int or type(offloads) is not int or type(announce) is not bool:
            raise ProtocolError("network device state: pairs, offloads or announce has a wrong type")
        if pairs < 1 or offloads & ~GUEST_OFFLOADS:
            raise ProtocolError(f"network device state: pairs={pairs}, offloads={offloads:#x} make no sense")
        if pairs > most_pairs:
            raise ConfigError(f"the guest uses {pairs} queue pairs, this network device has {most_pairs}")
        return cls(pairs, offloads, announce)
