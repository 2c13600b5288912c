"""vcpu_worker.process: pause and resume, deaths of every kind, what an exit looks like."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from shared import kvm
from tests.vcpu_worker.rig import ALL_EXITS, SPIN, native_variant, rig
from vcpu_worker import layout
from vcpu_worker.layout import State
from vcpu_worker.process import ExitKind

pytestmark = pytest.mark.probe


def start(body: str) -> str:
    return f"    .code32\n    {body}\nagain: jmp again\n"


def test_a_vcpu_is_a_process_with_a_name_a_filter_and_no_signals_but_the_kick() -> None:
    with rig(ALL_EXITS) as machine:
        machine.run_until(lambda: len(machine.devices.echoes[0]) > 2)
        pid = machine.vcpus[0].pid
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["Name"] == "vcpu0"
        assert int(status["PPid"]) == os.getpid()
        assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
        kick = 1 << (signal.SIGRTMIN - 1)
        assert int(status["SigCgt"], 16) == kick
        assert not int(status["SigBlk"], 16) & kick
        assert int(status["SigBlk"], 16) & 1 << (signal.SIGINT - 1), "a Ctrl-C is the controller's"


def test_pause_stops_the_guest_and_resume_lets_it_go_on() -> None:
    with rig(SPIN) as machine:
        vcpu = machine.vcpus[0]
        machine.pause()
        before = machine.regs(vcpu).rax
        assert vcpu.state is State.PARKED
        machine.run_until(lambda: not machine.serve(0))  # the notice of its parking may still have been unread
        assert vcpu.take_exit() is None
        assert machine.regs(vcpu).rax == before
        machine.resume()
        assert not vcpu.parked
        machine.run_until(lambda: vcpu.state is State.RUNNING)
        machine.pause()

        def goes_on() -> bool:
            """Once more: a busy host may have paused it before its first instruction."""
            machine.resume()
            machine.pause()
            return machine.regs(vcpu).rax > before

        assert any(goes_on() for _ in range(1000))


def test_a_process_that_is_counted_as_born_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still right behind its count."""
    count = "STORE(v.page->stats[STAT_STARTS], v.page->stats[STAT_STARTS] + 1);"
    monkeypatch.setattr(layout, "_library", native_variant(tmp_path, count, count + " for (;;);"))
    with rig(SPIN) as machine:
        machine.run_until(lambda: machine.vcpus[0].births == 1)
        assert machine.vcpus[0].state is State.RUNNING


def test_a_vcpu_started_with_a_pause_request_parks_before_its_first_instruction() -> None:
    with rig(SPIN, started=False) as machine:
        vcpu = machine.vcpus[0]
        vcpu.request_pause()
        vcpu.spawn()
        machine.run_until(lambda: vcpu.parked)
        assert machine.regs(vcpu).rip == 0x1000
        assert machine.regs(vcpu).rax == 0


def test_a_halted_vcpu_parks() -> None:
    with rig(start("out %al, $0x80; cli; hlt")) as machine:
        vcpu = machine.vcpus[0]
        machine.run_until(lambda: vcpu.page.stats[layout.Stat.POST_CODE] == 1)
        for _ in range(3):
            machine.pause()
            assert vcpu.parked
            machine.resume()
        assert not vcpu.take_exit()


def test_no_exit_is_pending_in_a_parked_vcpu() -> None:
    """Also a string instruction's: its bytes are in RAM, and its registers have moved on."""
    dice = random.Random(4)
    with rig(ALL_EXITS) as machine:
        for _ in range(60):
            for _ in range(dice.randrange(25)):
                machine.serve(0.01)
            machine.pause()
            page = machine.vcpus[0].page
            assert page.handoff == page.done
            regs = machine.regs(machine.vcpus[0])
            # a new process has nothing to finish: the reason it finds says so
            assert machine.vcpus[0].run.exit_reason in (layout.EXIT_SENTINEL, 10)
            assert machine.regs(machine.vcpus[0]).rip == regs.rip
            machine.resume()
        machine.check()


def test_pauses_and_kills_together() -> None:
    dice = random.Random(5)
    with rig(ALL_EXITS, vcpus=2) as machine:
        for _ in range(150):
            for _ in range(dice.randrange(12)):
                machine.serve(0.01)
            for vcpu in machine.vcpus:
                vcpu.request_pause()
            victim = dice.choice(machine.vcpus)
            victim.kill()
            machine.run_until(lambda victim=victim, n=victim.starts: victim.starts > n)  # type: ignore[misc]
            machine.run_until(lambda: all(vcpu.parked for vcpu in machine.vcpus))
            if dice.random() < 0.3:  # and once more, while it is parked
                victim.kill()
                machine.run_until(lambda victim=victim, n=victim.starts: victim.starts > n)  # type: ignore[misc]
                machine.run_until(lambda: all(vcpu.parked for vcpu in machine.vcpus))
            machine.resume()
        seen = len(machine.devices.echoes[0])
        machine.run_until(lambda: len(machine.devices.echoes[0]) > seen + 10)
        machine.check()


def test_a_pause_waits_for_the_exit_that_the_controller_works_on() -> None:
    with rig(ALL_EXITS) as machine:
        vcpu = machine.vcpus[0]
        machine.hold = lambda vcpu, exit: exit.kind is ExitKind.PIO
        machine.run_until(lambda: bool(machine.held))
        vcpu.request_pause()
        machine.serve(0.05)
        assert vcpu.state is State.EXITING
        assert not vcpu.parked
        exit = machine.held.pop()
        machine.carry_out(vcpu, exit)
        machine.hold = lambda vcpu, exit: False
        vcpu.finish_exit(exit.epoch)
        machine.run_until(lambda: vcpu.parked)
        machine.check()


def test_the_same_exit_is_given_out_once_whatever_dies() -> None:
    with rig(ALL_EXITS) as machine:
        vcpu = machine.vcpus[0]
        machine.hold = lambda vcpu, exit: True
        machine.run_until(lambda: bool(machine.held))
        for _ in range(5):
            starts = vcpu.starts
            vcpu.kill()
            machine.run_until(lambda starts=starts: vcpu.starts > starts)  # type: ignore[misc]
            machine.run_until(lambda: vcpu.state is State.EXITING)
            machine.serve(0)
        assert len(machine.held) == 1
        machine.hold = lambda vcpu, exit: False
        exit = machine.held.pop()
        vcpu.kill()  # and finished while there is no process
        machine.carry_out(vcpu, exit)
        vcpu.finish_exit(exit.epoch)
        machine.run_until(lambda: len(machine.devices.echoes[0]) > 5)
        machine.check()


def test_string_instructions_come_as_repeats() -> None:
    body = "mov $0x2000, %esi; mov $0x50c, %dx; mov $3, %ecx; cld; rep outsw"
    with rig(start(body), started=False) as machine:
        machine.memory.write(0x2000, b"\x01\x02\x03\x04\x05\x06")
        seen: list[tuple[bool, int, int, bytes]] = []

        def note(vcpu: object, exit: object) -> bool:
            seen.append((exit.is_write, exit.size, exit.repeats, bytes(exit.data)))  # type: ignore[attr-defined]
            return False

        machine.hold = note  # type: ignore[assignment]
        machine.vcpus[0].spawn()
        machine.run_until(lambda: sum(repeats for _, _, repeats, _ in seen) == 3)
        assert all(is_write and size == 2 and len(data) == 2 * repeats for is_write, size, repeats, data in seen)
        assert b"".join(data for *_, data in seen) == b"\x01\x02\x03\x04\x05\x06"


def test_the_pm_timer_is_native_monotonic_and_of_its_frequency() -> None:
    body = "mov $0x608, %dx; loop: in %dx, %eax; mov %eax, 0x2000; jmp loop"
    with rig(start(body), started=False) as machine:
        timer = machine.pages.timer
        timer.start = time.monotonic_ns() - 10**9  # one second ago
        timer.present = 1
        machine.vcpus[0].spawn()
        last = 0
        for _ in range(50):
            reads = machine.vcpus[0].page.stats[layout.Stat.PM_TIMER]
            machine.run_until(
                lambda reads=reads: machine.vcpus[0].page.stats[layout.Stat.PM_TIMER] > reads + 2  # type: ignore[misc]
            )
            before = machine.memory.u32(0x2000)
            assert before >= last >= 0
            last = before
        elapsed = time.monotonic_ns() - timer.start
        assert 3579545 <= last <= elapsed * 3579545 // 10**9


def test_a_triple_fault_is_a_shutdown_exit() -> None:
    with rig(start("ud2")) as machine:
        machine.run_until(lambda: bool(machine.devices.other))
        assert machine.devices.other[0][0] is ExitKind.SHUTDOWN


def test_what_kvm_cannot_run_is_a_failure_in_words() -> None:
    with rig(start("mov $0x10000000, %eax; jmp *%eax")) as machine:  # no RAM there
        machine.hold = lambda vcpu, exit: True
        machine.run_until(lambda: bool(machine.held))
        assert machine.held[0].kind is ExitKind.FAILED
        assert "KVM internal error 1" in machine.vcpus[0].failure()


def test_a_failing_kvm_run_is_an_exit_that_names_the_error() -> None:
    with rig(SPIN, started=False) as machine, open("/dev/null") as not_a_vcpu:
        vcpu = machine.vcpus[0]
        real = vcpu._start.vcpu_fd
        vcpu._start.vcpu_fd = not_a_vcpu.fileno()
        machine.hold = lambda vcpu, exit: True
        vcpu.spawn()
        machine.run_until(lambda: bool(machine.held))
        exit = machine.held.pop()
        assert (exit.kind, exit.address) == (ExitKind.FAILED, errno.ENOTTY)
        assert vcpu.exits()["controller"][layout.EXIT_REASONS - 1] == 1, "no reason of KVM's: with all others"
        assert vcpu.state is State.FAILED
        assert "KVM_RUN: Inappropriate ioctl" in vcpu.failure()
        vcpu._start.vcpu_fd = real
        vcpu.kill()
        machine.run_until(lambda: vcpu.starts == 2)
        machine.pause()


def test_an_application_processor_waits_survives_and_starts() -> None:
    """INIT and SIPI reach a vCPU whose process was killed while it waited for them."""
    boot = """
    .code32
    test %ebx, %ebx
    jnz again
    movl $0x000001ff, 0xfee000f0    # the LAPIC is on
poll: cmpl $0, 0x3000
    je poll
    movl $0x01000000, 0xfee00310    # to APIC id 1
    movl $0x00004500, 0xfee00300    # INIT
    movl $0x01000000, 0xfee00310
    movl $0x00004602, 0xfee00300    # SIPI to 0x2000
again: jmp again
"""
    with rig(boot, vcpus=2, started=False) as machine:
        machine.memory.write(0x2000, b"\xb0\x41\xe6\x80\xc6\x06\x00\x40\x07\xeb\xfe")  # movb $7, 0x4000; 16 bit
        first, second = machine.vcpus
        machine.set_mp_state(second, 1)
        first.spawn()
        second.spawn()
        machine.run_until(lambda: second.state is State.RUNNING)
        second.kill()
        machine.run_until(lambda: second.starts == 2)
        machine.pause()  # also one that has never run
        machine.resume()
        machine.memory.write(0x3000, b"\x01")
        machine.run_until(lambda: machine.memory.read(0x4000, 1) == b"\x07")


def test_a_forbidden_system_call_ends_the_process_not_the_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = native_variant(
        tmp_path,
        "    run_vcpu(&v);",
        "    syscall4(__NR_openat, 0, 0, 0, 0);\n    run_vcpu(&v);",
    )
    with rig(SPIN, started=False) as machine:
        vcpu = machine.vcpus[0]
        with monkeypatch.context() as patch:
            patch.setattr(layout, "_library", lost)
            vcpu.spawn()
        assert vcpu.reap() == signal.SIGSYS
        vcpu.spawn()
        machine.pause()


def test_a_host_that_hides_clone3_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = native_variant(tmp_path, "clone_vcpu(__NR_clone3, ", "clone_vcpu(9999, ")
    monkeypatch.setattr(layout, "_library", older)
    with rig(ALL_EXITS) as machine:
        machine.run_until(lambda: len(machine.devices.echoes[0]) > 3)
        machine.vcpus[0].kill()
        machine.run_until(lambda: len(machine.devices.echoes[0]) > 6)
        machine.check()


def test_a_stack_that_overflows_hits_a_guard_page() -> None:
    with rig(SPIN, started=False) as machine:
        low = machine.vcpus[0]._start.stack
        line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{low:x}-"))
        assert line.split()[1].startswith("---")


def test_exits_are_counted_by_reason_and_by_who_finished_them() -> None:
    with rig(ALL_EXITS) as machine:
        machine.run_until(lambda: len(machine.devices.echoes[0]) > 20)
        machine.pause()
        vcpu = machine.vcpus[0]
        exits, stats = vcpu.exits(), vcpu.stats()
        assert exits["vcpu"][kvm.KVM_EXIT_IO] == sum(
            stats[name] for name in ("uart_write", "uart_status", "pci_address", "pci_read", "post_code")
        )
        assert exits["vcpu"][kvm.KVM_EXIT_MMIO] == stats["ecam_read"] > 0
        assert exits["vcpu"][kvm.KVM_EXIT_INTR] == stats["interrupted"] > 0
        assert exits["controller"][kvm.KVM_EXIT_IO] == stats["handed_pio"] > 20
        assert exits["controller"][kvm.KVM_EXIT_MMIO] == stats["handed_mmio"] > 20
        assert sum(map(sum, exits.values())) == sum(stats.values()) - stats["starts"]


def test_exit_counts_outlive_the_process() -> None:
    with rig(ALL_EXITS) as machine:
        vcpu = machine.vcpus[0]
        machine.run_until(lambda: len(machine.devices.echoes[0]) > 5)
        vcpu.kill()
        vcpu.reap()
        before = vcpu.exits()["controller"][kvm.KVM_EXIT_IO]
        vcpu.spawn()
        done = len(machine.devices.echoes[0])
        machine.run_until(lambda: len(machine.devices.echoes[0]) > done + 5)
        assert vcpu.exits()["controller"][kvm.KVM_EXIT_IO] > before > 5
