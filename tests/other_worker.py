"""Programs of "another version" for worker-upgrade's --exec: this checkout's workers, changed in one place each."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WAITS = "the new one is there"  # on standard error, when strike("wait") does
PROGRAM = """#!{python} -IS
import gc, os, signal, sys, threading
gc.disable()
sys.path[:0] = {paths!r}
FOLDER = {folder!r}

def once(name):
    "True for the first process that asks."
    try:
        os.close(os.open(os.path.join(FOLDER, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

TOLD = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: TOLD.set())
once("started")

def stand_still():
    threading.Event().wait()

def strike(what):
    "Die, hang, or wait for SIGUSR1 and go on."
    if what == "die":
        os._exit(9)
    if what == "hang":
        stand_still()
    os.write(2, {waits!r})
    TOLD.wait()

def at_verb(verb, what, count=1):
    "strike() when a control request comes for the n-th time, before it is carried out."
    from shared.control import Channel
    serve, seen = Channel._serve, []
    def struck(self, peer, number, message):
        if message["verb"] == verb:
            seen.append(number)
            if len(seen) == count:
                strike(what)
        return serve(self, peer, number, message)
    Channel._serve = struck

def at_message(request, what):
    "The same for a vhost-user message."
    from shared.vhost_backend import Server
    on_message = Server._on_message
    def struck(self, message):
        if message.request == request:
            strike(what)
        on_message(self, message)
    Server._on_message = struck

def says(**fields):
    "What it answers to hello."
    from shared import control
    encode = control.messages.encode
    def said(message):
        if "contract" in message.get("ok", {{}}):
            message["ok"].update(fields)
        return encode(message)
    control.messages.encode = said

{change}

from controller.main import main
sys.exit(main())
"""


# Where a new process stops, by a word for it: the change, and the step of controller/handover.py that it fails in.
STEPS = {
    "hello": ("at_verb('hello', {what!r})", "start"),
    "features": ("at_message(1, {what!r})", "connect"),  # GET_FEATURES
    "load": ("at_verb('load', {what!r})", "load"),
    "memory": ("at_message(5, {what!r})", "prepare"),  # SET_MEM_TABLE
    "rings": ("at_message(12, {what!r})", "prepare"),  # SET_VRING_KICK
    "save": ("at_verb('save', {what!r})", "verify"),
    "quiesce": ("at_verb('quiesce', {what!r})", "verify"),
    "configuration": ("at_message(24, {what!r})", "verify"),  # GET_CONFIG
    "resume": ("at_verb('resume', {what!r})", "resume"),
}

# What a disk's new process lies about: the change, and what is said of it.
LIES = {
    "contract": ("says(contract=2)", "check: it speaks version 2 of the worker contract, this VMM speaks 1"),
    "no contract": ("says(contract=None)", "check: it speaks version None of the worker contract"),
    "kind": ("says(kind='net_worker')", "check: it is a 'net_worker', not a blk_worker"),
    "older": ("says(version=0)", "check: its blk_worker state has version 0, the present one's 1"),
    "no filter": (
        "from shared import seccomp; seccomp.install = lambda *_: None",
        "check: it is less confined than a worker of this VMM: seccomp is none, not filter",
    ),
    "features": (
        """
from blk_worker import backend
features = backend.features
backend.features = lambda *a, **k: features(*a, **k) & ~(1 << 9)
""",
        "connect: _disk0: the new back end lacks features 0x200 that the guest uses",
    ),
    "protocol features": (
        "from shared import vhost_backend as v; v.SERVER_FEATURES &= ~v.ProtocolFeature.INFLIGHT_SHMFD",
        "connect: _disk0: the new back end lacks",
    ),
    "refusal": (
        """
from blk_worker.backend import BlockBackend
from shared.errors import ProtocolError
def load(self, state):
    raise ProtocolError("not this one")
BlockBackend.load = load
""",
        "load: not this one",
    ),
    "state": (
        """
from blk_worker.backend import BlockBackend
save = BlockBackend.save
BlockBackend.save = lambda self: {**save(self), "acked_features": 5}
""",
        "lies about its state: acked_features is not what it was given",
    ),
    "no state": (
        "from shared.vhost_worker import VhostWorker\nVhostWorker.save = lambda self: 5",
        "lies about its state: state is not what it was given",
    ),
    "ring": (
        """
from shared.vhost_backend import Server
suspend = Server.suspend
Server.suspend = lambda self: {ring: base + 1 & 0xffff for ring, base in suspend(self).items()}
""",
        "lies about its state: ring 0 of _disk0 goes on at",
    ),
    "no ring": (
        """
from shared.vhost_worker import VhostWorker
quiesce = VhostWorker.quiesce
VhostWorker.quiesce = lambda self: quiesce(self) and {}
""",
        "quiesce: no base for ring 0 of _disk0",
    ),
    "configuration": (
        """
from blk_worker.backend import BlockBackend
get = BlockBackend.get_config
BlockBackend.get_config = lambda self, o, n: bytes([get(self, o, n)[0] ^ 1]) + get(self, o, n)[1:]
""",
        "lies about its state: byte 0 of _disk0's configuration space differs",
    ),
    "control message": (
        "from shared import messages; messages.encode = lambda message: b'\\xc1'",
        "start: control message is not msgpack",
    ),
}

# A disk's, card's or console's process that does not go on after it has been told to stop; its successors serve.
RELUCTANT = """
from shared import vhost_backend as backend
from shared.control import Channel
from shared.errors import ProtocolError

told, stop, start, serve = [], backend._HANDLERS[11], backend._HANDLERS[12], Channel._serve

def stopped(server, message):  # GET_VRING_BASE
    told.append(message)
    return stop(server, message)

def started(server, message):  # SET_VRING_KICK
    if told and {rings!r}:
        raise ProtocolError("not any more")
    return start(server, message)

def served(self, peer, number, message):
    if message["verb"] == "resume" and told:
        message = {{**message, "verb": "recommence"}}
    return serve(self, peer, number, message)

backend._HANDLERS.update({{11: stopped, 12: started}})
Channel._serve = served
"""

# It stops when it has carried out the first request of the guest's.
BEGUN = """
from shared.vhost_worker import VhostWorker
resume = VhostWorker.resume
def begun(self):
    resume(self)
    while not self.stats()["read_ops"] + self.stats()["write_ops"]:
        pass
    strike({what!r})
VhostWorker.resume = begun
"""


def program(folder: Path, change: str = "", name: str = "worker-next") -> str:
    """An executable file in `folder`; `change` is run before anything of the task is. Its path."""
    paths = [str(ROOT), *(path for path in sys.path if path and Path(path).is_dir() and Path(path) != ROOT)]
    path = folder / name
    waits = f"{WAITS}\n".encode()
    path.write_text(PROGRAM.format(python=sys.executable, paths=paths, folder=str(folder), waits=waits, change=change))
    path.chmod(0o755)
    return str(path)
