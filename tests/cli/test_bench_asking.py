"""The calls of a benchmark: against simulated hosts, and what is made of answers that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from aiohttp.test_utils import unused_port

from balancer.cli.bench_asking import Caller, Terms, generates, unreached
from balancer.cli.bench_choice import Choice, Copy
from balancer.cli.bench_rounds import Sample
from balancer.cli.client import Admin
from balancer.sim.fleet import Fleet
from balancer.sim.ollama import SimOllama

from .stub import Stub, serving

NOBODY = Admin("http://127.0.0.1:1", "secret-key")
FOREVER = 1e6


def terms(*copies: Copy, ends_at: float = FOREVER, context: int | None = 4096) -> Terms:
    """A clock that goes on by one with each look."""
    choice = Choice("llama3.2", context, copies)
    return Terms(choice, 8, "run", count(1.0).__next__, ends_at)


async def direct(host: SimOllama, ends_at: float = FOREVER, calls: int = 1) -> Sample:
    """The last of some calls that make tokens."""

    def work() -> Sample:
        caller = Caller(NOBODY, terms(Copy("a", host.url, ""), ends_at=ends_at))
        try:
            return [caller.stream("a") for _ in range(calls)][-1]
        finally:
            caller.close()

    return await asyncio.to_thread(work)


def asked(stub: Stub, call: Callable[[Caller], Sample]) -> Sample:
    """What becomes of one call to the stub as a backend."""
    caller = Caller(NOBODY, terms(Copy("a", f"http://127.0.0.1:{stub.port}/at", "")))
    try:
        return call(caller)
    finally:
        caller.close()


# -- calls -------------------------------------------------------------------------------------


async def test_a_stream_is_timed_as_it_arrives() -> None:
    """A moment for each token, whatever else is in the records; the backend's own count."""
    async with Fleet.test(1, speed=100.0, keeps_bodies=True) as fleet:
        sample = await direct(fleet["a"], calls=2)
        bodies = [json.loads(seen.body) for seen in fleet["a"].requests]
    assert (sample.backend, sample.wrong, sample.tokens) == ("a", "", 8)
    assert sample.first_s == 1.0
    assert set(sample.gaps_s) == {1.0}
    assert sample.load_s < 1.0
    options = {"num_predict": 8, "temperature": 0, "num_ctx": 4096}
    assert [body["options"] for body in bodies] == [options] * 2
    assert all("keep_alive" not in body for body in bodies)
    assert bodies[0]["prompt"] != bodies[1]["prompt"]
    assert bodies[0]["prompt"].startswith("run-001")


async def test_calls_without_tokens() -> None:
    """They are over at once; the second goes over the same connection."""
    async with Fleet.test(1, speed=100.0, keeps_bodies=True) as fleet:
        copy = Copy("a", fleet["a"].url, "")
        caller = Caller(NOBODY, terms(copy, context=None))
        try:
            empty = await asyncio.to_thread(caller.empty, "a")
            version = await asyncio.to_thread(caller.version, "a")
        finally:
            caller.close()
        (first, second) = fleet["a"].requests
    assert (empty.wrong, empty.first_s, empty.tokens) == ("", 1.0, 0)
    assert (version.wrong, version.first_s) == ("", 1.0)
    assert "num_ctx" not in json.loads(first.body)["options"]
    assert second.path == "/api/version"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda faults: faults.error_line(3, text="boom"), "a, directly: boom"),
        (lambda faults: faults.no_done(3), "a, directly: the answer ended in the middle"),
        (lambda faults: faults.cut(3), "a, directly: "),
        (lambda faults: faults.reset(3), "a, directly: "),
        (lambda faults: faults.queue_full(), "a, directly: 503: server busy"),
    ],
)
async def test_answers_that_break(fault: Callable[[Any], None], told: str) -> None:
    """Say where and how, and are not measured."""
    async with Fleet.test(1, speed=100.0) as fleet:
        fault(fleet["a"].faults)
        sample = await direct(fleet["a"])
    assert sample.wrong.startswith(told)
    assert not sample.late
    assert (sample.tokens, sample.gaps_s) == (0, ())


async def test_a_stream_that_stands_still_ends_with_the_time() -> None:
    """That is our doing, not a failure."""
    async with Fleet.test(1, speed=100.0) as fleet:
        fleet["a"].faults.stall(3)
        sample = await direct(fleet["a"], ends_at=0.0)
    assert (sample.late, sample.wrong) == (True, "a, directly: no end in time")


async def test_a_stream_that_goes_on_ends_with_the_time() -> None:
    """Though each of its records comes in time."""
    async with Fleet.test(1, speed=100.0) as fleet:
        sample = await direct(fleet["a"], ends_at=5.0)
    assert sample.late


def test_the_key_goes_to_the_balancer_alone() -> None:
    """To a backend it would be somebody else's secret; the path prefix of each is kept."""
    answers = {"/at/api/version": (200, {"version": "1"}), "/at/api/generate": (200, {"done": 1})}
    with serving(answers) as stub:
        there = f"http://127.0.0.1:{stub.port}/at"
        caller = Caller(Admin(there, "secret-key"), terms(Copy("a", there, "")))
        stub.headers["X-Balancer-Backend"] = "b"
        samples = [caller.version("a"), caller.version(None), caller.empty(None)]
        caller.close()
    assert [key for *_, key in stub.asked] == [None, "Bearer secret-key", "Bearer secret-key"]
    assert [(sample.backend, sample.wrong) for sample in samples] == [
        ("a", ""),
        ("b", ""),
        ("b", ""),
    ]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, {"error": "who\x1b?"}, "a, directly: 401: who??"),
        (500, "oops", "a, directly: 500: oops"),
        (200, "no JSON", "a, directly: no JSON"),
        (200, {"done": True}, "a, directly: the answer has no tokens in it"),
    ],
)
def test_answers_that_are_none(status: int, body: object, told: str) -> None:
    """In the words of who gave them, without what would steer a terminal."""
    with serving({"/at/api/generate": (status, body)}) as stub:
        assert asked(stub, lambda caller: caller.stream("a")).wrong == told


def test_nobody_there() -> None:
    """Is a failure of that call."""
    copy = Copy("a", f"http://127.0.0.1:{unused_port()}", "")
    assert Caller(NOBODY, terms(copy)).empty("a").wrong == "a, directly: connection refused"


def test_thoughts_are_tokens() -> None:
    """A model that thinks first answers with its first thought."""
    records = [{"thinking": "hm"}, {"response": ""}, {"response": "one"}, {"done": True}]
    told = "".join(f"{json.dumps(record)}\n" for record in records)
    with serving({"/at/api/generate": (200, told)}) as stub:
        sample = asked(stub, lambda caller: caller.stream("a"))
    assert (sample.wrong, sample.first_s, sample.gaps_s, sample.tokens) == ("", 1.0, (2.0,), 2)


# -- who is there ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, {"models": [{"digest": "abc"}]}), ""),
        ((200, {"models": [{"digest": "xyz"}, 1]}), "does not have llama3.2 in memory"),
        ((200, {"models": []}), "does not have llama3.2 in memory"),
        ((200, {}), "does not answer like Ollama from here (status 200 for /api/ps)"),
        ((404, "nothing"), "does not answer like Ollama from here (status 404 for /api/ps)"),
        ((401, {}), "wants a credential, which only the balancer has (status 401)"),
    ],
)
def test_who_can_be_called_directly(answer: tuple[int, object], told: str) -> None:
    """Only who shows that very model in memory: an address may mean another host here."""
    with serving({"/at/api/ps": answer}) as stub:
        copy = Copy("a", f"http://127.0.0.1:{stub.port}/at/", "abc")
        found = unreached(copy, Choice("llama3.2", None, (copy,)))
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_who_is_not_there_cannot_be_called() -> None:
    """And the reason is told."""
    copy = Copy("a", f"http://127.0.0.1:{unused_port()}", "abc")
    told = unreached(copy, Choice("m", None, (copy,)))
    assert told == "cannot be reached from here: connection refused"


@pytest.mark.parametrize(
    ("told", "does"),
    [
        ({"capabilities": ["completion", "tools"]}, True),
        ({"capabilities": ["embedding"]}, False),
        ({}, True),
    ],
)
def test_who_makes_text(told: object, does: bool) -> None:
    """By the capabilities that `show` tells; a release that tells none is believed."""
    with serving({"/api/show": (200, told)}) as stub:
        assert generates(Admin(f"http://127.0.0.1:{stub.port}"), "m") is does
