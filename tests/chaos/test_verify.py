"""Images of the probe guest's: what is whole, and each way in which a sector can be wrong is seen."""

from __future__ import annotations

import os
import select
import subprocess

import pytest

from chaos.verify import BegunAnew, Image, Lost, run_command
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
        (encode(Sector(3, 5, 1))[:-1] + b"\0", "damaged"),
        (encode(Sector(4, 5, 1)), "sector 3 holds sector 4"),
        (b"\xa5" * SECTOR, "sector 3 is no sector of the guest's, and had generation 5"),
    ],
    ids=["older", "misplaced", "damaged", "damaged body under the header of before", "its neighbour's", "no magic"],
)
def test_a_sector_that_is_wrong_is_named(disk, sector, message):
    image = Image(str(disk))
    image.look()
    put(disk, 3, sector)
    with pytest.raises(Lost, match=message):
        image.look()


def test_what_was_never_the_guests_is_not_judged(disk):
    image = Image(str(disk))
    image.look()
    put(disk, 20, b"\xa5" * SECTOR)
    assert image.look() == 16


def test_whether_the_guest_has_written(disk):
    image = Image(str(disk))
    for at, sector in ((3, Sector(3, 6, 1)), (20, Sector(20, 1, 1))):
        image.note()
        assert not image.wrote()
        put(disk, at, encode(sector))
        assert image.wrote()
    image.note()
    put(disk, 5, encode(Sector(5, 6, 1))[:100])
    assert not image.wrote()


def test_a_guest_that_writes_with_another_seed_was_reset_and_what_another_run_has_left_is_not_judged(disk):
    image = Image(str(disk))
    image.note()
    for number in (3, 4):
        put(disk, number, encode(Sector(number, 1, 2)))
        assert image.wrote() and image.look() == 16
    put(disk, 5, encode(Sector(5, 1, 3)))
    image.note()
    with pytest.raises(BegunAnew, match=r"sector 5 was written with seed 3, and the campaign began with 2"):
        image.look()


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(HostError, match=r"--verify .*/none: No such file"):
        Image(str(tmp_path / "none"))


def test_a_command_that_fails_means_lost_data():
    run_command("true")
    with pytest.raises(Lost, match="ended with 3: seven bytes"):
        run_command("echo seven bytes; exit 3")


def test_a_command_that_is_not_done_in_time_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("chaos.verify.COMMAND_SECONDS", 0.3)
    alive, survived = tmp_path / "alive", tmp_path / "survived"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)

    class Begun(subprocess.Popen):
        """Its time begins when the command does, and not with the start of the shell."""

        def wait(self, timeout=None):
            if timeout is not None:
                assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b"\n"
            return super().wait(timeout)

    monkeypatch.setattr("chaos.verify.subprocess.Popen", Begun)
    try:
        with pytest.raises(Lost, match="not done within 0 s"):
            run_command(f"exec 3>{alive}; echo >&3; (sleep 20; touch {survived}) & wait")
        assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b""
    finally:
        os.close(reader)
    assert not survived.exists()


def test_a_command_is_not_waited_for_longer_than_it_takes(tmp_path):
    """Whatever it leaves in the background has its output, and may stay."""
    go, done = tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    os.mkfifo(done)
    reader = os.open(done, os.O_RDONLY | os.O_NONBLOCK)
    try:
        run_command(f"(exec 3>{done}; read line <{go}) &")
        go.write_text("on\n")
        assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_output_that_is_no_text_is_told_all_the_same():
    with pytest.raises(Lost, match=r"ended with 1: .* seven"):
        run_command(r"printf '\377 seven'; exit 1")
