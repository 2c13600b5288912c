"""deploy/demo.sh: the examples of the live-migration document, shown while they happen.

    play.py       an example: terminals, steps, its report
    inside.py     the local example, where KVM runs Linux: in the lab, or on this host
    nested.py     the nested example, in the lab
    example.py, example_nested.py   the document's commands
    terminal.py   a command typed at a terminal of its own
    host_vm.py    a VM whose serial port is a shell, and windows behind it
    vmm.py        questions to a running VMM: ch-remote, its API socket, /proc
    report.py     events between an example and the display; the report
    __main__.py   chooses lab or host and starts an example there
    host.py       the lab's ~/workloads on this host, for hardware KVM
    display.py    the events, on a terminal or line by line
"""
