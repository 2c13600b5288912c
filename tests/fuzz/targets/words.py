"""What users and clients say: option strings, command lines, API bodies."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from controller.api.endpoints import BY_NAME, ENDPOINTS
from controller.config import cli, options
from controller.config.codec import from_json, net_from_json, to_json
from controller.config.model import VmConfig
from controller.config.validate import validate
from controller.faults.fault import parse as parse_fault
from controller.migration.arguments import parse_receive, parse_resolve, parse_send, parse_url, unix_path
from controller.requests import answer
from controller.upgrade import parse as parse_upgrade
from shared.errors import FlotillaError
from shared.faults import Process
from tests.fuzz.choices import Choices
from tests.fuzz.engine import Target
from tests.fuzz.targets.peers import CONFIG

DISK = (
    'path="a,b.raw",readonly=on,direct=off,num_queues=2,queue_size=128,serial=x,id=d,lock=shared,image_type=raw,'
    "queue_affinity=[]"
)
FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "--cpus": (options.cpus, "boot=2,max=4,topology=1:2:1:2,max_phys_bits=46,nested=on,affinity=[0@[1,2-3]]"),
    "--memory": (options.memory, "size=512M,mergeable=off,shared=on,hugepages=off,thp=on"),
    "--disk": (options.disk, DISK),
    "--net": (options.net, "tap=t0,mac=12:34:56:78:90:ab,ip=10.0.0.1,mask=255.0.0.0,num_queues=4,fd=[3-4],mtu=1500"),
    "--rng": (options.rng, "src=/dev/urandom,id=r,pci_device_id=4"),
    "--serial": (options.serial, "file=/tmp/x"),
    "--console": (options.console, "socket=/tmp/s,id=c"),
}  # fmt: skip
PARTS = (
    "=", ",", "[", "]", '"', "@", "-", ":", "on", "off", "tty", "[0-65535]", "18446744073709551616", "~/", "\0", "é",
)  # fmt: skip


def text_of(choices: Choices, text: str) -> str:
    """The text with some of its parts taken away, doubled, or replaced."""
    for _ in range(choices.below(5)):
        at, count = choices.below(len(text) + 1), choices.below(12)
        match choices.below(4):
            case 0:
                text = text[:at] + text[at + count :]
            case 1:
                text = text[:at] + text[at : at + count] * 2 + text[at + count :]
            case 2:
                text = text[:at] + choices.bytes(count).decode("utf-8", "surrogateescape") + text[at:]
            case _:
                text = text[:at] + choices.one_of(PARTS) + text[at + count :]
    return text


def option_strings() -> Iterator[Callable[[bytes], None]]:
    def run(data: bytes) -> None:
        choices = Choices(data)
        convert, text = FLAGS[choices.one_of(list(FLAGS))]
        convert(text_of(choices, text))

    yield run


def command_line() -> Iterator[Callable[[bytes], None]]:
    words = [word for flag, (_, text) in FLAGS.items() for word in (flag, text)]
    words += ["--kernel", "/k", "--api-socket", "path=/a", "fd=3", "--cmdline", "-v", "-vvVh", "--seccomp", "log"]
    words += ["--initramfs", "--event-monitor", "--log-file", "--", "-", "--help", "--version", "--kernel=/k"]

    def run(data: bytes) -> None:
        choices = Choices(data)
        argv = [text_of(choices, choices.one_of(words)) if choices.flag() else choices.one_of(words)
                for _ in range(choices.below(10))]  # fmt: skip
        argv = [word.replace("\0", "") for word in argv]  # argv has none
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cli.parse_argv(argv)
        except SystemExit as end:
            assert end.code in (0, 2), end.code

    yield run


# API bodies ------------------------------------------------------------------------------------------------------


async def _create(body: Any) -> None:
    config = from_json(body, strict=True)
    validate(config)
    assert isinstance(to_json(config), dict)


async def _add_net(body: Any) -> None:
    net = net_from_json(body)
    validate(from_json({**CONFIG, "net": [dict(body)]}, strict=True))
    assert net is not None


async def _send(body: Any) -> None:
    given = parse_send(body)
    if given.local:
        unix_path(given.url)
    parse_url(given.url)


async def _receive(body: Any) -> None:
    parse_url(parse_receive(body))


async def _resolve(body: Any) -> None:
    parse_resolve(body)


async def _inject(body: Any) -> None:
    parse_fault(body, {"_disk0": Process.BLK, "_net1": Process.NET, "vcpu0": Process.VCPU})


async def _upgrade(body: Any) -> None:
    parse_upgrade(body)


async def _nothing(_: Any) -> None:
    return None


BODY_VERBS: dict[str, tuple[Callable[[Any], Awaitable[None]], Any]] = {
    "vm.create": (_create, {
        **CONFIG,
        "disks": [{"path": "/d", "readonly": True, "num_queues": 1, "id": "d", "flotilla": {"lock": "shared"}}],
        "net": [{"tap": "t", "mac": "12:34:56:78:90:ab", "num_queues": 2}],
    }),
    "vm.add-net": (_add_net, {"tap": "t", "ip": "10.0.0.1", "mask": "255.0.0.0", "mtu": 1500, "num_queues": 4}),
    "vm.send-migration": (_send, {"destination_url": "unix:/s", "local": True, "downtime_ms": 9, "timeout_s": 1,
                                  "timeout_strategy": "Cancel", "net_fds": []}),
    "vm.receive-migration": (_receive, {"receiver_url": "tcp:127.0.0.1:9000"}),
    "vm.migration-resolve": (_resolve, {"guest": "here"}),
    "vm.worker-upgrade": (_upgrade, {"id": "_disk0", "exec": "/bin/true", "timeout_ms": 1000}),
    "vmm.fault-inject": (_inject, {"process": "_disk0", "fault": "slow", "value": 20, "spread": 3, "shape": "normal",
                                   "seed": 1, "count": 3, "duration_ms": 5, "at": {"request": 100}}),
}  # fmt: skip
VERBS = {endpoint.name: BODY_VERBS[endpoint.name][0] if endpoint.body else _nothing for endpoint in ENDPOINTS}


def api_bodies() -> Iterator[Callable[[bytes], None]]:
    names = [*BODY_VERBS, *BODY_VERBS, *BY_NAME, "vm.unheard-of"]

    def run(data: bytes) -> None:
        choices = Choices(data)
        name = choices.one_of(names)
        method = BY_NAME[name].method if name in BY_NAME and choices.below(8) else choices.one_of(("GET", "PUT", "x"))
        template = BODY_VERBS.get(name, (None, None))[1]
        text = json.dumps(choices.damage(template), default=repr).encode() if choices.below(4) and template else b""
        if not choices.below(3):
            text = text_of(choices, text.decode()).encode("utf-8", "surrogateescape")
        given = _finish(answer(VERBS, method, name, text))
        assert given["status"] in (200, 204, 400, 404, 409, 500), given
        assert given["status"] != 500, "a client's mistake is no failure of ours"
        if given["status"] >= 400:
            errors = json.loads(given["body"])
            assert errors[0] == "Error from API" and all(isinstance(error, str) for error in errors)

    yield run


def _finish(coroutine: Any) -> dict[str, Any]:
    try:
        coroutine.send(None)
    except StopIteration as stop:
        given: dict[str, Any] = stop.value
        return given
    raise AssertionError("a verb waits")


def config_json() -> Iterator[Callable[[bytes], None]]:
    """A configuration that is taken comes back from its own JSON as it is."""
    template = BODY_VERBS["vm.create"][1]

    def run(data: bytes) -> None:
        choices = Choices(data)
        given = choices.damage(template)
        config: VmConfig = from_json(given, strict=choices.flag())
        with contextlib.suppress(FlotillaError):
            validate(config)
        assert from_json(to_json(config), strict=True) == config

    yield run


TARGETS = (
    Target("options", option_strings, about="option strings of every flag"),
    Target("cli", command_line, about="whole command lines"),
    Target("api", api_bodies, about="API requests: method, name and body"),
    Target("config", config_json, about="a VM's configuration as JSON, there and back"),
)
