"""controller.config.cli: the command line of `cloud-hypervisor`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.config import version
from controller.config.cli import Options, Seccomp, Target, parse_argv
from controller.config.flags import FLAGS, REFUSED
from controller.config.model import (
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    DiskConfig,
    DiskLock,
    ImageType,
    LockGranularity,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from controller.machine.topology import Topology
from shared.errors import ConfigError, FlotillaError, chain
from shared.log import Level

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")


def vm(*words: str) -> VmConfig:
    config = parse_argv(["--kernel", "/k", *words]).vm
    assert config is not None
    return config


def test_the_documents_source_command() -> None:
    """As dash hands it over: every `~/` still there."""
    options = parse_argv(
        [
            "--kernel",
            "~/workloads/vmlinux",
            "--disk",
            "path=~/workloads/focal.raw",
            "--cpus",
            "boot=1",
            "--memory",
            "size=1G,shared=on",
            "--cmdline",
            "root=/dev/vda1 console=ttyS0",
            "--serial",
            "tty",
            "--console",
            "off",
            "--api-socket=/tmp/api1",
        ]
    )
    assert options == Options(
        vm=VmConfig(
            payload=PayloadConfig(kernel="/h/workloads/vmlinux", cmdline="root=/dev/vda1 console=ttyS0"),
            cpus=CpusConfig(boot_vcpus=1, max_vcpus=1),
            memory=MemoryConfig(size=1 << 30, shared=True),
            disks=(DiskConfig(path="/h/workloads/focal.raw"),),
            serial=SerialConfig(ConsoleMode.TTY),
            console=ConsoleConfig(ConsoleMode.OFF),
        ),
        api_socket=Target(path="/tmp/api1"),
        event_monitor=None,
        log_file=None,
        log_level=Level.WARN,
        no_shutdown=False,
        seccomp=Seccomp.TRAP,
    )


def test_the_documents_destination_command() -> None:
    options = parse_argv(["--api-socket=/tmp/api2"])
    assert options.vm is None and options.api_socket == Target(path="/tmp/api2")


def test_defaults_are_cloud_hypervisors() -> None:
    config = vm()
    assert (config.cpus.boot_vcpus, config.cpus.max_vcpus, config.cpus.max_phys_bits) == (1, 1, 46)
    assert config.memory == MemoryConfig(size=512 << 20, mergeable=False, shared=False)
    assert config.rng == RngConfig(src="/dev/urandom")
    assert config.serial.mode is ConsoleMode.NULL and config.console.mode is ConsoleMode.TTY


@pytest.mark.parametrize(
    "words",
    [
        ["--disk", "path=a", "path=b", "path=c"],
        ["--disk", "path=a", "--disk", "path=b", "path=c"],
        ["--disk=path=a", "--disk=path=b", "--disk", "path=c"],
        ["--disk=path=a", "path=b", "--serial", "tty", "--disk", "path=c"],
    ],
)
def test_several_values_and_repeated_flags_are_the_same(words: list[str]) -> None:
    assert [disk.path for disk in vm(*words).disks] == ["a", "b", "c"]


def test_every_key_of_a_disk() -> None:
    text = (
        "path=~/a,readonly=on,direct=on,num_queues=2,queue_size=256,serial=abc,sparse=off,image_type=raw,"
        "lock_granularity=full,lock=shared,id=root,pci_device_id=5,_disable_io_uring=on,_disable_aio=on,"
        "iommu=off,pci_segment=0,backing_files=off,queue_affinity=[],bw_size=0"
    )
    disk = DiskConfig(
        path="/h/a",
        readonly=True,
        direct=True,
        num_queues=2,
        queue_size=256,
        serial="abc",
        sparse=False,
        image_type=ImageType.RAW,
        lock_granularity=LockGranularity.FULL,
        lock=DiskLock.SHARED,
        id="root",
        pci_device_id=5,
        disable_io_uring=True,
        disable_aio=True,
    )
    assert vm("--cpus", "boot=2", "--disk", text).disks == (disk,)


def test_a_vhost_user_disk() -> None:
    assert vm("--disk", "vhost_user=on,socket=~/s").disks == (
        DiskConfig(vhost_user=True, vhost_socket="/h/s"),
    )


def test_every_key_of_cpus() -> None:
    text = "boot=2,max=4,topology=2:2:1:1,max_phys_bits=40,nested=off,kvm_hyperv=off,core_scheduling=vm,profile=host"
    assert vm("--cpus", text).cpus == CpusConfig(2, 4, Topology(2, 2, 1, 1), 40, nested=False)


@pytest.mark.parametrize("flag", ["serial", "console"])
@pytest.mark.parametrize(
    ("text", "mode", "file", "socket"),
    [
        ("off", ConsoleMode.OFF, None, None),
        ("null", ConsoleMode.NULL, None, None),
        ("pty", ConsoleMode.PTY, None, None),
        ("tty", ConsoleMode.TTY, None, None),
        ("file=~/log", ConsoleMode.FILE, "/h/log", None),
        ("socket=~/sock", ConsoleMode.SOCKET, None, "/h/sock"),
    ],
)
def test_every_console_mode(
    flag: str, text: str, mode: ConsoleMode, file: str | None, socket: str | None
) -> None:
    device = getattr(vm(f"--{flag}", text), flag)
    assert (device.mode, device.file, device.socket) == (mode, file, socket)


def test_a_console_can_have_an_id_and_a_slot() -> None:
    config = vm("--console", "pty,id=con,pci_device_id=9", "--rng", "src=~/r,id=rnd,pci_device_id=8")
    assert config.console == ConsoleConfig(ConsoleMode.PTY, id="con", pci_device_id=9)
    assert config.rng == RngConfig("/h/r", "rnd", 8)


def test_the_remaining_flags() -> None:
    options = parse_argv(
        [
            "--api-socket",
            "fd=3",
            "--event-monitor",
            "path=~/ev",
            "--log-file",
            "~/log",
            "-vv",
            "-v",
            "--no-shutdown",
            "--seccomp",
            "log",
            "--kernel=~/k",
            "--initramfs",
            "~/i",
        ]
    )
    assert options.api_socket == Target(fd=3) and options.event_monitor == Target(path="/h/ev")
    assert options.log_file == "/h/log" and options.log_level is Level.TRACE
    assert options.no_shutdown and options.seccomp is Seccomp.LOG
    assert options.vm is not None and options.vm.payload == PayloadConfig("/h/k", None, "/h/i")


@pytest.mark.parametrize(
    ("count", "level"), [(0, "WARN"), (1, "INFO"), (2, "DEBUG"), (3, "TRACE"), (9, "TRACE")]
)
def test_v_raises_the_log_level(count: int, level: str) -> None:
    assert parse_argv(["--api-socket=x", *["-v"] * count]).log_level is Level[level]


@pytest.mark.parametrize("text", ["/x", "path=/x", "~/x", "path=~/x", "x=y"])
def test_api_socket_paths(text: str) -> None:
    target = parse_argv(["--api-socket", text]).api_socket
    assert target == Target(path=text.removeprefix("path=").replace("~", "/h"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--disk", "path=a"], "--kernel <PATH>"),
        (["--api-socket=x", "--memory", "size=1G"], "--memory describes a VM"),
        (["--cpus", "boot=1", "--serial", "tty"], "--cpus, --serial describe a VM"),
        (["--cmdline", "x"], "--cmdline describes a VM"),
        (["-v"], "--api-socket <PATH>"),
        (["--kernel"], "a value is required for '--kernel <PATH>'"),
        (["--kernel", "--disk"], "a value is required for '--kernel <PATH>'"),
        (["--disk", "--kernel", "x"], "a value is required for '--disk <DISK>...'"),
        (["--kernel", "a", "--kernel", "b"], "'--kernel' cannot be used multiple times"),
        (["--no-shutdown", "--no-shutdown"], "'--no-shutdown' cannot be used multiple times"),
        (["--no-shutdown=yes"], "unexpected value 'yes' for '--no-shutdown'"),
        (["--kernel", "a", "b"], "unexpected argument 'b'"),
        (["path=a"], "unexpected argument 'path=a'"),
        (["--", "x"], "unexpected argument '--'"),
        (["-"], "unexpected argument '-'"),
        (["-x"], "unexpected argument '-x'"),
        (["-vx"], "unexpected argument '-x'"),
        (["--kernal", "x"], "a similar argument exists: '--kernel'"),
        (["--zzz"], "unexpected argument '--zzz'"),
        (["--api-socket=x", "--seccomp", "maybe"], "[possible values: true, false, log, errno]"),
    ],
)
def test_usage_errors_exit_2_as_claps_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_argv(words)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == "" and err.startswith("error: ") and message in err
    assert err.endswith("Usage: cloud-hypervisor [OPTIONS]\n\nFor more information, try '--help'.\n")


@pytest.mark.parametrize("flag", sorted(REFUSED))
@pytest.mark.parametrize("form", ["{}", "{}=x=y"])
def test_flags_not_available_yet_are_refused_by_name(
    flag: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_argv(["--kernel", "x", form.format(flag)])
    assert ended.value.code == 2
    assert f"error: {flag} is not available yet in this version of Flotilla" in capsys.readouterr().err


CH_FLAGS = """
    --api-socket --kernel --initramfs --cmdline --firmware --cpus --memory --memory-zone --disk --net --serial --console
    --debug-console --rng --balloon --fs --pmem --vsock --generic-vhost-user --user-device --device --vdpa --numa
    --pci-segment --platform --rate-limit-group --watchdog --pvpanic --rtc --tpm --ivshmem --restore --event-monitor
    --seccomp --landlock --landlock-rules --log-file --log-format --no-shutdown --gdb --igvm --host-data --fw-cfg-config
    --pvmemcontrol
"""


def test_every_flag_of_cloud_hypervisor_is_known_or_refused() -> None:
    known = {*FLAGS, *REFUSED}
    assert not set(CH_FLAGS.split()) - known
    assert not set(FLAGS) & set(REFUSED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--disk", "path=a,speed=1"], "Unknown option: speed"),
        (["--disk", "a.raw"], "Invalid syntax: a.raw"),
        (["--disk", "path=a,bw_size=1,bw_refill_time=1"], "bw_size=1 is not available yet"),
        (["--disk", "path=a,rate_limit_group=g"], "rate_limit_group=g is not available yet"),
        (["--disk", "path=a,queue_affinity=[0@[1]]"], "queue_affinity=[0@[1]] is not available yet"),
        (["--disk", "path=a,iommu=on"], "iommu=on is not available yet"),
        (["--disk", "path=a,pci_segment=1"], "pci_segment=1 is not available yet"),
        (["--disk", "path=a,backing_files=on"], "backing_files=on is not available yet"),
        (["--cpus", "boot=two"], "Unable to convert two for boot"),
        (["--cpus", "boot=1,kvm_hyperv=on"], "kvm_hyperv=on is not available yet"),
        (["--cpus", "boot=1,affinity=[0@[1]]"], "affinity=[0@[1]] is not available yet"),
        (["--cpus", "boot=1,features=amx"], "features=amx is not available yet"),
        (["--cpus", "boot=1,core_scheduling=vcpu"], "core_scheduling=vcpu is not available yet"),
        (["--cpus", "boot=1,profile=skylake"], "profile=skylake is not available yet"),
        (["--memory", "size=1G,hugepages=on"], "hugepages=on is not available yet"),
        (["--memory", "size=1G,hugepage_size=2M"], "hugepage_size=2M is not available yet"),
        (["--memory", "size=1G,hotplug_size=1G"], "hotplug_size=1G is not available yet"),
        (
            ["--memory", "size=1G,hotplug_method=virtio-mem"],
            "hotplug_method=virtio-mem is not available yet",
        ),
        (["--memory", "size=1G,prefault=on"], "prefault=on is not available yet"),
        (["--memory", "size=1G,reserve=on"], "reserve=on is not available yet"),
        (["--memory", "size=lots"], "Unable to convert lots for size"),
        (["--rng", "/dev/urandom"], "Invalid syntax: /dev/urandom"),
        (["--serial", "loud"], "Invalid syntax: loud"),
        (["--serial", "tty,file=x"], "given: tty and file"),
        (["--serial", "file="], "given: none"),
        (["--serial", "tty,iommu=off"], "Unknown option: iommu"),
        (["--console", "id=x"], "given: none"),
        (["--console", "tty,iommu=on"], "iommu=on is not available yet"),
        (["--event-monitor", "/x"], "Invalid syntax: /x"),
        (["--event-monitor", "path=/x,fd=3"], "and not both"),
        (["--event-monitor", "fd=x"], "Unable to convert x for fd"),
        (["--api-socket", "fd="], "expected a path, or fd= and a number"),
        (["--api-socket", ""], "expected a path, or fd= and a number"),
    ],
)
def test_bad_values_name_the_flag_and_the_key(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        vm(*words)
    messages = chain(caught.value)
    assert messages[0].startswith(f"Error parsing {words[0]}") and message in "\n".join(messages)


def test_what_a_vm_config_means_is_validated() -> None:
    with pytest.raises(ConfigError, match="size"):
        vm("--memory", "size=0")


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_argv([])
    assert ended.value.code == 2 and "Usage: cloud-hypervisor" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-h", "--help", "-vh"])
def test_help_is_complete_and_sorted(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_argv([flag])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == ""
    shown = [word for line in out.splitlines() for word in line.split()[:1] if line.startswith("      --")]
    assert shown == sorted(FLAGS)
    joined = "".join(out.split())
    for name, flag_entry in FLAGS.items():
        assert "".join(flag_entry.syntax.split()) in joined, name
    assert all(name in out for name in REFUSED)
    assert max(len(line) for line in out.splitlines()) <= 110


def test_version_has_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_argv(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert lines[0] == f"cloud-hypervisor {version.BUILD_VERSION}"
    assert lines[1].startswith("Migration Protocol Versions: ") and len(lines) == 2


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == version.FLOTILLA_VERSION


@pytest.mark.parametrize("words", [["-V", "-v"], ["-vV"], ["-v", "--version"]])
def test_verbose_version_has_the_features(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_argv(words)
    assert capsys.readouterr().out.splitlines()[2] == "Enabled features: [kvm]"


tokens = st.sampled_from(
    [
        *FLAGS,
        "--kernel=k",
        "-v",
        "-",
        "--disk=path=a",
        "path=a",
        "size=1G",
        "tty",
        "boot=2",
        "fd=3",
        "x",
        "",
        "=",
        "~/",
    ]
)


@given(st.lists(tokens | st.text(max_size=8), max_size=8))
def test_any_argv_ends_in_options_an_exit_or_an_error(argv: list[str]) -> None:
    try:
        assert isinstance(parse_argv(argv), Options)
    except SystemExit as ended:
        assert ended.code in (0, 2)
    except FlotillaError as error:
        assert error.message


def test_the_import_is_light() -> None:
    """Start-up time is a promise: nothing on this path may bring in the slow parts of the standard library."""
    code = "import sys; before = set(sys.modules); import controller.config.cli; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"argparse", "asyncio", "json", "logging", "subprocess", "difflib", "zmq", "msgpack"}
