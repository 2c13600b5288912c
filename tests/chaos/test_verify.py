"""Images of the probe guest's: what is whole, and each way in which a sector can be wrong is seen."""

from __future__ import annotations

import pytest

from chaos.verify import Image, Lost, run_command
from guest.pattern import SECTOR, Sector, encode
from shared.errors import HostError


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(encode(Sector(number, 5, 1)) for number in range(16)) + bytes(16 * SECTOR))
    return path


def put(disk, at, data):
    with open(disk, "r+b") as file:
        file.seek(at * SECTOR)
        file.write(data)


def test_what_is_whole_and_what_goes_on_is_fine(disk):
    image = Image(str(disk))
    assert image.look() == 16
    put(disk, 3, encode(Sector(3, 6, 1)))
    put(disk, 4, bytes(SECTOR))
    put(disk, 20, encode(Sector(20, 1, 1)))
    assert image.look() == 16


@pytest.mark.parametrize(
    ("sector", "message"),
    [
        (encode(Sector(3, 4, 1)), "sector 3 has generation 4, and had 5"),
        (encode(Sector(9, 6, 1)), "sector 3 holds sector 9"),
        (encode(Sector(3, 6, 1))[:-1] + b"\0", "damaged"),
    ],
    ids=["older", "misplaced", "damaged"],
)
def test_a_sector_that_is_wrong_is_named(disk, sector, message):
    image = Image(str(disk))
    image.look()
    put(disk, 3, sector)
    with pytest.raises(Lost, match=message):
        image.look()


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(HostError, match=r"--verify .*/none: No such file"):
        Image(str(tmp_path / "none"))


def test_a_command_that_fails_means_lost_data():
    run_command("true")
    with pytest.raises(Lost, match="ended with 3: seven bytes"):
        run_command("echo seven bytes; exit 3")
