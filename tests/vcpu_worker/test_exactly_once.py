"""SIGKILL of vCPU processes at any instruction: every exit takes effect once, in order, whoever finishes it."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vcpu_worker.rig import ALL_EXITS, TRANSMIT_TAGGED, Rig, first_wrong, native_variant, rig
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
    "latch": "lea 0x80000000(%esi), %ebx; mov %ebx, %eax; mov $0xcf8, %dx; out %eax, %dx;"
    "in %dx, %eax; cmp %ebx, %eax; jne wrong",
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
    """Kill the vCPU 0, 1, 2 … instructions into an exit, up to the next entry into the guest. How many kills."""
    vcpu = machine.vcpus[0]
    entries = 0
    for steps in range(most):
        stepper = Stepper(vcpu, lambda: machine.take(vcpu))
        stepper.run_to_exit()
        epoch = vcpu.page.epoch
        for _ in range(steps):
            stepper.step()
            machine.take(vcpu)
        entries += vcpu.page.epoch > epoch
        stepper.kill()
        machine.run_until(lambda starts=vcpu.starts: vcpu.starts > starts)  # type: ignore[misc]
        if entries > 12:  # as many instructions lie between the step of the epoch and KVM_RUN, at most
            return steps
    raise AssertionError(f"{most} instructions and the exit is still not finished")


def check_transmitted(machine: Rig) -> None:
    """Each vCPU's bytes carry its number in the high bit and count in the others."""
    for tag in (0x00, 0x80):
        assert not first_wrong((byte & 0x7F for byte in machine.output if byte & 0x80 == tag), 128)


def test_random_kills_lose_and_double_nothing() -> None:
    with rig(ALL_EXITS) as machine:
        kill_at_random(machine, 300, seed=1)
        rounds = len(machine.devices.echoes[0])
        machine.run_until(lambda: len(machine.devices.echoes[0]) > rounds + 20)
        machine.check()
        assert machine.vcpus[0].restarts == machine.kills == 300


def test_no_undefined_behaviour_while_being_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UBSan with traps: the sanitizers' runtimes need a libc and TLS, which this process has not got."""
    sanitize = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    checked = native_variant(tmp_path, "#define PM_TIMER_HZ 3579545u", "#define PM_TIMER_HZ 3579545u", *sanitize)
    monkeypatch.setattr(layout, "_library", checked)
    with rig(ALL_EXITS) as machine:
        kill_at_random(machine, 50, seed=6)
        machine.check()


def test_random_kills_of_two_vcpus_that_share_the_ring() -> None:
    with rig(TRANSMIT_TAGGED, vcpus=2) as machine:
        kill_at_random(machine, 120, seed=2)
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
        machine.check()
        assert uart.thr_irq_pending


def step_until(machine: Rig, condition: Callable[[], bool]) -> None:
    """Start vCPU 0 and let it go instruction by instruction, from before the guest's first on, until the condition
    holds, then kill it there; no successor yet."""
    vcpu = machine.vcpus[0]
    vcpu.request_pause()
    vcpu.spawn()
    machine.run_until(lambda: vcpu.parked)
    stepper = Stepper(vcpu, lambda: machine.take(vcpu))
    vcpu.resume()
    for _ in range(5000):
        if condition():
            break
        stepper.step()
    else:
        raise AssertionError("5000 instructions, and it did not happen")
    stepper.kill()
    vcpu.reap()


def test_a_byte_that_is_in_stays_native_when_the_registers_change() -> None:
    """Killed between its append and the sentinel; then another vCPU sets DLAB: the byte must not become a divisor."""
    with rig(LOOP.format(body=BODIES["transmit"]), started=False) as machine:
        vcpu, uart = machine.vcpus[0], machine.pages.uart
        step_until(machine, lambda: uart.tx_head > 0 and uart.tx_done[0] == vcpu.page.epoch)
        sent = uart.tx_head
        uart.lcr = 0x80
        handed = vcpu.page.handoff
        machine.hold = lambda vcpu, exit: True
        vcpu.spawn()
        machine.run_until(lambda: vcpu.page.handoff > handed)  # the next byte, which is for the divisor
        assert uart.tx_head == sent
        exit = machine.held[-1]
        assert (exit.address, exit.data[0]) == (0x3F8, sent % 256)


def test_a_latch_write_that_another_has_overwritten_is_not_repeated() -> None:
    body = "movl $0x80001234, %eax; mov $0xcf8, %dx; out %eax, %dx; stop: mov $0x80, %dx; out %al, %dx; jmp stop"
    with rig(LOOP.format(body=body), started=False) as machine:
        vcpu, pci = machine.vcpus[0], machine.pages.pci
        step_until(machine, lambda: pci.latch != 0)
        assert pci.latch == 0x8000_1234
        assert vcpu.page.stats[layout.Stat.POST_CODE] == 0
        pci.set_address(0x8000_5678)
        vcpu.spawn()
        machine.run_until(lambda: vcpu.page.stats[layout.Stat.POST_CODE] > 10)
        assert pci.latch == 0x8000_5678


def test_an_exit_in_the_controllers_hands_is_not_finished_natively_by_a_successor() -> None:
    """The ring is full, so the byte is handed over; then there is room again, and the vCPU has been killed."""
    with rig(TRANSMIT_TAGGED) as machine:
        vcpu = machine.vcpus[0]
        machine.hold = lambda vcpu, exit: True
        machine.drains = False
        machine.run_until(lambda: bool(machine.held))
        vcpu.kill()
        machine.run_until(lambda: vcpu.starts == 2)
        machine.output += machine.pages.uart.drain()
        assert len(machine.output) == layout.TX_SLOTS
        machine.run_until(lambda: vcpu.state is layout.State.EXITING)
        machine.hold = lambda vcpu, exit: False
        machine.drains = True
        exit = machine.held.pop()
        assert not machine.held, "the same exit was given out twice"
        machine.carry_out(vcpu, exit)
        vcpu.finish_exit(exit.epoch)
        machine.run_until(lambda: len(machine.output) > 2 * layout.TX_SLOTS)
        check_transmitted(machine)


MUTANTS = {
    "a new process does not finish what it finds": (
        "pio-write",
        "    STORE(v.page->stats[STAT_STARTS], v.page->stats[STAT_STARTS] + 1);",
        "    STORE(v.run->exit_reason, EXIT_SENTINEL);",
    ),
    "no sentinel": ("pio-write", "            STORE(*reason, EXIT_SENTINEL);", "            ;"),
    "append without looking at the done table": (
        "transmit",
        "    if (LOAD(uart->tx_done[vcpu]) >= epoch)\n        return true;",
        "    page_end:;",
    ),
    "the head moves on before the byte is settled": (
        "transmit",
        "    settle(uart->tx_done, tag);\n    cas(&uart->tx_head, head, head + 1);",
        "    cas(&uart->tx_head, head, head + 1);\n    settle(uart->tx_done, tag);",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_kill_test_notices(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that forgets one rule must not pass."""
    kind, old, new = MUTANTS[mutant]
    monkeypatch.setattr(layout, "_library", native_variant(tmp_path, old, new))
    with rig(LOOP.format(body=BODIES[kind])) as machine:
        with contextlib.suppress(AssertionError):  # a guest that has seen something wrong stops
            step_and_kill(machine)
            machine.run_until(lambda: machine.vcpus[0].page.epoch > 1000)
            # Whether a kill finds the guest itself running is the scheduler's choice: until it has, up to a bound.
            for seed in range(20):
                if machine.violations():
                    break
                kill_at_random(machine, 20, seed)
        assert machine.violations()
