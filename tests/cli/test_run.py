"""`sim`: simulated hosts alone. (`serve` and `demo` have files of their own.)"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port

from balancer.cli.exits import ExitCode
from tests.sim.wire import ask

from .conftest import LIMIT_S, Command, Spawn


async def test_sim_serves_hosts_until_it_is_interrupted(spawn: Spawn, place: Path) -> None:
    """Each is told with its address and answers as Ollama; then the code is 0."""
    process = await spawn("sim", "--hosts", "2", "-l", "127.0.0.1:0")
    assert process.process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        lines = [(await process.process.stdout.readline()).decode().split() for _ in range(2)]
    assert [name for name, _ in lines] == ["fast", "slow"]
    for _, url in lines:
        assert (await ask(int(url.rpartition(":")[2]), "GET", "/")).body == b"Ollama is running"
    process.process.send_signal(signal.SIGINT)
    assert (await process.ended())[0] == ExitCode.OK


async def test_sim_on_a_taken_port_is_code_4(spawn: Spawn) -> None:
    """One line with the reason."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", unused_port())
    port = server.sockets[0].getsockname()[1]
    async with server:
        code, _, err = await (await spawn("sim", "-l", f"127.0.0.1:{port}")).ended()
    assert code == ExitCode.BIND
    assert "ddress already in use" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "args",
    [
        ("-b", "gpu1", "-b", "ftp://x"),
        ("-b", "gpu1", "ftp://x"),
        ("-b", "gpu1,ftp://x"),
        ("-b", "gpu1, ftp://x"),
        ("serve", "-b", "gpu1", "--no-demo", "ftp://x"),
    ],
)
def test_however_hosts_are_listed(command: Command, args: tuple[str, ...]) -> None:
    """Repeated, with commas or spaces: each is read; here the second is refused."""
    told = command(*args)
    assert told.exit_code == ExitCode.USAGE
    assert told.stderr.startswith('command line backends[1].url: "ftp" is not a scheme')


def test_a_host_without_its_flag_is_pointed_to_it(command: Command) -> None:
    """Whether or not a command stands before it."""
    assert "-b gpu1:1. Try" in command("gpu1:1").stderr
    assert "-b gpu1. Try" in command("serve", "gpu1").stderr


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--discover", "lokal"), 'Did you mean "local"?'),
        (("--watch",), "needs a configuration file"),
    ],
)
def test_what_serve_cannot_do(command: Command, args: tuple[str, ...], told: str) -> None:
    """One line, code 2."""
    done = command(*args)
    assert (done.exit_code, done.stderr.count("\n")) == (ExitCode.USAGE, 1)
    assert told in done.stderr
