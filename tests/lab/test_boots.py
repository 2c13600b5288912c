"""A stock Debian guest in each kernel form, and each way that it can end. One lab machine goes through all of them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.lab import Lab, Outcome

SCRIPT = Path(__file__).with_name("scripts") / "boots.sh"
GUEST_LIMIT = 240
LIMIT = 900
TAIL = 3000


@dataclass(frozen=True, slots=True)
class Boots:
    outcome: Outcome

    def said(self, case: str) -> str:
        """The console of a case whose VMM ended with exit code 0; anything else fails the test, loudly."""
        assert not self.outcome.died, f"not the fault of the VMM: the lab machine died: {self.outcome.died}"
        console, stderr, code = (self.text(f"{case}.{kind}") for kind in ("console", "stderr", "rc"))
        seen = f"\n---- console:\n{console[-TAIL:]}\n---- stderr of the VMM:\n{stderr[-TAIL:]}\n{self.outcome.stderr}"
        assert code.strip() == "0", f"{case}: the VMM's exit code is {code.strip() or 'unknown'}{seen}"
        assert "API socket is left" not in stderr, seen
        return console

    def text(self, name: str) -> str:
        file = self.outcome.out / name
        return file.read_text(errors="replace") if file.exists() else ""


@pytest.fixture(scope="module")
def boots(lab: Lab) -> Boots:
    return Boots(lab.run(SCRIPT.read_text(), str(GUEST_LIMIT), limit=LIMIT))


def md5_of_second_disk(said: str) -> str:
    (found,) = re.findall(r"([0-9a-f]{32})  /dev/vdb", said)
    return str(found)


@pytest.mark.timeout(2 * LIMIT)
def test_power_off_ends_the_vmm_with_exit_code_0(boots: Boots) -> None:
    assert "focal: rc=0" in boots.said("elf")


def test_elf_kernel_that_carries_its_initramfs(boots: Boots) -> None:
    said = boots.said("elf")
    assert md5_of_second_disk(said) != hashlib.md5(b"").hexdigest()
    assert re.search(r"^2\r?$", said, re.MULTILINE), "nproc does not say 2"


def test_bzimage_with_initramfs(boots: Boots) -> None:
    said = boots.said("bzimage")
    assert md5_of_second_disk(said) == md5_of_second_disk(boots.said("elf"))
    assert "guest.sh=md5sum^/dev/vdb;cat^/proc/cmdline" in said


def test_uki_with_a_command_line_of_ours(boots: Boots) -> None:
    said = boots.said("uki")
    assert md5_of_second_disk(said) == md5_of_second_disk(boots.said("elf"))
    assert "guest.sh=md5sum^/dev/vdb;cat^/proc/cmdline" in said


def test_reboot_starts_the_guest_again_in_the_same_vmm(boots: Boots) -> None:
    said = boots.said("reboot")
    first, second = (re.findall(rf"{word}=([0-9a-f-]{{36}})", said) for word in ("boot", "again"))
    assert len(first) == len(second) == 1
    assert first != second
    assert json.loads(boots.text("ping.1"))["pid"] == json.loads(boots.text("ping.2"))["pid"]


def test_power_button_makes_the_guest_power_off(boots: Boots) -> None:
    boots.said("reboot")
    assert boots.text("pressed") == "pressed\n"
