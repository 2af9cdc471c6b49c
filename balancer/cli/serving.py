"""The process around a balancer: sockets, event loop, signals, log, start screen."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final

from balancer import __version__
from balancer.app import Balancer, Stop, bind
from balancer.cli import client, start
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.source import Source, read_or_refuse
from balancer.config import Config, Listen
from balancer.core.events import ConfigApplied, Event, HealthFlipped, MemberJoined, Serving
from balancer.ops.log import Bridge, LogWriter, configure

if TYPE_CHECKING:
    from balancer.sim.fleet import Fleet

LAG_S: Final = 5.0  # for load balancers before us to see that we are not ready any more
REMIND_S: Final = 60.0
HOW_TO_STOP: Final = "Press Ctrl+C to stop (waits for running answers; twice = now)"
DEMO_HEADERS: Final = {"X-Balancer-Demo": "1"}
_SHOWN_AT_START: Final = (Serving, MemberJoined, HealthFlipped)


def serve(source: Source) -> int:
    """
    Serve until told to stop; an exit code.

    Raises:
        CommandError: It cannot begin.
    """
    config = read_or_refuse(source)
    lift_file_limit()
    sockets = bind_all(config.server.listen)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(source, config, sockets))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's, where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def lift_file_limit() -> None:
    """Every call takes two sockets, and the usual soft limit is 1024."""
    with suppress(OSError, ValueError):  # a sandbox may forbid it
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- sockets -----------------------------------------------------------------------------------


def bind_all(addresses: Sequence[Listen]) -> list[socket.socket]:
    """Bound sockets, or a refusal that says who is there already."""
    bound: list[socket.socket] = []
    for address in addresses:
        try:
            bound.append(bind(address))
        except OSError as error:
            for sock in bound:
                sock.close()
            raise CommandError(cannot_listen(address, error), code=ExitCode.BIND) from None
    return bound


def cannot_listen(address: Listen, error: OSError) -> str:
    """What stands in the way of an address, and what to do."""
    head = f"Cannot listen on {address}:"
    match error.errno:
        case errno.EADDRINUSE if address.path is not None:
            return f"{head} a server is there already. Listen elsewhere: --listen unix:/PATH"
        case errno.EADDRINUSE:
            return f"{head} address in use — by {_taken(address)}"
        case errno.EACCES | errno.EPERM:
            hint = "a port from 1024 on, or CAP_NET_BIND_SERVICE, or a directory you may write to"
            return f"{head} permission denied. It takes {hint}."
        case errno.EADDRNOTAVAIL:
            return f"{head} no address of this machine. Its own: ip address; all: --listen :11435"
    return f"{head} {(error.strerror or str(error)).lower()}."


def _taken(address: Listen) -> str:
    """Who has it, and the way out."""
    host = "127.0.0.1" if address.host in ("", "0.0.0.0", "::") else address.host
    who = client.occupant(host, address.port)
    other = str(Listen(address.host, 11435 if address.port == 11434 else address.port + 1))
    elsewhere = f"listen elsewhere: ollama-balancer --listen {other}"
    if who.startswith("an Ollama"):
        return (
            f"{who}. Either keep it there and {elsewhere}, or move Ollama: start it with "
            "OLLAMA_HOST=127.0.0.1:11440 and use it with --backend 127.0.0.1:11440."
        )
    if who.startswith("another ollama-balancer"):
        return f"{who}. See what it does: ollama-balancer status; or {elsewhere}."
    return f"{who}. See which: ss -ltnp; or {elsewhere}."


# -- the process -------------------------------------------------------------------------------


async def _serve(source: Source, config: Config, sockets: Sequence[socket.socket]) -> int:
    async with AsyncExitStack() as stack:
        if config.demo.enabled:
            fleet = await stack.enter_async_context(_simulated(config))
            source = over_fleet(source, fleet)
            config = read_or_refuse(source)
        balancer = _build(source, config, sockets)
        on_terminal = sys.stdout.isatty()
        signals = Signals(balancer, on_terminal=on_terminal)
        writer = Writer(balancer)
        if on_terminal:
            writer.hold()
        else:
            writer.log.info("starting", version=__version__, config_file=source.told)
        balancer.bus.subscribe(writer)
        try:
            await balancer.start()
        except OSError as error:  # bound by two at once, the other was first to listen
            told = f"Cannot listen: {(error.strerror or str(error)).lower()}."
            raise CommandError(told, code=ExitCode.BIND) from None
        if on_terminal:
            await start.first_checks(balancer)
            subject = source.told or "no configuration file"
            print(*start.lines(balancer, subject), HOW_TO_STOP, sep="\n", flush=True)
            writer.go_on()
        else:
            for warning in config.warnings:
                writer.log.warning("config_warning", message=warning)
            balancer.tasks.spawn(_remind(balancer, writer), "reminder of missing backends")
        await balancer.wait()
        return ExitCode.INTERRUPTED if signals.cut_short else ExitCode.OK


def _simulated(config: Config) -> Fleet:
    """The simulated hosts of ``--demo``: what they say is made up, so nobody else may ask them."""
    from balancer.sim.fleet import Fleet

    away = [str(address) for address in config.server.listen if not address.is_local]
    if away:
        told = f"The demo answers on this machine only, not on {', '.join(away)}."
        raise CommandError(f"{told} Leave --listen out.", code=ExitCode.USAGE)
    return Fleet.demo()


def over_fleet(source: Source, fleet: Fleet) -> Source:
    """The same configuration with simulated hosts instead of its backends."""
    return source.over(backends=[{"name": host.name, "url": host.url} for host in fleet])


def _build(source: Source, config: Config, sockets: Sequence[socket.socket]) -> Balancer:
    try:
        return Balancer(
            config,
            read=source.read,
            config_file=source.told,
            sockets=sockets,
            extra_headers=DEMO_HEADERS if config.demo.enabled else {},
        )
    except OSError as error:
        told = f"A certificate of a backend cannot be used: {error.strerror or error}"
        raise CommandError(told, code=ExitCode.CONFIG) from None


async def _remind(balancer: Balancer, writer: Writer) -> None:
    while True:
        if not balancer.pool.members:
            writer.log.warning("no_backends", hint=start.NO_BACKENDS)
        await asyncio.sleep(REMIND_S)


class Writer:
    """
    Writes events as the configuration in force wants it.

    What happens while the start screen is being made is held back, and left out where the
    screen tells it.
    """

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer
        self._held: list[Event] | None = None
        self._bridge: Bridge | None = None
        self._begin()

    def _begin(self) -> None:
        how = self._balancer.config.logging
        self.log = configure(
            how.level,
            how.format,
            stream=sys.stderr,
            is_tty=sys.stderr.isatty(),
            env=os.environ,
            wall=time.time,  # noqa: TID251 - timestamps are the wall clock's
        )
        slow_s = math.inf if how.slow_s is None else how.slow_s
        self._write = LogWriter(
            self.log, access=how.access, slow_s=slow_s, client_address=how.client_ip
        )
        if self._bridge is not None:
            logging.getLogger().removeHandler(self._bridge)
        self._bridge = Bridge(self.log, asyncio.get_running_loop().time, how.client_ip)
        logging.getLogger().addHandler(self._bridge)

    def __call__(self, event: Event) -> None:
        """Write one event, or hold it."""
        if isinstance(event, ConfigApplied):
            self._begin()
        if self._held is not None:
            self._held.append(event)
        else:
            self._write(event)

    def hold(self) -> None:
        """From now on nothing is written."""
        self._held = []

    def go_on(self) -> None:
        """Write what was held, and what comes."""
        held, self._held = self._held or [], None
        for event in held:
            if not isinstance(event, _SHOWN_AT_START):
                self._write(event)


class Signals:
    """
    What signals mean to a balancer: TERM and INT drain, a second one stops at once, HUP reloads.

    On a terminal nobody waits for us to be taken out of rotation, and its end is a HUP, too.
    """

    def __init__(self, balancer: Balancer, *, on_terminal: bool) -> None:
        self._balancer = balancer
        self._on_terminal = on_terminal
        self._interrupts = 0
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    @property
    def cut_short(self) -> bool:
        """Whether somebody was too impatient to wait for the drain."""
        return self._interrupts > 1

    def _interrupt(self) -> None:
        self._interrupts += 1
        self._stop("SIGINT")

    def _stop(self, reason: str) -> None:
        lag_s = LAG_S if reason == "SIGTERM" and not self._on_terminal else 0.0
        self._balancer.stop(Stop(reason, lag_s))

    def _hang_up(self) -> None:
        if self._on_terminal and not sys.stdout.isatty():
            self._stop("the terminal is gone")
        else:
            self._balancer.reload_now()
