"""deploy/lab.sh: build, shell, run."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from deploy.install import SetupError
from deploy.lab.cache import say
from deploy.lab.debian import DebianError
from deploy.lab.kernel import KernelError
from deploy.lab.machine import INTERRUPTED, Machine, Sink, write_all
from deploy.lab.run import Job, needed, run
from deploy.lab.terminal import shell

DESCRIPTION = """\
The lab: a real KVM host on a machine without one (see deploy/lab/README.md).

  build              build what is missing of its images, and nothing more
  shell              a shell in it on this terminal; exit or Ctrl-D ends it
  run SCRIPT [ARG…]  run a script in it; its output comes back as it is written, its exit code is the exit code.
                     125: the lab machine itself died, repeatedly. 124: the script's time was up.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--mem", default="4G", help="RAM of the lab machine (default 4G)")
    common.add_argument("--smp", type=int, default=1, help="its CPUs (default 1: with 2 it falls over now and then)")
    common.add_argument("--append", default="", metavar="WORDS", help="more words for its kernel")
    common.add_argument("--put", action="append", default=[], metavar="FILE[=NAME]", help="lay a file into $LAB")
    common.add_argument("--out", type=Path, metavar="DIR", help="folder for what is left in $OUT")
    also = argparse.ArgumentParser(add_help=False)
    also.add_argument("--nested", action="store_true", help="also the images of the nested example, in ~/nested")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lab.sh", description=DESCRIPTION, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", parents=[also])
    verbs.add_parser("shell", parents=[common, also])
    script = verbs.add_parser("run", parents=[common, also])
    script.add_argument("--timeout", type=int, default=900, metavar="S", help="limit of the script (default 900)")
    script.add_argument("--retries", type=int, default=2, metavar="N", help="if the lab machine dies (default 2)")
    script.add_argument("script", type=Path)
    script.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def parse_puts(words: list[str]) -> dict[str, Path]:
    puts = {}
    for word in words:
        file, _, name = word.partition("=")
        puts[name or Path(file).name] = existing(Path(file))
    return puts


def existing(path: Path) -> Path:
    if not path.exists():
        raise DebianError(f"{path}: no such file")
    return path


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        if options.verb == "build":
            needed(Job(nested=options.nested))
            return 0
        puts = parse_puts(options.put)
        if options.verb == "shell":
            return shell(Machine(options.mem, options.smp, 0, options.append), puts, options.out, options.nested)
        machine = Machine(options.mem, options.smp, options.timeout, options.append)
        job = Job(existing(options.script), options.arguments, puts, nested=options.nested)
        sinks: dict[str, Sink] = {"stdout": partial(write_all, 1), "stderr": partial(write_all, 2)}
        return run(job, machine, options.out, sinks, options.retries).code or 0
    except (DebianError, KernelError, SetupError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
