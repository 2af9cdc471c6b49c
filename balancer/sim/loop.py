"""An event loop whose time is virtual while its sockets are real.

`time()` stands still while anything can run. When nothing can, neither a callback nor a socket,
it jumps to the next timer, so that a test may wait out five minutes in a millisecond.

    def test_gives_up_after_five_minutes() -> None:
        run(scenario())

What to know before relying on it:

* Everything that speaks over the sockets must live in this loop. Another process or thread needs
  real time, and virtual time does not wait for it. Work handed to `run_in_executor` is waited for.
* Code that reads `time.monotonic` by itself sees real time: aiohttp's pool does so for the age of
  idle connections, which therefore never grow old here.
* A timer ends what is waiting for it, so an idle `sleep` in one task makes the time pass for all.
  A loop that polls (`while not done: await sleep(0.01)`) works, but pays for each turn.
* Bytes sent over loopback are there at once, or so the jump assumes; before one of more than
  `CAUTION_S` it gives the kernel a real millisecond to prove the contrary.
* With no timer at all the loop blocks for real; if nothing happens for `STUCK_S` it gives up.
"""

import asyncio
import os
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

CAUTION_S = 0.05
STUCK_S = 10.0
_GRACE_S = 0.001

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class StuckError(RuntimeError):
    """Nothing is scheduled and nothing arrives: every task waits for ever."""


class _JumpingSelector(selectors.DefaultSelector):
    """Asked to wait, it looks whether a socket is ready and moves the clock if none is."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.now = start
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.threads:
            return super().select(_GRACE_S)
        if timeout is None:
            return self._wait_for_real()
        os.sched_yield()
        ready = super().select(_GRACE_S if timeout > CAUTION_S else 0)
        if not ready:
            self.now += timeout
        return ready

    def _wait_for_real(self) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(STUCK_S)
        if not ready:
            raise StuckError(f"no timer, and no socket ready for {STUCK_S:g} real seconds")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A selector loop on virtual time, which begins at `start` seconds."""

    def __init__(self, start: float = 0.0) -> None:
        self._jumping = _JumpingSelector(start)
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds."""
        return self._jumping.now

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[*_Ts], _T],
        *args: *_Ts,
    ) -> asyncio.Future[_T]:
        """As usual, with the time standing still until the thread is done."""
        self._jumping.threads += 1
        future: asyncio.Future[_T] = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _: object) -> None:
        self._jumping.threads -= 1


def run(coro: Coroutine[Any, Any, _T], *, start: float = 0.0) -> _T:
    """Runs a coroutine in a fresh virtual loop to its end."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        return runner.run(coro)
