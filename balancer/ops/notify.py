"""
What systemd is told, and what it hands over: the sd_notify and LISTEN_FDS protocols.

Messages are datagrams of NAME=value lines. Nothing here can fail or delay the service: a socket
that is gone or full loses a message, and the next beat makes up for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from balancer.core.events import (
    ConfigApplied,
    ConfigRejected,
    Emit,
    Event,
    Mishap,
    Serving,
    Stopping,
)

READY: Final = "READY=1"
RELOADING: Final = "RELOADING=1"
STOPPING: Final = "STOPPING=1"
ALIVE: Final = "WATCHDOG=1"
BEAT_S: Final = 3.0
EXTENSION_S: Final = 30.0  # of the stop's time limit, from each beat of a drain
FIRST_FD: Final = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    What the service manager asks for in the environment.

    Args:
        address: Of its socket; None: it wants to hear nothing.
        watchdog_s: How long it bears silence; None: for ever.
    """

    address: str | None = None
    watchdog_s: float | None = None


def wanted(env: Mapping[str, str], pid: int) -> Wanted:
    """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; what makes no sense is not there."""
    path = env.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):  # others are sockets between virtual machines
        return Wanted()
    usec, whom = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", str(pid))
    meant = whom == str(pid) and usec.isascii() and usec.isdigit() and int(usec) > 0
    address = f"\0{path[1:]}" if path.startswith("@") else path
    return Wanted(address, int(usec) / 1e6 if meant else None)


class Notify:
    """
    A subscriber that tells systemd in which stage of its life the balancer is.

    Args:
        monotonic: CLOCK_MONOTONIC to the microsecond. An event loop's time is too coarse:
            systemd drops a RELOADING that is older than its own signal.
        watchdog: Whether to answer the watchdog.
    """

    KINDS: Final = (Serving, Stopping, ConfigApplied, ConfigRejected)

    def __init__(
        self,
        whom: Wanted,
        monotonic: Callable[[], float],
        *,
        watchdog: bool = True,
    ) -> None:
        self._address = whom.address
        self._watchdog_s = whom.watchdog_s if watchdog else None
        self._monotonic = monotonic
        self._stage = self._told = self._status = ""
        self._socket: socket.socket | None = None
        if whom.address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return self._socket is not None

    @property
    def beat_s(self) -> float:
        """Between two beats."""
        return min(BEAT_S, (self._watchdog_s or BEAT_S * 2) / 2)

    def __call__(self, event: Event) -> None:
        """Tell what an event means to systemd, if anything."""
        match event:
            case Serving():
                self._enter(READY)
            case Stopping():
                self._enter(STOPPING, _extension())
            case ConfigApplied() | ConfigRejected():
                self._enter(self._stage)

    def reloading(self) -> None:
        """The configuration is about to be read again."""
        if self._stage == READY:
            self._told = RELOADING
            self._send(RELOADING, f"MONOTONIC_USEC={int(self._monotonic() * 1e6)}")

    async def watch(self, pulse: Callable[[], str], emit: Emit) -> None:
        """
        Beat for ever, from the event loop, so that a loop that stands still is missed.

        Args:
            pulse: The self-check; the status line, or any exception.
        """
        while True:
            self.beat(pulse, emit)
            await asyncio.sleep(self.beat_s)

    def beat(self, pulse: Callable[[], str], emit: Emit) -> None:
        """Check ourselves, tell a status that changed, and answer the watchdog if all is well."""
        try:
            status, lines = pulse(), [] if self._watchdog_s is None else [ALIVE]
        except Exception as error:  # noqa: BLE001 - whatever it is, we are not well
            status, lines = f"self-check failed: {error}", []
            emit(Mishap(self._monotonic(), "self-check", f"{type(error).__name__}: {error}"))
        if self._stage == STOPPING:
            lines.append(_extension())
        if self._told != self._stage:  # lost, or a reload that died
            self._enter(self._stage)
        said = [] if status == self._status else [f"STATUS={' '.join(status.split())}"]
        if self._send(*lines, *said):
            self._status = status

    def close(self) -> None:
        """Nothing more is told."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _enter(self, stage: str, *more: str) -> None:
        self._stage = stage
        if self._send(stage, *more):
            self._told = stage

    def _send(self, *lines: str) -> bool:
        if self._socket is None or self._address is None or not any(lines):
            return False
        with suppress(OSError):
            return bool(self._socket.sendto("\n".join(lines).encode(), self._address))
        return False


def _extension() -> str:
    return f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}"


def handed_over(name: str, env: Mapping[str, str], pid: int) -> list[socket.socket]:
    """
    The listening sockets that systemd passes under a name (`FileDescriptorName=` of its unit).

    Each call gives sockets of their own to the same addresses. None if there is no such name, or
    they were meant for another process.

    Raises:
        OSError: What was passed is no socket.
    """
    if env.get("LISTEN_PID") != str(pid) or not env.get("LISTEN_FDS", "").isdecimal():
        return []
    count = int(env["LISTEN_FDS"])
    names = env["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in env else ["unknown"] * count
    fds = [FIRST_FD + at for at, each in enumerate(names[:count]) if each == name]
    taken: list[socket.socket] = []
    for fd in fds:
        with socket.socket(fileno=fd) as passed:
            try:
                taken.append(passed.dup())
            finally:
                passed.detach()  # stays systemd's word: a second reader finds it too
    return taken
