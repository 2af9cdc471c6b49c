"""Conversations: a next turn goes where its beginning is cached, told by how it begins."""

from __future__ import annotations

import pytest

from balancer.core.domain import Call, Switch
from balancer.core.scheduler import Began, Fact
from tests.e2e.stage import is_whole, models, virtual
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

LONG = "Once upon a time there was a llama. " * 200
FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}]
SECOND = [*FIRST, {"role": "assistant", "content": "So?"}, {"role": "user", "content": "Go on."}]


def granted(rig: Rig) -> list[Call]:
    """From now on, each call as it was granted."""
    calls: list[Call] = []
    note = rig.balancer.pool.note

    def noting(fact: Fact) -> None:
        if isinstance(fact, Began):
            calls.append(fact.run.call)
        note(fact)

    rig.balancer.pool.note = noting
    return calls


async def goes_to(rig: Rig, messages: list[dict[str, str]], **headers: str) -> str | None:
    """Where a turn was answered."""
    body = {"model": "m", "messages": messages}
    reply = await rig.ask("POST", "/api/chat", body, **headers)
    assert is_whole(reply, "/api/chat")
    return reply.get("x-balancer-backend")


async def begun_on_b(rig: Rig, **headers: str) -> None:
    """Both have the model, and the first turn was b's, for a was away."""
    for name in "ab":
        await rig.warm(name, "m")
    rig.balancer.pool.turn("a", Switch.DRAINING)
    assert await goes_to(rig, FIRST, **headers) == "b"
    rig.balancer.pool.turn("a", Switch.SERVING)


@pytest.mark.parametrize("speed", [1.0, 20.0])
@virtual
async def test_the_next_turn_goes_where_the_first_one_is_cached(speed: float) -> None:
    """The other is as free and as warm, and its name comes first; another talk goes there."""
    async with running(2, models=models(0.0, speed=speed)) as rig:
        await begun_on_b(rig)
        assert await goes_to(rig, SECOND) == "b"


@virtual
async def test_who_wants_no_affinity_has_none() -> None:
    """Nothing is hashed, and who is free and first gets the next turn."""
    off = {"routing.affinity.enabled": False}
    async with running(2, models=models(0.0, speed=6.0), config=off) as rig:
        calls = granted(rig)
        await begun_on_b(rig)
        assert [call.chain for call in calls] == [()]


@pytest.mark.parametrize(
    ("hosts", "config", "has_chain"),
    [
        (2, {}, True),
        (1, {}, False),
        (2, {"routing.strategy": "least-loaded"}, False),
        (2, {"routing.affinity.keys": ["header:X-Session-Id"]}, False),
        (2, {"routing.affinity.keys": ["prefix"]}, True),
    ],
)
@virtual
async def test_prompts_are_hashed_only_where_it_may_matter(
    hosts: int, config: dict[str, object], has_chain: bool
) -> None:
    """Where there is a choice, a strategy that looks at it, and an operator who wants it."""
    async with running(hosts, models=models(0.0), config=config) as rig:
        await rig.warm("a", "m")
        calls = granted(rig)
        await goes_to(rig, FIRST)
        ((links, shared),) = ((call.chain, call.shared) for call in calls)
        assert (len(links), shared) == ((2, 1) if has_chain else (0, 0))


@virtual
async def test_an_alias_is_a_conversation_of_its_own() -> None:
    """Its models may be several, so there is a choice even where each has one host."""
    config: dict[str, object] = {"models.aliases": {"fast": ["m"]}}
    async with running(2, models=models(0.0), config=config) as rig:
        for name in "ab":
            await rig.warm(name, "m")
        calls = granted(rig)
        for messages in (FIRST, SECOND):
            body = {"model": "fast", "messages": messages}
            assert is_whole(await rig.ask("POST", "/api/chat", body), "/api/chat")
        first, second = (call.chain for call in calls)
        assert second[: len(first)] == first
