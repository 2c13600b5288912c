"""Programs of "another version" for worker-upgrade's --exec: this checkout's workers, changed in one place each."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """#!{python} -IS
import gc, os, signal, sys
gc.disable()
sys.path[:0] = {paths!r}
sys.argv[1:2] == ["worker"] or sys.exit(64)
FOLDER = {folder!r}

def once(name):
    "True for the first process that asks."
    try:
        os.close(os.open(os.path.join(FOLDER, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def stand_still():
    import threading
    threading.Event().wait()

def strike(what):
    "Die, hang, or wait for a while and go on."
    import threading
    if what == "die":
        os._exit(9)
    threading.Event().wait(2 if what == "wait" else None)

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

from shared.worker_program import main
main(sys.argv[2:])
"""


def program(folder: Path, change: str = "", name: str = "worker-next") -> str:
    """An executable file in `folder`; `change` is run before anything of the task is. Its path."""
    paths = [str(ROOT), *(path for path in sys.path if path and Path(path).is_dir() and Path(path) != ROOT)]
    path = folder / name
    path.write_text(PROGRAM.format(python=sys.executable, paths=paths, folder=str(folder), change=change))
    path.chmod(0o755)
    return str(path)
