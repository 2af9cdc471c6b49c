"""Background tasks have an owner, and none dies unheard."""

from __future__ import annotations

import asyncio

from balancer.core.events import Event, Mishap
from balancer.net.tasks import Tasks
from tests.core.clocks import ManualClock


async def forever(log: list[str] | None = None) -> None:
    """Wait for nothing; tell of the end."""
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        if log is not None:
            log.append("ended")


async def fails() -> None:
    """Die."""
    raise LookupError("oops")


async def test_a_task_that_dies_is_told_and_the_others_go_on() -> None:
    """By name, with the kind of error and its text, once."""
    events: list[Event] = []
    tasks = Tasks(events.append, ManualClock(7.0))
    other = tasks.spawn(forever(), "other")
    dying = tasks.spawn(fails(), "dying")
    await asyncio.wait([dying])
    assert events == [Mishap(7.0, "dying", "LookupError: oops")]
    assert not other.done()
    assert len(tasks) == 1
    await tasks.close()


async def test_the_end_is_waited_for() -> None:
    """`close` cancels everybody and returns when the last has cleaned up; nothing is told."""
    events: list[Event] = []
    log: list[str] = []
    tasks = Tasks(events.append, ManualClock())
    for _ in range(3):
        tasks.spawn(forever(log), "task")
    await asyncio.sleep(0)
    await tasks.close()
    assert log == ["ended"] * 3
    assert (len(tasks), events) == (0, [])


async def test_a_task_ended_by_others_is_no_mishap() -> None:
    """Cancelling one is how it is ended."""
    events: list[Event] = []
    tasks = Tasks(events.append, ManualClock())
    task = tasks.spawn(forever(), "task")
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert (len(tasks), events) == (0, [])


async def test_a_closed_group_runs_nothing_more() -> None:
    """What is spawned during the end is ended too."""
    events: list[Event] = []
    log: list[str] = []
    tasks = Tasks(events.append, ManualClock())
    await tasks.close()
    late = tasks.spawn(forever(log), "late")
    await asyncio.wait([late])
    assert late.cancelled()
    assert (log, events, len(tasks)) == ([], [], 0)


async def test_a_task_that_spawns_another_as_it_ends_is_ended_with_it() -> None:
    """`close` goes on until nothing is left."""
    tasks = Tasks(lambda _: None, ManualClock())
    log: list[str] = []

    async def parent() -> None:
        try:
            await forever()
        finally:
            tasks.spawn(forever(log), "child")

    tasks.spawn(parent(), "parent")
    await asyncio.sleep(0)
    await tasks.close()
    assert len(tasks) == 0
