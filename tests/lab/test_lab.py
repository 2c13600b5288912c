"""The lab itself: what it carries in and out, whom it blames, and that a stock Debian guest boots in it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from deploy.lab import machine
from deploy.lab.machine import Session
from tests.lab.lab import Lab


def test_output_exit_code_arguments_and_files_come_back(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "put").write_text("carried in")
    events = bytearray()
    script = """
        echo "first $1, second $2"; echo problem >&2; cat $LAB/sub/name; echo '{"n": 1}' > $EVENTS
        mkdir $OUT/folder; head -c 3000000 /dev/zero > $OUT/folder/zeros
        for command in cloud-hypervisor flotilla ch-remote; do command -v $command; done
        python3 -c 'import zmq, msgpack, posix_ipc, fastapi, uvicorn, rich, lz4; print("packages")'
        trap 'echo interrupted' INT; kill -INT $$
        sleep 1000 & exit 7
    """
    done = lab.run(script, "a", "b c", puts={"sub/name": tmp_path / "put"}, sinks={"events": events.extend})
    assert (done.code, done.died) == (7, "")
    assert done.stderr == "problem\n"
    lines = done.stdout.splitlines()
    assert lines[0] == "first a, second b c"
    assert lines[1] == "carried in/usr/local/bin/cloud-hypervisor"
    assert lines[2:] == ["/usr/local/bin/flotilla", "/usr/local/bin/ch-remote", "packages", "interrupted"]
    assert bytes(events) == b'{"n": 1}\n'
    assert (done.out / "folder" / "zeros").read_bytes() == bytes(3000000)
    assert "Linux version" in (done.out / ".dmesg").read_text()
    assert [line.split(maxsplit=1)[1].strip() for line in done.left] == ["sleep 1000"]


def test_script_that_never_ends_has_code_124_and_is_not_started_again(lab: Lab) -> None:
    starts = bytearray()
    done = lab.run("echo start > $EVENTS; sleep 1000", limit=30, sinks={"events": starts.extend})
    assert (done.code, done.died, bytes(starts)) == (124, "", b"start\n")


def test_death_of_the_lab_machine_is_told_apart_and_started_again(lab: Lab) -> None:
    starts = bytearray()
    script = "echo start > $EVENTS; echo c > /proc/sysrq-trigger; sleep 60"
    done = lab.run(script, sinks={"events": starts.extend}, retries=1)
    assert done.code == 125
    assert "Kernel panic" in done.died
    assert bytes(starts) == b"start\nstart\n"


def test_machine_that_gives_no_sign_of_life_is_told_with_where_its_cpu_stands(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BEAT_LIMIT", 15.0)
    done = lab.run("kill -STOP $(pgrep -P 1 -f run/init); sleep 100", retries=0)
    assert done.code == 125
    assert re.search(r"no sign of life for 15 s; its CPU stands at RIP=[0-9a-f]+ ", done.died)


def test_host_interrupts_the_machine_and_is_answered(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself the machine gives a sign of life every 5 s: six in this time, on a busy host two or three more."""
    words: list[bytes] = []
    hear = Session._hear
    monkeypatch.setattr(machine, "TICK", 0.2)
    monkeypatch.setattr(Session, "_hear", lambda session, data: words.append(data) or hear(session, data))
    lab.run("sleep 30").must_succeed()
    assert b"".join(words).count(b"beat\n") > 20


def test_out_comes_back_whole_to_a_host_that_is_slow_to_read(lab: Lab) -> None:
    """It is a host's to be busy; here it looks away while the machine says its last words."""
    script = "head -c 3000000 /dev/zero > $OUT/zeros; echo look away > $EVENTS"
    done = lab.run(script, sinks={"events": lambda _: time.sleep(5)})
    assert (done.code, done.died) == (0, "")
    assert (done.out / "zeros").read_bytes() == bytes(3000000)


def test_killed_vmm_is_not_the_death_of_the_lab_machine(lab: Lab) -> None:
    script = """
        qemu-system-x86_64 -accel kvm -cpu host -display none -kernel ~/workloads/bzImage & kill -KILL $!; wait $!
    """
    done = lab.run(script)
    assert (done.code, done.died) == (137, "")


def test_debian_guest_boots_from_its_disk_with_both_kernel_forms(lab: Lab) -> None:
    script = """
        . $LAB/library.sh
        cd ~/workloads
        for kernel in vmlinux bzImage; do
            timeout 120 qemu-system-x86_64 -accel kvm -cpu host -M q35 -m 512 -nodefaults -display none -no-reboot \
                -serial file:/tmp/$kernel.log -kernel $kernel -initrd initrd \
                -append "root=/dev/vda1 console=ttyS0 quiet guest.sh=verify^/dev/vdb^2;^lsblk^-no^NAME,TYPE" \
                -drive file=focal.raw,if=virtio,format=raw,snapshot=on -drive file=tmp.img,if=virtio,format=raw ||
                die "QEMU ends with $?"
            cat /tmp/$kernel.log
        done
    """
    said = lab.run(script).must_succeed().stdout
    assert said.count("verify: ok") >= 2
    assert "verify: BAD" not in said
    assert said.count("focal: rc=0") == 2
    assert said.count("part") == 2
