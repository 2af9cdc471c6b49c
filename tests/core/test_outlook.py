"""What is foretold, against what then happens."""

from __future__ import annotations

import itertools
import math

from balancer.core.scheduler import Ticket
from tests.core.bench import call
from tests.core.planned import Planned, at_rest, crowded


def test_a_rehearsal_says_what_would_happen_and_does_nothing(uneven: Planned) -> None:
    """Free, held and cold; the same as comes of it then."""
    plan, now = uneven.plan, uneven.clock()

    def rehearsed(model: str = "m:1") -> tuple[str, list[str]]:
        ticket = Ticket(call(model, prompt_tokens=1000), 9, frozenset(), (), now, now + 60)
        told = plan.rehearse(ticket, uneven.pool, uneven.clock())
        effect = told.effect
        return type(effect).__name__, [option.backend for option in told.options]

    assert rehearsed() == ("Commit", ["a", "b"])
    assert at_rest(plan)
    first = uneven.submit(prompt_tokens=1000)
    uneven.pour(1.5, 120, first)
    assert rehearsed() == ("NoneType", ["a", "b"])
    uneven.lists("a", "m:1", "n:1")
    assert rehearsed("n:1") == ("Load", ["a"])
    assert uneven.loads == []


def test_an_estimate_of_the_wait(uneven: Planned) -> None:
    """Nothing while a slot is free, longer the more wait, and nobody knows where nobody serves."""
    plan, seq = uneven.plan, itertools.count(50)

    def estimate(model: str = "m:1") -> float:
        now = uneven.clock()
        ticket = Ticket(call(model), next(seq), frozenset(), (), now, now + 60)
        return plan.wait_estimate(ticket, now)

    assert estimate() == 0.0
    for number in range(2):
        uneven.submit(id=f"r{number}")
        uneven.pour(0.5, 60)
    waits = []
    for number in range(4):
        uneven.submit(id=f"w{number}")
        waits.append(estimate())
    assert waits == sorted(waits)
    assert 0.0 < waits[0] < waits[-1] < math.inf
    assert estimate("unknown:1") == math.inf


def test_why_a_backend_is_no_candidate(bench: Planned) -> None:
    """Told of each that may serve the call and cannot now: full, in use by a load, failed."""
    crowded(bench)
    running = bench.submit(id="running")

    def barred() -> str:
        now = bench.clock()
        ticket = Ticket(call("o:1"), 9, frozenset(), (), now, now + 60)
        return bench.plan.rehearse(ticket, bench.pool, now).barred["a"]

    assert barred() == "not in memory, and there is no room: m:1 is in use or pinned"
    bench.end(running)
    bench.lists("a", "m:1", "o:1", "p:1")
    bench.submit("p:1", id="other")
    assert barred() == "not in memory, and p:1 is being loaded there"


def test_a_call_without_a_prompt_is_foretold_with_the_usual_one(uneven: Planned) -> None:
    """Which is said; nobody's own is replaced."""
    uneven.end(uneven.submit(prompt_tokens=700))
    now, tokens = uneven.clock(), {}
    for own in (0, 90):
        ticket = Ticket(call(prompt_tokens=own), 9, frozenset(), (), now, now + 60)
        told = uneven.plan.rehearse(ticket, uneven.pool, now)
        tokens[told.prompt_tokens] = told.options[0].terms["new_tokens"]
    assert tokens == {700: 700, None: 90}
