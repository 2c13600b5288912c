"""Reading the probe guest's disk blocks on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest import pattern

U64 = st.integers(0, 2**64 - 1)


@given(U64, st.integers(0, 2**32 - 1), U64)
def test_a_sector_says_what_it_is(number: int, generation: int, seed: int) -> None:
    sector = pattern.Sector(number, generation, seed)
    assert pattern.decode(pattern.encode(sector)) == sector


@given(st.integers(8, 511), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, change: int) -> None:
    data = bytearray(pattern.encode(pattern.Sector(7, 3, 1)))
    data[at] ^= change
    with pytest.raises(ValueError, match="damaged"):
        pattern.decode(bytes(data))


def test_damage_tells_torn_and_misplaced_blocks(tmp_path: Path) -> None:
    image = tmp_path / "image"

    def write(*sectors: bytes) -> list[str]:
        image.write_bytes(bytes(pattern.SECTOR) + b"".join(sectors))
        return list(pattern.damage(image, 1024, 1))

    one, two = (pattern.encode(pattern.Sector(number, 1, 1)) for number in (1, 2))
    newer = pattern.encode(pattern.Sector(2, 2, 1))
    assert write(one, two) == []
    assert write(bytes(1024)) == []
    assert "torn" in write(one, newer)[0]
    assert "sector 1 holds sector 2" in write(two, two)[0]
    assert "damaged" in write(one, two[:-1] + b"\0")[0]
