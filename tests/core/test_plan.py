"""The plan: what becomes of calls, situation by situation, with the real pool and by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from balancer.core.contexts import Contexts, Policy, Rule, Rules, applied
from balancer.core.cost import GO, HOLD
from balancer.core.domain import Allowance, Call, Principal, Role
from balancer.core.events import LeaseGranted
from balancer.core.greedy import POLICIES, Greedy
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.pool import Lease
from balancer.core.scheduler import Commit, Load, Ticket, WakeAt
from tests.core.bench import PoolBench, backend, call, key, tried
from tests.core.planned import FAST, SLOW, M, Planned, at_rest, where

# -- warm ---------------------------------------------------------------------------------------


def test_warm_and_free(bench: Planned) -> None:
    """It goes at once, to the quickest, and the plan looks after it from then on."""
    for name in "abc":
        bench.start(name, "m:1", loaded=["m:1"])
    bench.speed("b", **FAST)
    client = bench.submit(prompt_tokens=1000)
    assert where(client) == ["b"]
    assert bench.of(LeaseGranted)[-1].why == "warm"
    assert bench.wake_at == bench.clock() + bench.plan.knobs.tick_s
    bench.end(client)
    assert at_rest(bench.plan)


def test_ties_go_by_name(bench: Planned) -> None:
    """Never by chance, or a run could not be replayed."""
    for name in "cab":
        bench.start(name, "m:1", loaded=["m:1"])
    clients = [bench.submit(id=f"r{n}") for n in range(3)]
    assert where(*clients) == ["a", "b", "c"]


def test_each_commit_counts_at_once(bench: Planned) -> None:
    """Many that wait for one slot do not all see it free."""
    bench.start("a", "m:1")
    clients = [bench.submit(id=f"r{n}") for n in range(5)]
    bench.end_load()
    assert where(*clients) == ["a", "a", "", "", ""]
    assert bench["a"].load.in_flight(M) == 2


# -- holding ------------------------------------------------------------------------------------


def test_held_for_a_fast_busy_one_while_a_slow_one_is_free(uneven: Planned) -> None:
    """The record shows why: what it holds for costs less than the free slot."""
    first = uneven.submit(prompt_tokens=1000)
    uneven.pour(1.5, 120, first)
    second = uneven.submit(id="r2", prompt_tokens=1000)
    assert where(first, second) == ["a", ""]
    chosen, other = uneven.last.options
    assert (chosen.backend, chosen.terms.kind) == ("a", HOLD)
    assert (other.backend, other.terms.kind) == ("b", GO)
    assert chosen.terms.total < other.terms.total
    uneven.end(first)
    assert where(second) == ["a"]


def test_the_second_in_line_sees_the_second_release(uneven: Planned) -> None:
    """What is promised to the first is not promised again: it takes the slow one at once."""
    uneven.speed("b", prompt_rate=1000.0, decode_rate=30.0)
    first = uneven.submit(prompt_tokens=1000)
    uneven.pour(1.5, 120, first)
    second, third = (uneven.submit(id=f"r{n}", prompt_tokens=1000) for n in (2, 3))
    assert where(second, third) == ["", "b"]
    uneven.end(first)
    assert where(second) == ["a"]


def test_a_free_slot_is_not_declined_for_ever(uneven: Planned) -> None:
    """However much better the busy one seems: after a while the best that is free is taken."""
    uneven.speed("a", prompt_rate=50_000.0, decode_rate=1000.0)
    first = uneven.submit(prompt_tokens=1000)
    uneven.pour(1.0, 1000, first)
    second = uneven.submit(id="r2", prompt_tokens=3000)
    uneven.pour(9.5, 1000, first)
    assert where(second) == [""]
    uneven.pour(1.0, 1000, first)
    assert where(second) == ["b"]


def test_a_slot_with_too_short_a_context_is_not_taken_for_long_waiting(uneven: Planned) -> None:
    """What does not fit is for who finds nothing else, and is marked then."""
    uneven.holds("a", "m:1", context=32768)
    first = uneven.submit(prompt_tokens=1000)
    uneven.pour(0.5, 100, first)
    second = uneven.submit(id="r2", prompt_tokens=5000)
    uneven.pour(30.0, 100, first)
    assert where(second) == [""]
    uneven.go_down("a")
    assert where(second) == ["b"]
    assert uneven.of(LeaseGranted)[-1].why == "short-context"
    first.lease.release()


def test_who_has_held_enough_takes_what_is_free_by_tier(bench: Planned) -> None:
    """Not the lower tier's slot, though it costs less, while one is free in the higher."""
    bench.shape(
        backend("a", slots=1, priority=200),
        backend("b", slots=1, priority=200),
        backend("c", slots=1),
    )
    for name in "abc":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("a", prompt_rate=50_000.0, decode_rate=1000.0)
    bench.speed("b", **SLOW)
    first = bench.submit(prompt_tokens=100)
    bench.pour(1.0, 1000, first)
    second = bench.submit(id="r2", prompt_tokens=100)
    bench.pour(9.5, 1000, first)
    assert where(first, second) == ["a", ""]
    bench.pour(1.0, 1000, first)
    assert where(second) == ["b"]


def test_whose_higher_tier_is_not_dear_any_more_is_looked_at_at_once(bench: Planned) -> None:
    """Though what it holds for below is still cheaper."""
    bench.shape(backend("a", slots=1, priority=200), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    running = [bench.submit(id="ra")]
    bench.speed("a", decode_rate=5.0)
    running.append(bench.submit(id="rb"))
    assert where(*running) == ["a", "b"]
    waits = bench.submit(id="waits")
    bench.sleep(1.0)
    assert waits.ticket is not None
    waiter = bench.plan.queues.waiters[waits.ticket]
    chosen = [waiter.choice]
    bench.speed("a", decode_rate=45.0)
    bench.dispatcher.kick()
    chosen.append(waiter.choice)
    assert [choice and choice.backend for choice in chosen] == ["b", "a"]


# -- cold ---------------------------------------------------------------------------------------


def test_a_load_that_was_asked_for_counts_in_the_same_pass() -> None:
    """Overloaded, the queue is gone through twice: no second copy beside the first for that."""
    bench = PoolBench()
    bench.shape(*(backend(name, slots=8) for name in "ab"))
    plan, now = Plan(bench.pool), bench.clock()
    for name, load_rate in (("a", 1.0), ("b", 0.5)):
        bench.up(name, "m:1")
        told = {"load_rate": load_rate, "samples": {"load": 9}}
        plan.books.ledger(name).speed.restore(told)
    for number in range(8):
        prompt = 5000 if number % 2 else 10
        asked = call(id=f"r{number}", prompt_tokens=prompt)
        plan.enqueue(Ticket(asked, number, frozenset(), (), now - 3.0, now + 60))
    loads = [effect for effect in plan.plan(now) if isinstance(effect, Load)]
    assert [load.backend for load in loads] == ["a"]


# -- order --------------------------------------------------------------------------------------


def test_a_key_at_its_own_limit_waits_and_others_pass(bench: Planned) -> None:
    """Also when several of its calls become possible in one pass."""
    bench.start("a", "m:1")
    bench.shape(backend("a", slots=4))
    principal = Principal("k", Role.USER, allowance=Allowance(slots=1))
    mine = [bench.submit(id=f"k{n}", principal=principal, owner="key:k") for n in range(3)]
    others = [bench.submit(id=f"o{n}") for n in range(2)]
    bench.end_load()
    assert where(*mine, *others) == ["a", "", "", "a", "a"]
    bench.end(mine[0])
    assert where(*mine[1:]) == ["a", ""]


def test_a_call_that_is_tried_again_stands_in_front(bench: Planned) -> None:
    """It keeps away from where it failed, and holds up nobody who may go there."""
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(0.5, 60, *running)
    waiting = [bench.submit(id=f"w{n}") for n in range(3)]
    again = bench.submit(id="again", excluded=frozenset("a"), attempts=(tried("a"),), seq=0)
    assert bench.dispatcher.waiting()[0] is again.ticket
    bench.end(running[0])
    assert where(again, *waiting) == ["", "a", "", ""]
    bench.end(running[1])
    assert where(again) == ["b"]


def test_routes_that_not_every_backend_has(bench: Planned) -> None:
    """Who finds no backend for its route stands in nobody's way."""
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    odd = "/api/generate"
    bench.pool.catalog.note_no_route("a", call(path=odd).route.feature)
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(0.5, 60, *running)
    head = bench.submit(id="odd", path=odd)
    plain = bench.submit(id="plain")
    bench.end(running[0])
    assert where(head, plain) == ["", "a"]
    bench.end(running[1])
    assert where(head) == ["b"]


# -- what could not be carried out --------------------------------------------------------------


def test_a_commit_that_is_refused_comes_back_with_its_place(
    bench: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes elsewhere in the next pass; nothing stays counted where it could not go."""
    for name in "ab":
        bench.start(name, "m:1", loaded=["m:1"])
    grant = bench.pool.lease
    refused: list[str] = []

    def lease(asked: Any, name: str, *told: Any, **more: Any) -> Lease | None:
        if name == "a" and not refused:
            refused.append(asked.id)
            return None
        return grant(asked, name, *told, **more)

    monkeypatch.setattr(bench.pool, "lease", lease)
    client = bench.submit(fair_key="k", prompt_tokens=1000)
    assert (where(client), refused) == (["b"], ["r1"])
    assert bench.plan.ledgers["a"].is_idle
    assert [d.tag for d in bench.plan.decisions.ring] == [0.0, 0.0]


def test_who_leaves_between_plan_and_grant_leaves_nothing_behind(bench: Planned) -> None:
    """The answer to one call makes another hang up, which the same pass has committed."""
    bench.start("a", "m:1")
    second: list[Ticket] = []

    def granted(lease: Lease) -> None:
        bench.dispatcher.withdraw(second[0])
        lease.release()

    bench.dispatcher.submit(call(id="r1"), granted, lambda _: None)
    second.append(bench.dispatcher.submit(call(id="r2"), lambda _: None, lambda _: None))
    bench.end_load()
    assert at_rest(bench.plan)
    assert bench.plan.wake_at() == math.inf


def test_a_probe_that_nobody_makes_is_not_waited_for(bench: Planned) -> None:
    """Exchanged in mid-probe, the new plan still sees its end."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    probe = bench.submit(id="probe")
    assert probe.lease.run.probe
    belief = bench["a"].load.belief
    bench.take(Plan(bench.pool))
    assert belief.probe == M
    probe.lease.release()
    assert belief.probe is None


# -- turns --------------------------------------------------------------------------------------


def waiting(plan: Plan, bench: PoolBench, count: int, **more: Any) -> None:
    """So many wait."""
    told = {"excluded": frozenset(), "attempts": (), **more}
    for number in range(count):
        asked, now = call(id=f"r{number}"), bench.clock()
        ticket = Ticket(asked, number, queued_at=now, limit_at=now + 60, **told)
        plan.enqueue(ticket)


def turns(plan: Plan, now: float, most: int = 500) -> tuple[int, int]:
    """Plan until nothing is left to do now: turns, and commits."""
    commits = 0
    for turn in range(1, most + 1):
        effects = plan.plan(now)
        commits += sum(isinstance(effect, Commit) for effect in effects)
        if WakeAt(now) not in effects:
            return turn, commits
    raise AssertionError("it never comes to an end")


def test_a_turn_ends_and_goes_on() -> None:
    """By count, at once; and comes to an end."""
    bench = PoolBench()
    bench.shape(backend("a", slots=10))
    bench.up("a", "m:1", loaded=["m:1"])
    plan = Plan(bench.pool, Knobs(evaluations=3))
    waiting(plan, bench, 12)
    assert turns(plan, bench.clock()) == (4, 10)


def test_nobody_waits_for_a_backend_that_has_left(bench: Planned) -> None:
    """Its load ended with it; the next begins at once, not with the next tick."""
    for name in "ab":
        bench.start(name, "m:1")
    client = bench.submit()
    assert [load.backend for load in bench.loads] == ["a"]
    bench.sleep(1.2)
    bench.shape(backend("b"))
    assert [load.backend for load in bench.loads] == ["a", "b"]
    bench.loads.pop(0)
    bench.end_load()
    assert where(client) == ["b"]


def test_a_plan_that_never_ends_ends_with_the_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever mistake keeps it busy, it does not turn for ever; after the tick it tries again."""
    bench = PoolBench()
    bench.shape(backend("a", slots=2))
    bench.up("a", "m:1", loaded=["m:1"])
    plan = Plan(bench.pool)
    waiting(plan, bench, 3)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_serve", lambda *_, **__: False)
        assert turns(plan, bench.clock(), most=20)[1] == 0
    bench.clock.advance(plan.knobs.tick_s)
    assert turns(plan, bench.clock())[1] == 2


@pytest.mark.parametrize("priority", [100, 200])
def test_who_can_go_nowhere_does_not_keep_the_plan_turning(priority: int) -> None:
    """Neither tried again without a backend left, nor holding beside a free slot."""
    bench = PoolBench()
    bench.shape(backend("a", slots=1, priority=priority), backend("b", slots=9))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    plan = Plan(bench.pool, Knobs(evaluations=3, tier_patience_s=1e9))
    waiting(plan, bench, 20, excluded=frozenset("ab"), attempts=(tried("a"),))
    assert turns(plan, bench.clock())[1] == 0
    waiting(plan, bench, 20)
    assert turns(plan, bench.clock())[1] == (1 if priority == 200 else 10)


def test_what_is_listed_while_we_load_it_is_not_there_yet(bench: Planned) -> None:
    """Ollama before 0.30 lists a model from the beginning of its load on."""
    bench.start("a", "m:1")
    cold, late = bench.submit(), bench.submit(id="late")
    (load,) = bench.loads
    bench.sleep(0.5)
    bench.holds("a", "m:1")
    bench.sleep(1.0)
    assert where(cold, late, bench.submit(id="later")) == ["", "", ""]
    assert bench.loads == [load]
    bench.loaded()
    assert where(cold, late) == ["a", "a"]


def test_a_slot_that_is_free_for_others_only_is_not_declined() -> None:
    """Calls that were tried there are not weighed for it again and again, ahead of who may go."""
    bench = Planned(Knobs(evaluations=2))
    bench.shape(backend("a"), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    tried_there: dict[str, Any] = {"excluded": frozenset("a"), "attempts": (tried("a"),)}
    running = bench.submit(**tried_there)
    held = [bench.submit(id=f"r{n}", seq=n + 1, **tried_there) for n in range(6)]
    assert where(running) == ["b"]
    bench.pour(60.0, 60, running)
    assert not any(where(*held))
    assert not bench.plan.decisions.declined
    assert where(bench.submit(id="plain")) == ["a"]
    bench.close()


def test_who_may_not_take_what_is_free_asks_for_it_now_and_then(bench: Planned) -> None:
    """One slot more may be tried, but not by such calls: not at each pass is all weighed for it."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    held, plan = bench.submit(id="held", streaming=False), bench.plan
    bench.pour(6.0, 60, *running)
    (waiter,) = plan.queues.waiters.values()
    assert waiter.declined_at is not None
    waiter.declined_until, before = bench.clock() - 1.0, plan.decisions.evaluations
    for _ in range(3):
        plan.queues.by_key[waiter.ticket.call.key].fresh = True
        plan.plan(bench.clock())
    assert plan.decisions.evaluations - before <= 1
    assert where(held) == [""]


def test_many_keys_are_all_looked_at() -> None:
    """A flood for saturated models does not hide the free slots of the last."""
    bench = PoolBench()
    models = [f"m{n}:1" for n in range(20)]
    bench.shape(backend("a", slots=1))
    bench.up("a", *models, loaded=models)
    plan = Plan(bench.pool, Knobs(evaluations=3))
    now = bench.clock()
    for number, model in enumerate(models * 2):
        plan.enqueue(Ticket(call(model, id=f"r{number}"), number, frozenset(), (), now, now + 60))
    assert turns(plan, now)[1] == 20


def test_a_slot_that_comes_with_time_is_taken_at_that_instant(bench: Planned) -> None:
    """After a recovery slots come back one by one; nothing tells of it but the clock."""
    bench.shape(backend("a", slots=3))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.recover("a", "m:1", loaded=["m:1"])
    began = bench.clock()
    bench.sleep(0.3)  # so that no step of it falls on a tick
    first, second, third = (bench.submit(id=f"r{number}") for number in range(3))
    bench.pour(32.0, 60, first, second, third)
    at = [client.lease.granted_at - began for client in (first, second, third)]
    assert at == pytest.approx([0.3, 15.0, 30.0])


def test_nothing_to_do_is_nothing_to_wake_for(bench: Planned) -> None:
    """Before the first call, and after the last has ended."""
    bench.start("a", "m:1", loaded=["m:1"])
    assert bench.plan.wake_at() == math.inf
    client = bench.submit()
    assert bench.plan.wake_at() == bench.clock() + 0.5
    bench.end(client)
    assert bench.plan.wake_at() == math.inf
    bench.sleep(10.0)
    assert bench.wake_at == math.inf


def situation(seed: int) -> tuple[PoolBench, Plan, Ticket]:
    """A pool in some state, and one more call."""
    rng = random.Random(seed)
    bench = PoolBench()
    bench.shape(
        *(
            backend(n, slots=rng.choice([1, 2, None]), priority=rng.choice([100, 200]))
            for n in "abc"
        )
    )
    plan = Plan(bench.pool)
    bench.pool.note = plan.note
    for name in "abc":
        bench.up(name, "m:1", "n:1", loaded=rng.sample(["m:1", "n:1"], rng.randint(0, 2)))
        speed = plan.ledgers[name].speed
        told = {"prompt_rate": rng.choice([100.0, 5000.0]), "decode_rate": rng.choice([10.0, 99.0])}
        speed.restore({**told, "samples": {"prompt": 9, "decode": 9}})
    for number in range(rng.randint(0, 6)):
        lease = bench.lease(rng.choice("abc"), rng.choice(["m:1", "n:1"]), id=f"r{number}")
        if lease is not None and rng.random() < 0.7:
            lease.moved(rng.randint(1, 300))
    now = bench.clock()
    asked = call(id="new", prompt_tokens=rng.choice([10, 5000]))
    return bench, plan, Ticket(asked, 99, frozenset(), (), now, now + 60)


@pytest.mark.parametrize("seed", range(40))
def test_what_begins_at_once_is_what_a_pass_would_begin(seed: int) -> None:
    """With the same place, at the same price; and what does not begin has changed nothing."""
    bench, plan, ticket = situation(seed)
    begun = plan.begin(ticket, bench.clock())
    other_bench, other, waits = situation(seed)
    other.enqueue(waits)
    planned = [e for e in other.plan(other_bench.clock()) if isinstance(e, Commit)]
    told = [] if begun is None else [(begun.backend, begun.why, begun.probe, begun.slots)]
    assert told == [(e.backend, e.why, e.probe, e.slots) for e in planned]
    if begun is None:
        plan.enqueue(ticket)
        effects = [repr(e) for e in plan.plan(bench.clock())]
        again_bench, again, waits = situation(seed)
        again.enqueue(waits)
        assert effects == [repr(e) for e in again.plan(again_bench.clock())]
        again_bench.close()
    else:
        assert plan.decisions.ring[-1].chosen.terms == other.decisions.ring[-1].chosen.terms
        assert plan.turns.fair.virtual_time == other.turns.fair.virtual_time
    for each in (bench, other_bench):
        each.close()


# -- from one to another ----------------------------------------------------------------------


@pytest.mark.parametrize("by", ["plan", "least-loaded"])
def test_exchanged_while_calls_run(bench: Planned, by: str) -> None:
    """Whoever waits keeps its turn, what runs is counted, and its end is heard."""
    bench.start("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    running[0].lease.moved(10)
    waits = [bench.submit(id=f"w{n}") for n in range(2)]
    if by == "plan":
        bench.take(Plan(bench.pool))
        assert bench.plan.ledgers["a"].in_flight(M) == 2
        assert bench.plan.ledgers["a"].streams(M) == 1
    else:
        bench.dispatcher.exchange(Greedy(POLICIES[by], bench.pool))
        bench.take(Plan(bench.pool))
    assert [ticket.call.id for ticket in bench.dispatcher.waiting()] == ["w0", "w1"]
    bench.dispatcher.kick()
    assert where(*waits) == ["", ""]
    bench.end(running[0])
    assert where(*waits) == ["a", ""]
    bench.end(running[1], *waits[:1])
    assert where(*waits) == ["a", "a"]
    bench.end(waits[1])
    assert at_rest(bench.plan)


# -- contexts that calls share ------------------------------------------------------------------


def guest(bench: Planned, **more: Any) -> Call:
    """One who asked for no context, as it comes under the policy reuse."""
    asked = call(**more)
    return applied(asked, Contexts(Rules(Rule(Policy.REUSE)), bench.pool).place(asked))


def test_who_asked_for_nothing_has_nothing_of_that_size_loaded(bench: Planned) -> None:
    """The runner it was to share has gone before its turn: it goes to the one that is there."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.holds("a", "m:1", context=16384)
    shared = guest(bench, options={"num_ctx": 3000})
    assert shared.key == key("m:1", num_ctx=16384)
    bench.holds("a", "m:1", context=4096)
    client = bench.submit(key=shared.key, origin=shared.origin)
    bench.sleep(1.0)
    assert where(client) == ["a"]
    assert client.call.key == key("m:1", num_ctx=4096)
    assert not bench.loads


def test_a_guest_is_no_reason_for_more_of_what_it_shares(bench: Planned) -> None:
    """Only who asked for a context counts as demand for it."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.holds("a", "m:1", context=16384)
    shared = guest(bench, options={"num_ctx": 3000})
    bench.submit(key=shared.key, origin=shared.origin)
    assert shared.key not in bench.plan.books.asked
    bench.submit(id="r2", key=shared.key)
    assert shared.key in bench.plan.books.asked
