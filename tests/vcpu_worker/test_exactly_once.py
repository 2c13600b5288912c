"""SIGKILL of vCPU processes at any instruction: every exit takes effect once, in order, whoever finishes it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.vcpu_worker.rig import ALL_EXITS, TRANSMIT, TRANSMIT_TAGGED, Rig, assert_counting, native_variant, rig
from tests.vcpu_worker.stepper import Stepper
from vcpu_worker import layout
from vcpu_worker.process import Exit, Vcpu

pytestmark = pytest.mark.probe

# Kinds of exits of one round of ALL_EXITS, string instructions included, and a few of the next.
EXITS_OF_A_ROUND = 26
# More instructions than the loop has from one KVM_RUN to the next, whatever the exit.
MOST_INSTRUCTIONS = 400


def kill_at_random(machine: Rig, kills: int, seed: int) -> None:
    """The vCPUs run on the other core meanwhile, so a kill between two rounds of ours hits them anywhere."""
    dice = random.Random(seed)
    while machine.kills < kills:
        for _ in range(dice.randrange(6)):
            machine.serve(0)
        victim = dice.choice(machine.vcpus)
        victim.kill()
        while victim.pidfd >= 0 and machine.kills < kills:
            before = machine.kills
            machine.serve(1)
            if machine.kills > before:
                break


def test_random_kills_lose_and_double_nothing() -> None:
    with rig(ALL_EXITS) as machine:
        kill_at_random(machine, 1500, seed=1)
        rounds = len(machine.devices.echoes[0])
        machine.run_until(lambda: len(machine.devices.echoes[0]) > rounds + 20)
        machine.check()
        assert_counting(bytes(machine.output))
        assert machine.vcpus[0].restarts == 1500


def test_random_kills_of_two_vcpus_that_share_the_ring() -> None:
    with rig(TRANSMIT_TAGGED, vcpus=2) as machine:
        kill_at_random(machine, 800, seed=2)
        sent = len(machine.output)
        machine.run_until(lambda: len(machine.output) > sent + 1000)
        for tag in (0x00, 0x80):
            assert_counting(bytes(byte & 0x7F for byte in machine.output if byte & 0x80 == tag), 128)


def test_random_kills_while_two_vcpus_do_everything() -> None:
    with rig(ALL_EXITS, vcpus=2) as machine:
        kill_at_random(machine, 600, seed=3)
        assert not machine.devices.wrong


def kill_after_each_instruction(machine: Rig, exits: int) -> int:
    """For `exits` exits, one after the other: kill after 0, 1, 2 … instructions of finishing it. How many kills.

    The guest is deterministic but moves on with every kill, so each length is tried on the same kind of exit a round
    later: what counts is that every (kind of exit, number of instructions) is met.
    """
    vcpu = machine.vcpus[0]
    kills = 0

    def serve() -> None:
        machine.take(vcpu)

    for skipped in range(exits):
        for steps in range(MOST_INSTRUCTIONS):
            entered = _kill_once(machine, vcpu, serve, skipped if steps == 0 else EXITS_OF_A_ROUND - 1, steps)
            kills += 1
            if entered:
                break
        else:
            pytest.fail("the loop never came back to KVM_RUN")
    return kills


def _kill_once(machine: Rig, vcpu: Vcpu, serve: object, skip: int, steps: int) -> bool:
    """Let `skip` exits pass, kill `steps` instructions into the next. True when it was finished by then."""
    stepper = Stepper(vcpu, serve)  # type: ignore[arg-type]
    for _ in range(skip + 1):
        stepper.run_to_exit()
    epoch = vcpu.page.epoch
    for _ in range(steps):
        stepper.step()
        if vcpu.page.epoch != epoch:
            break
    finished = bool(vcpu.page.epoch != epoch)
    stepper.kill()
    machine.run_until(lambda: vcpu.starts > starts_before)
    return finished
