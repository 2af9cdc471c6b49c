"""`serve` as a process: signals, sockets, log, exit codes; beside it the commands that ask it."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
from aiohttp.test_utils import unused_port

from balancer import __version__
from balancer.cli.exits import ExitCode
from balancer.cli.serving import Writer, cannot_listen, is_demo_meant, lift_file_limit, pulse
from balancer.cli.source import Source
from balancer.config import Candidate, Listen
from balancer.core.bus import Bus
from balancer.core.events import ConfigApplied, LeaseGranted, Mishap
from balancer.net.discovery import Look
from balancer.sim.host import SimModel
from balancer.sim.ollama import SimOllama
from tests.e2e.stage import CHAT, Asking, models, now, virtual
from tests.rig import running
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
    await ask(port, "GET", "/_balancer/ready")
    process.process.send_signal(signal.SIGTERM)
    line = await process.told("shutdown_drain")
    assert line["reason"] == "SIGTERM"
    assert (await ask(port, "GET", "/_balancer/ready")).status == 503
    assert (await ask(port, "GET", "/api/tags")).status == 200
    process.process.send_signal(signal.SIGTERM)
    assert (await process.ended())[0] == ExitCode.OK


async def test_no_line_is_lost_or_late(sim: SimOllama, spawn: Spawn) -> None:
    """Lines that go out together are all there when it has been told to end, and in their order."""
    process = await spawn("-b", sim.url, "-l", "127.0.0.1:0")
    port = await process.port()
    for number in range(60):
        assert (await ask(port, "GET", f"/nowhere/{number}")).status == 404
    process.process.send_signal(signal.SIGTERM)
    process.process.send_signal(signal.SIGTERM)
    code, _, err = await process.ended()
    assert code == ExitCode.OK
    lines = [json.loads(line) for line in err.splitlines()]
    paths = [line["url.path"] for line in lines if line["event"] == "request"]
    assert paths == [f"/nowhere/{number}" for number in range(60)]
    assert lines[-1]["event"] == "stopped"


@virtual
async def test_a_log_that_takes_no_more_is_a_mishap() -> None:
    """What the shell's call back cannot write is counted; the balancer serves on."""
    async with running(1, models=models(0.0)) as rig:
        writer = Writer(rig.balancer)
        told: list[str] = []
        rig.balancer.bus.subscribe(lambda event: told.append(str(event)), [Mishap])

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        writer._later(full)
        await asyncio.sleep(0.3)
        writer.close()
        logging.getLogger().removeHandler(writer._bridge or logging.NullHandler())
        (event,) = told
        assert "No space left on device" in event
        rig.events.events = [e for e in rig.events.events if not isinstance(e, Mishap)]


@virtual
async def test_a_reload_changes_what_the_log_wants_to_hear() -> None:
    """With details on, the events are made that were for nobody before; and off again."""
    async with running(1, models=models(0.0)) as rig:
        balancer, bus = rig.balancer, Bus()
        balancer.bus = bus
        writer = Writer(balancer)
        bus.subscribe(writer, but=writer.unheard)
        heard = []
        for level in ("info", "debug", "info"):
            logged = replace(balancer.config.logging, level=level)
            balancer.config = replace(balancer.config, logging=logged)
            bus(ConfigApplied(1.0, (), ()))
            heard.append(bus.hears(LeaseGranted))
        assert heard == [False, True, False]
        writer.close()
        logging.getLogger().removeHandler(writer._bridge or logging.NullHandler())


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


async def test_on_a_terminal(sim: SimOllama, on_terminal: OnTerminal) -> None:
    """It greets with the start screen and stops on TERM without lingering."""
    process, text = await on_terminal("-b", sim.url)
    assert "ollama run m\n" in text
    assert "--backend" in text
    loop = asyncio.get_running_loop()
    process.process.send_signal(signal.SIGTERM)
    before = loop.time()
    assert (await process.ended())[0] == ExitCode.OK
    assert loop.time() - before < 5.0  # the time that it lingers elsewhere


class OnTerminal(Protocol):
    """Starts a balancer on a terminal of its own."""

    def __call__(self, *args: str, **env: str) -> Awaitable[tuple[Process, str]]:
        """The process, and its start screen."""


@pytest.fixture
async def on_terminal(spawn: Spawn) -> AsyncIterator[OnTerminal]:
    """Starts balancers on terminals that last as long as the test."""
    masters = []

    async def start(*args: str, **env: str) -> tuple[Process, str]:
        master, slave = os.openpty()
        masters.append(master)
        process = await spawn(*args, "-l", "127.0.0.1:0", stdout=slave, env=env)
        os.close(slave)
        loop = asyncio.get_running_loop()
        text = ""
        async with asyncio.timeout(LIMIT_S):
            while "twice = now" not in text:
                text += (await loop.run_in_executor(None, os.read, master, 4096)).decode()
        return process, text.replace("\r", "")

    yield start
    for master in masters:
        os.close(master)


def looking_at(*ports: int) -> dict[str, str]:
    """The environment in which discovery looks at these ports alone."""
    return {
        "BALANCER_DISCOVERY__LOCAL__PORTS": ",".join(map(str, ports)),
        "OLLAMA_HOST": "",
        "OLLAMA_BASE_URLS": "",
    }


async def test_without_a_word_it_serves_what_it_finds(sim: SimOllama, spawn: Spawn) -> None:
    """At a local port and at OLLAMA_HOST; a host named by both is one; the log says which."""
    async with SimOllama([SimModel("n", load_s=0.05)]) as other:
        env = looking_at(sim.port, unused_port()) | {
            "OLLAMA_HOST": f"localhost:{other.port}",
            "OLLAMA_BASE_URLS": f"{sim.url};{sim.url}/",
        }
        process = await spawn("-l", "127.0.0.1:0", env=env)
        port = await process.port()
        added = {line["url"] for line in process.lines if line["event"] == "backend_added"}
        assert added == {sim.url, f"http://localhost:{other.port}"}
        for model in "mn":
            reply = await ask(port, "POST", "/api/generate", GENERATE | {"model": model})
            assert reply.status == 200
        assert await stop(process) == ExitCode.OK


async def test_a_host_that_appears_is_picked_up(spawn: Spawn) -> None:
    """Off a terminal nothing is made up: 503 until there is one, then it serves."""
    where = unused_port()
    env = looking_at(where) | {"BALANCER_DISCOVERY__REFRESH": "100ms"}
    process = await spawn("-l", "127.0.0.1:0", env=env)
    port = await process.port()
    hint = (await process.told("no_backends"))["hint"]
    assert f"Until then we look every 0.1 s on this machine ({where}) and at OLLAMA_HOST" in hint
    assert (await ask(port, "GET", "/_balancer/ready")).status == 503
    async with SimOllama([SimModel("m", load_s=0.05)], port=where):
        assert (await process.told("backend_added"))["url"] == f"http://127.0.0.1:{where}"
        await process.told("backend_up")
        assert (await ask(port, "GET", "/_balancer/ready")).status == 200
        assert await stop(process) == ExitCode.OK


async def test_on_a_terminal_it_shows_what_it_found(
    sim: SimOllama, on_terminal: OnTerminal
) -> None:
    """Each with where it is from, and how to keep it."""
    process, text = await on_terminal(**looking_at(sim.port))
    assert "no configuration file, using discovery (save it: ollama-balancer init" in text
    row = next(line.split() for line in text.splitlines() if f"local:{sim.port}" in line)
    assert row[1:] == [f"127.0.0.1:{sim.port}", "0.33.0", "1", "–", "local", "port"]
    assert "DEMO" not in text
    assert "ollama run m\n" in text
    assert await stop(process) == ExitCode.OK


async def test_on_a_terminal_with_nothing_found_it_is_a_demo(on_terminal: OnTerminal) -> None:
    """It says so before anything else, says how to leave it, and marks every answer."""
    process, text = await on_terminal(**looking_at(unused_port()))
    assert text.startswith("No Ollama found on this machine (")
    assert "DEMO with three simulated hosts" in text
    assert "ollama-balancer --no-demo" in text
    assert text.count("simulated\n") == 3
    port = int(text.partition("Listening  http://127.0.0.1:")[2].split()[0])
    assert (await ask(port, "GET", "/api/tags")).get("x-balancer-demo") == "1"
    assert await stop(process) == ExitCode.OK


async def test_nobody_gets_a_demo_against_his_word(on_terminal: OnTerminal) -> None:
    """It serves nothing, and says where it looks."""
    process, text = await on_terminal("--no-demo", **looking_at(unused_port()))
    assert "No backends: calls are answered 503." in text
    assert "DEMO" not in text
    assert await stop(process) == ExitCode.OK


@pytest.mark.parametrize(
    ("text", "flags", "found", "meant"),
    [
        (None, {}, False, True),
        (None, {}, True, False),
        ("", {}, False, False),
        (None, {"backends": ["gpu1"]}, False, False),
        (None, {"discovery.sources": ["none"]}, False, False),
        (None, {"demo.enabled": False}, False, False),
        (None, {"demo.enabled": True}, False, False),
        (None, {"server.listen": ":0", "auth.anonymous": "always"}, False, False),
    ],
)
def test_when_a_demo_is_meant(
    place: Path, text: str | None, flags: dict[str, object], *, found: bool, meant: bool
) -> None:
    """Only where there is nothing at all, nobody has written a word, and nobody else can call."""
    file = None if text is None else place / "config.yaml"
    if file is not None:
        file.write_text(text or "")
    source = Source(file, {}, flags)
    looked = Look((Candidate("http://a:1", "x"),)) if found else Look()
    assert is_demo_meant(source, source.read(), looked) is meant


async def test_watching_the_file(sim: SimOllama, spawn: Spawn, place: Path) -> None:
    """A change is taken over without a word, also of a file that an editor put in its place."""
    file = place / "config.yaml"
    text = f"backends: [{{name: first, url: '{sim.url}'}}]\nserver: {{listen: '127.0.0.1:0'}}\n"
    file.write_text(text)
    process = await spawn("-c", "config.yaml", "--watch")
    await process.port()
    new = place / "new"
    new.write_text(text.replace("first", "second"))
    new.replace(file)
    assert "backends[second]" in (await process.told("config_reloaded"))["changed"]
    file.write_text("nonsense: 1\n")
    assert "nonsense" in (await process.told("config_rejected"))["problems"][0]
    assert await stop(process) == ExitCode.OK


async def test_opening_the_page(sim: SimOllama, spawn: Spawn, place: Path) -> None:
    """The browser gets the page's address."""
    browser, told = place / "browser", place / "told"
    browser.write_text(f'#!/bin/sh\necho "$1" > {told}.new && mv {told}.new {told}\n')
    browser.chmod(0o755)
    process = await spawn(
        "-b", sim.url, "-l", "127.0.0.1:0", "--open", env={"BROWSER": f"{browser} %s"}
    )
    port = await process.port()
    async with asyncio.timeout(LIMIT_S):
        while not told.exists():
            await asyncio.sleep(0.01)
    assert told.read_text() == f"http://127.0.0.1:{port}/_balancer/\n"
    assert await stop(process) == ExitCode.OK


async def test_without_backends_it_starts_and_says_so(spawn: Spawn) -> None:
    """Not ready, a warning with what to do, no crash."""
    process = await spawn("-l", "127.0.0.1:0", "--discover", "none")
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


async def test_an_address_that_is_named_twice(spawn: Spawn) -> None:
    """Both can be bound, one can be served: code 4, and the reason."""
    there = f"127.0.0.1:{unused_port()}"
    process = await spawn("-b", "gpu1", "-l", there, "-l", there)
    code, _, err = await process.ended()
    assert code == ExitCode.BIND
    assert err.splitlines()[-1] == "Cannot listen: address already in use."


def test_a_file_in_the_way_is_no_server(place: Path) -> None:
    """Each is called what it is."""
    (place / "notes.txt").touch()
    taken = OSError(errno.EADDRINUSE, "Address already in use")
    told = cannot_listen(Listen("", 0, path=str(place / "notes.txt")), taken)
    assert "notes.txt: a file is there already" in told
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "s"))
        assert "a server is there" in cannot_listen(Listen("", 0, path=str(place / "s")), taken)


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


# -- under systemd -------------------------------------------------------------------------


class Systemd:
    """A notify socket: what systemd would hear, line by line."""

    def __init__(self, path: Path) -> None:
        self.env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        self.lines: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    async def hears(self, *lines: str) -> None:
        """Wait until these have come, in this order, after what was waited for before."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LIMIT_S):
            for wanted in lines:
                while wanted not in self.lines:
                    self.lines += (await loop.sock_recv(self._socket, 4096)).decode().split("\n")
                del self.lines[: self.lines.index(wanted) + 1]

    def close(self) -> None:
        self._socket.close()


async def test_systemd_follows_its_life(sim: SimOllama, spawn: Spawn, place: Path) -> None:
    """Ready, status, signs of life, reloads good and bad, and the stop."""
    file = place / "config.yaml"
    good = f"backends: ['{sim.url}']\nserver: {{listen: '127.0.0.1:0'}}\n"
    file.write_text(good)
    systemd = Systemd(place / "n")
    process = await spawn("-c", "config.yaml", env=systemd.env)
    await systemd.hears("READY=1", "STATUS=1/1 hosts up, 0 running, 0 queued")
    assert (await ask(await process.port(), "GET", "/_balancer/ready")).status == 200
    await systemd.hears("WATCHDOG=1", "WATCHDOG=1")
    process.process.send_signal(signal.SIGHUP)
    await systemd.hears("RELOADING=1", "READY=1")
    file.write_text("nonsense: 1\n")
    process.process.send_signal(signal.SIGHUP)
    refused = "STATUS=1/1 hosts up, 0 running, 0 queued; the last reload was refused"
    await systemd.hears("RELOADING=1", "READY=1", refused)
    process.process.send_signal(signal.SIGTERM)
    await systemd.hears("STOPPING=1", "WATCHDOG=1")
    process.process.send_signal(signal.SIGTERM)
    assert (await process.ended())[0] == ExitCode.OK
    systemd.close()


async def test_systemd_hears_nothing_if_so_configured(
    sim: SimOllama, spawn: Spawn, place: Path
) -> None:
    """`systemd.notify: never`, whatever it asks for."""
    systemd = Systemd(place / "n")
    env = systemd.env | {"BALANCER_SYSTEMD__NOTIFY": "never"}
    process = await spawn("-b", sim.url, "-l", "127.0.0.1:0", env=env)
    await process.told("serving")
    assert await stop(process) == ExitCode.OK
    with pytest.raises(BlockingIOError):
        systemd._socket.recv(1)
    systemd.close()


HANDED_OVER = """
import os, sys
fd = int(sys.argv[1])
os.dup2(fd, 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="api")
os.execv(sys.executable, [sys.executable, "-m", "balancer", *sys.argv[2:]])
"""


async def test_a_socket_of_systemd(sim: SimOllama, place: Path) -> None:
    """It is served, and outlives us: whoever calls while nobody serves waits and is not refused."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    env = {**os.environ, "BALANCER_API_KEY": "0123456789abcdef"}
    args = (HANDED_OVER, str(listener.fileno()), "-b", sim.url, "-l", "fd:api")

    async def start() -> Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", *args),
            stderr=asyncio.subprocess.PIPE,
            pass_fds=[listener.fileno()],
            cwd=place,
            env=env,
        )
        return Process(process)

    first = await start()
    assert await first.port() == port
    assert (await ask(port, "GET", "/_balancer/live")).status == 200
    assert await stop(first) == ExitCode.OK
    between = asyncio.ensure_future(ask(port, "GET", "/_balancer/live"))  # noqa: TID251 - ours
    second = await start()
    assert (await between).status == 200
    assert await stop(second) == ExitCode.OK
    listener.close()


async def test_a_socket_nobody_hands_over_is_code_4(spawn: Spawn) -> None:
    """Started by hand instead of by its socket unit."""
    process = await spawn("-b", "gpu1", "-l", "fd:api", env={"BALANCER_API_KEY": "0" * 16})
    code, _, err = await process.ended()
    assert code == ExitCode.BIND
    assert "FileDescriptorName=api" in err


@virtual
async def test_a_queue_that_stands_still_is_no_sign_of_life() -> None:
    """Calls are counted; one that waits long past its limit makes the self-check fail."""
    async with running(1, models=models(0.0, speed=0.1), backend={"slots": 1}) as rig:
        await rig.warm("a", "m")
        assert pulse(rig.balancer) == "1/1 hosts up, 0 running, 0 queued"
        calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(2)]
        await asyncio.sleep(1.0)
        assert pulse(rig.balancer) == "1/1 hosts up, 1 running, 1 queued"
        (ticket,) = rig.balancer.dispatcher.waiting()
        limit_at, ticket.limit_at = ticket.limit_at, now() - 31.0
        with pytest.raises(RuntimeError, match="31 s past its limit"):
            pulse(rig.balancer)
        ticket.limit_at = limit_at
        for call in calls:
            call.hang_up()


def test_the_file_limit_is_lifted() -> None:
    """The soft limit becomes the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        lift_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
