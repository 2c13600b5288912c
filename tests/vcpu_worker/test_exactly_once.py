"""SIGKILL of vCPU processes at any instruction: every exit takes effect once, in order, whoever finishes it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.vcpu_worker.rig import ALL_EXITS, TRANSMIT_TAGGED, Rig, assert_counting, native_variant, rig
from tests.vcpu_worker.stepper import Stepper
from vcpu_worker import layout

pytestmark = [pytest.mark.probe, pytest.mark.timeout(180)]

# One kind of exit each, again and again; esi counts the rounds, and what is read is compared with it.
LOOP = """
    .code32
    xor %esi, %esi
    mov $0x2000, %edi
again:
{body}
    inc %esi
    jmp again
wrong:
    mov $0x508, %dx
    out %eax, %dx
    hlt
"""
BODIES = {
    "transmit": "mov %esi, %eax; mov $0x3f8, %dx; out %al, %dx",
    "line-status": "mov $0x3fd, %dx; in %dx, %al; cmp $0x60, %al; jne wrong",
    "latch": "lea 0x80000000(%esi), %eax; mov %eax, %ebx; mov $0xcf8, %dx; out %eax, %dx; in %dx, %eax; cmp %ebx, %eax; jne wrong",
    "config-read": "mov 0xe8000000, %eax; cmp $0x0d578086, %eax; jne wrong",
    "pio-write": "mov %esi, %eax; mov $0x504, %dx; out %eax, %dx",
    "pio-read": "mov $0x500, %dx; in %dx, %eax; cmp %esi, %eax; jne wrong",
    "mmio-write": "movl %esi, 0xd0000000",
    "mmio-read": "mov 0xd0000000, %eax; cmp %esi, %eax; jne wrong",
    "string-in": "mov $0x2000, %edi; mov $4, %ecx; mov $0x50c, %dx; rep insb; movzbl 0x2003, %eax;"
    "lea 3(,%esi,4), %ebx; movzbl %bl, %ebx; cmp %ebx, %eax; jne wrong",
}


def kill_at_random(machine: Rig, kills: int, seed: int) -> None:
    """The vCPUs run on another core meanwhile, so a kill between two rounds of ours hits them anywhere."""
    dice = random.Random(seed)
    for _ in range(kills):
        victim = dice.choice(machine.vcpus)
        goal = victim.page.epoch + dice.randrange(30)
        deadline = time.monotonic() + 20
        while victim.page.epoch < goal:
            machine.serve(0)
            assert time.monotonic() < deadline, machine.describe()
        starts = victim.starts
        victim.kill()
        machine.run_until(lambda victim=victim, starts=starts: victim.starts > starts)  # type: ignore[misc]


def step_and_kill(machine: Rig, most: int = 1200) -> int:
    """Kill the vCPU 0, 1, 2 … instructions into an exit, until it is killed a whole exit later. How many kills."""
    vcpu = machine.vcpus[0]
    for steps in range(most):
        stepper = Stepper(vcpu, lambda: machine.take(vcpu))
        stepper.run_to_exit()
        epoch = vcpu.page.epoch
        for _ in range(steps):
            stepper.step()
            machine.take(vcpu)
        later = vcpu.page.epoch - epoch
        stepper.kill()
        machine.run_until(lambda starts=vcpu.starts: vcpu.starts > starts)  # type: ignore[misc]
        if later >= 2:
            return steps
    raise AssertionError(f"{most} instructions and the next exit is still not finished")


def check_transmitted(machine: Rig) -> None:
    """Each vCPU's bytes carry its number in the high bit and count in the others."""
    for tag in (0x00, 0x80):
        assert_counting(bytes(byte & 0x7F for byte in machine.output if byte & 0x80 == tag), 128)


def test_random_kills_lose_and_double_nothing() -> None:
    with rig(ALL_EXITS) as machine:
        kill_at_random(machine, 1000, seed=1)
        rounds = len(machine.devices.echoes[0])
        machine.run_until(lambda: len(machine.devices.echoes[0]) > rounds + 20)
        machine.check()
        assert_counting(bytes(machine.output))
        assert machine.vcpus[0].restarts == machine.kills == 1000


def test_random_kills_of_two_vcpus_that_share_the_ring() -> None:
    with rig(TRANSMIT_TAGGED, vcpus=2) as machine:
        kill_at_random(machine, 600, seed=2)
        sent = len(machine.output)
        machine.run_until(lambda: len(machine.output) > sent + 1000)
        check_transmitted(machine)


@pytest.mark.parametrize("kind", BODIES)
def test_a_kill_after_any_number_of_instructions(kind: str) -> None:
    with rig(LOOP.format(body=BODIES[kind])) as machine:
        kills = step_and_kill(machine)
        assert kills > 30, "one exit takes more instructions than that"
        epoch = machine.vcpus[0].page.epoch
        machine.run_until(lambda: machine.vcpus[0].page.epoch > epoch + 50)
        machine.check()
        assert_counting(bytes(machine.output))


def test_a_kill_after_any_number_of_instructions_with_interrupt_and_wish() -> None:
    """The longest way through a THR write: append, wake the consumer, raise the transmit interrupt."""
    with rig(LOOP.format(body=BODIES["transmit"])) as machine:
        uart = machine.pages.uart
        uart.tx_fd = uart.irq_fd = machine.event_fd
        uart.ier = 0x02
        uart.arm()
        step_and_kill(machine)
        sent = len(machine.output)
        machine.run_until(lambda: len(machine.output) > sent + 50)
        assert_counting(bytes(machine.output))
        assert uart.thr_irq_pending


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("transmit", "    if (LOAD(uart->tx_done[vcpu]) >= epoch)\n        return true;", "    if (0)\n        return true;"),
        ("pio-read", "        if (is_exit(found) || unknown) {", "        if (retired + (page->stats[STAT_STARTS]++, 1) && is_exit(found)) {"),
    ],
    ids=["append without looking at the done table", "control"],
)
def test_the_kill_test_notices(
    kind: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that forgets one rule must fail it."""
    monkeypatch.setattr(layout, "_library", native_variant(tmp_path, old, new))
    with rig(LOOP.format(body=BODIES[kind])) as machine:
        with pytest.raises(AssertionError):
            step_and_kill(machine)
            machine.check()
            assert_counting(bytes(machine.output))
