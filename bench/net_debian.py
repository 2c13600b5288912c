"""A network card as iperf3 sees it: a Debian guest on a TAP, beside QEMU's virtio-net with vhost=off.

It needs a KVM that runs Linux. One boot of each VMM in turns (A B A B …), and all cases in it: iperf3 runs as the
guest's server and the host's client.
The guest is the lab's (~/workloads: kernels and focal.raw, which are not written to). Figures:

    mb_per_s    10^6 bytes of TCP payload a second, as the receiver counts them
    kpps        thousand UDP datagrams a second, in frames of 64 bytes, that arrived
    p50_us      median round trip of the host's pings
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import processes, programs, report
from bench.errors import BenchError
from bench.net import GOALS
from bench.wire import GUEST, GUEST_MAC, HEADERS, HOST, NAME, Wire, namespace

WORKLOADS: Final = Path("~/workloads")
MEMORY: Final = 512  # MiB
SMALL: Final = 64 - HEADERS
PINGS: Final = 50
PROMPT: Final = "root@"
ADDRESS: Final = f"ip address add {GUEST}/24 dev eth0; ip link set eth0 up"
CARD: Final = f"modprobe virtio_net; {ADDRESS}; iperf3 -s -D; echo card=$?"
CMDLINE: Final = "root=/dev/vda1 console=ttyS0 quiet"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    words: tuple[str, ...]  # for iperf3 at the host; none: pings
    figure: str


CASES: Final = (
    *(Case(f"tx tcp x{streams}", ("-R", "-P", str(streams)), "mb_per_s") for streams in (1, 4)),
    *(Case(f"rx tcp x{streams}", ("-P", str(streams)), "mb_per_s") for streams in (1, 4)),
    Case("tx udp 64", ("-R", "-u", "-b", "0", "-l", str(SMALL)), "kpps"),
    Case("rx udp 64", ("-u", "-b", "0", "-l", str(SMALL)), "kpps"),
    Case("rtt", (), "p50_us"),
)


def run(runs: int, patience: float, seconds: float) -> dict[str, object]:
    """Never raises for what can't be measured: that is a row that says why."""
    rows = {name: [report.Row(name, case.name) for case in CASES] for name in MAKERS}
    for number in range(runs):
        for name, here in rows.items():
            _boot(name, here, number, patience, seconds)
    every = [row for here in rows.values() for row in here]
    answer = report.result("net", "MB/s, thousand datagrams/s, us", every, "mb_per_s", [GOALS])
    return {**answer, "ratios": compare(every)}


def compare(rows: Sequence[report.Row]) -> dict[str, float]:
    """Ours over QEMU's, case by case, in the case's own figure."""
    found: dict[str, float] = {}
    for case in CASES:
        sense = "lower" if case.figure == "p50_us" else "higher"
        medians = report.ratio([row for row in rows if row.case == case.name], case.figure, "flotilla")
        found |= {f"{name} {case.figure} ({sense} is better)": value for name, value in medians.items()}
    return found


def flotilla(kernel: Path, disk: Path) -> list[str]:
    return [
        *programs.ours("flotilla"), "--kernel", str(kernel), "--disk", f"path={disk}", "--memory", f"size={MEMORY}M",
        "--cmdline", CMDLINE, "--serial", "tty", "--console", "off",
        "--net", f"tap={NAME},mac={GUEST_MAC}",
    ]  # fmt: skip


def qemu(kernel: Path, disk: Path) -> list[str]:
    return [
        programs.qemu(), "-accel", "kvm", "-M", "q35", "-cpu", "host", "-m", f"{MEMORY}M", "-nodefaults", "-no-reboot",
        "-display", "none", "-serial", "stdio", "-append", CMDLINE,
        # It knows no kernel that carries its initramfs.
        "-kernel", str(kernel.with_name("bzImage")), "-initrd", str(kernel.with_name("initrd")),
        "-netdev", f"tap,id=n,ifname={NAME},script=no,downscript=no,vhost=off",
        "-drive", f"file={disk},format=raw,if=virtio",
        "-device", f"virtio-net-pci,disable-legacy=on,netdev=n,mac={GUEST_MAC},romfile=",
    ]  # fmt: skip


MAKERS: Final[dict[str, Callable[[Path, Path], list[str]]]] = {"flotilla": flotilla, "qemu": qemu}


def _boot(name: str, rows: Sequence[report.Row], number: int, patience: float, seconds: float) -> None:
    """One boot, one sample into each row."""
    if all(row.missing for row in rows):
        return
    done = 0
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench.") as folder,
            namespace(),
            Wire(1),
            guest(name, Path(folder), rows, patience),
        ):
            for row, case in zip(rows, CASES, strict=True):
                row.add(**{case.figure: sample(case, seconds, patience)})
                done += 1
    except (BenchError, OSError) as error:
        for row in rows[done:]:
            row.missing = f"run {number}: {error}"
    finally:
        processes.settle()


@contextlib.contextmanager
def guest(name: str, folder: Path, rows: Sequence[report.Row], patience: float) -> Iterator[None]:
    """Debian is up and its iperf3 answers at GUEST. Raises BenchError."""
    workloads = WORKLOADS.expanduser()
    disk = folder / "disk.raw"
    try:
        shutil.copyfile(workloads / "focal.raw", disk)
    except OSError as error:
        raise BenchError(
            f"{error.filename}: {error.strerror}; the guest is the lab's (deploy/lab.sh)"
        ) from error
    command = MAKERS[name](workloads / "vmlinux", disk)
    for row in rows:
        row.command = command
    said, errors = folder / "serial", folder / "stderr"
    with open(said, "wb") as out, open(errors, "wb") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=folder, env=programs.environment()
        )
    try:
        assert process.stdin is not None
        try:
            _until(said, PROMPT, process, patience)
            process.stdin.write(f"{CARD}\n".encode())
            process.stdin.flush()
            _until(said, "card=0", process, patience)
        except BenchError as problem:
            raise BenchError(
                f"{name}: {problem}; stderr: {errors.read_text(errors='replace')[-300:]!r}"
            ) from problem
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(processes.END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _until(said: Path, text: str, process: subprocess.Popen[bytes], patience: float) -> None:
    end = time.monotonic() + patience
    while text not in said.read_text(errors="replace"):
        if process.poll() is not None:
            raise BenchError(f"the VMM ended with {process.returncode} before the guest said {text!r}")
        if time.monotonic() > end:
            raise BenchError(f"the guest did not say {text!r} within {patience:g} s")
        time.sleep(0.1)


def sample(case: Case, seconds: float, patience: float) -> float:
    """In the case's figure. Raises BenchError."""
    if not case.words:
        return pings(patience)
    words = ["iperf3", "-c", GUEST, "-B", HOST, "-t", f"{seconds:g}", "-J", *case.words]
    answer = json.loads(_said(words, seconds + patience))
    if "error" in answer:
        raise BenchError(f"{' '.join(words)}: {answer['error']}")
    if case.figure == "mb_per_s":
        return float(answer["end"]["sum_received"]["bits_per_second"]) / 8e6
    total = answer["end"]["sum"]
    return float(total["packets"] - total["lost_packets"]) / float(total["seconds"]) / 1e3


def pings(patience: float) -> float:
    text = _said(["ping", "-n", "-c", str(PINGS), "-i", "0.05", GUEST], patience)
    times = [1000 * float(each) for each in re.findall(r"time=([0-9.]+) ms", text)]
    if len(times) < PINGS // 2:
        raise BenchError(f"{len(times)} of {PINGS} pings came back")
    return statistics.median(times)


def _said(words: Sequence[str], seconds: float) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, check=False, env=os.environ
        )
    except FileNotFoundError:
        raise BenchError(f"{words[0]} is not in PATH") from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(words)}: no end within {seconds:g} s") from None
    if done.returncode and not done.stdout.startswith("{"):
        raise BenchError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
