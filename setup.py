"""What pyproject.toml cannot say: the native loops, and launchers that start in a few milliseconds."""

import os
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from shared import native


class BuildWithLoops(build_py):
    """Compile the native loops into the folder that the wheel is made of (in place for an editable install)."""

    def run(self) -> None:
        super().run()
        for name in native.available():
            native.build(name, native.ROOT if self.editable_mode else self.build_lib)


setup(
    cmdclass={"build_py": BuildWithLoops},
    # Not console_scripts: the launcher that pip writes for those imports re before main.
    scripts=["deploy/bin/cloud-hypervisor", "deploy/bin/flotilla", "deploy/bin/ch-remote"],
)
