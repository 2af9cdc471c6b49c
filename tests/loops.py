"""
Virtual time on uvloop, so that what is tested in one loop can be tested in the other.

uvloop polls by itself and does not say when it has nothing to do. It is asked: a callback of ours
runs in every turn, and takes it for idleness if for `QUIET` turns nothing was called soon and no
socket was ready. Then, as in `balancer.sim.loop`, time jumps to the next timer.
"""

from __future__ import annotations

import asyncio
import heapq
import select
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

import uvloop

from balancer.sim import loop as virtual

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
QUIET = 8  # turns: what uvloop defers by itself (a made or lost connection) is done in fewer
_GRACE_MS = 1


class VirtualUvloop(uvloop.Loop):
    """A loop of uvloop's on virtual time, which begins at `start` seconds."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self._now = start
        self._scheduled: list[asyncio.TimerHandle] = []  # called as asyncio's own loops call it
        self._called = False
        self._quiet = 0
        self._threads = 0
        self._stuck = False
        own: Any = self
        self._sockets = select.poll()
        self._sockets.register(own._get_backend_id(), select.POLLIN)  # ready if one of them is
        super().call_soon(self._turn)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As usual, and noticed."""
        self._called = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """A timer in virtual time, to the last bit."""
        loop: Any = self
        timer = asyncio.TimerHandle(when, callback, args, loop, context)
        heapq.heappush(self._scheduled, timer)
        self._called = True
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """The same, from now."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> Any:
        """As usual, with the time standing still until the thread is done."""
        self._threads += 1
        future: Any = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    async def getaddrinfo(self, *args: Any, **more: Any) -> Any:
        """The same: it asks in a thread."""
        self._threads += 1
        try:
            return await super().getaddrinfo(*args, **more)
        finally:
            self._thread_done()

    def run_forever(self) -> None:
        """Run until stopped; raises StuckError if nothing can happen any more."""
        super().run_forever()
        if self._stuck:
            self._stuck = False
            raise virtual.StuckError(f"nothing happened for {virtual.STUCK_S:g} real seconds")

    def _timer_handle_cancelled(self, timer: asyncio.TimerHandle) -> None:
        """It stays until it is met."""

    def _thread_done(self, _: object = None) -> None:
        self._threads -= 1

    def _turn(self) -> None:
        called, self._called = self._called, False
        self._quiet = 0 if called or self._sockets.poll(0) else self._quiet + 1
        if self._quiet >= QUIET:
            self._wait()
        timers = self._scheduled
        while timers and timers[0].when() <= self._now:
            self.call_soon(_fire, heapq.heappop(timers))
        super().call_soon(self._turn)

    def _wait(self) -> None:
        """Nothing can run: jump, or wait for somebody else."""
        timers = self._scheduled
        while timers and timers[0].cancelled():
            heapq.heappop(timers)
        if self._threads:
            self._sockets.poll(_GRACE_MS)
        elif timers:
            wait = timers[0].when() - self._now
            if not self._sockets.poll(_GRACE_MS if wait > virtual.CAUTION_S else 0):
                self._now = max(self._now, timers[0].when())
        elif not self._sockets.poll(virtual.STUCK_S * 1000):
            self._stuck, self._quiet = True, 0
            self.stop()


def _fire(timer: asyncio.TimerHandle) -> None:
    if not timer.cancelled():
        timer._run()


VIRTUAL: dict[str, Any] = {"asyncio": virtual.VirtualLoop, "uvloop": VirtualUvloop}
