"""One order on several backends, by a door that does what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, cast

import pytest

from balancer.core.domain import Call
from balancer.core.fanout import Merger, Record
from balancer.core.verdicts import Failure, FailureKind
from balancer.net.spread import BROKEN_OFF, ENDED_SHORT, LONGEST_LINE, Spread
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Sink, Target
from tests.core.clocks import ManualClock

from .parts import a_call

LAYER = "sha256:" + "a" * 64


class Door:
    """Remembers who was asked, in order; a test answers in their place."""

    def __init__(self) -> None:
        self.sinks: dict[str, Sink] = {}
        self.aborted: list[str] = []
        self.asked: list[str] = []
        self._news = asyncio.Event()

    def send(self, target: Target, call: Call, sink: Sink, *, patient: bool) -> Any:
        """One exchange."""
        name = target.url
        self.asked.append(name)
        self.sinks[name] = sink
        self._news.set()
        door = self

        class Handle:
            def abort(self) -> None:
                door.aborted.append(name)

        return Handle()

    async def until(self, name: str) -> Sink:
        """Wait until a backend is asked."""
        while name not in self.sinks:
            self._news.clear()
            await self._news.wait()
        return self.sinks[name]

    async def says(self, name: str, *records: Record, status: int = 200, ends: bool = True) -> None:
        """A backend's answer."""
        sink = await self.until(name)
        sink.head(status, ())
        for record in records:
            sink.data(json.dumps(record).encode() + b"\n")
        if ends:
            sink.end()


class Bench:
    """An order on the backends of some groups."""

    def __init__(self, *groups: Sequence[str], parallel: int = 9) -> None:
        self.door = Door()
        self.clock = ManualClock()
        self.made: dict[str, str] = {}
        self.tasks = Tasks(lambda _: None, self.clock)
        names = [name for group in groups for name in group]
        self.spread = Spread(
            groups,
            {name: Target(name) for name in names},
            Merger(names, self.clock),
            a_call(),
            cast("ClientUpstream", self.door),
            parallel=parallel,
            idle_s=None,
            stands=self._stands,
        )
        self.task = self.spread.start(self.tasks, "test")

    async def _stands(self, name: str) -> str:
        return self.made.get(name, "")

    def watching(self) -> asyncio.Task[list[Record]]:
        """Somebody who watches to the end."""
        return asyncio.get_running_loop().create_task(self.told())

    async def told(self) -> list[Record]:
        """All that a watcher is told."""
        async with aclosing(cast("Any", self.spread.watch())) as records:
            return [record async for record in records]


def layer(completed: int, total: int = 8_000_000_000) -> Record:
    """A record of a download."""
    return {"status": "pulling aaaa", "digest": LAYER, "total": total, "completed": completed}


GOOD: tuple[Record, ...] = ({"status": "pulling manifest"}, {"status": "success"})


async def test_success_is_said_once_by_all() -> None:
    """Each is asked once; the last record is the only success."""
    bench = Bench("a", "b")
    watching = bench.watching()
    await bench.door.says("a", *GOOD)
    await bench.door.says("b", layer(8_000_000_000), *GOOD)
    records = await watching
    assert [record["status"] for record in records].count("success") == 1
    assert records[-1]["status"] == "success"
    assert bench.door.asked == ["a", "b"]
    assert not bench.spread.is_open


@pytest.mark.parametrize(
    ("pieces", "status", "error"),
    [
        ([b'{"status":"pulling manifest"}\n'], 200, ENDED_SHORT),
        ([b"{no JSON}\n[1]\n\n"], 200, ENDED_SHORT),
        ([b'{"error":"no space left"}\n'], 200, "no space left"),
        ([b'{"error":', b'"in\\npieces"}'], 400, "in\npieces"),
        ([b"<html>"], 502, "HTTP 502"),
        ([b"x" * (LONGEST_LINE + 1)], 200, "sent an endless line"),
    ],
)
async def test_what_does_not_say_success_has_failed(
    pieces: list[bytes], status: int, error: str
) -> None:
    """Whatever else it says; the status of a refusal is kept."""
    bench = Bench("a")
    watching = bench.watching()
    sink = await bench.door.until("a")
    sink.head(status, ())
    for piece in pieces:
        sink.data(piece)
    sink.end()
    assert (await watching)[-1]["error"] == error
    assert bench.spread.status == (0 if status == 200 else status)
    assert bench.door.aborted == ["a"]


async def test_one_whose_connection_ends_fails_alone() -> None:
    """The others go on, and the last record names it."""
    bench = Bench("a", "b")
    watching = bench.watching()
    (await bench.door.until("a")).fail(Failure(FailureKind.CUT, accepted=True))
    await bench.door.says("b", *GOOD)
    assert "failed on 1 of 2 hosts: a: " in (await watching)[-1]["error"]


async def test_so_many_at_once() -> None:
    """The third is asked when the first has ended."""
    bench = Bench("a", "b", "c", parallel=2)
    watching = bench.watching()
    await bench.door.until("b")
    await asyncio.sleep(0)
    assert bench.door.asked == ["a", "b"]
    await bench.door.says("b", *GOOD)
    await bench.door.says("c", *GOOD)
    await bench.door.says("a", *GOOD)
    assert (await watching)[-1]["status"] == "success"


@pytest.mark.parametrize(("theirs", "asked"), [("1", "a"), ("0", "ab"), ("", "ab")])
async def test_who_has_the_same_afterwards_is_not_asked(theirs: str, asked: str) -> None:
    """One that still has an older model, or none, keeps its files elsewhere after all."""
    bench = Bench("ab")
    bench.made = {"a": "1", "b": theirs}
    watching = bench.watching()
    await bench.door.says("a", *GOOD)
    if "b" in asked:
        await bench.door.says("b", *GOOD)
    assert (await watching)[-1]["status"] == "success"
    assert bench.door.asked == list(asked)


async def test_the_last_to_leave_ends_the_work() -> None:
    """Until then it goes on; afterwards nobody can join."""
    bench = Bench("a")
    first, second = bench.spread.watch(), bench.spread.watch()
    await bench.door.says("a", {"status": "pulling manifest"}, ends=False)
    for watcher in (first, second):
        assert (await anext(watcher))["status"] == "pulling manifest"
    await _leave(first)
    assert bench.spread.is_open
    assert not bench.door.aborted
    await _leave(second)
    assert not bench.spread.is_open
    await asyncio.wait({bench.task})
    assert bench.door.aborted == ["a"]


async def _leave(watcher: AsyncIterator[Record]) -> None:
    await cast("Any", watcher).aclose()


async def test_a_stop_is_told() -> None:
    """A stream that just ends would look like one that came to its end."""
    bench = Bench("a")
    watching = bench.watching()
    await bench.door.says("a", {"status": "pulling manifest"}, ends=False)
    await asyncio.sleep(0)
    await bench.tasks.close()
    assert (await watching)[-1]["error"] == BROKEN_OFF


async def test_a_slow_reader_is_told_the_newest() -> None:
    """Hours of records of one layer wait as one."""
    bench = Bench("a")
    watcher = bench.spread.watch()
    await bench.door.says("a", {"status": "pulling manifest"}, ends=False)
    await anext(watcher)
    for gigabytes in range(1, 8):
        bench.clock.now += 1.0
        bench.door.sinks["a"].data(json.dumps(layer(gigabytes * 10**9)).encode() + b"\n")
    assert (await anext(watcher))["completed"] == 7 * 10**9
    bench.door.sinks["a"].fail(Failure(FailureKind.CUT))
    assert "error" in await anext(watcher)
    await _leave(watcher)


async def test_who_comes_late_is_told_what_was_missed() -> None:
    """In order, without the steps between."""
    bench = Bench("a")
    early = bench.watching()
    await bench.door.says("a", {"status": "pulling manifest"}, layer(5), ends=False)
    late = bench.watching()
    await asyncio.sleep(0)
    bench.door.sinks["a"].data(b'{"status":"success"}\n')
    bench.door.sinks["a"].end()
    assert [record.get("completed") for record in await late][:2] == [None, 5]
    assert (await early)[-1] == (await late)[-1]
