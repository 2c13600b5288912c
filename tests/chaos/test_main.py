"""Command lines of `flotilla chaos` that can't be carried out, and the schedule of one that can."""

from __future__ import annotations

import pytest

from chaos.main import main, parse_argv
from shared.faults import Kind, Process


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--api-socket"),
        (["--api-socket", "/a", "--kinds", "kill,explode"], "unknown: 'explode'; there are: kill, stop"),
        (["--api-socket", "/a", "--processes", "gpu"], "unknown: 'gpu'; there are: vcpu, blk"),
        (["--api-socket", "/a", "--minutes", "0"], "expected a number above 0"),
        (["--api-socket", "/a", "--rate", "fast"], "expected a number above 0"),
        (["--api-socket", "/a", "--seed", "x"], "--seed"),
    ],
)
def test_a_wrong_command_line_ends_with_two(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_no_vmm_at_the_socket_is_told(tmp_path, capsys):
    assert main(["--api-socket", str(tmp_path / "none")]) == 1
    assert "none: No such file or directory (is a VMM running with it?)" in capsys.readouterr().err


def test_what_is_understood():
    options = parse_argv(["--api-socket", "/a", "--kinds", "stop,kill", "--processes", "blk,blk,net"])
    assert options.kinds == (Kind.STOP, Kind.KILL) and options.processes == (Process.BLK, Process.NET)
