"""Background tasks with an owner: nothing is spawned that nobody awaits or ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from balancer.core.events import Emit, Mishap


class Tasks:
    """
    A group of tasks that can be joined at any time and ended all at once.

    A task that dies of anything but its own cancellation is told as a `Mishap`; the others go on.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *coro* in the background, owned by this group."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(coro, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        if self._closed:
            task.cancel()
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._emit(Mishap(self._clock(), task.get_name(), f"{type(error).__name__}: {error}"))

    async def close(self) -> None:
        """Cancel what runs and wait for its end."""
        self._closed = True
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)
