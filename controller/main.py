"""`cloud-hypervisor`: parse, boot, serve; error output and exit codes as Cloud Hypervisor's.

Exit codes: 0 the VM ended in order, 1 it could not start or failed, 2 the command line is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from controller.config.cli import Options, parse_argv
from shared import log
from shared.errors import FlotillaError, HostError, chain
from shared.visible import visible


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["doctor"]:
        from controller.doctor import main as doctor

        return doctor(words[1:])
    if words[:1] == ["chaos"]:  # a process of its own: it knows a VMM by its API only
        from controller.spawn import interpreter

        command = interpreter("from chaos.main import main; sys.exit(main())", *words[1:])
        os.execv(command[0], command)
    if words[:1] == ["worker"]:  # of another VMM, which exec'd us for it
        from shared.worker_program import main as worker

        try:
            worker(words[1:])
        except FlotillaError as error:
            report(error)
            return 2
    try:
        options = parse_argv(words)
        os.umask(0o077)
        _configure_log(options, began)
        return _run(options, began)
    except FlotillaError as error:
        report(error)
        return 1


def report(error: FlotillaError) -> None:
    """Cloud Hypervisor's form: one line for one message, a numbered list for a chain."""
    messages = [visible(message) for message in chain(error)]
    if len(messages) == 1:
        text = f"Error: Cloud Hypervisor exited with the following error:\n  {messages[0]}\n"
    else:
        lines = "".join(f"  {number}: {message}\n" for number, message in enumerate(messages))
        text = f"Error: Cloud Hypervisor exited with the following chain of errors:\n{lines}"
    sys.stderr.write(text)


def _configure_log(options: Options, began: float) -> None:
    fd = 2
    if options.log_file is not None:
        try:
            fd = os.open(options.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"--log-file {options.log_file}: {error.strerror}") from error
    log.configure(options.log_level, fd, "vmm", began)


def _run(options: Options, began: float) -> int:
    from controller.cgroups import Cgroups
    from controller.users import Users
    from controller.vmm import Vmm

    users = Users(options.worker_uid)
    target = options.api_socket
    api_socket = metrics_socket = None
    cgroups = Cgroups(options.cgroup)
    try:
        if target is not None:
            from controller.api_socket import ApiSocket

            path = target.path
            api_socket = ApiSocket.listen(path) if path is not None else ApiSocket.inherit(target.fd or 0)
        if options.metrics is not None:
            from controller.metrics_socket import listen

            metrics_socket = listen(options.metrics)
        vmm = Vmm(options, began)
        vmm.fleet.use(cgroups, users)
        if options.event_monitor is not None:
            vmm.events.open(options.event_monitor.path, options.event_monitor.fd)
        return vmm.run(api_socket, metrics_socket)
    finally:
        for made in (metrics_socket, api_socket):
            if made is not None:
                made.close()
        cgroups.close()
