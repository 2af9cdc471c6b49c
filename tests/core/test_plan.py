"""The plan: what becomes of calls, situation by situation, with the real pool and by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from balancer.core.admission import QueueLimits
from balancer.core.cost import GO, HOLD
from balancer.core.decisions import Decision
from balancer.core.domain import Allowance, Principal, Role, Usage, Verdict
from balancer.core.events import DrainEnded, DrainRequested, LeaseGranted
from balancer.core.greedy import POLICIES, Greedy
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.pool import Lease
from balancer.core.scheduler import Changed, Commit, Load, Ticket, WakeAt
from tests.core.bench import (
    GB,
    Bench,
    Client,
    PoolBench,
    backend,
    call,
    canon,
    key,
    outcome,
    resident,
    tag,
    tried,
)

FAST = {"prompt_rate": 6000.0, "decode_rate": 120.0}
SLOW = {"prompt_rate": 75.0, "decode_rate": 9.0}
M = canon("m:1")


class Planned(Bench):
    """The core with the plan, and with what hosts do played by hand."""

    def __init__(self, knobs: Knobs | None = None) -> None:
        super().__init__("plan", limits=QueueLimits(10_000, 10_000, 900.0))
        self.memory: dict[str, list[dict[str, Any]]] = {}
        self.take(Plan(self.pool, knobs, may_start=self.limits.may_start))

    def take(self, plan: Plan) -> None:
        """Exchange the scheduler."""
        plan.decisions.emit = self.events.append
        self.dispatcher.exchange(plan)
        self.scheduler = plan

    @property
    def plan(self) -> Plan:
        """The planner."""
        assert isinstance(self.scheduler, Plan)
        return self.scheduler

    def speed(self, name: str, load_rate: float = 1.0, **rates: float) -> None:
        """How fast one is, as if learned."""
        ledger = self.plan.ledgers[name]
        told = {"prompt_rate": 1500.0, "decode_rate": 60.0, "load_rate": load_rate, **rates}
        ledger.speed.restore({**told, "samples": dict.fromkeys(("prompt", "decode", "load"), 20)})
        ledger.moved()

    @property
    def last(self) -> Decision:
        """What was decided last."""
        return self.plan.decisions.ring[-1]

    def pour(self, seconds: float, rate: float, *clients: Client) -> None:
        """Let answers come at that rate, for a time."""
        for _ in range(round(2 * seconds)):
            for client in clients:
                for lease in client.leases:
                    if not lease.settled:
                        lease.moved(round(rate / 2))
            self.sleep(0.5)

    def holds(self, name: str, *models: str, context: int = 4096, minute: int = 5) -> None:
        """What is in its memory was read, and is read again from then on."""
        told = {"expires_at": f"2026-11-21T12:{minute:02d}:00Z"}
        self.memory[name] = [resident(model, context) | told for model in models]
        self.pool.note_ps(name, self.memory[name], self.clock())

    def sleep(self, seconds: float) -> None:
        """Let time pass; memory is read now and then."""
        end = self.clock() + seconds
        while self.clock() < end:
            super().sleep(min(5.0, end - self.clock()))
            for name, rows in self.memory.items():
                if name in self.pool.members and self[name].health.up:
                    self.pool.note_ps(name, rows, self.clock())

    def end(self, *clients: Client, **usage: Any) -> None:
        """They end well."""
        for client in clients:
            client.lease.settle(outcome(now=self.clock(), usage=Usage(**usage)))

    def end_load(self, *stays: str) -> Load:
        """The oldest load is done, and what is in memory then is read: it, and what *stays*."""
        self.sleep(0.1)
        self.holds(self.loads[0].backend, *stays)
        load = self.loaded()
        self.holds(load.backend, *stays, load.key.model.rpartition("/")[2])
        return load

    def go_down(self, *names: str) -> None:
        """Their checks fail."""
        for name in names:
            self.check(name, ok=False, connected=False, count=3)


def where(*clients: Client) -> list[str]:
    """Where each runs; empty: it waits."""
    return [client.leases[0].backend.name if client.leases else "" for client in clients]


@pytest.fixture
def bench() -> Iterator[Planned]:
    """A pool with nothing in it."""
    found = Planned()
    yield found
    found.close()


def at_rest(plan: Plan) -> bool:
    """Whether nothing is counted any more."""
    idle = all(ledger.is_idle for ledger in plan.ledgers.values())
    return idle and not plan._tracks and not plan._in_flight and not plan._queues


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


@pytest.fixture
def uneven(bench: Planned) -> Planned:
    """A fast one with one slot, which is busy and soon free, and a slow one that is free."""
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name, speed in (("a", FAST), ("b", SLOW)):
        bench.up(name, "m:1", loaded=["m:1"])
        bench.speed(name, **speed)
    return bench


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


# -- cold ---------------------------------------------------------------------------------------


def test_cold_with_the_cheapest_victim(bench: Planned) -> None:
    """Of the idle models the one goes that nobody asks for; the call follows its load."""
    bench.shape(backend("a", slots=1, vram_bytes=11 * GB))
    bench.up("a", "m:1", "n:1", "o:1", loaded=["m:1", "n:1"])
    for number in range(5):
        bench.end(bench.submit("m:1", id=f"m{number}"))
        bench.sleep(1.0)
    client = bench.submit("o:1")
    (load,) = bench.loads
    assert (load.backend, load.why, load.victims) == ("a", "call", (key("n:1"),))
    assert load.keep_alive is None  # the host's own default
    assert where(client) == [""]
    bench.end_load("m:1")
    assert where(client) == ["a"]
    assert client.ticket is not None
    assert client.ticket.cold


def test_one_load_per_backend(bench: Planned) -> None:
    """The next begins when it is answered."""
    bench.start("a", "m:1", "n:1")
    clients = [bench.submit("m:1"), bench.submit("n:1", id="r2")]
    assert [load.key for load in bench.loads] == [key("m:1")]
    bench.end_load()
    assert [load.key for load in bench.loads] == [key("n:1")]
    bench.end_load("m:1")
    assert where(*clients) == ["a", "a"]


def test_a_second_copy_must_beat_the_first(bench: Planned) -> None:
    """While the first is loaded, few wait for it; for many a second one is sooner."""
    for name in "ab":
        bench.start(name, "m:1")
    clients = [bench.submit(id=f"r{n}") for n in range(3)]
    assert len(bench.loads) == 1
    clients += [bench.submit(id=f"s{n}") for n in range(40)]
    bench.sleep(1.5)
    assert [(load.ticket is None, load.why) for load in bench.loads] == [
        (False, "call"),
        (True, "copy"),
    ]
    assert {load.backend for load in bench.loads} == {"a", "b"}


def test_a_copy_for_many_that_wait_behind_busy_ones(bench: Planned) -> None:
    """And none for a few that will be through before it is loaded."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.start("b", "m:1")
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    for client in running:
        client.lease.moved(190)
    bench.submit(id="few")
    bench.sleep(0.1)
    assert bench.loads == []
    for number in range(40):
        bench.submit(id=f"s{number}")
    bench.sleep(1.5)
    assert [load.why for load in bench.loads] == ["copy"]


def test_a_copy_that_failed_is_not_loaded_again_at_once(bench: Planned) -> None:
    """For nobody in particular; after a while it is worth another try."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.start("b", "m:1")
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    for number in range(60):
        bench.submit(id=f"s{number}")
    bench.sleep(1.5)
    assert bench.loaded(verdict=Verdict.UNFIT).why == "copy"
    bench.pour(8.0, 60, *running)
    assert bench.loads == []


def test_a_load_that_was_asked_for_counts_in_the_same_pass() -> None:
    """Overloaded, the queue is gone through twice: no second copy beside the first for that."""
    bench = PoolBench()
    bench.shape(*(backend(name, slots=8) for name in "ab"))
    plan, now = Plan(bench.pool), bench.clock()
    for name, load_rate in (("a", 1.0), ("b", 0.5)):
        bench.up(name, "m:1")
        told = {"load_rate": load_rate, "samples": {"load": 9}}
        plan._ledger(name).speed.restore(told)
    for number in range(8):
        prompt = 5000 if number % 2 else 10
        asked = call(id=f"r{number}", prompt_tokens=prompt)
        plan.enqueue(Ticket(asked, number, frozenset(), (), now - 3.0, now + 60))
    loads = [effect for effect in plan.plan(now) if isinstance(effect, Load)]
    assert [load.backend for load in loads] == ["a"]


def test_copies_ahead_of_the_queue(bench: Planned) -> None:
    """Of what is asked for often enough that its copies will not do, before anybody waits."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.start("b", "m:1")
    for number in range(60):
        client = bench.submit(id=f"r{number}", prompt_tokens=10)
        bench.sleep(0.2)
        bench.end(client)
        if bench.loads:
            break
    assert [(load.why, load.backend) for load in bench.loads] == [("ahead", "b")]


# -- victims ------------------------------------------------------------------------------------


def crowded(bench: Planned, **more: Any) -> None:
    """Room for one model; m:1 is there, o:1 is wanted."""
    bench.shape(backend("a", slots=2, vram_bytes=7 * GB, **more))
    bench.up("a", "m:1", "o:1", loaded=["m:1"])


def test_nobody_is_sent_to_a_model_that_is_about_to_go(bench: Planned) -> None:
    """Its unload is under way: who asks for it now would only load it again."""
    crowded(bench)
    cold = bench.submit("o:1", id="cold")
    assert [load.victims for load in bench.loads] == [(key("m:1"),)]
    late = bench.submit("m:1", id="late")
    assert where(late) == [""]
    bench.loaded(verdict=Verdict.UNFIT)
    assert len(cold.errors) == 1
    assert where(late) == ["a"]


def test_a_busy_model_is_drained_for_one_that_waits(bench: Planned) -> None:
    """After a while no new call gets there, and when the last has ended the load begins."""
    crowded(bench)
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    cold = bench.submit("o:1", id="cold")
    bench.pour(4.0, 60, *running)
    assert bench.of(DrainRequested) == []
    bench.pour(2.0, 60, *running)
    assert [event.backend for event in bench.of(DrainRequested)] == ["a"]
    late = bench.submit(id="late")
    bench.end(running[0])
    assert where(late) == [""]
    assert bench.loads == []
    bench.end(running[1])
    (load,) = bench.loads
    assert (load.key, load.victims, load.why) == (key("o:1"), (key("m:1"),), "drain")
    bench.end_load()
    assert where(cold, late) == ["a", ""]


def test_a_drain_has_an_end(bench: Planned) -> None:
    """A call that does not end does not keep all others of its model out."""
    crowded(bench)
    endless = bench.submit(id="endless")
    bench.submit("o:1", id="cold")
    bench.pour(6.0, 60, endless)
    late = bench.submit(id="late")
    assert where(late) == [""]
    drain = bench.plan.ledgers["a"].drain
    assert drain is not None
    bench.pour(drain.until - bench.clock() + 0.6, 60, endless)
    assert where(late) == ["a"]
    assert bench.of(DrainEnded)[0].reason == "late"


def test_a_drain_ends_with_the_wish(bench: Planned) -> None:
    """When nobody waits for it any more."""
    crowded(bench)
    running = bench.submit()
    cold = bench.submit("o:1", id="cold")
    bench.pour(6.0, 60, running)
    assert bench.plan.ledgers["a"].drain is not None
    assert cold.ticket is not None
    bench.dispatcher.withdraw(cold.ticket)
    assert where(bench.submit(id="late")) == ["a"]
    assert bench.plan.ledgers["a"].drain is None


def test_whoever_is_drained_does_not_ask_for_a_drain_in_turn(bench: Planned) -> None:
    """Its model is still there."""
    crowded(bench)
    bench.shape(bench["a"].backend, backend("b", slots=1, vram_bytes=7 * GB))
    bench.up("b", "m:1", "p:1", loaded=["p:1"])
    running = bench.submit("m:1")
    other = bench.submit("p:1", id="other")
    bench.submit("o:1", id="cold")
    bench.pour(6.0, 60, running, other)
    bench.submit("m:1", id="late")
    bench.pour(20.0, 60, running, other)
    assert [event.backend for event in bench.of(DrainRequested)] == ["a"]
    assert bench.of(DrainEnded) == []


def test_two_models_do_not_take_turns(bench: Planned) -> None:
    """What was just loaded, and is waited for, is not drained at once for the one before."""
    crowded(bench)
    bench.speed("a", load_rate=0.2)
    first = [bench.submit(id=f"m{n}") for n in range(2)]
    cold = [bench.submit("o:1", id=f"o{n}") for n in range(3)]
    bench.pour(6.0, 60, *first)
    again = bench.submit(id="again")
    bench.end(*first)
    bench.end_load()
    bench.speed("a", load_rate=0.2)
    loaded_at = bench.clock()
    assert where(*cold) == ["a", "a", ""]
    bench.pour(20.0, 60, *cold)
    assert len(bench.of(DrainRequested)) == 1
    bench.pour(40.0, 60, *cold)
    assert len(bench.of(DrainRequested)) == 2
    load_s = bench.plan.ledgers["a"].speed.load_s(bench.plan._size(canon("o:1")))
    tick_s = bench.plan.knobs.tick_s
    assert bench.of(DrainRequested)[1].at >= loaded_at + 2 * load_s - tick_s
    assert where(again) == [""]


def test_no_drain_where_it_would_not_make_room(bench: Planned) -> None:
    """Beside the busy one there is one that must not go."""
    bench.shape(backend("a", slots=2, vram_bytes=11 * GB))
    bench.up("a", "m:1", "n:1", "o:1", loaded=["m:1", "n:1"])
    bench.plan._room("a").configured = 7 * GB
    running = bench.submit()
    bench.plan._foreign["a", canon("n:1")] = bench.clock() + 30.0
    bench.submit("o:1", id="cold")
    bench.pour(8.0, 60, running)
    assert bench.of(DrainRequested) == []


def test_what_a_stranger_uses_is_not_put_out(bench: Planned) -> None:
    """Its time to expire moved without us; also where we have not been for hours."""
    crowded(bench)
    bench.sleep(7200.0)
    bench.holds("a", "m:1", minute=6)
    client = bench.submit("o:1")
    bench.sleep(59.0)
    assert bench.loads == []
    bench.sleep(3.0)
    assert [load.key for load in bench.loads] == [key("o:1")]
    assert where(client) == [""]


def test_what_we_use_is_no_strangers(bench: Planned) -> None:
    """Our own calls move the time to expire as well."""
    crowded(bench)
    bench.end(bench.submit())
    bench.sleep(2.5)
    bench.holds("a", "m:1", minute=6)
    bench.submit("o:1")
    assert len(bench.loads) == 1


def test_what_was_loaded_for_somebody_is_not_put_out_before_he_came(bench: Planned) -> None:
    """Not even overloaded, when those that came later and can still be quick go first."""
    crowded(bench)
    old = [bench.submit("o:1", id=f"o{n}") for n in range(3)]
    bench.sleep(5.0)
    new = bench.submit("m:1", id="new")
    assert where(new) == [""]
    bench.sleep(1.0)
    late = bench.submit("m:1", id="late")
    bench.end_load()
    assert where(*old, new, late) == ["a", "a", "", "", ""]
    assert bench.loads == []


# -- order --------------------------------------------------------------------------------------


def test_batch_leaves_room(bench: Planned) -> None:
    """It does not take the last slots, which the next interactive call finds free."""
    bench.shape(backend("a", slots=20))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"b{n}", batch=True) for n in range(20)]
    assert sum(map(bool, where(*running))) == 18
    assert where(bench.submit(id="chat")) == ["a"]
    bench.pour(1.0, 60, *running)
    assert where(*running).count("a") == 18


def test_batch_is_patient_but_not_for_ever(bench: Planned) -> None:
    """After a minute it is a call like any other."""
    bench.take(Plan(bench.pool, Knobs(batch_floor=1e-9)))
    bench.shape(backend("a", slots=20))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.end(bench.submit(id="had its share", batch=True))
    running = [bench.submit(id=f"r{n}") for n in range(18)]
    batch = bench.submit(id="batch", batch=True)
    bench.pour(59.0, 60, *running)
    assert where(batch) == [""]
    bench.pour(2.0, 60, *running)
    assert where(batch) == ["a"]


def test_batch_gets_its_floor() -> None:
    """A tenth of the commits, however many interactive calls there are."""
    bench = PoolBench()
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    plan = Plan(bench.pool, Knobs(batch_patience_s=1e6))
    seq, went = itertools.count(), []
    for number in range(10):
        asked = call(id=f"b{number}", batch=True, fair_key="batch")
        plan.enqueue(Ticket(asked, next(seq), frozenset(), (), bench.clock(), math.inf))
    for number in range(60):
        asked = call(id=f"c{number}", fair_key="chat")
        plan.enqueue(Ticket(asked, next(seq), frozenset(), (), bench.clock(), math.inf))
        bench.clock.advance(1.0)
        for effect in plan.plan(bench.clock()):
            if isinstance(effect, Commit):
                lease = bench.pool.lease(effect.ticket.call, "a", 1, "warm")
                assert lease is not None
                bench.pool.note = plan.note
                went.append(effect.ticket.call.batch)
                lease.release()
                for ledger, track in list(plan._tracks.values()):
                    plan._strike(ledger, track, bench.clock())
                plan._tracks.clear()
    assert 0.05 <= sum(went[10:]) / len(went[10:]) <= 0.25


def test_a_light_key_is_not_behind_a_heavy_ones_hundred(bench: Planned) -> None:
    """It is the next to go."""
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    first = bench.submit(fair_key="big", prompt_tokens=1000)
    heavy = [bench.submit(id=f"b{n}", fair_key="big", prompt_tokens=1000) for n in range(100)]
    light = bench.submit(id="light", fair_key="small", prompt_tokens=1000)
    bench.end(first)
    assert where(light) == ["a"]
    assert not any(where(*heavy))


def test_a_key_with_its_share_of_slots_lets_others_by(bench: Planned) -> None:
    """But nobody is held back where nobody else waits, and nobody stands behind it."""
    bench.shape(backend("a", slots=4))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"x{n}", fair_key="x") for n in range(3)]
    other = bench.submit(id="z", fair_key="z")
    bench.plan.fair.tag("y", 1000.0, 1.0, bench.clock())  # y has used more of late
    waiting = [bench.submit(id=f"w{n}", fair_key="x") for n in range(2)]
    late = bench.submit(id="y", fair_key="y")
    bench.end(other)
    assert where(*waiting, late) == ["", "", "a"]
    bench.end(late)
    assert where(*waiting) == ["a", ""]
    bench.end(running[0])
    assert where(*waiting) == ["a", "a"]


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


# -- tiers, preferences, affinity ---------------------------------------------------------------


@pytest.mark.parametrize(("rate", "goes"), [(120.0, ""), (5.0, "b")])
def test_a_lower_tier_waits_for_its_turn(bench: Planned, rate: float, goes: str) -> None:
    """Until the higher one would take too long, though it is free and would be sooner."""
    bench.shape(backend("a", slots=1, priority=200), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("a", decode_rate=rate)
    first = bench.submit(prompt_tokens=100)
    second = bench.submit(id="r2", prompt_tokens=100)
    assert where(first, second) == ["a", goes]
    bench.go_down("a")
    assert where(second) == ["b"]
    first.lease.release()


def test_a_preference_decides_between_equals(bench: Planned) -> None:
    """And is worth half a second, no more."""
    bench.shape("a", backend("b", prefer=("m:*",)))
    for name in "ab":
        bench.up(name, "m:1", "n:1", loaded=["m:1", "n:1"])
    clients = [bench.submit("m:1"), bench.submit("n:1", id="r2")]
    assert where(*clients) == ["b", "a"]
    bench.speed("a", **FAST)
    assert where(bench.submit("m:1", id="r3", prompt_tokens=8000)) == ["a"]


def test_a_weight_counts_until_it_is_measured(bench: Planned) -> None:
    """Then measurement knows better."""
    bench.shape("a", backend("b", weight=2.0))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    client = bench.submit(prompt_tokens=1000)
    assert where(client) == ["b"]
    bench.end(client)
    bench.speed("b")
    assert where(bench.submit(id="r2", prompt_tokens=1000)) == ["a"]


def test_a_conversation_goes_where_it_was(bench: Planned) -> None:
    """As long as what is cached there is worth more than what it has to wait for."""
    bench.shape(*(backend(name, slots=4) for name in "ab"))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    beside = bench.submit(id="beside")
    first = bench.submit(id="first", prompt_tokens=4000, chain=((1, 1000), (2, 4000)))
    assert where(beside, first) == ["a", "b"]
    bench.end(beside, first)
    chain = ((1, 1000), (2, 4000), (3, 4100), (4, 4200))
    second = bench.submit(id="second", prompt_tokens=4200, chain=chain)
    assert where(second) == ["b"]
    assert bench.last.chosen.terms.cached == pytest.approx(4000)


# -- what is believed ---------------------------------------------------------------------------


def test_slots_are_tried_one_at_a_time(bench: Planned) -> None:
    """Three streams side by side prove three slots; only first attempts that stream try it."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    for more in ({"streaming": False}, {"batch": True}, {"attempts": (tried("b"),), "seq": 0}):
        client = bench.submit(id="no", **more)
        assert where(client) == [""]
        assert client.ticket is not None
        bench.dispatcher.withdraw(client.ticket)
    probe, other = bench.submit(id="probe"), bench.submit(id="other")
    assert where(probe, other) == ["a", ""]
    assert probe.lease.run.probe
    bench.pour(0.5, 60, *running, probe)
    assert bench["a"].load.slots(M) == 3
    bench.pour(6.0, 60, *running, probe)
    assert where(other) == ["a"]


def test_a_probe_that_fails_takes_the_belief_no_further(bench: Planned) -> None:
    """It answered only after another had ended."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    probe = bench.submit(id="probe")
    bench.end(running[0])
    bench.pour(1.0, 60, running[1], probe)
    assert bench["a"].load.slots(M) == 2
    assert not bench["a"].load.belief.may_probe(M, bench.clock() + 5.0)


def test_who_waits_behind_fewer_streams_than_believed_lowers_the_belief(bench: Planned) -> None:
    """The next call does not go into that queue."""
    bench.shape(backend("a", slots=None), backend("b", slots=None))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("b", **SLOW)
    running = [bench.submit(id=f"r{n}", prompt_tokens=100) for n in range(2)]
    assert where(*running) == ["a", "a"]
    bench.pour(5.0, 60, running[0])
    assert bench["a"].load.slots(M) == 1
    assert bench["b"].load.slots(M) == 2


def test_a_straggler_is_avoided(bench: Planned) -> None:
    """As soon as its streams tell so, and not before."""
    for name in "ab":
        bench.start(name, "m:1", loaded=["m:1"])
        bench.speed(name)
    first = bench.submit(id="first")
    second = bench.submit(id="second")
    assert where(first, second) == ["a", "b"]
    bench.pour(1.0, 60, first, second)
    for _ in range(6):
        first.lease.moved(3)
        second.lease.moved(30)
        bench.sleep(0.5)
    bench.end(second)
    assert where(bench.submit(id="third")) == ["b"]
    assert where(bench.submit(id="fourth")) == ["b"]


def test_embeddings_are_sent_by_work_not_by_slots(bench: Planned) -> None:
    """Many short ones at once, on the one slot such a model has; of long ones few."""
    bench.shape(backend("a", slots=1))
    bench.up("a")
    row = tag("e:1", GB) | {"capabilities": ["embedding"]}
    bench.pool.note_tags("a", [row], bench.clock())
    bench.holds("a", "e:1")
    asked: dict[str, Any] = {"path": "/api/embed", "embedding": True, "streaming": False}
    short = [bench.submit("e:1", id=f"s{n}", prompt_tokens=50, **asked) for n in range(8)]
    assert where(*short) == ["a"] * 8
    bench.end(*short)
    long = [bench.submit("e:1", id=f"l{n}", prompt_tokens=8000, **asked) for n in range(8)]
    sent = where(*long).count("a")
    assert 1 <= sent < 8
    bench.end(*(client for client in long if client.leases))
    assert where(*long).count("a") > sent


def test_what_is_only_passed_on_has_no_slots(bench: Planned) -> None:
    """No GPU of ours is in the way."""
    bench.shape(backend("a", cloud=True, slots=1))
    bench.up("a", "m:1")
    clients = [bench.submit("far:cloud", id=f"r{n}") for n in range(20)]
    assert where(*clients) == ["a"] * 20


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
        assert plan.fair.virtual_time == other.fair.virtual_time
    for each in (bench, other_bench):
        each.close()


# -- over a restart, and from one to another ----------------------------------------------------


def test_what_was_learned_outlives_a_restart(bench: Planned) -> None:
    """As JSON; also of backends that come later."""
    bench.shape(backend("a", slots=None), backend("b", slots=None))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    for number in range(12):
        client = bench.submit(id=f"r{number}", prompt_tokens=1000)
        bench.pour(2.0, 90, client)
        bench.end(client, tokens_in=1500, tokens_out=180, prompt_s=0.5, decode_s=2.0)
    bench["a"].load.belief.restore({"believed": {M: 5}})
    plan = bench.plan
    kept = json.loads(json.dumps(plan.learned(bench.clock())))
    other = Planned()
    other.shape(backend("a", slots=None))
    other.plan.recall(kept, other.clock(), 0.0)
    other.shape(backend("a", slots=None), backend("b", slots=None))
    other.up("b", "m:1", loaded=["m:1"])
    other.up("a", "m:1", loaded=["m:1"])
    again = json.loads(json.dumps(other.plan.learned(other.clock())))
    assert again["speeds"]["a"] == kept["speeds"]["a"]
    assert again["slots"] == kept["slots"]
    assert again["ratios"] == kept["ratios"] != {}
    assert again["lengths"] == kept["lengths"]
    assert again["rooms"] == kept["rooms"]
    assert other["a"].load.slots(M) == 5
    rates = [(key, fast, slow) for _, key, fast, slow in kept["demand"]["rates"]]
    assert rates == [
        (key, pytest.approx(fast), pytest.approx(slow))
        for _, key, fast, slow in again["demand"]["rates"]
    ]


GARBAGE: list[Any] = [None, 7, "x", [], [1], {"a": 99}, {"a": None}, {"a": []}, {"a": {"a": {}}}]
PARTS = ("speeds", "rooms", "slots", "lengths", "demand", "ratios", "reuse")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("told", GARBAGE, ids=repr)
def test_what_cannot_be_is_not_taken_up(part: str, told: Any) -> None:
    """It is as if that part had not been kept."""
    bench, fresh = Planned(), Planned()
    for each in (bench, fresh):
        each.start("a", "m:1", loaded=["m:1"])
    bench.plan.recall({part: told}, bench.clock(), 0.0)
    fresh.plan.recall({}, fresh.clock(), 0.0)
    for each in (bench, fresh):
        each.plan.note(Changed("a", at=each.clock()))
    assert bench.plan.learned(bench.clock()) == fresh.plan.learned(fresh.clock())


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


# -- asked only ---------------------------------------------------------------------------------


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
