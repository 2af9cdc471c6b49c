"""`sim`: simulated hosts alone. (`serve` and `demo` have files of their own.)"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from aiohttp.test_utils import unused_port

from balancer.cli.exits import ExitCode
from tests.sim.wire import ask

from .conftest import LIMIT_S, Spawn


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
