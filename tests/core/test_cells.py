"""Cells: who is in which, where calls go, and that the whole is still one scheduler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balancer.core import cells
from balancer.core.admission import QueueLimits
from balancer.core.cells import Cells
from balancer.core.domain import Allowance, Call, Principal, Role, Verdict
from balancer.core.pins import Pin, Pins
from balancer.core.plan import Plan
from balancer.core.scheduler import Ticket
from balancer.core.sight import Sight
from balancer.core.strategy import build, cell_count
from tests.core.bench import Bench, backend, call, canon, key, outcome
from tests.core.planned import at_rest, where

NAMES = [f"gpu{n}" for n in range(6)]


class Celled(Bench):
    """The core with three cells of two backends each, which have m:1 in memory."""

    def __init__(self) -> None:
        super().__init__("plan", limits=QueueLimits(10_000, 10_000, 900.0))
        self.shape(*(backend(name, slots=1) for name in NAMES))
        for name in NAMES:
            self.up(name, "m:1", "o:1", loaded=["m:1"])
        self.cells = Cells(self.pool, self._plan, self.limits.may_start, 3)
        self.dispatcher.exchange(self.cells)

    @staticmethod
    def _plan(view: Sight, may_start: Callable[[Call, int], bool]) -> Plan:
        return Plan(view, may_start=may_start)

    def cell(self, name: str) -> int:
        """The number of a backend's cell."""
        return next(cell.number for cell in self.cells.cells if name in cell.names)

    def is_at_rest(self) -> bool:
        """Whether nothing is counted any more."""
        idle = all(at_rest(cell.plan) and not cell.calls for cell in self.cells.cells)
        return idle and not self.cells.waiting()


@pytest.fixture
def bench() -> Iterator[Celled]:
    """Three cells of two."""
    found = Celled()
    yield found
    found.close()


# -- who is where --------------------------------------------------------------------------------


@pytest.mark.parametrize(("backends", "count"), [(0, 1), (64, 1), (65, 3), (240, 10), (1000, 42)])
def test_so_many_backends_make_so_many_cells(backends: int, count: int) -> None:
    """A pool that one plan can look through is not cut."""
    assert cells.count(backends) == count


def test_a_big_pool_is_dealt_into_cells_and_one_with_tiers_is_not() -> None:
    """Whoever is second choice over the whole pool must not be first in some cell."""
    bench = Bench("plan")
    bench.shape(*(f"gpu{n}" for n in range(70)))
    assert cell_count(bench.pool) == 3
    assert isinstance(build("plan", bench.pool), Cells)
    bench.shape(*(backend(f"gpu{n}", priority=100 + n % 2) for n in range(70)))
    assert cell_count(bench.pool) == 1
    assert isinstance(build("plan", bench.pool), Plan)


def test_each_cell_gets_of_every_kind(bench: Celled) -> None:
    """Like cards: those that are alike are not put together."""
    bench.shape(*(backend(name, weight=1.0 + (n > 2)) for n, name in enumerate(NAMES)))
    fresh = Cells(bench.pool, bench._plan, bench.limits.may_start, 3)
    for cell in fresh.cells:
        weights = [bench[name].backend.weight for name in cell.names]
        assert sorted(weights) == [1.0, 2.0]


def test_who_comes_goes_to_the_smallest_cell_and_nobody_moves(bench: Celled) -> None:
    """What was learned of a backend stays with it."""
    before = {name: bench.cell(name) for name in NAMES}
    left = NAMES[1]
    bench.shape(*(backend(name, slots=1) for name in [*NAMES, "new"] if name != left))
    assert bench.cell("new") == before[left]
    assert {n: bench.cell(n) for n in NAMES if n != left} == {
        n: c for n, c in before.items() if n != left
    }
    assert Counter(map(bench.cell, [n for n in [*NAMES, "new"] if n != left])) == {0: 2, 1: 2, 2: 2}


def test_a_cell_sees_its_own_backends_and_no_others(bench: Celled) -> None:
    """In everything that it may ask of the pool."""
    wanted = call("m:1")
    for cell in bench.cells.cells:
        view = cell.plan._view
        assert {b.name for b in view.backends()} == cell.names
        assert {p.name for p in view.places(wanted, frozenset())} == cell.names
        assert {c.backend for c in view.candidates(wanted, frozenset())} == cell.names
    assert bench.pool.take_token(NAMES[0], key("o:1"), "somebody's")
    seen = [len(cell.plan._view.loading(key("o:1"))) for cell in bench.cells.cells]
    assert seen.pop(bench.cell(NAMES[0])) == 1
    assert seen == [0, 0]


# -- calls ---------------------------------------------------------------------------------------


def test_every_slot_of_every_cell_is_used(bench: Celled) -> None:
    """By as many calls as there are slots, whatever cells are home to their model."""
    clients = [bench.submit(id=f"r{n}") for n in range(6)]
    bench.sleep(5.0)
    assert sorted(where(*clients)) == NAMES
    late = bench.submit(id="late")
    assert late.waits
    clients[3].lease.settle(outcome(now=bench.clock()))
    bench.sleep(5.0)
    assert where(late) == where(clients[3])
    for client in (*clients[:3], *clients[4:], late):
        client.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


def test_a_conversation_stays_in_its_cell(bench: Celled) -> None:
    """Where its prompt is cached, if that is not much busier; other conversations go elsewhere."""
    turns: list[int] = []
    for turn in range(4):
        client = bench.submit(id=f"r{turn}", session="one")
        turns.append(bench.cell(where(client)[0]))
        other = bench.submit(id=f"o{turn}", session=f"other {turn}")
        for each in (client, other):
            each.lease.settle(outcome(now=bench.clock()))
    assert len(set(turns)) == 1


def test_who_cannot_be_served_in_a_cell_is_moved(bench: Celled) -> None:
    """The backends of his cell go away while he waits."""
    clients = [bench.submit(id=f"r{n}") for n in range(6)]
    bench.sleep(3.0)
    late = bench.submit(id="late")
    (waiting,) = bench.cells.waiting()
    home = bench.cells._of[waiting]
    for name in home.names:
        bench.check(name, ok=False, connected=False, count=3)
    bench.sleep(3.0)
    assert bench.cells._of[waiting] is not home
    there = next(c for c in clients if where(c)[0] in bench.cells._of[waiting].names)
    there.lease.settle(outcome(now=bench.clock()))
    assert where(late) == where(there)
    for each in (*clients, late):
        if not each.lease.settled:
            each.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


def test_who_was_tried_is_not_asked_again_in_another_cell(bench: Celled) -> None:
    """A call that must keep away from both backends of a cell waits in another one."""
    away = frozenset(bench.cells.cells[0].names | bench.cells.cells[1].names)
    client = bench.submit(excluded=away, attempts=(), seq=1)
    assert where(client)[0] in bench.cells.cells[2].names


def test_a_limit_holds_over_all_cells(bench: Celled) -> None:
    """What one cell starts in a pass, the next one counts."""
    owner = Principal("o", Role.USER, allowance=Allowance(slots=2))
    others = [bench.submit(id=f"o{n}") for n in range(6)]
    clients = [bench.submit(id=f"r{n}", principal=owner, owner="key:o") for n in range(5)]
    bench.sleep(3.0)
    bench.pool.changed = lambda: None
    for client in others:
        client.lease.settle(outcome(now=bench.clock()))
    bench.pool.changed = bench.dispatcher.kick
    bench.sleep(3.0)
    assert sum(not client.waits for client in clients) == 2


def test_nobody_is_counted_twice_who_leaves(bench: Celled) -> None:
    """A call that is withdrawn, and one whose backend leaves the pool while it runs."""
    first = bench.submit()
    bench.shape(*(backend(name, slots=1) for name in NAMES if name != where(first)[0]))
    first.lease.settle(outcome(Verdict.GONE, bench.clock()))
    others = [bench.submit(id=f"r{n}") for n in range(6)]
    (late,) = (client for client in others if client.waits)
    assert late.ticket is not None
    bench.dispatcher.withdraw(late.ticket)
    for client in others:
        if client is not late:
            client.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


# -- one scheduler -------------------------------------------------------------------------------


def test_what_is_learned_is_told_as_one_and_taken_over_by_another(bench: Celled) -> None:
    """Each backend's part under its name, whatever cell it is in."""
    for cell in bench.cells.cells:
        for name in cell.names:
            rates = {"prompt_rate": 1500.0 + cell.number, "decode_rate": 60.0, "load_rate": 1.0}
            samples = dict.fromkeys(("prompt", "decode", "load"), 20)
            cell.plan.books.ledger(name).speed.restore({**rates, "samples": samples})
    learned = bench.cells.learned(bench.clock())
    assert sorted(learned["speeds"]) == NAMES
    fresh = Cells(bench.pool, bench._plan, bench.limits.may_start, 2)
    fresh.recall(learned, bench.clock(), 0.0)
    for cell in fresh.cells:
        for name in cell.names:
            rate = cell.plan.books.ledger(name).speed.prompt_rate
            assert rate == pytest.approx(1500.0 + bench.cell(name))


def test_what_waits_moves_over_to_another_dealing(bench: Celled) -> None:
    """A pool that has grown is dealt anew, while calls run and wait."""
    clients = [bench.submit(id=f"r{n}") for n in range(8)]
    bench.sleep(3.0)
    bench.cells = Cells(bench.pool, bench._plan, bench.limits.may_start, 2)
    bench.dispatcher.exchange(bench.cells)
    assert len(bench.cells.waiting()) == 2
    for client in clients:
        bench.sleep(2.0)
        client.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


def test_explain_shows_the_backends_of_all_cells(bench: Celled) -> None:
    """The first is where it would go."""
    told = bench.dispatcher.forecast(call("m:1", arrived_at=bench.clock()))
    assert sorted(option.backend for option in told.options) == NAMES
    assert told.options[0].backend == told.backend
    assert where(bench.submit()) == [told.backend]


def test_a_wait_is_estimated_by_the_cell_of_the_call(bench: Celled) -> None:
    """Zero while a slot is free there."""
    now = bench.clock()
    ticket = Ticket(call("m:1"), 1, frozenset(), (), now, now + 60.0)
    assert bench.cells.wait_estimate(ticket, now) == 0.0


def test_nothing_to_do_is_nothing_to_wake_for(bench: Celled) -> None:
    """As for one plan."""
    assert bench.cells.wake_at() == math.inf


@pytest.mark.parametrize("backends", [(), (NAMES[0], NAMES[4])])
def test_a_pin_is_kept_once_and_not_in_every_cell(bench: Celled, backends: tuple[str, ...]) -> None:
    """Any one copy is the first home's to keep; named backends are those of their cells."""
    bench.pool.pins = Pins([Pin(canon("o:1"), backends, 1, key("o:1"))])
    bench.dispatcher.kick()
    asked: list[str] = []
    for _ in range(20):
        bench.sleep(1.0)
        asked += [load.backend for load in bench.loads]
        while bench.loads:
            load: Any = bench.loaded()
            bench.holds(load.backend, "m:1", "o:1")
    assert sorted(asked) == sorted(backends) if backends else len(asked) == 1
