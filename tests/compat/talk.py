"""
What the tests of client libraries share: models, one way to call any client, and how hosts die.

    @pytest.fixture(params=["sync", "async"])
    async def call(request: pytest.FixtureRequest) -> AsyncIterator[Call]:
        async with calling(client_of, blocks=request.param == "sync") as call:
            yield call

    caller = call(rig)
    chunks = await caller.ask("chat.completions.create", model="llama3.2", stream=True)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from balancer.core.events import CallEnded
from balancer.sim.host import SimModel
from tests.conftest import Start
from tests.rig import Rig

SAID = (" The", " light", " ☃", " keeper", " sleeps.")
TEXT = "".join(SAID)
VECTOR = (0.0, 1.0, 0.0, 0.0)
LISTED = ["embed:latest", "endless:latest", "llama3.2:latest", "tooled:latest"]
TOOL_NAME = "get_weather"
TOOL_ARGUMENTS = {"city": "Paris"}
TOOL_SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "The weather",
        "parameters": TOOL_SCHEMA,
    },
}
ASKED = [{"role": "user", "content": "who sleeps?"}]
CALLS_TOOL = [{"role": "user", "content": f"call {TOOL_NAME}"}]

C = TypeVar("C")


def models() -> tuple[SimModel, ...]:
    """One of each kind, in no hurry to load and quick to answer, and one that never ends."""
    model = partial(SimModel, prompt_tps=1e6, decode_tps=5000.0)
    return (
        model("llama3.2", words=SAID),
        model("tooled", capabilities=("completion", "tools")),
        model("embed", capabilities=("embedding",), vector=VECTOR),
        SimModel("endless", words=SAID, endless=True),
    )


# -- calling ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """
    One interface to a package's clients, the blocking and the other; methods by dotted name.

    A blocking one is called in a thread.
    """

    client: Any
    blocks: bool

    async def ask(self, name: str, *path: Any, **given: Any) -> Any:
        """What a method answers; of a stream, its parts."""
        parts: list[Any] = []
        answer = await self.into(parts, name, *path, **given)
        return parts if given.get("stream") else answer

    async def into(self, parts: list[Any], name: str, *path: Any, **given: Any) -> Any:
        """The same, and the parts of a stream go into *parts* as they come."""
        method = attrgetter(name)(self.client)
        if self.blocks:
            return await asyncio.to_thread(_collect, method, path, given, parts)
        answer = await method(*path, **given)
        if given.get("stream"):
            async for part in answer:
                parts.append(part)  # noqa: PERF401 - what came before an error must be kept
        return answer


def _collect(
    method: Callable[..., Any], path: tuple[Any, ...], given: dict[str, Any], parts: list[Any]
) -> Any:
    answer = method(*path, **given)
    if given.get("stream"):
        parts.extend(answer)
    return answer


Call = Callable[[Rig], Caller]
Operation = Callable[[Caller], Awaitable[None]]


@asynccontextmanager
async def calling(make: Callable[[Rig], Any], *, blocks: bool) -> AsyncIterator[Call]:
    """Makes callers for a rig of what *make* makes; closes them all."""
    made: list[Caller] = []

    def call(rig: Rig) -> Caller:
        made.append(Caller(make(rig), blocks))
        return made[-1]

    yield call
    for caller in made:
        closing = caller.client.close()
        if closing is not None:
            await closing


# -- what happens to hosts ----------------------------------------------------------------------
#
# *call* makes whatever an operation takes, for a rig; an operation asserts what it is answered.


async def inference(rig: Rig, count: int) -> list[CallEnded]:
    """What became of the calls for inference, once so many have ended."""

    def ended() -> list[CallEnded]:
        return [one for one in rig.calls() if one.inference]

    await rig.events.until(lambda: len(ended()) >= count)
    return ended()


async def answers(
    start: Start, call: Callable[[Rig], C], operations: Sequence[Callable[[C], Awaitable[None]]]
) -> None:
    """Two healthy hosts."""
    rig = await start(2, models=models())
    caller = call(rig)
    for operation in operations:
        await operation(caller)


async def first_is_dead(
    start: Start, call: Callable[[Rig], C], operations: Sequence[Callable[[C], Awaitable[None]]]
) -> None:
    """The first backend of the list refuses connections, and nothing changes."""
    rig = await start(1, dead=["gone"], models=models())
    caller = call(rig)
    for operation in operations:
        await operation(caller)
    assert not rig.balancer.pool.members["gone"].health.up


async def dies_between(
    start: Start,
    call: Callable[[Rig], C],
    model: str,
    operation: Callable[[C], Awaitable[None]],
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    rig = await start(2, models=models())
    await rig.warm("a", model)
    caller = call(rig)
    await operation(caller)
    rig.fleet["a"].faults.refuse()
    await operation(caller)
    first, second = await inference(rig, 2)
    assert (first.backend, first.attempts) == ("a", 1)
    assert (second.backend, second.attempts, second.outcome) == ("b", 2, "ok")


async def dies_before_a_word(
    start: Start,
    call: Callable[[Rig], C],
    operation: Callable[[C], Awaitable[None]],
    fault: str = "cut",
    after: int = 0,
) -> None:
    """The host dies before anything was passed on; the call is taken up by another."""
    rig = await start(2, models=models())
    await rig.warm("a", "llama3.2")
    rig.fleet["a"].faults.apply(fault, after)
    await operation(call(rig))
    assert [one.attempts for one in await inference(rig, 1)] == [2]


async def dying(start: Start, fault: str = "cut", after: int = 2) -> Rig:
    """Two hosts that both die in the middle of every stream."""
    rig = await start(2, models=models())
    for host in rig.fleet:
        host.faults.apply(fault, after)
    return rig


async def all_gone(start: Start) -> Rig:
    """Two hosts that refuse connections, behind a queue in which nobody waits long."""
    rig = await start(2, models=models(), config={"queue.max_wait": "0.2s"})
    for host in rig.fleet:
        host.faults.refuse()
    return rig
