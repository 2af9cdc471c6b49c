"""Jobs as requests: sizes as told, the same words in every turn, and the way back."""

from __future__ import annotations

import json

import pytest

from balancer.core import chains, routes
from balancer.core.body import read
from balancer.sim.bodies import Bodies
from balancer.sim.jobs import Job
from balancer.sim.machine import Model

M, E = Model("m"), Model("e", embedding=True)
FIRST = Job(0.0, "m", 400, 30, chain=((11, 300), (12, 400)), shared=1)
SECOND = Job(0.0, "m", 480, 30, chain=((11, 300), (12, 400), (13, 430), (14, 480)), shared=1)
JOBS = [FIRST, SECOND, Job(0.0, "m", 77, 5), Job(0.0, "e", 50, 0)]


@pytest.mark.parametrize("place", range(len(JOBS)))
def test_the_product_reads_as_many_tokens_as_the_job_has(place: int) -> None:
    """By bytes over four, which is what it has to go by."""
    path, body = Bodies(JOBS, [M, E]).of(place)
    told = read(routes.find("POST", path), body)
    assert told.prompt_tokens == pytest.approx(JOBS[place].prompt_tokens, abs=1)


def test_each_request_tells_its_job() -> None:
    """Also where a turn repeats what was said before; and strangers are nobody's."""
    bodies = Bodies(JOBS, [M, E])
    places = [bodies.place(json.loads(bodies.of(place)[1])) for place in range(len(JOBS))]
    assert places == [0, 1, 2, 3]
    assert bodies.place({"prompt": "hello there"}) is None


def test_a_turn_begins_as_the_one_before() -> None:
    """In the product's own links, of which there are as many as the job has."""
    bodies = Bodies(JOBS, [M, E])
    route = routes.find("POST", "/api/chat")
    (first, shared), (second, _) = (chains.chain(bodies.of(at)[1], route) for at in (0, 1))
    assert second[: len(first)] == first
    assert shared == 1
    assert [tokens for _, tokens in second] == pytest.approx([300, 400, 430, 480], abs=2)
    roles = [m["role"] for m in json.loads(bodies.of(1)[1])["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_prompts_begin_alike_whatever_follows() -> None:
    """One more link, or none, changes nothing of what stands before it."""
    links = ((1, 100), (2, 200), (3, 300), (4, 400))
    jobs = [Job(0.0, "m", 100 * n, 5, chain=links[:n]) for n in (2, 3, 4)]
    route, bodies = routes.find("POST", "/api/chat"), Bodies(jobs, [M])
    whole, *chains_of = (chains.chain(bodies.of(at)[1], route)[0] for at in (2, 0, 1))
    assert [whole[: len(each)] for each in chains_of] == chains_of


def test_jobs_that_cannot_be_told_apart_are_refused() -> None:
    """Two with one chain would be one to the host."""
    with pytest.raises(ValueError, match="same chain"):
        Bodies([FIRST, FIRST], [M])
