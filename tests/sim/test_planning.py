"""
The plan in small worlds where everything goes wrong: what must hold after each of its passes.

Each world is one seed; one that fails is repeated by its seed alone.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from balancer.core.admission import QueueLimits
from balancer.core.cells import Cell, Cells
from balancer.core.cost import GO
from balancer.core.knobs import Knobs
from balancer.core.plan import KEPT_TICKS, Plan
from balancer.core.queues import Queue, Waiter
from balancer.core.scheduler import (
    Effect,
    Fact,
    Load,
    LoadAnswered,
    LoadRefused,
    Ticket,
    WakeAt,
)
from balancer.sim.world import HOST_TYPES, Job, Machine, Mishap, Model, Report, World
from tests.sim.test_world import calls, trouble

SEEDS = range(1, 21)
EPSILON_S = 1e-6


class Watched(Plan):
    """A plan that is looked at after each pass."""

    made: list[Watched]

    def __init__(self, *told: Any, **more: Any) -> None:
        super().__init__(*told, **more)
        self.seen: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.made.append(self)

    def plan(self, now: float) -> list[Effect]:
        """One pass, and a look at what it left."""
        effects = super().plan(now)
        self.seen["passes"] += 1
        for effect in effects:
            if isinstance(effect, Load):
                self.asked[effect.backend] += 1
                assert self.asked[effect.backend] == 1, f"a second load on {effect.backend}"
        self.asked.clear()
        self._look_at_drains(now)
        if WakeAt(now) not in effects and not any(isinstance(each, Load) for each in effects):
            # Else another pass follows at once.
            for queue in self.queues.by_key.values():
                self._look_at_queue(queue, now)
        return effects

    def _look_at_drains(self, now: float) -> None:
        """Nobody is kept out for a wish that nobody has any more, or for ever."""
        for ledger in self.ledgers.values():
            drain = ledger.drain
            if drain is not None:
                self.seen["drains"] += 1
                assert drain.wanted in self.queues.by_key, f"{ledger.name} drains for nobody"
                assert now < drain.until, f"{ledger.name} drains for ever"
            if ledger.going:
                self.seen["going"] += 1
                told = f"nothing is loaded on {ledger.name} for which {ledger.going} went"
                asked = ledger.asked_load is not None
                assert asked or self._view.loading_on(ledger.name) is not None, told

    def _look_at_queue(self, queue: Queue, now: float) -> None:
        """Who declines a free slot has a recorded option of lower predicted cost."""
        promised: Counter[str] = Counter()
        for waiter in queue.waiters[: self.knobs.plan_depth]:
            if not self._is_held_back(waiter):
                self._look_at_waiter(waiter, promised, now)
            if waiter.choice is not None:
                promised[waiter.choice.backend] += 1

    def _is_held_back(self, waiter: Waiter) -> bool:
        """By the gate for batch, by its key's share, or by its owner's limit."""
        call = waiter.ticket.call
        return call.batch or self.turns.has_its_share(call) or not self._may_start(call, 0)

    def _look_at_waiter(self, waiter: Waiter, promised: Counter[str], now: float) -> None:
        found = self.quotes.weigh(waiter, promised, now, exists=False)
        fits = [c for c in found if not c.short] or found
        free = [c for c in fits if c.terms.kind is GO and not c.quote.may_probe]
        if not free:
            return
        best, told = min(free, key=lambda c: c.terms.total), waiter.ticket.call.id
        assert waiter.choice is not None, f"{told} waits beside a free slot on {best.backend}"
        assert waiter.choice.terms.kind is not GO, f"{told} may go, and waits"
        assert waiter.tick > self.books.ticks - KEPT_TICKS, f"{told} was not looked at for long"
        self.seen["declined"] += 1
        if waiter.tick < self.books.ticks:  # since then time alone may have changed the prices
            return
        assert waiter.choice.terms.total <= best.terms.total + EPSILON_S, (
            f"{told} waits for {waiter.choice.terms} beside {best.terms}"
        )

    def left_over(self) -> list[str]:
        """What is still counted though nothing runs."""
        kinds = {
            "waiting": self.queues.waiters,
            "queues": self.queues.by_key,
            "tracks": self.books.tracks,
            "in flight": self.books.in_flight,
            "busy": [each for each in self.ledgers.values() if not each.is_idle],
            "drains": [each for each in self.ledgers.values() if each.drain is not None],
            "going": [each for each in self.ledgers.values() if each.going],
        }
        return [name for name, left in kinds.items() if left]


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The plans that a test's worlds have made."""
    monkeypatch.setattr(Watched, "made", [], raising=False)
    monkeypatch.setattr("balancer.core.strategy.Plan", Watched)
    return Watched.made


def world(seed: int, *, calm: bool = False, count: int = 60) -> tuple[World, list[Job]]:
    """Up to four unlike hosts, up to five models, calls of all kinds within a minute."""
    rng = random.Random(seed)
    kinds = list(HOST_TYPES.values())
    hosts = [
        Machine(f"h{n}", rng.choice(kinds), rng.choice([1, 2, 4]), max_models=rng.choice([1, 2, 3]))
        for n in range(rng.randint(2, 4))
    ]
    sizes = [(0.5, 1.0), (2.0, 3.0), (4.9, 8.0)]
    models = [Model(f"m{n}", *rng.choice(sizes)) for n in range(rng.randint(2, 4))]
    models.append(Model("e", 0.3, 0.14, 0.0, embedding=True))
    names = [host.name for host in hosts]
    mishaps: list[Mishap] = [] if calm else trouble(rng, names, models)
    made = World(
        hosts,
        models,
        policy="plan",
        seed=seed,
        warm={names[0]: ["e"]},
        slots_known=rng.random() < 0.5,
        mishaps=mishaps,
        check_invariants=True,
        queue=None if calm else rng.choice([None, QueueLimits(30, 10, 20.0)]),
        knobs=Knobs(evaluations=rng.choice([4, 64]), drain_after_s=rng.choice([1.0, 5.0])),
    )
    jobs = calls(rng, models, count)
    if calm:
        jobs = [replace(job, leaves_after=None) for job in jobs]
    return made, jobs


def lived(seed: int, plan: list[Watched], *, calm: bool = False) -> tuple[Report, Watched]:
    """A world that was run to its end, and came to rest."""
    made, jobs = world(seed, calm=calm)
    report = made.run(jobs)
    return report, plan[-1]


def test_the_plans_laws_hold_whatever_happens(watched: list[Watched]) -> None:
    """After each pass, with mishaps, in every world; and nothing is left over at its end."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        try:
            report, plan = lived(seed, watched)
            assert plan.left_over() == []
            assert plan.wake_at() == math.inf
            assert {"unfinished", "never"}.isdisjoint(r.status for r in report.records)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        seen += plan.seen
    # Chance has been everywhere, or the test proves nothing.
    assert seen["passes"] > 100 * len(SEEDS)
    for what in ("declined", "drains", "going"):
        assert seen[what], seen


class Told(Cells):
    """Cells that are known to a test."""

    made: list[Told]
    moves = 0

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.made.append(self)

    def _move(self, ticket: Ticket, cell: Cell, there: Cell) -> None:
        self.moves += 1
        super()._move(ticket, cell, there)

    def left_over(self) -> list[object]:
        """What is still counted though nothing runs."""
        return [*self._of, *self._runs, *(cell.calls for cell in self.cells if cell.calls)]


def test_the_laws_hold_in_cells(watched: list[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every cell's plan; and no cell counts anybody who is not there any more."""
    for name, value in (("FROM", 1), ("SIZE", 2), ("LOOK_S", 0.1), ("Cells", Told)):
        monkeypatch.setattr(f"balancer.core.cells.{name}", value)
    monkeypatch.setattr(Told, "made", [], raising=False)
    for seed in SEEDS:
        watched.clear()
        made, jobs = world(seed)
        report = made.run(jobs)
        assert [plan.left_over() for plan in watched] == [[]] * len(watched), seed
        assert {"unfinished", "never"}.isdisjoint(r.status for r in report.records), seed
    assert len(Told.made) > len(SEEDS) // 2
    assert not any(cells.left_over() for cells in Told.made)
    assert any(cells.moves for cells in Told.made)


def test_nobody_starves(watched: list[Watched]) -> None:
    """Where nothing goes wrong and nobody leaves, everybody is answered, and none far too late."""
    for seed in SEEDS:
        report, _ = lived(seed, watched, calm=True)
        assert {r.status for r in report.records} == {"done"}, seed
        waits = [r.first_at - r.arrived_at for r in report.records if r.first_at is not None]
        assert max(waits) < 400.0, (seed, max(waits))


@pytest.mark.parametrize("seed", [2, 7, 11, 16])
def test_two_runs_of_a_seed_decide_the_same(seed: int, watched: list[Watched]) -> None:
    """Each decision, with all that it was made from."""
    (first, one), (second, two) = lived(seed, watched), lived(seed, watched)
    assert one is not two
    assert list(map(repr, one.decisions.ring)) == list(map(repr, two.decisions.ring))
    assert first.records == second.records


def test_each_load_is_answered_or_refused(
    watched: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is forgotten, also where hosts crash and hang while they load."""
    asked, heard = Counter[str](), Counter[str]()
    note, plan = Watched.note, Watched.plan

    def noted(self: Watched, fact: Fact) -> None:
        if isinstance(fact, LoadAnswered | LoadRefused):
            heard[fact.backend] += 1
        note(self, fact)

    def planned(self: Watched, now: float) -> list[Effect]:
        effects = plan(self, now)
        asked.update(effect.backend for effect in effects if isinstance(effect, Load))
        return effects

    monkeypatch.setattr(Watched, "note", noted)
    monkeypatch.setattr(Watched, "plan", planned)
    for seed in SEEDS:
        asked.clear()
        heard.clear()
        lived(seed, watched)
        assert asked == heard, seed
