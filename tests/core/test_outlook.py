"""What is foretold, against what then happens."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from balancer.core.cost import Need
from balancer.core.domain import Allowance, Call, Principal, Role
from balancer.core.pins import Pin, Pins
from balancer.core.scheduler import Load, Rehearsal, Ticket
from tests.core.bench import backend, call, canon, key
from tests.core.planned import Planned, at_rest, crowded, where


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


NEED = Need(0.0, 256.0, 0.0)


def ticket(asked: Call, now: float = 1000.0) -> Ticket:
    """A call that waits nowhere."""
    return Ticket(asked, 9999, frozenset(), (), now, now + 60)


def told(bench: Planned, asked: Call) -> Rehearsal:
    """What is said of a call, to people and to the queue: both are told the same wait."""
    now = bench.clock()
    its = ticket(asked, now)
    found = bench.plan.rehearse(its, bench.pool, now)
    assert found.wait_s == bench.plan.wait_estimate(its, now)
    return found


def test_an_estimate_of_the_wait(uneven: Planned) -> None:
    """Nothing for whoever goes at once, longer the more wait, unknown where nobody serves."""
    waits = []
    for number in range(6):
        found = told(uneven, call())
        client = uneven.submit(id=f"r{number}")
        assert (found.wait_s == 0.0) == bool(client.leases)
        waits += [found.wait_s] if client.waits else []
        uneven.pour(0.5, 60)
    assert waits == sorted(waits)
    assert 0.0 < waits[0] < waits[-1] < math.inf
    assert told(uneven, call("unknown:1")).wait_s == math.inf


def test_the_wait_is_that_of_the_backend_it_is_for(bench: Planned) -> None:
    """However many are ahead, whether anybody has thought of them yet or not."""
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    waits = []
    for number in range(300):
        bench.submit(id=f"r{number}")
        if number % 60 == 59:
            found = told(bench, call())
            assert found.turn is not None
            assert found.turn.ahead == number - 1
            assert found.wait_s == found.options[0].terms["wait_s"]
            assert sum(option.terms["promised"] for option in found.options) == number - 1
            waits.append(found.wait_s / found.turn.ahead)
    assert waits == pytest.approx([waits[0]] * 5, rel=0.1)


@pytest.mark.parametrize(("slots", "ahead"), [(20, 0), (2, 1)])
def test_batch_that_gives_way_is_not_ahead(bench: Planned, slots: int, ahead: int) -> None:
    """But it is ahead of other batch, and of all where so few slots are that none is kept free."""
    bench.shape(backend("a", slots=slots))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}", fair_key=f"k{n}") for n in range(slots)]
    batch = [bench.submit(id=f"b{n}", batch=True, fair_key="b") for n in range(5)]
    found, other = told(bench, call(fair_key="k")), told(bench, call(batch=True, fair_key="b"))
    assert found.turn is not None
    assert other.turn is not None
    assert (found.turn.ahead, other.turn.ahead) == (ahead, 5)
    assert found.wait_s == found.options[0].terms["wait_s"] <= other.wait_s
    last = bench.submit(id="last", fair_key="k")
    bench.end(running[0])
    assert where(last, batch[0]) == (["", "a"] if ahead else ["a", ""])


def test_calls_beyond_their_owners_limit_are_not_ahead(bench: Planned) -> None:
    """But for those of the same owner, who go first."""
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.submit(id="running", owner="k", fair_key="k")
    few = Principal("k", Role.USER, allowance=Allowance(slots=2))
    for number in range(5):
        bench.submit(id=f"w{number}", owner="k", fair_key="k", principal=few)
    ahead = []
    for who in ("k", "j"):
        found = told(bench, call(owner=who, fair_key="k", principal=few))
        assert found.turn is not None
        ahead.append(found.turn.ahead)
    assert ahead == [5, 1]


def test_a_higher_tier_comes_first_though_it_costs_more(bench: Planned) -> None:
    """As long as that is not too much; those ahead are thought to go by the same rule."""
    bench.shape(backend("a", slots=1, priority=50), backend("b", slots=1, priority=100))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.submit()
    found = told(bench, call())
    assert found.text == (
        "holds for a slot on b, which has a higher priority than a, where a slot is free"
    )
    first, second = found.options
    assert (first.backend, first.why.partition(":")[0]) == ("b", "comes first")
    assert (second.backend, second.why.partition(":")[0]) == ("a", "costs less")
    ahead = Counter[str]()
    bench.plan.outlook._spread(ahead, 2, bench.plan.turns.preview(ticket(call()), NEED), 1000.0)
    assert ahead == {"b": 2}
    bench.plan.outlook._spread(ahead, 9, bench.plan.turns.preview(ticket(call()), NEED), 1000.0)
    assert ahead["a"] > 0


def test_options_stand_in_the_order_in_which_they_would_be_chosen(bench: Planned) -> None:
    """By tier if that is not dear, what is tried after the free, too short a context last."""
    bench.shape(
        backend("a", priority=50),
        backend("b", priority=100),
        backend("c", priority=100),
        backend("d", priority=100),
        backend("e", priority=100),
        backend("f", slots=None, priority=100),
        backend("g", priority=40),
    )
    rates = {"a": 60.0, "b": 30.0, "c": 45.0, "d": 2.0, "e": 120.0, "f": 100.0, "g": 90.0}
    for name, rate in rates.items():
        bench.up(name, "m:1")
        bench.holds(name, "m:1", context=2048 if name == "e" else 16_384)
        bench.speed(name, decode_rate=rate)
    bench.speed("f", prompt_rate=9000.0, decode_rate=300.0)
    running = [bench.submit(id=f"r{n}", prompt_tokens=3000) for n in range(2)]
    bench.pour(6.0, 60, *running)
    assert where(*running) == ["f", "f"]
    found = told(bench, call(prompt_tokens=3000))
    assert [option.backend for option in found.options] == list("cbfagde")
    names = []
    while (rehearsal := told(bench, call(prompt_tokens=3000))).options:
        names.append(rehearsal.options[0].backend)
        bench.go_down(names[-1])
    assert names == list("cbfagde")
    for client in running:
        client.lease.release()


def test_who_embeds_waits_for_those_ahead(bench: Planned) -> None:
    """Though the runner's slots are not counted."""
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    waits = []
    for number in range(60):
        bench.submit(
            path="/api/embed", id=f"r{number}", embedding=True, prompt_tokens=20_000, owner="k"
        )
        found = told(bench, call(path="/api/embed", embedding=True, prompt_tokens=20_000))
        assert found.wait_s == found.options[0].terms["wait_s"]
        waits.append(found.wait_s)
    assert waits[-1] > waits[5] + 2.0


def test_why_a_backend_is_no_candidate(bench: Planned) -> None:
    """Told of each that may serve the call and cannot now: full, in use by a load, failed."""
    crowded(bench)
    running = bench.submit(id="running")

    def barred() -> str:
        now = bench.clock()
        ticket = Ticket(call("o:1"), 9, frozenset(), (), now, now + 60)
        return bench.plan.rehearse(ticket, bench.pool, now).barred["a"]

    assert barred() == "not in memory, and there is no room: m:1 is in use"
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


def test_why_another_variant_stays(bench: Planned) -> None:
    """Of the very model is said that it has other options, and who keeps it so."""
    bench.start("a", "m:1", "n:1", loaded=["m:1"])
    bench.pool.pins = Pins([Pin(canon("m:1"), ("a",), 1, key("m:1", num_ctx=8192), exact=True)])
    running, asked = bench.submit(id="running"), call(options={"num_ctx": 8192})
    why = told(bench, asked).barred["a"]
    assert why == "in memory with other options (context 4096): in use"
    bench.end(running)
    assert isinstance(told(bench, asked).effect, Load)
