"""
One order on many backends: sent to each, its progress merged, told to whoever watches.

Laws:
- At most so many backends work at once; the rest wait their turn.
- An order belongs to those who watch it: when the last has gone, the work is broken off.
- A watcher that reads slowly is told less, never later: of one layer only the newest record waits.
- A stream that does not end in success ends in an error, also when we stop.
- Nothing here touches a breaker: fetching a file says nothing of how a backend answers calls.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from balancer.core import verdicts
from balancer.core.domain import Call
from balancer.core.fanout import SUCCESS, Merger, Record
from balancer.core.verdicts import Failure
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Handle, Target

LONGEST_LINE: Final = 1024 * 1024
ENDED_SHORT: Final = "ended without saying that it succeeded"
BROKEN_OFF: Final = "the balancer broke it off; ask again"


class _Host:
    """The sink of one backend's progress."""

    def __init__(self, name: str, spread: Spread) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._name = name
        self._spread = spread
        self._status = 0
        self._rest = b""

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:  # noqa: ARG002
        """The answer's head."""
        self._status = status

    def data(self, data: bytes) -> None:
        """Bytes of its body."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._status == 200:
            for line in lines:
                self._line(line)
        else:
            self._rest = b"".join([*lines, self._rest])
        if len(self._rest) > LONGEST_LINE:
            self._end("sent an endless line")

    def end(self) -> None:
        """It is complete."""
        if self._status == 200:
            self._line(self._rest)
            self._end(ENDED_SHORT)
        else:
            text = verdicts.error_text(self._rest)
            self._end(f"HTTP {self._status}" if text is None else text)

    def fail(self, failure: Failure) -> None:
        """It is not, and will not be."""
        self._end(failure.text)

    def _line(self, line: bytes) -> None:
        try:
            record: Any = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            return
        if isinstance(record, dict):
            self._spread.heard(self._name, record)

    def _end(self, otherwise: str) -> None:
        """What it is called if it has not said itself how it ended."""
        if not self.over.done():
            self._spread.ended(self._name, otherwise, self._status)
            self.over.set_result(None)


class Spread:
    """
    One order under way.

    Args:
        groups: The backends it goes to; those of one group are thought to share their files, so
            that the first does the work and the others are asked only for what they still lack.
        targets: How each is reached.
        call: As it is sent to each.
        parallel: How many groups may work at once.
        idle_s: Longest silence of one backend; None: any.
        stands: Reads a backend's list again: what stands there under the model's name, empty:
            nothing. Two backends that have the same say the same.

    Attributes:
        status: The HTTP status of the first backend that refused, 0: none did.
        told: Progress has been told.
        is_open: It can be joined: it is under way, and has not been given up.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        targets: Mapping[str, Target],
        merger: Merger,
        call: Call,
        upstream: ClientUpstream,
        *,
        parallel: int,
        idle_s: float | None,
        stands: Callable[[str], Awaitable[str]],
    ) -> None:
        self.merger = merger
        self.status = 0
        self.told = False
        self.is_open = True
        self._groups = groups
        self._targets = {n: replace(t, idle_s=idle_s) for n, t in targets.items()}
        self._call = call
        self._upstream = upstream
        self._turn = asyncio.Semaphore(parallel)
        self._stands = stands
        self._followers: dict[str, Sequence[str]] = {}
        self._watchers: set[_Watcher] = set()
        self._task: asyncio.Task[Any] | None = None

    def start(self, tasks: Tasks, name: str) -> asyncio.Task[Any]:
        """Begin."""
        self._task = tasks.spawn(self._run(), name)
        return self._task

    # -- the work ------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as work:
                for group in self._groups:
                    work.create_task(self._group(group))
            self._tell(self.merger.last())
        except asyncio.CancelledError:
            self._tell([self.merger.record({"error": BROKEN_OFF})])
            raise
        finally:
            self.is_open = False
            for watcher in self._watchers:
                watcher.close()

    async def _group(self, group: Sequence[str]) -> None:
        first, *others = group
        self._followers[first] = others
        async with self._turn:
            await self._one(first)
            made = await self._stands(first) if first in self.merger.succeeded else ""
            del self._followers[first]
            for name in others:
                if made and await self._stands(name) == made:
                    self._tell(self.merger.finish(name))
                else:
                    await self._one(name)
                    await self._stands(name)

    async def _one(self, name: str) -> None:
        host = _Host(name, self)
        target = self._targets[name]
        handle: Handle = self._upstream.send(target, self._call, host, patient=False)
        try:
            await host.over
        finally:
            handle.abort()

    def heard(self, name: str, record: Record) -> None:
        """A backend told something, which goes for those that share its files, too."""
        self._tell(self.merger.feed(name, record))
        if record.get("status") != SUCCESS and "error" not in record:
            for other in self._followers.get(name, ()):
                self._tell(self.merger.feed(other, record))

    def ended(self, name: str, otherwise: str, status: int) -> None:
        """A backend's answer is over; without a success it has failed."""
        if status not in (0, 200):
            self.status = self.status or status
        self._tell(self.merger.fail(name, otherwise))

    # -- those who watch -----------------------------------------------------------------------

    def _tell(self, records: Sequence[Record]) -> None:
        for record in records:
            self.told = self.told or "status" in record
            for watcher in self._watchers:
                watcher.put(record)

    async def watch(self) -> AsyncIterator[Record]:
        """What there is to tell, up to the last record. The last to leave ends the work."""
        watcher = _Watcher()
        for record in self.merger.so_far():
            watcher.put(record)
        self._watchers.add(watcher)
        try:
            while (next_record := await watcher.get()) is not None:
                yield next_record
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._task is not None:
                self.is_open = False
                self._task.cancel()


class _Watcher:
    """What one client has not been told yet."""

    def __init__(self) -> None:
        self._waiting: dict[object, Record] = {}
        self._news = asyncio.Event()
        self._closed = False

    def put(self, record: Record) -> None:
        key = record.get("digest") or record.get("status") or "error"
        self._waiting.pop(key, None)
        self._waiting[key] = record
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def get(self) -> Record | None:
        """The next record; None: there will be none."""
        while not self._waiting:
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        return self._waiting.pop(next(iter(self._waiting)))
