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
import webbrowser
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from balancer import __version__
from balancer.app import Balancer, Stop, bind
from balancer.cli import client, start
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.source import Source, read_or_refuse
from balancer.config import Config, Listen
from balancer.core.events import (
    ConfigApplied,
    Event,
    HealthFlipped,
    MemberJoined,
    Mishap,
    Serving,
)
from balancer.net import discovery
from balancer.ops.log import Bridge, LogWriter, configure
from balancer.ops.notify import Notify, Wanted, handed_over, wanted

if TYPE_CHECKING:
    from balancer.sim.fleet import Fleet

LAG_S: Final = 5.0  # for load balancers before us to see that we are not ready any more
REMIND_S: Final = 60.0
WATCH_S: Final = 1.0
FLUSH_S: Final = 0.25  # lines of the log that come so soon after one another go out together
STUCK_S: Final = 30.0  # past its limit no call waits on, unless the queue stands still
HOW_TO_STOP: Final = "Press Ctrl+C to stop (waits for running answers; twice = now)"
DEMO_HEADERS: Final = {"X-Balancer-Demo": "1"}
_SHOWN_AT_START: Final = (Serving, MemberJoined, HealthFlipped)


def serve(source: Source, *, open_page: bool = False, watch: bool = False) -> int:
    """
    Serve until told to stop; an exit code.

    Args:
        open_page: Show the dashboard in a browser.
        watch: Reload when the file has changed.

    Raises:
        CommandError: It cannot begin.
    """
    seen = Seen(source.file) if watch and source.file is not None else None
    config = read_or_refuse(source)
    lift_file_limit()
    sockets = bind_all(config.server.listen)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(source, config, sockets, open_page=open_page, seen=seen))


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
            bound += _sockets(address)
        except OSError as error:
            for sock in bound:
                sock.close()
            raise CommandError(cannot_listen(address, error), code=ExitCode.BIND) from None
    return bound


def _sockets(address: Listen) -> list[socket.socket]:
    """Bound to it by us or, perhaps several, by systemd."""
    if address.fd is None:
        return [bind(address)]
    found = handed_over(address.fd, os.environ, os.getpid())
    if not found:
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    return found


def cannot_listen(address: Listen, error: OSError) -> str:
    """What stands in the way of an address, and what to do."""
    head = f"Cannot listen on {address}:"
    match error.errno:
        case errno.ENOTSOCK:
            return (
                f"{head} systemd handed over no socket of that name. It needs a socket unit with "
                f"FileDescriptorName={address.fd}, and to be started by it: "
                "systemctl start ollama-balancer.socket"
            )
        case errno.EADDRINUSE if address.path is not None:
            what = "server" if Path(address.path).is_socket() else "file"
            return f"{head} a {what} is there already. Listen elsewhere: --listen unix:/PATH"
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
        how = f"start it with OLLAMA_HOST=127.0.0.1:{11441 if address.port == 11440 else 11440}"
        if address.port == 11434:
            how = "see ollama-balancer install --takeover"
        return f"{who}. Either keep it there and {elsewhere}, or move Ollama: {how}."
    if who.startswith("another ollama-balancer"):
        admin = "" if address.port == 11435 else f" --admin {Listen(host, address.port)}"
        return f"{who}. See what it does: ollama-balancer status{admin}; or {elsewhere}."
    return f"{who}. See which: ss -ltnp; or {elsewhere}."


# -- the process -------------------------------------------------------------------------------


async def _serve(
    source: Source,
    config: Config,
    sockets: Sequence[socket.socket],
    *,
    open_page: bool,
    seen: Seen | None,
) -> int:
    on_terminal = sys.stdout.isatty()
    looked = await discovery.first_look(config)
    async with AsyncExitStack() as stack:
        if on_terminal and is_demo_meant(source, config, looked):
            print(*start.nobody_found(config), sep="\n", flush=True)
            source = source.over(**{"demo.enabled": True})
            config, looked = read_or_refuse(source), discovery.Look()
        if config.demo.enabled:
            fleet = await stack.enter_async_context(_simulated(config))
            source = over_fleet(source, fleet)
            config = read_or_refuse(source)
        notify = _notify(config)
        stack.callback(notify.close)
        config = replace(config, warnings=(*config.warnings, *looked.notes))
        balancer = _build(source, config, sockets, notify, looked)
        signals = Signals(balancer, on_terminal=on_terminal)
        writer = Writer(balancer)
        stack.callback(writer.close)
        if on_terminal:
            writer.hold()
        else:
            writer.log.info("starting", version=__version__, config_file=source.told)
        balancer.bus.subscribe(writer, but=writer.unheard)
        balancer.bus.subscribe(notify, Notify.KINDS)
        try:
            await balancer.start()
        except OSError as error:  # bound by two at once, the other was first to listen
            told = f"Cannot listen: {(error.strerror or str(error)).lower()}."
            raise CommandError(told, code=ExitCode.BIND) from None
        if notify.is_heard:
            beats = notify.watch(lambda: pulse(balancer), balancer.bus)
            balancer.tasks.spawn(beats, "signs of life for systemd")
        if on_terminal:
            await start.first_checks(balancer)
            subject = start.subject(balancer.config, source.told)
            print(*start.lines(balancer, subject), HOW_TO_STOP, sep="\n", flush=True)
            writer.go_on()
        else:
            for warning in config.warnings:
                writer.log.warning("config_warning", message=warning)
            balancer.tasks.spawn(_remind(balancer, writer), "reminder of missing backends")
        if seen is not None:
            balancer.tasks.spawn(_watch(seen, balancer), "the configuration file")
        page = start.page(balancer)
        if open_page and page is not None:
            asyncio.get_running_loop().run_in_executor(None, webbrowser.open, page)
        await balancer.wait()
        return ExitCode.INTERRUPTED if signals.cut_short else ExitCode.OK


def is_demo_meant(source: Source, config: Config, looked: discovery.Look) -> bool:
    """Whether there is nothing to serve but a demo, and nobody has said anything against one."""
    is_bare = source.file is None and not config.backends and "demo.enabled" not in config.origins
    is_local = all(address.is_local for address in config.server.listen)
    return is_bare and is_local and bool(config.discovery.sources) and not looked.found


class Seen:
    """A file as it was when last looked at; the first look is at once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._state = self._look()

    def has_changed(self) -> bool:
        """Whether it is another than at the last look; also if an editor put a new one there."""
        now = self._look()
        before, self._state = self._state, now or self._state  # one being replaced may be missing
        return now not in (before, None)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            told = self._file.stat()
        except OSError:
            return None
        return told.st_mtime_ns, told.st_size, told.st_ino


async def _watch(seen: Seen, balancer: Balancer) -> None:
    while True:
        await asyncio.sleep(WATCH_S)
        if seen.has_changed():
            balancer.reload_now()


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


def _notify(config: Config) -> Notify:
    """To systemd, if it wants to hear from us."""
    auto = config.systemd.notify == "auto"
    whom = wanted(os.environ, os.getpid()) if auto else Wanted()
    watchdog = config.systemd.watchdog == "auto"
    return Notify(whom, time.monotonic, watchdog=watchdog)


def pulse(balancer: Balancer) -> str:
    """
    One line on how things are, asked of those who decide.

    Raises:
        RuntimeError: Callers wait though their time is up: nobody serves the queue any more.
    """
    now = asyncio.get_running_loop().time()
    waiting = balancer.dispatcher.waiting()
    late_s = max((now - ticket.limit_at for ticket in waiting), default=0.0)
    if late_s > STUCK_S:
        raise RuntimeError(f"the queue stands still: a call waits {late_s:.0f} s past its limit")
    up = [view.up for view in balancer.pool.snapshot()].count(True)
    told = (
        f"{up}/{len(balancer.pool.members)} hosts up, "
        f"{balancer.pool.running} running, {len(waiting)} queued"
    )
    return f"{told}; the last reload was refused" if balancer.reload.rejected else told


def _build(
    source: Source,
    config: Config,
    sockets: Sequence[socket.socket],
    notify: Notify,
    looked: discovery.Look,
) -> Balancer:
    def read() -> Config:
        notify.reloading()
        return source.read()

    try:
        return Balancer(
            config,
            read=read,
            config_file=source.told,
            sockets=sockets,
            extra_headers=DEMO_HEADERS if config.demo.enabled else {},
            looked=looked,
        )
    except OSError as error:
        told = f"A certificate of a backend cannot be used: {error.strerror or error}"
        raise CommandError(told, code=ExitCode.CONFIG) from None


async def _remind(balancer: Balancer, writer: Writer) -> None:
    while True:
        if not balancer.pool.members:
            writer.log.warning("no_backends", hint=start.no_backends(balancer.config))
        await asyncio.sleep(REMIND_S)


class Writer:
    """
    Writes events as the configuration in force wants it.

    What happens while the start screen is being made is held back, and left out where the
    screen tells it.
    """

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer
        self._loop = asyncio.get_running_loop()
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
            later=self._later,
        )
        slow_s = math.inf if how.slow_s is None else how.slow_s
        self._write = LogWriter(
            self.log, access=how.access, slow_s=slow_s, client_address=how.client_ip
        )
        if self._bridge is not None:
            logging.getLogger().removeHandler(self._bridge)
        self._bridge = Bridge(self.log, self._loop.time, how.client_ip)
        logging.getLogger().addHandler(self._bridge)

    def _later(self, flush: Callable[[], None]) -> None:
        self._loop.call_later(FLUSH_S, self._flush, flush)

    def _flush(self, flush: Callable[[], None]) -> None:
        try:
            flush()
        except (OSError, ValueError) as error:  # a full disk, or nobody there who reads
            self._balancer.bus(Mishap(self._loop.time(), "log", str(error)))

    def __call__(self, event: Event) -> None:
        """Write one event, or hold it."""
        if isinstance(event, ConfigApplied):
            self.close()
            self._begin()
            self._balancer.bus.subscribe(self, but=self.unheard)
        if self._held is not None:
            self._held.append(event)
        else:
            self._write(event)

    @property
    def unheard(self) -> Collection[type[Event]]:
        """The events that are not written, as the configuration is now."""
        return self._write.unheard

    def close(self) -> None:
        """Write what the log still holds; from now on it holds nothing."""
        self._flush(self.log.lines.close)

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
