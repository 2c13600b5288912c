"""The API process's `main`, before anything of it is imported.

Half a second of imports: 10 % less of it without a garbage collector and without a search for plugins of pydantic.
"""

from __future__ import annotations

import gc
import os

from shared.worker import Start


def main(start: Start) -> int:
    """`fds`: "listening". `spec`: "controller", the endpoint to dial."""
    gc.disable()
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    from controller.api.process import run

    return run(start)
