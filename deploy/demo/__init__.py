"""deploy/demo.sh: the first example of the live-migration document, shown while it happens.

    inside.py     takes the example through its steps, where KVM runs Linux: in the lab, or on this host
    example.py    the document's commands, and what they become on the next hop
    terminal.py   a command typed at a terminal of its own
    vmm.py        questions to a running VMM: ch-remote, its API socket, /proc
    report.py     events between inside.py and the display; the report
    __main__.py   chooses lab or host and starts inside.py there
    host.py       the lab's ~/workloads on this host, for hardware KVM
    display.py    the events, on a terminal or line by line
"""
