"""The demo as people see it."""

from __future__ import annotations

import io
import socket

import pytest
from rich.console import Console

from balancer.cli import demoing
from balancer.cli import start as start_screen
from balancer.cli.exits import CommandError, ExitCode
from balancer.sim.demo import Demo

from .conftest import Spawn


def test_a_taken_port_means_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    """And it says so; if none is free, the code is 4."""
    with demoing.free_socket(30000, 20000) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        capsys.readouterr()
        with demoing.free_socket(port, 50) as sock:
            found = sock.getsockname()
        assert found[0] == "127.0.0.1"
        assert found[1] > port
        assert f"Port {port} is taken" in capsys.readouterr().out
        with pytest.raises(CommandError) as caught:
            demoing.free_socket(port, 1)
        assert caught.value.code == ExitCode.BIND


async def test_the_table_shows_every_host() -> None:
    """Name, state, breaker, what is loaded, running and done."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    async with Demo(sock=sock) as demo:
        await start_screen.first_checks(demo.balancer)
        demo.tally.done["fast"] = 7
        out = io.StringIO()
        Console(file=out, width=100).print(demoing._table(demo))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[0] == ["host", "state", "breaker", "loaded", "running", "done"]
    assert ["fast", "up", "closed", "–", "0", "7"] in rows
    assert [row[0] for row in rows[1:]] == ["fast", "slow", "flaky"]


async def test_off_a_terminal_it_ends_by_itself(spawn: Spawn) -> None:
    """With lines instead of a table, a line to try, and a summary."""
    code, out, err = await (await spawn("demo", "--seconds", "1")).ended()
    assert (code, err) == (ExitCode.OK, "")
    assert "ollama run demo/haiku" in out
    assert "curl http://127.0.0.1:" in out
    assert "calls, 0 failed" in out.splitlines()[-1]
    assert "\x1b" not in out
