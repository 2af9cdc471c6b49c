"""What is loaded, copied and drained, with the real pool and with what hosts do by hand."""

from __future__ import annotations

import pytest

from balancer.core.cost import Need
from balancer.core.domain import Verdict
from balancer.core.events import DrainEnded, DrainRequested
from balancer.core.pins import Pin, Pins
from balancer.core.scheduler import Effect, Load, Ticket
from tests.core.bench import GB, backend, call, canon, key
from tests.core.planned import M, Planned, crowded, where


def waiting_ticket(bench: Planned) -> Ticket:
    """One that waits nowhere."""
    now = bench.clock()
    return Ticket(call(), 9999, frozenset(), (), now, now + 60)


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


@pytest.mark.parametrize(("tier", "goes"), [(200, "b"), (100, "c")])
def test_a_copy_for_many_goes_to_the_highest_tier(bench: Planned, tier: int, goes: str) -> None:
    """Though another is sooner; to a lower one where each of the higher ones has it."""
    bench.shape(backend("a", priority=200), backend("b", priority=tier), backend("c", priority=100))
    bench.up("a", "m:1", loaded=["m:1"])
    for name, load_rate in (("b", 0.8), ("c", 1.2)):
        bench.up(name, "m:1")
        bench.speed(name, load_rate=load_rate)
    waiter = bench.plan.turns.preview(waiting_ticket(bench), Need(100.0, 200.0, 0.0))
    for number in range(2):
        bench.submit(id=f"r{number}")
    effects: list[Effect] = []
    found = bench.plan.quotes.weigh(waiter, {}, bench.clock())
    bench.plan.placement.consider_copy(found, 80, bench.clock(), effects)
    assert [load.backend for load in effects if isinstance(load, Load)] == [goes]


@pytest.mark.parametrize(("tier", "rest", "loads"), [(50, 4, 0), (100, 4, 1), (50, 20, 1)])
def test_no_copy_in_a_lower_tier_that_nobody_would_go_to(
    bench: Planned, tier: int, rest: int, loads: int
) -> None:
    """Where all that wait are served above soon enough, though a copy would be sooner."""
    bench.shape(backend("a", slots=2), backend("b", priority=tier))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.up("b", "m:1")
    bench.speed("b", load_rate=8.0)
    waiter = bench.plan.turns.preview(waiting_ticket(bench), Need(100.0, 200.0, 0.0))
    for number in range(2):
        bench.submit(id=f"r{number}")
    effects: list[Effect] = []
    found = bench.plan.quotes.weigh(waiter, {}, bench.clock())
    bench.plan.placement.consider_copy(found, rest, bench.clock(), effects)
    assert len(effects) == loads


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


@pytest.mark.parametrize(
    ("b", "c", "is_loading", "goes"),
    [
        (100, 100, False, ["b"]),
        (50, 100, False, ["c"]),
        (50, 50, False, []),
        (50, 100, True, []),
    ],
)
def test_copies_ahead_are_of_the_highest_tier(
    bench: Planned, b: int, c: int, is_loading: bool, goes: list[str]
) -> None:
    """None below what has it or could take it, though that is loading something else just now."""
    many = "defghijklmnopqrs"  # so that more than one may load at a time
    bench.shape("a", backend("b", priority=b), backend("c", priority=c), *many)
    bench.up("a", "m:1", loaded=["m:1"])
    bench.up("b", "m:1")
    bench.up("c", "m:1", "n:1")
    bench.speed("c", load_rate=0.5)
    if is_loading:
        bench.speed("c", load_rate=0.1)
        bench.submit("n:1", id="other")
    for number in range(60):
        client = bench.submit(id=f"r{number}", prompt_tokens=10)
        bench.sleep(0.2)
        bench.end(client)
        if bench.loads[is_loading:]:
            break
    assert [load.backend for load in bench.loads[is_loading:]] == goes


def test_a_lower_tier_is_not_drained_though_it_is_sooner(bench: Planned) -> None:
    """Unless the higher one would take too long."""
    bench.shape(
        backend("a", slots=1, vram_bytes=7 * GB, priority=200),
        backend("b", slots=1, vram_bytes=7 * GB),
    )
    for name, model in (("a", "m:1"), ("b", "n:1")):
        bench.up(name, model, "o:1", loaded=[model])
    for name, load_rate in (("a", 3.0), ("b", 8.0)):
        bench.speed(name, load_rate=load_rate)
    running = [bench.submit("m:1"), bench.submit("n:1", id="r2")]
    for client in running:
        client.lease.moved(100)
    bench.submit("o:1", id="cold")
    bench.pour(6.0, 60, *running)
    assert [event.backend for event in bench.of(DrainRequested)] == ["a"]


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


def test_a_drain_ends_with_the_wish_though_nobody_else_waits(bench: Planned) -> None:
    """It does not stand until somebody happens to wait for something else."""
    crowded(bench)
    running = bench.submit()
    cold = bench.submit("o:1", id="cold")
    bench.pour(6.0, 60, running)
    assert cold.ticket is not None
    bench.dispatcher.withdraw(cold.ticket)
    bench.pour(0.5, 60, running)
    assert bench.plan.ledgers["a"].drain is None
    assert [event.reason for event in bench.of(DrainEnded)] == ["nobody waits"]


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
    load_s = bench.plan.ledgers["a"].speed.load_s(bench.plan.books.model(canon("o:1")).size)
    tick_s = bench.plan.knobs.tick_s
    assert bench.of(DrainRequested)[1].at >= loaded_at + 2 * load_s - tick_s
    assert where(again) == [""]


def test_no_drain_where_it_would_not_make_room(bench: Planned) -> None:
    """Beside the busy one there is one that must not go."""
    bench.shape(backend("a", slots=2, vram_bytes=11 * GB))
    bench.up("a", "m:1", "n:1", "o:1", loaded=["m:1", "n:1"])
    bench.plan.books.room("a").configured = 7 * GB
    running = bench.submit()
    bench.plan.books._foreign["a", canon("n:1")] = bench.clock() + 30.0
    bench.submit("o:1", id="cold")
    bench.pour(8.0, 60, running)
    assert bench.of(DrainRequested) == []


# -- pins ---------------------------------------------------------------------------------------


def test_what_is_pinned_is_loaded_though_nobody_asks(bench: Planned) -> None:
    """Where it is wanted, to stay; and not again where that has failed, for a while."""
    for name in "ab":
        bench.start(name, "m:1")
    bench.pool.pins = Pins([Pin(M, ("b",), 1, key("m:1"))])
    bench.dispatcher.kick()
    bench.sleep(3.0)
    told = [(load.ticket, load.why, load.backend, load.keep_alive) for load in bench.loads]
    assert told == [(None, "pin", "b", "24h")]
    bench.loaded(verdict=Verdict.UNFIT)
    bench.sleep(8.0)
    assert bench.loads == []
    bench.sleep(5.0)
    assert [load.why for load in bench.loads] == ["pin"]
    bench.end_load()
    bench.sleep(20.0)
    assert bench.loads == []


def test_a_pin_on_any_backends_takes_those_of_the_highest_tier(bench: Planned) -> None:
    """First, though another loads sooner; of a lower one so many as are lacking then."""
    bench.shape(backend("a", priority=50), "b", "c")
    for name in "abc":
        bench.up(name, "m:1")
        bench.speed(name, load_rate=4.0 if name == "a" else 0.5)
    bench.pool.pins = Pins([Pin(M, (), 3, key("m:1"))])
    bench.dispatcher.kick()
    told = []
    for _ in range(3):
        bench.sleep(3.0)
        told.append(bench.end_load().backend)
    assert told == ["b", "c", "a"]


def test_what_is_pinned_is_not_put_out(bench: Planned) -> None:
    """Nor drained, however long another waits for its room."""
    crowded(bench)
    bench.pool.pins = Pins([Pin(M, ("a",), 1, key("m:1"))])
    running = bench.submit(id="running")
    bench.submit("o:1", id="cold")
    bench.pour(20.0, 60, running)
    bench.end(running)
    bench.sleep(20.0)
    assert (bench.loads, bench.of(DrainRequested)) == ([], [])


EXACT = key("m:1", num_ctx=8192)


def test_a_pin_counts_what_is_there_already(bench: Planned) -> None:
    """In just its context, whoever loaded it: no other copy is made."""
    for name in "ab":
        bench.start(name, "m:1")
    bench.holds("b", "m:1", context=8192)
    bench.pool.pins = Pins([Pin(M, (), 1, EXACT, exact=True)])
    bench.dispatcher.kick()
    bench.sleep(10.0)
    assert bench.loads == []
    bench.holds("b", "m:1", context=4096)
    bench.sleep(10.0)
    assert [(load.why, load.key) for load in bench.loads] == [("pin", EXACT)]


def test_a_pin_that_came_later_replaces_another_variant(bench: Planned) -> None:
    """Once nobody uses that any more, and has not for as long as the load takes."""
    bench.start("a", "m:1", loaded=["m:1"])
    running = bench.submit()
    bench.pool.pins = Pins([Pin(M, ("a",), 1, EXACT, exact=True)])
    bench.dispatcher.kick()
    bench.pour(10.0, 60, running)
    assert bench.loads == []
    bench.end(running)
    bench.speed("a", load_rate=0.2)
    bench.sleep(10.0)
    assert bench.loads == [], "the next call may be on its way"
    bench.sleep(20.0)
    (load,) = bench.loads
    assert (load.why, load.key, load.victims) == ("pin", EXACT, (key("m:1"),))
    bench.sleep(0.1)
    bench.loaded()
    bench.holds("a", "m:1", context=8192)
    bench.sleep(20.0)
    assert bench.loads == []


def test_calls_for_a_pinned_variant_make_room_for_it(bench: Planned) -> None:
    """The other one, which more and more callers use, runs dry."""
    bench.start("a", "m:1", loaded=["m:1"])
    running = bench.submit(id="running")
    bench.pool.pins = Pins([Pin(M, ("a",), 1, EXACT, exact=True)])
    wants = bench.submit(id="wants", options={"num_ctx": 8192})
    bench.pour(6.0, 60, running)
    late = bench.submit(id="late")
    assert where(wants, late) == ["", ""]
    bench.end(running)
    (load,) = bench.loads
    assert (load.why, load.key, load.victims) == ("drain", EXACT, (key("m:1"),))


def test_a_pinned_model_serves_other_contexts(bench: Planned) -> None:
    """The host runs one variant at a time; a pin without a context is met by each."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.pool.pins = Pins([Pin(M, ("a",), 1, key("m:1"))])
    bench.submit(options={"num_ctx": 8192})
    assert [(load.why, load.key) for load in bench.loads] == [("call", EXACT)]
    bench.sleep(0.1)
    bench.loaded()
    bench.holds("a", "m:1", context=8192)
    bench.sleep(20.0)
    assert bench.loads == []


def test_copies_for_nobody_do_not_push_a_pinned_context_out(bench: Planned) -> None:
    """It would be back soon, and so on for ever."""
    bench.start("a", "m:1", loaded=["m:1"])
    bench.start("b", "m:1")
    bench.pool.pins = Pins([Pin(M, ("b",), 1, EXACT, exact=True)])
    bench.dispatcher.kick()
    bench.sleep(3.0)
    assert bench.loaded().key == EXACT
    bench.holds("b", "m:1", context=8192)
    for number in range(60):
        client = bench.submit(id=f"r{number}", prompt_tokens=10)
        bench.sleep(0.2)
        bench.end(client)
    assert bench.loads == []
