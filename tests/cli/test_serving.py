"""`serve` as a process: signals, sockets, log, exit codes; beside it the commands that ask it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port

from balancer import __version__
from balancer.cli.exits import ExitCode
from balancer.cli.serving import lift_file_limit
from balancer.sim.host import SimModel
from balancer.sim.ollama import SimOllama
from tests.sim.wire import ask

from .conftest import LIMIT_S, Process, Spawn

GENERATE = {"model": "m", "prompt": "hi", "stream": False}


@pytest.fixture
async def sim() -> AsyncIterator[SimOllama]:
    """One simulated host with a quick model."""
    async with SimOllama([SimModel("m", load_s=0.05)]) as host:
        yield host


async def stop(process: Process) -> int:
    """Interrupt it, and its exit code."""
    process.process.send_signal(signal.SIGINT)
    return (await process.ended())[0]


async def test_it_serves_and_stops(sim: SimOllama, spawn: Spawn) -> None:
    """A call is answered; INT ends it with code 0; the log is JSON, one line per call."""
    process = await spawn("-b", sim.url, "-l", "127.0.0.1:0", stdout=asyncio.subprocess.DEVNULL)
    assert (await process.told("starting"))["version"] == __version__
    port = await process.port()
    reply = await ask(port, "POST", "/api/generate", GENERATE)
    assert reply.status == 200
    assert json.loads(reply.body)["done"] is True
    assert reply.get("x-balancer-demo") is None
    line = await process.told("request")
    assert (line["url.path"], line["http.response.status_code"]) == ("/api/generate", 200)
    assert await stop(process) == ExitCode.OK


async def test_status_and_reload_of_a_running_balancer(
    sim: SimOllama, spawn: Spawn, place: Path
) -> None:
    """A good file is taken over by command or HUP; a bad one is refused and changes nothing."""
    file = place / "config.yaml"
    good = f"backends: [{{name: first, url: '{sim.url}'}}]\nserver: {{listen: '127.0.0.1:0'}}\n"
    file.write_text(good)
    process = await spawn("-c", "config.yaml")
    admin = f"127.0.0.1:{await process.port()}"

    async def told(*args: str) -> tuple[int, str, str]:
        return await (await spawn(*args, "--admin", admin)).ended()

    code, out, _ = await told("status")
    assert code == ExitCode.OK
    assert "first" in out
    doc = json.loads((await told("status", "--json"))[1])
    assert doc["config"]["file"] == "config.yaml"

    file.write_text(good + "backnds: []\n")
    code, _, err = await told("reload")
    assert code == ExitCode.CONFIG
    assert "Nothing was changed" in err
    assert "config.yaml:3:1 backnds" in err

    file.write_text(good.replace("first", "second"))
    code, out, _ = await told("reload")
    assert code == ExitCode.OK
    assert "backends[second]" in out
    assert "backends[second]" in (await process.told("config_reloaded"))["changed"]

    file.write_text(good.replace("first", "third"))
    process.process.send_signal(signal.SIGHUP)
    assert "backends[third]" in (await process.told("config_reloaded"))["changed"]
    file.write_text("nonsense: 1\n")
    process.process.send_signal(signal.SIGHUP)
    assert "config.yaml:1:1" in (await process.told("config_rejected"))["problems"][0]
    assert "third" in (await told("status"))[1]
    assert await stop(process) == ExitCode.OK


async def test_term_drains_and_a_second_one_does_not_wait(sim: SimOllama, spawn: Spawn) -> None:
    """After TERM it still serves for load balancers before it, but is not ready; code 0."""
    process = await spawn("-b", sim.url, "-l", "127.0.0.1:0")
    port = await process.port()
    await ask(port, "GET", "/api/tags")
    process.process.send_signal(signal.SIGTERM)
    line = await process.told("shutdown_drain")
    assert line["reason"] == "SIGTERM"
    assert (await ask(port, "GET", "/_balancer/ready")).status == 503
    assert (await ask(port, "GET", "/api/tags")).status == 200
    process.process.send_signal(signal.SIGTERM)
    assert (await process.ended())[0] == ExitCode.OK


async def test_a_second_interrupt_cuts_what_runs(sim: SimOllama, spawn: Spawn) -> None:
    """The first waits for the running call, the second ends it with an error; code 130."""
    sim.faults.hang_inference()
    process = await spawn("-b", sim.url, "-l", "127.0.0.1:0")
    port = await process.port()
    while (await ask(port, "GET", "/_balancer/ready")).status != 200:
        await asyncio.sleep(0.01)
    call = asyncio.ensure_future(ask(port, "POST", "/api/generate", GENERATE))  # noqa: TID251 - ours
    while not sim.requests or sim.requests[-1].path != "/api/generate":
        await asyncio.sleep(0.01)
    process.process.send_signal(signal.SIGINT)
    await process.told("shutdown_drain")
    assert not call.done()
    process.process.send_signal(signal.SIGINT)
    assert (await call).status == 503
    assert (await process.ended())[0] == ExitCode.INTERRUPTED


async def test_on_a_terminal(sim: SimOllama, spawn: Spawn) -> None:
    """It greets with the start screen and stops on TERM without lingering."""
    master, slave = os.openpty()
    process = await spawn("-b", sim.url, "-l", "127.0.0.1:0", stdout=slave)
    os.close(slave)
    loop = asyncio.get_running_loop()
    text = ""
    async with asyncio.timeout(LIMIT_S):
        while "twice = now" not in text:
            text += (await loop.run_in_executor(None, os.read, master, 4096)).decode()
    assert "ollama run m\r\n" in text
    assert "--backend" in text
    process.process.send_signal(signal.SIGTERM)
    before = loop.time()
    assert (await process.ended())[0] == ExitCode.OK
    assert loop.time() - before < 5.0  # the time that it lingers elsewhere
    os.close(master)


async def test_without_backends_it_starts_and_says_so(spawn: Spawn) -> None:
    """Not ready, a warning with what to do, no crash."""
    process = await spawn("-l", "127.0.0.1:0")
    port = await process.port()
    assert "-b gpu1" in (await process.told("no_backends"))["hint"]
    assert (await ask(port, "GET", "/_balancer/ready")).status == 503
    assert (await ask(port, "GET", "/_balancer/live")).status == 200
    status = await spawn("status", "--admin", f"127.0.0.1:{port}")
    assert (await status.ended())[0] == ExitCode.NO_BACKEND
    assert await stop(process) == ExitCode.OK


async def test_a_taken_port_is_code_4(sim: SimOllama, spawn: Spawn) -> None:
    """One line that says who is there and what to do."""
    process = await spawn("-b", "gpu1", "-l", f"127.0.0.1:{sim.port}")
    code, _, err = await process.ended()
    assert code == ExitCode.BIND
    assert err.count("\n") == 1
    assert "by an Ollama server (0.33.0)" in err
    assert "--listen" in err


async def test_demo_marks_every_answer(spawn: Spawn) -> None:
    """Its hosts are simulated, and each answer says so."""
    process = await spawn("--demo", "-l", "127.0.0.1:0")
    port = await process.port()
    for path in ("/", "/api/tags", "/_balancer/live", "/nowhere"):
        assert (await ask(port, "GET", path)).get("x-balancer-demo") == "1"
    assert await stop(process) == ExitCode.OK


async def test_demo_stays_on_this_machine(spawn: Spawn) -> None:
    """Made-up answers are for nobody else; code 2."""
    process = await spawn("--demo", "-l", f"0.0.0.0:{unused_port()}", "--insecure-no-auth")
    code, _, err = await process.ended()
    assert code == ExitCode.USAGE
    assert "this machine only" in err


async def test_a_unix_socket(sim: SimOllama, spawn: Spawn, place: Path) -> None:
    """Served and asked over a file; what the dead left there is no obstacle."""
    url = f"unix:{place}/olb.sock"
    process = await spawn("-b", sim.url, "-l", url)
    await process.told("serving")
    asked = await (await spawn("status", "--admin", url)).ended()
    assert asked[0] == ExitCode.OK
    second = await (await spawn("-b", sim.url, "-l", url)).ended()
    assert second[0] == ExitCode.BIND
    process.process.kill()
    await process.ended()
    process = await spawn("-b", sim.url, "-l", url)
    await process.told("serving")
    assert await stop(process) == ExitCode.OK


def test_the_file_limit_is_lifted() -> None:
    """The soft limit becomes the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        lift_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
