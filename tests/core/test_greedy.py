"""The greedy policies, against a view by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest

from balancer.core.domain import Call, Candidate, PlacementKey, Residency, Verdict
from balancer.core.greedy import (
    OVERDUE_EXTRA_S,
    OVERDUE_FACTOR,
    POLICIES,
    Greedy,
    load_estimate_s,
)
from balancer.core.running import Run
from balancer.core.scheduler import (
    Commit,
    Effect,
    Ended,
    FirstByte,
    Load,
    LoadAnswered,
    LoadingNow,
    Rehearsal,
    Ticket,
    WakeAt,
    split_by_context,
)
from balancer.core.strategy import build
from tests.core.bench import GB, call, key, outcome

LOADED, ON_DISK = Residency.LOADED, Residency.ON_DISK
LOADING, UNKNOWN = Residency.LOADING, Residency.UNKNOWN
NOW = 1000.0
E = TypeVar("E", bound=Effect)


def candidate(backend: str, residency: Residency = LOADED, **more: Any) -> Candidate:
    """A backend with two free slots; *more* are fields of `Candidate`."""
    told = {
        "in_flight": 0,
        "slots": 2,
        "host_in_flight": more.get("in_flight", 0),
        "load_token": True,
        "first_byte_s": 0.0,
        "context": None,
        "size_bytes": 4 * GB,
    }
    return Candidate(backend, residency, **{**told, **more})


def ended(backend: str, busy_s: float, *, ok: bool) -> Ended:
    """A call on m:1 that held its slot for so long."""
    run = Run(call("m:1"), backend, NOW)
    return Ended(run, outcome(Verdict.OK if ok else Verdict.FAULT), NOW + busy_s)


class World:
    """A view of a pool that is whatever the test says."""

    def __init__(self, *candidates: Candidate) -> None:
        self.by_key: dict[PlacementKey, list[Candidate]] = {}
        self.all = list(candidates)
        self.loads: dict[PlacementKey, list[LoadingNow]] = {}
        self.routes: dict[str, set[str]] = {}
        self.priorities: dict[str, int] = {}

    def candidates(self, call: Call, excluded: frozenset[str]) -> list[Candidate]:
        lacks = self.routes.get(call.route.operation, set())
        found = self.by_key.get(call.key, self.all)
        return [c for c in found if c.backend not in excluded | lacks]

    def loading(self, key: PlacementKey) -> Sequence[LoadingNow]:
        return self.loads.get(key, ())

    def set(self, backend: str, **more: Any) -> None:
        """Change one backend, for every key."""
        self.all = [replace(c, **more) if c.backend == backend else c for c in self.all]


class Bench:
    """A scheduler and its tickets."""

    def __init__(self, *candidates: Candidate, policy: str = "least-loaded") -> None:
        self.world = World(*candidates)
        self.scheduler = Greedy(POLICIES[policy], self.world)
        self.now = NOW
        self.seq = 0

    def ticket(self, model: str = "m:1", *, excluded: str = "", **more: Any) -> Ticket:
        """A call begins to wait."""
        self.seq += 1
        seq = more.pop("seq", self.seq)
        ticket = Ticket(call(model, **more), seq, frozenset(excluded), (), self.now, self.now + 120)
        self.scheduler.enqueue(ticket)
        return ticket

    def rehearse(self, model: str = "m:1", **more: Any) -> Rehearsal:
        """What would become of one more call."""
        ticket = Ticket(
            call(model, **more), self.seq + 1, frozenset(), (), self.now, self.now + 120
        )
        return self.scheduler.rehearse(ticket, self.world, self.now)

    def plan(self) -> list[Effect]:
        return self.scheduler.plan(self.now)

    def committed(self) -> list[str]:
        """The backends of one plan's commits, in order."""
        return [effect.backend for effect in of(Commit, self.plan())]


def of(kind: type[E], effects: list[Effect]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


# -- the queue ---------------------------------------------------------------------------------


def test_waits_in_order_of_arrival() -> None:
    """A call that comes back keeps its place, whatever came in between."""
    bench = Bench(candidate("a", slots=1))
    late, early = bench.ticket(seq=7), bench.ticket(seq=3)
    other = bench.ticket("other:1", seq=5)
    assert bench.scheduler.waiting() == [early, other, late]


def test_the_oldest_goes_first() -> None:
    """One slot, two calls: who came first gets it, and is gone from the queue."""
    bench = Bench(candidate("a", slots=1))
    late, early = bench.ticket(seq=7), bench.ticket(seq=3)
    (commit,) = of(Commit, bench.plan())
    assert commit == Commit(early, "a", "warm")
    assert bench.scheduler.waiting() == [late]


def test_a_ticket_can_be_forgotten() -> None:
    """Withdrawn tickets start nothing; a second time, or of an unknown one, is no mistake."""
    bench = Bench(candidate("a"))
    ticket = bench.ticket()
    bench.scheduler.withdraw(ticket)
    bench.scheduler.withdraw(ticket)
    bench.scheduler.withdraw(Ticket(call("other:1"), 9, frozenset(), (), 0, 0))
    assert bench.plan() == []
    assert bench.scheduler.waiting() == []


def test_withdrawing_one_keeps_the_others() -> None:
    """The queue of a key lasts as long as anybody waits in it."""
    bench = Bench(candidate("a"))
    first, second = bench.ticket(), bench.ticket()
    bench.scheduler.withdraw(first)
    assert bench.scheduler.waiting() == [second]


def test_nothing_to_do_is_nothing() -> None:
    """An empty queue plans nothing."""
    assert Bench(candidate("a")).plan() == []


# -- the choice --------------------------------------------------------------------------------


def test_fewest_calls_per_slot_wins() -> None:
    """Three of eight slots taken is less than one of two."""
    bench = Bench(candidate("a", in_flight=1), candidate("b", in_flight=3, slots=8))
    bench.ticket()
    assert bench.committed() == ["b"]


def test_then_the_backend_with_fewer_calls_in_all() -> None:
    """Equal on this model: the one with less else to do."""
    bench = Bench(candidate("a", host_in_flight=3), candidate("b", host_in_flight=2))
    bench.ticket()
    assert bench.committed() == ["b"]


def test_then_the_quicker_by_factors_of_two() -> None:
    """A tenth quicker is noise, four times quicker is not."""
    bench = Bench(candidate("a", first_byte_s=2.0), candidate("b", first_byte_s=0.5))
    bench.ticket()
    assert bench.committed() == ["b"]
    bench.world.set("b", first_byte_s=1.9)
    bench.ticket()
    assert bench.committed() == ["a"], "as quick, and idle for longer"


def test_then_whoever_was_idle_longest() -> None:
    """Equal backends take turns."""
    bench = Bench(candidate("a"), candidate("b"), candidate("c"))
    turns = []
    for _ in range(6):
        bench.ticket()
        turns += bench.committed()
    assert turns == list("abcabc")


def test_what_a_pass_gives_away_counts_at_once() -> None:
    """Five calls in one pass fill four slots, evenly; the fifth waits."""
    bench = Bench(candidate("a"), candidate("b"))
    tickets = [bench.ticket() for _ in range(5)]
    assert bench.committed() == ["a", "b", "a", "b"]
    assert bench.scheduler.waiting() == [tickets[4]]


def test_variants_of_one_model_share_its_slots() -> None:
    """Slots belong to the model, whatever the options."""
    bench = Bench(candidate("a"))
    for context in (1, 2, 3):
        bench.ticket(options={"num_ctx": context})
    assert bench.committed() == ["a", "a"]


def test_an_excluded_backend_is_not_used_again() -> None:
    """A call that failed there goes elsewhere or waits, and holds up nobody."""
    bench = Bench(candidate("a"), candidate("b", in_flight=2))
    failed, fresh = bench.ticket(excluded="a"), bench.ticket()
    assert of(Commit, bench.plan()) == [Commit(fresh, "a", "warm")]
    assert bench.scheduler.waiting() == [failed]


def test_a_call_whose_route_is_lacking_holds_up_nobody() -> None:
    """The head may wait for the one backend that has its route; others need not."""
    bench = Bench(candidate("a"), candidate("b", in_flight=2))
    bench.world.routes["embed"] = {"a"}
    head, second = bench.ticket(path="/api/embed"), bench.ticket(path="/api/embed")
    chat = bench.ticket()
    assert of(Commit, bench.plan()) == [Commit(chat, "a", "warm")]
    assert bench.scheduler.waiting() == [head, second]


def test_a_queue_of_calls_alike_costs_one_look() -> None:
    """Once the first of a kind must wait, the others of that kind are not even asked about."""
    bench = Bench(candidate("a", in_flight=2))
    for _ in range(100):
        bench.ticket()
    asked = 0
    look = bench.world.candidates

    def counting(call: Call, excluded: frozenset[str]) -> list[Candidate]:
        nonlocal asked
        asked += 1
        return look(call, excluded)

    bench.world.candidates = counting  # type: ignore[method-assign]
    bench.plan()
    assert asked <= 2


# -- context -----------------------------------------------------------------------------------


def test_contexts_are_told_apart_by_prompt_and_answer() -> None:
    """Unknown fits; what was asked for as answer counts."""
    found = [candidate("a", context=100), candidate("b", context=99), candidate("c")]
    wanted = call(prompt_tokens=60, output_tokens=40)
    fits, short = split_by_context(wanted, found)
    assert [c.backend for c in fits] == ["a", "c"]
    assert [c.backend for c in short] == ["b"]
    assert split_by_context(call(prompt_tokens=60), found)[1] == []


def test_a_short_context_is_used_if_there_is_no_other() -> None:
    """And it is said so."""
    bench = Bench(candidate("a", context=10))
    ticket = bench.ticket(prompt_tokens=50)
    assert of(Commit, bench.plan()) == [Commit(ticket, "a", "short-context")]


def test_a_context_that_fits_is_waited_for() -> None:
    """A free slot that would cut the prompt is left to those who need less, behind or not."""
    bench = Bench(candidate("a", context=10), candidate("b", in_flight=2, load_token=False))
    long, short = bench.ticket(prompt_tokens=50), bench.ticket(prompt_tokens=5)
    assert of(Commit, bench.plan()) == [Commit(short, "a", "warm")]
    assert bench.scheduler.waiting() == [long]


def test_a_cold_backend_that_fits_is_loaded_before_a_short_one_is_used() -> None:
    """The prompt is worth a load."""
    bench = Bench(candidate("a", context=10), candidate("b", ON_DISK))
    ticket = bench.ticket(prompt_tokens=50)
    assert bench.plan() == [Load(ticket, "b", key("m:1"), "no copy in memory")]


def test_a_short_context_is_used_if_what_fits_cannot_be_loaded() -> None:
    """Nothing that fits is in memory or could be: better cut than never."""
    bench = Bench(candidate("a", context=10), candidate("b", ON_DISK, load_token=False))
    ticket = bench.ticket(prompt_tokens=50)
    assert bench.plan() == [Commit(ticket, "a", "short-context")]


# -- loads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", [ON_DISK, UNKNOWN])
def test_a_cold_model_is_loaded_once(residency: Residency) -> None:
    """One load for a queue of calls, and no commit to a backend without the model in memory."""
    bench = Bench(candidate("a", residency), candidate("b", residency))
    first, _ = bench.ticket(), bench.ticket()
    assert bench.plan() == [Load(first, "a", key("m:1"), "no copy in memory")]
    assert len(bench.scheduler.waiting()) == 2


def test_a_model_is_loaded_once_for_all_who_want_it() -> None:
    """Also for those who may not go everywhere: they see first what comes of it."""
    bench = Bench(candidate("a", ON_DISK), candidate("b", ON_DISK))
    first, _ = bench.ticket(), bench.ticket(excluded="a")
    assert bench.plan() == [Load(first, "a", key("m:1"), "no copy in memory")]


def test_a_load_goes_where_no_variant_is_busy() -> None:
    """A runner with other options that serves calls would have to be evicted."""
    bench = Bench(candidate("a", ON_DISK, in_flight=1), candidate("b", ON_DISK, host_in_flight=9))
    bench.ticket()
    (load,) = of(Load, bench.plan())
    assert load.backend == "b"


def test_a_backend_loads_one_model_at_a_time() -> None:
    """Two cold models, one backend: the second waits for the token, in one pass or the next."""
    bench = Bench(candidate("a", ON_DISK))
    first, _ = bench.ticket("m:1"), bench.ticket("n:1")
    assert [load.ticket for load in of(Load, bench.plan())] == [first]
    bench.world.set("a", load_token=False)
    bench.world.loads[key("m:1")] = [LoadingNow("a", NOW)]
    bench.world.by_key[key("m:1")] = [candidate("a", LOADING, load_token=False)]
    assert of(Load, bench.plan()) == []


def test_two_cold_models_load_side_by_side_on_two_backends() -> None:
    """What is given away in a pass counts for loads too."""
    bench = Bench(candidate("a", ON_DISK), candidate("b", ON_DISK))
    bench.ticket("m:1")
    bench.ticket("n:1")
    assert {load.backend for load in of(Load, bench.plan())} == {"a", "b"}


def test_a_load_under_way_is_waited_for_until_it_is_overdue() -> None:
    """Not before, and exactly then: the instant asked for is the instant acted upon."""
    bench = Bench(candidate("a", LOADING, load_token=False), candidate("b", ON_DISK))
    bench.world.loads[key("m:1")] = [LoadingNow("a", NOW - 7.3)]
    ticket = bench.ticket()
    limit_s = OVERDUE_FACTOR * load_estimate_s(4 * GB) + OVERDUE_EXTRA_S
    (wake,) = bench.plan()
    assert wake == WakeAt(NOW - 7.3 + limit_s)
    assert isinstance(wake, WakeAt)
    bench.now = wake.at
    assert bench.plan() == [Load(ticket, "b", key("m:1"), "no copy in memory")]


def test_a_load_where_the_call_cannot_go_is_not_waited_for() -> None:
    """It failed there before, or the backend is away by now."""
    bench = Bench(candidate("a", LOADING, load_token=False), candidate("b", ON_DISK))
    bench.world.loads[key("m:1")] = [LoadingNow("a", NOW), LoadingNow("gone", NOW)]
    bench.ticket(excluded="a")
    (load,) = of(Load, bench.plan())
    assert load.backend == "b"


def test_an_overdue_load_with_nowhere_else_to_go_is_waited_for() -> None:
    """Nothing can be done; its end is an event."""
    bench = Bench(candidate("a", LOADING, load_token=False))
    bench.world.loads[key("m:1")] = [LoadingNow("a", NOW - 1e6)]
    bench.ticket()
    assert bench.plan() == []


def test_no_candidate_no_effect() -> None:
    """Nobody may serve it now: it waits."""
    bench = Bench()
    bench.ticket()
    assert bench.plan() == []


def test_a_warm_copy_that_comes_free_is_taken_while_a_load_is_under_way() -> None:
    """A ticket that waits for its load goes elsewhere if something better turns up."""
    bench = Bench(candidate("a", LOADING, load_token=False), candidate("b"))
    bench.world.loads[key("m:1")] = [LoadingNow("a", NOW)]
    ticket = bench.ticket()
    assert bench.plan() == [Commit(ticket, "b", "warm")]


def test_the_call_a_load_was_made_for_is_told_as_cold() -> None:
    """The why of its commit says that it waited for a load."""
    bench = Bench(candidate("a"))
    ticket = bench.ticket()
    ticket.cold = True
    assert bench.plan() == [Commit(ticket, "a", "cold")]


# -- a second copy -----------------------------------------------------------------------------


def test_a_copy_is_loaded_when_waiting_has_cost_as_much() -> None:
    """Every copy full: the head waits as long as a load would take, to the instant, then loads."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", ON_DISK))
    ticket = bench.ticket()
    (wake,) = bench.plan()
    assert wake == WakeAt(NOW + load_estimate_s(4 * GB))
    assert isinstance(wake, WakeAt)
    bench.now = wake.at
    assert bench.plan() == [Load(ticket, "b", key("m:1"), "every copy is full")]


def test_many_short_waits_buy_a_copy_as_one_long_one_does() -> None:
    """A steady queue in which nobody waits long would else leave idle backends idle for ever."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", ON_DISK))
    load_s = load_estimate_s(4 * GB)
    for _ in range(math.ceil(load_s)):
        bench.ticket()
        assert of(Load, bench.plan()) == []
        bench.now += 1.0
        bench.world.set("a", in_flight=1)
        (commit,) = of(Commit, bench.plan())
        assert commit.backend == "a"
        bench.world.set("a", in_flight=2)
    ticket = bench.ticket()
    bench.now += 0.5
    assert of(Load, bench.plan()) == [Load(ticket, "b", key("m:1"), "every copy is full")]


def test_what_was_waited_long_ago_buys_nothing() -> None:
    """A few waits a day are no reason to load."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", ON_DISK))
    bench.ticket()
    bench.now += 4.5
    bench.world.set("a", in_flight=1)
    bench.plan()
    bench.world.set("a", in_flight=2)
    bench.now += 3600.0
    bench.ticket()
    bench.now += 1.0
    assert of(Load, bench.plan()) == []


def test_the_time_a_load_really_takes_counts() -> None:
    """Not what its size suggests, once one was seen; a load that was cancelled shows nothing."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", ON_DISK))
    bench.scheduler.note(LoadAnswered("a", key("m:1"), ok=True, load_s=0.0))
    bench.scheduler.note(LoadAnswered("a", key("m:1"), ok=True, load_s=1.0))
    bench.ticket()
    (wake,) = bench.plan()
    assert wake == WakeAt(NOW + 1.0)


def test_waiting_for_a_load_is_not_waiting_for_a_slot() -> None:
    """Who waited for the first copy to come has not paid for a second one."""
    bench = Bench(candidate("a", ON_DISK), candidate("b", ON_DISK))
    bench.ticket()
    bench.plan()
    bench.now += 10.0
    bench.scheduler.note(LoadAnswered("a", key("m:1"), ok=True, load_s=10.0))
    bench.world.set("a", residency=LOADED, in_flight=2)
    assert bench.plan() == [WakeAt(bench.now + 10.0)]


def test_a_copy_needs_a_backend_that_can_load_it() -> None:
    """Without one there is nothing to wake up for."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", ON_DISK, load_token=False))
    bench.ticket()
    bench.now += 1e6
    assert bench.plan() == []


def test_one_copy_at_a_time() -> None:
    """While a copy is being loaded no further one is."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", LOADING), candidate("c", ON_DISK))
    bench.world.loads[key("m:1")] = [LoadingNow("b", NOW)]
    bench.ticket()
    bench.now += 10.0
    assert of(Load, bench.plan()) == []


@pytest.mark.parametrize("policy", ["warm-first", "round-robin"])
def test_other_policies_make_no_copies(policy: str) -> None:
    """They wait for the copy that is there, however long."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", ON_DISK), policy=policy)
    if policy == "round-robin":
        bench.world.loads[key("m:1")] = [LoadingNow("z", NOW)]  # cold ones are no equals meanwhile
    bench.ticket()
    bench.now += 1e6
    assert bench.plan() == []


# -- round robin -------------------------------------------------------------------------------


def test_round_robin_takes_turns_whatever_the_load() -> None:
    """Nobody is spared for being busy."""
    bench = Bench(candidate("a", in_flight=1), candidate("b"), candidate("c"), policy="round-robin")
    turns = []
    for _ in range(6):
        bench.ticket()
        turns += bench.committed()
    assert turns == list("abcabc")


def test_round_robin_loads_whose_turn_it_is() -> None:
    """A cold backend gets its turn by a load, one per model, and one per backend, in a pass."""
    bench = Bench(
        candidate("a"), candidate("b", ON_DISK), candidate("c", ON_DISK), policy="round-robin"
    )
    first = bench.ticket()
    assert bench.plan() == [Commit(first, "a", "warm")]
    second, third = bench.ticket(), bench.ticket()
    bench.world.by_key[key("n:1")] = [candidate("b", ON_DISK)]
    bench.ticket("n:1")
    assert bench.plan() == [
        Load(second, "b", key("m:1"), "its turn"),
        Commit(third, "a", "warm"),
    ]


# -- what is told ------------------------------------------------------------------------------


def test_estimates_follow_how_long_calls_take() -> None:
    """Calls ahead, and the call itself, times what was learned, over the slots."""
    bench = Bench(candidate("a", in_flight=2), candidate("b", in_flight=2), candidate("c", ON_DISK))
    assert bench.rehearse().wait_s == 5.0 / 4
    bench.scheduler.note(ended("a", 10.0, ok=True))
    bench.scheduler.note(ended("a", 20.0, ok=True))
    bench.ticket()
    assert bench.rehearse().wait_s == pytest.approx(2 * 12.0 / 4)


def test_estimates_learn_from_success_alone() -> None:
    """A failure is quick, and says nothing of how long a call takes."""
    bench = Bench(candidate("a", in_flight=2))
    bench.scheduler.note(ended("a", 0.01, ok=False))
    bench.scheduler.note(FirstByte(Run(call("m:1"), "a", NOW), NOW + 0.01))
    bench.scheduler.note(LoadAnswered("a", key("m:1"), ok=True, load_s=0.01))
    assert bench.rehearse().wait_s == 2.5


def test_estimates_know_now_and_never_and_a_load() -> None:
    """A free slot is now; a load takes its size, or what is left of it; nobody is never."""
    assert Bench(candidate("a")).rehearse().wait_s == 0.0
    assert Bench().rehearse().wait_s == math.inf
    cold = Bench(candidate("a", ON_DISK))
    assert cold.rehearse().wait_s == load_estimate_s(4 * GB) == 5.0
    loading = Bench(candidate("a", LOADING, load_token=False))
    loading.world.loads[key("m:1")] = [LoadingNow("a", NOW - 2.0)]
    assert loading.rehearse().wait_s == 3.0
    loading.world.loads[key("m:1")] = [LoadingNow("z", NOW - 2.0)]
    assert loading.rehearse().wait_s == math.inf, "a load where this call may not go"


def test_a_rehearsal_is_what_the_pass_then_does() -> None:
    """The same effect for the same ticket, whoever waits before it, under every policy."""
    for policy in POLICIES:
        for extra in (0, 1, 2, 3):
            bench = Bench(candidate("a"), candidate("b", in_flight=1), policy=policy)
            for _ in range(extra):
                bench.ticket()
            told = bench.rehearse().effect
            last = bench.ticket()
            done = [e for e in bench.plan() if isinstance(e, Commit | Load) and e.ticket is last]
            expected = [] if told is None else [(type(told), told.backend)]
            assert [(type(each), each.backend) for each in done] == expected, policy


def test_a_rehearsal_leaves_no_trace() -> None:
    """The queue, and whose turn it is, stay as they were."""
    bench = Bench(candidate("a"), candidate("b"), policy="round-robin")
    order = [bench.rehearse().options[0].backend for _ in range(3)]
    assert order == ["a", "a", "a"]
    assert bench.scheduler.waiting() == []
    bench.ticket()
    assert bench.committed() == ["a"]
    assert bench.rehearse().options[0].backend == "b"


def test_a_rehearsal_lists_the_candidates_best_first() -> None:
    """What is in memory before what is not, the less loaded before the more; each with why."""
    bench = Bench(
        candidate("a", ON_DISK),
        candidate("b", in_flight=1),
        candidate("c", first_byte_s=0.5),
        candidate("d", in_flight=2),
        candidate("e", ON_DISK, load_token=False),
        candidate("f", LOADING),
    )
    assert [(o.backend, o.state, o.why) for o in bench.rehearse().options] == [
        ("c", "in memory, a slot is free", "has fewer calls for its slots than b"),
        ("b", "in memory, a slot is free", "has more calls for its slots than c"),
        ("d", "in memory, every slot is taken", "could begin later than c"),
        ("f", "being loaded", "could begin later than c"),
        ("a", "not in memory", "could begin later than c"),
        ("e", "not in memory, another load is under way", "could begin later than c"),
    ]


def test_the_order_of_a_rehearsal_knows_what_a_load_looks_at() -> None:
    """An empty backend evicts nobody; a busy variant would have to go."""
    bench = Bench(
        candidate("a", ON_DISK, models_loaded=1),
        candidate("b", ON_DISK),
        candidate("c", ON_DISK, in_flight=1),
    )
    options = bench.rehearse().options
    assert [(option.backend, option.why) for option in options] == [
        ("b", "has fewer models in memory than a"),
        ("a", "has more models in memory than b"),
        ("c", "runs the model with other options than b"),
    ]
    effect = bench.rehearse().effect
    assert isinstance(effect, Load)
    assert effect.backend == "b"


def test_too_short_a_context_comes_last() -> None:
    """Even where it is in memory and free; a candidate alone needs no comparison."""
    bench = Bench(candidate("a", context=100), candidate("b", ON_DISK, context=4000))
    first, last = bench.rehearse(prompt_tokens=200).options
    assert (first.backend, first.why) == ("b", "has more context than a")
    assert last.state == "in memory, a slot is free, context of 100 is too short"
    assert last.why == "has less context than b"
    assert Bench(candidate("a")).rehearse().options[0].why == "is the only one"
    twins = Bench(candidate("a"), candidate("b")).rehearse().options
    assert [option.why for option in twins] == [
        "is as good as b, but listed before it",
        "is as good as a, but listed later",
    ]


def test_a_load_takes_longer_the_larger_the_model() -> None:
    """A gigabyte a second and one second besides."""
    assert load_estimate_s(0) == 1.0
    assert load_estimate_s(40 * GB) == 41.0


def test_policies_are_built_by_name() -> None:
    """Those of the configuration, and no other."""
    for name in POLICIES:
        assert isinstance(build(name, cast("Any", World())), Greedy)
    with pytest.raises(KeyError):
        build("none", cast("Any", World()))


def test_a_queue_of_one_is_looked_at_once() -> None:
    """Calls may ask for as many contexts as they like, each a queue of its own."""
    bench = Bench(candidate("a", in_flight=2))
    looked: list[PlacementKey] = []
    see = bench.world.candidates

    def counted(call: Call, excluded: frozenset[str]) -> list[Candidate]:
        looked.append(call.key)
        return see(call, excluded)

    bench.world.candidates = counted  # type: ignore[method-assign]
    for context in range(5):
        bench.ticket(options={"num_ctx": 4096 + context})
    assert bench.committed() == []
    assert len(looked) == 5


# -- tiers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_lower_tier_serves_what_no_higher_one_can(policy: str) -> None:
    """A busy backend of a higher one sends no call down; that there is none does."""
    bench = Bench(candidate("a", slots=1), candidate("b"), policy=policy)
    bench.world.priorities = {"a": 100, "b": 50}
    ticket = bench.ticket()
    at_once = bench.scheduler.begin(ticket, NOW)
    assert at_once is not None
    assert at_once.backend == "a"
    bench.world.set("a", in_flight=1, host_in_flight=1)
    assert bench.committed() == []
    assert bench.scheduler.begin(ticket, NOW) is None
    bench.ticket(excluded="a")
    assert bench.committed() == ["b"]
    bench.world.all = bench.world.all[1:]
    assert bench.committed() == ["b"]


def test_a_cold_backend_is_loaded_before_a_lower_tier_serves() -> None:
    """The lower one is for what the others cannot, not for what they must load."""
    bench = Bench(candidate("a", ON_DISK), candidate("b"))
    bench.world.priorities = {"a": 100, "b": 50}
    bench.ticket()
    (load,) = of(Load, bench.plan())
    assert load.backend == "a"


def test_a_rehearsal_tells_of_tiers() -> None:
    """Before all else; and the wait is that for the higher one."""
    bench = Bench(candidate("a"), candidate("b", in_flight=2))
    bench.world.priorities = {"a": 50, "b": 100}
    told = bench.rehearse()
    assert told.effect is None
    assert told.wait_s == 5.0 / 2
    assert [(option.backend, option.why) for option in told.options] == [
        ("b", "has a higher priority than a"),
        ("a", "has a lower priority than b"),
    ]


# -- what is learned ---------------------------------------------------------------------------


def test_what_others_have_learned_is_kept_for_them() -> None:
    """A spell of another strategy costs nothing; there is nothing of its own to keep."""
    scheduler = Bench().scheduler
    assert scheduler.learned(NOW) == {}
    told = {"speeds": {"a": {"prompt_rate": 900.0}}}
    scheduler.recall(told, NOW, 60.0)
    assert scheduler.learned(NOW) == told
