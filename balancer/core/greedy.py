"""
The small greedy policies: the head of each queue goes to the best backend with a free slot.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Final

from balancer.core.domain import Call, Candidate, PlacementKey, Residency, Verdict
from balancer.core.scheduler import (
    Commit,
    Effect,
    Ended,
    Fact,
    Load,
    LoadAnswered,
    Option,
    Rehearsal,
    Ticket,
    View,
    WakeAt,
    split_by_context,
)
from balancer.core.tiers import highest

LOADED: Final = Residency.LOADED  # looked up in the enum it takes longer than all of `_is_free`


@dataclass(frozen=True, slots=True)
class Policy:
    """
    What tells one greedy policy from another.

    Args:
        rank: Order among backends; the least is chosen. Gets the candidate with this pass's
            commits counted, and how long ago it was last chosen (a rank, not seconds).
        terms: For people, what it means to be less, and more, in each part of the rank.
        copies: Whether a second copy may be loaded while one is in memory.
        cold_is_equal: A backend without the model in memory competes with those that have it.
    """

    rank: Callable[[Candidate, int], tuple[float, ...]]
    terms: tuple[tuple[str, str], ...]
    copies: bool
    cold_is_equal: bool = False


SOON_S: Final = 0.01  # no need to tell apart what answers sooner than that
AT_ONCE: Final = round(math.log2(SOON_S))


def _by_load(candidate: Candidate, last_used: int) -> tuple[float, ...]:
    """Fewest calls per slot, then the quicker by factors of two, then whoever was idle longest."""
    first_byte_s = candidate.first_byte_s
    quick = round(math.log2(first_byte_s)) if first_byte_s > SOON_S else AT_ONCE
    share = candidate.in_flight / candidate.slots
    return (share, candidate.host_in_flight, quick, last_used)


_TURN: Final = ("was used longer ago", "was used more lately")
_TERMS: Final = (
    ("has fewer calls for its slots", "has more calls for its slots"),
    ("has fewer calls in all", "has more calls in all"),
    ("answers sooner", "answers later"),
    _TURN,
)
_COLD_TERMS: Final = (
    ("would evict no running variant", "runs the model with other options"),
    ("has fewer models in memory", "has more models in memory"),
)

POLICIES: Final[Mapping[str, Policy]] = {
    "least-loaded": Policy(_by_load, _TERMS, copies=True),
    "warm-first": Policy(_by_load, _TERMS, copies=False),
    "round-robin": Policy(
        lambda _, last_used: (last_used,), (_TURN,), copies=False, cold_is_equal=True
    ),
}

# A load that takes this much longer than its size suggests no longer holds up its callers.
OVERDUE_FACTOR: Final = 3.0
OVERDUE_EXTRA_S: Final = 30.0
WAITED_HALF_LIFE_S: Final = 60.0


def load_estimate_s(size_bytes: int) -> float:
    """Seconds to load that many bytes at a gigabyte a second, before anything is known."""
    return 1.0 + size_bytes / 1e9


def _anybody(_: Call, __: int) -> bool:
    return True


class Greedy:
    """
    The head of each queue goes to the best backend with a free slot.

    A second copy is loaded only when every copy is full and calls have waited as long as the load
    would take, the head and those before it together: then waiting and loading have cost the same,
    whatever comes next (the ski-rental rule, at most twice the optimum). What was waited long ago
    counts for less and less.

    Args:
        may_start: Whether the owner of a call may have one more at a backend, besides so many
            that are about to start.
    """

    def __init__(
        self, policy: Policy, view: View, may_start: Callable[[Call, int], bool] = _anybody
    ) -> None:
        self._policy = policy
        self._view = view
        self._may_start = may_start
        self._queues: dict[PlacementKey, list[Ticket]] = {}
        self._last_used: dict[str, int] = {}
        self._uses = 0
        self._kept: dict[str, Any] = {}
        self._busy_s: dict[str, float] = {}  # by model: smoothed seconds a call holds its slot
        self._load_s: dict[str, float] = {}  # by model: smoothed seconds of its loads
        self._waited: dict[str, _Waited] = {}  # by model
        self._just_loaded: set[str] = set()
        self._loaded_at: dict[str, float] = {}  # by model: what was waited before, a load has paid

    def enqueue(self, ticket: Ticket) -> None:
        """Take a waiting ticket in, in order of its seq."""
        queue = self._queues.setdefault(ticket.call.key, [])
        bisect.insort(queue, ticket, key=lambda other: other.seq)

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket; one that is not here is no mistake."""
        queue = self._queues.get(ticket.call.key, [])
        if ticket in queue:
            queue.remove(ticket)
        if not queue:
            self._queues.pop(ticket.call.key, None)

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, in order."""
        tickets = [ticket for queue in self._queues.values() for ticket in queue]
        return sorted(tickets, key=lambda ticket: ticket.seq)

    def note(self, fact: Fact) -> None:
        """Learn how long calls hold their slots, and how long loads take."""
        if isinstance(fact, Ended) and fact.outcome.verdict is Verdict.OK:
            _smooth(self._busy_s, fact.run.key.model, fact.at - fact.run.at)
        elif isinstance(fact, LoadAnswered) and fact.ok and fact.load_s > 0.0:
            _smooth(self._load_s, fact.key.model, fact.load_s)
            self._just_loaded.add(fact.key.model)

    def plan(self, now: float) -> list[Effect]:
        """One pass over the heads of all queues, oldest first."""
        self._date_loads(now)
        if not self._queues:
            return []
        run = _Pass(now)
        for key in sorted(self._queues, key=lambda key: self._queues[key][0].seq):
            self._serve(key, run)
        for effect in run.effects:
            if isinstance(effect, Commit):
                self.withdraw(effect.ticket)
                model = effect.ticket.call.key.model
                waited_s = now - self._waits_since(effect.ticket)
                if waited_s > 0.0:
                    self._waited.setdefault(model, _Waited()).add(waited_s, now)
            elif isinstance(effect, Load):
                self._waited.pop(effect.key.model, None)
        return run.effects

    def wake_at(self) -> float:
        """Never: only who waits is planned for."""
        return math.inf

    def begin(self, ticket: Ticket, now: float) -> Commit | None:
        """As `plan`, as long as a copy is in memory where the context suffices, or none would."""
        if not self._may_start(ticket.call, 0):
            return None
        if self._just_loaded:
            self._date_loads(now)
        candidates = self._view.candidates(ticket.call, ticket.excluded)
        if self._view.priorities:
            candidates = highest(candidates, self._view.priorities)
        fits, short = split_by_context(ticket.call, candidates)
        free = [c for c in fits or short if c.residency is LOADED and c.in_flight < c.slots]
        if not free:
            return None
        if self._policy.cold_is_equal and not all(map(_is_loaded, candidates)):
            return None
        chosen = free[0]
        if len(free) > 1:
            rank, last_used = self._policy.rank, self._last_used.get
            chosen = min(free, key=lambda c: rank(c, last_used(c.backend, 0)))
        self._used(chosen.backend)
        return Commit(ticket, chosen.backend, "warm" if fits else "short-context")

    def _date_loads(self, now: float) -> None:
        """What was noted since the last pass was loaded by now."""
        if self._just_loaded:
            self._loaded_at.update(dict.fromkeys(self._just_loaded, now))
            self._just_loaded.clear()

    def _serve(self, key: PlacementKey, run: _Pass) -> None:
        """Commit from one queue until its head must wait."""
        full: set[tuple[str, frozenset[str]]] = set()
        queue = list(self._queues[key])
        for ticket in queue:
            if not self._may_start(ticket.call, run.started[ticket.call.owner]):
                continue
            alike = (ticket.call.route.feature, ticket.excluded)
            if alike in full or self._start(ticket, run) or ticket is queue[-1]:
                continue
            # Of those behind it, only one that needs less context may still find a slot.
            if not any(map(_is_free, self._counted(ticket.call, ticket.excluded, run))):
                full.add(alike)

    def _start(self, ticket: Ticket, run: _Pass) -> bool:
        candidates = self._counted(ticket.call, ticket.excluded, run)
        if self._is_rekeyed(ticket, candidates, run):
            return False
        fits, short = split_by_context(ticket.call, candidates)
        for group, why in ((fits, "cold" if ticket.cold else "warm"), (short, "short-context")):
            free = [c for c in group if _is_free(c)]
            may_load = self._policy.cold_is_equal and not ticket.call.is_guest
            if may_load and not self._is_any_loading(ticket.call.key, run):
                free += _able(group, run)
            if free:
                self._take(ticket, min(free, key=self._rank), why, run)
                return True
            if any(c.residency is LOADED for c in group):
                self._consider_copy(ticket, group, run)
                return False
            if not group:
                continue
            if self._is_loading(ticket, group, run):
                return False
            if self._load(ticket, group, "no copy in memory", run):
                return False
        return False

    def _is_rekeyed(self, ticket: Ticket, candidates: Sequence[Candidate], run: _Pass) -> bool:
        """Whether the call waits for another context now, rather than have one loaded."""
        call = ticket.call
        if call.origin is None or any(c.residency is LOADED for c in candidates):
            return False
        if self._is_any_loading(call.key, run):
            return False
        key = call.origin.instead(call)
        if key == call.key:
            return False
        self.withdraw(ticket)
        call.rekey(key)
        self.enqueue(ticket)
        run.effects.append(WakeAt(run.now))  # its queue may have been looked at already
        return True

    def _take(self, ticket: Ticket, chosen: Candidate, why: str, run: _Pass) -> None:
        if chosen.residency is not Residency.LOADED:
            self._start_load(ticket, chosen, "its turn", run)
            return
        self._used(chosen.backend)
        run.taken[chosen.backend, ticket.call.key.model] += 1
        run.started[ticket.call.owner] += 1
        run.effects.append(Commit(ticket, chosen.backend, why))

    def _consider_copy(self, ticket: Ticket, group: Sequence[Candidate], run: _Pass) -> None:
        if ticket.call.is_guest or not self._policy.copies or self._is_loading(ticket, group, run):
            return
        if not _able(group, run):
            return
        model = ticket.call.key.model
        before = self._waited.get(model)
        paid_s = before.seconds(run.now) if before is not None else 0.0
        load_s = self._load_s.get(model) or load_estimate_s(_size(group))
        worth_at = self._waits_since(ticket) + max(0.0, load_s - paid_s)
        if run.now >= worth_at:
            self._load(ticket, group, "every copy is full", run)
        else:
            run.effects.append(WakeAt(worth_at))

    def _waits_since(self, ticket: Ticket) -> float:
        """Since when it waits for a slot, and not for a load."""
        return max(ticket.queued_at, self._loaded_at.get(ticket.call.key.model, -math.inf))

    def _is_any_loading(self, key: PlacementKey, run: _Pass) -> bool:
        return key in run.loads or bool(self._view.loading(key))

    def _is_loading(self, ticket: Ticket, group: Sequence[Candidate], run: _Pass) -> bool:
        """Whether a load that is not overdue is under way on a backend this call may use."""
        key = ticket.call.key
        if key in run.loads:
            return True
        usable = {c.backend for c in group}
        under_way = [x for x in self._view.loading(key) if x.backend in usable]
        if not under_way:
            return False
        size_bytes = max(c.size_bytes for c in group)
        limit_s = OVERDUE_FACTOR * load_estimate_s(size_bytes) + OVERDUE_EXTRA_S
        overdue_at = max(x.since for x in under_way) + limit_s
        if run.now < overdue_at:
            run.effects.append(WakeAt(overdue_at))
            return True
        return False

    def _load(self, ticket: Ticket, group: Sequence[Candidate], why: str, run: _Pass) -> bool:
        """Start a load on the backend that has most room for it."""
        able = _able(group, run)
        if not able:
            return False
        # A busy variant of the same model would have to be evicted; an empty backend evicts nobody.
        best = min(able, key=self._cold_rank)
        self._start_load(ticket, best, why, run)
        return True

    def _start_load(self, ticket: Ticket, chosen: Candidate, why: str, run: _Pass) -> None:
        self._used(chosen.backend)
        run.loads.add(ticket.call.key)
        run.loading_on.add(chosen.backend)
        run.effects.append(Load(ticket, chosen.backend, ticket.call.key, why))

    def _counted(self, call: Call, excluded: frozenset[str], run: _Pass) -> list[Candidate]:
        """The candidates with what this pass has committed."""
        counted = []
        for c in _candidates(self._view, call, excluded):
            mine = run.taken[c.backend, call.key.model]
            counted.append(_busier(c, mine) if mine else c)
        return counted

    def _rank(self, candidate: Candidate) -> tuple[float, ...]:
        return self._policy.rank(candidate, self._last_used.get(candidate.backend, 0))

    def _cold_rank(self, candidate: Candidate) -> tuple[float, ...]:
        return (candidate.in_flight, candidate.models_loaded, *self._rank(candidate))

    def _used(self, backend: str) -> None:
        self._uses += 1
        self._last_used[backend] = self._uses

    def learned(self, now: float) -> dict[str, Any]:  # noqa: ARG002 - see `Scheduler`
        """Nothing of our own: what others have learned, kept for whoever comes after us."""
        return self._kept

    def recall(
        self,
        learned: Mapping[str, Any],
        now: float,  # noqa: ARG002 - see `Scheduler`
        age_s: float,  # noqa: ARG002 - see `Scheduler`
    ) -> None:
        """Keep it; we have no use for it."""
        self._kept = dict(learned)

    def rehearse(self, ticket: Ticket, view: View, now: float) -> Rehearsal:
        """Plan with a twin of ours that looks through *view*, and see what becomes of *ticket*."""
        twin = Greedy(self._policy, view, self._may_start)
        twin._queues = {key: list(queue) for key, queue in self._queues.items()}
        twin._last_used, twin._uses = dict(self._last_used), self._uses
        twin._load_s, twin._loaded_at = self._load_s, dict(self._loaded_at)
        twin._waited = {model: replace(waited) for model, waited in self._waited.items()}
        wait_s = self._wait_s(ticket, view, now)
        options = self._options(ticket, view)
        twin.enqueue(ticket)
        for effect in twin.plan(now):
            if isinstance(effect, Commit | Load) and effect.ticket is ticket:
                load_s = load_estimate_s(_size(_candidates(view, ticket.call, ticket.excluded)))
                return Rehearsal(options, effect, 0.0 if isinstance(effect, Commit) else load_s)
        return Rehearsal(options, None, wait_s)

    def wait_estimate(self, ticket: Ticket, now: float) -> float:
        """Seconds until *ticket*, which may wait here or nowhere, gets a slot; inf: unknown."""
        if ticket.call.key.model not in self._busy_s:
            return math.inf  # nothing has ended yet
        return self._wait_s(ticket, self._view, now)

    def _wait_s(self, ticket: Ticket, view: View, now: float) -> float:
        """A load's remainder, or calls ahead times how long each holds a slot, over the slots."""
        call = ticket.call
        candidates = _candidates(view, call, ticket.excluded)
        slots = sum(c.slots for c in candidates if c.residency is LOADED)
        if slots:
            queue = self._queues.get(call.key, [])
            ahead = bisect.bisect_left(queue, ticket.seq, key=lambda other: other.seq)
            return (ahead + 1) * self._busy_s.get(call.key.model, 5.0) / slots
        usable = {c.backend for c in candidates}
        since = [load.since for load in view.loading(call.key) if load.backend in usable]
        if not since:
            return math.inf
        return max(0.0, min(since) + load_estimate_s(_size(candidates)) - now)

    def _options(self, ticket: Ticket, view: View) -> tuple[Option, ...]:
        """Every candidate, best first."""
        candidates = view.candidates(ticket.call, ticket.excluded)
        _, short = split_by_context(ticket.call, candidates)
        too_short = {c.backend for c in short}
        equal = self._policy.cold_is_equal and not view.loading(ticket.call.key)
        ranked = sorted(
            (
                (
                    -view.priorities.get(c.backend, 0),
                    *self._place(c, is_short=c.backend in too_short, equal=equal),
                ),
                index,
            )
            for index, c in enumerate(candidates)
        )
        options = []
        for at, (place, index) in enumerate(ranked):
            other = ranked[0] if at else ranked[1] if len(ranked) > 1 else None
            why = "is the only one" if other is None else ""
            if other is not None:
                than = candidates[other[1]].backend
                alike = f"is as good as {than}, but listed {'later' if at else 'before it'}"
                why = self._difference(place, other[0], than, equal=equal) or alike
            c = candidates[index]
            options.append(Option(c.backend, _state(c, is_short=c.backend in too_short), why))
        return tuple(options)

    def _place(self, c: Candidate, *, is_short: bool, equal: bool) -> tuple[float, ...]:
        """What `_start` looks at, in its order: context, readiness, then the rank."""
        stage = _stage(c)
        if equal:
            return (is_short, 0 if stage is _Stage.COLD else stage, *self._rank(c))
        rank = self._cold_rank(c) if stage >= _Stage.COLD else self._rank(c)
        return (is_short, stage, *rank)

    def _difference(
        self, mine: tuple[float, ...], other: tuple[float, ...], than: str, *, equal: bool
    ) -> str:
        """The first part in which two places differ, for people; empty: none."""
        cold = () if equal or mine[2] < _Stage.COLD else _COLD_TERMS
        terms = (_PRIORITY, _CONTEXT, _READY, *cold, *self._policy.terms)
        for value, others, (less, more) in zip(mine, other, terms, strict=False):
            if value != others:
                return f"{less if value < others else more} than {than}"
        return ""


class _Stage(IntEnum):
    """How soon a candidate could begin."""

    FREE = 0
    FULL = 1
    LOADING = 2
    COLD = 3
    BLOCKED = 4  # it loads something else


_PRIORITY: Final = ("has a higher priority", "has a lower priority")
_CONTEXT: Final = ("has more context", "has less context")
_READY: Final = ("could begin sooner", "could begin later")
_STATES: Final = {
    _Stage.FREE: "in memory, a slot is free",
    _Stage.FULL: "in memory, every slot is taken",
    _Stage.LOADING: "being loaded",
    _Stage.COLD: "not in memory",
    _Stage.BLOCKED: "not in memory, another load is under way",
}


def _stage(c: Candidate) -> _Stage:
    if c.residency is LOADED:
        return _Stage.FREE if c.in_flight < c.slots else _Stage.FULL
    if c.residency is Residency.LOADING:
        return _Stage.LOADING
    return _Stage.COLD if c.load_token else _Stage.BLOCKED


def _state(c: Candidate, *, is_short: bool) -> str:
    return f"{_STATES[_stage(c)]}{f', context of {c.context} is too short' if is_short else ''}"


def _candidates(view: View, call: Call, excluded: frozenset[str]) -> Sequence[Candidate]:
    """Who is to be considered: of what may serve the call, the highest tier."""
    return highest(view.candidates(call, excluded), view.priorities)


def _size(candidates: Sequence[Candidate]) -> int:
    return max((c.size_bytes for c in candidates), default=0)


@dataclass(slots=True)
class _Waited:
    """Seconds that calls of one key have waited for a slot, lately."""

    amount_s: float = 0.0
    at: float = 0.0

    def add(self, waited_s: float, now: float) -> None:
        self.amount_s = self.seconds(now) + waited_s
        self.at = now

    def seconds(self, now: float) -> float:
        """What it is worth by now."""
        return self.amount_s * math.pow(0.5, (now - self.at) / WAITED_HALF_LIFE_S)


def _smooth(known: dict[str, float], model: str, seconds: float) -> None:
    before = known.setdefault(model, seconds)
    known[model] = before + 0.2 * (seconds - before)


@dataclass(slots=True)
class _Pass:
    """What one pass has decided so far."""

    now: float
    effects: list[Effect] = field(default_factory=list)
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)
    started: Counter[str] = field(default_factory=Counter)  # by owner
    loads: set[PlacementKey] = field(default_factory=set)
    loading_on: set[str] = field(default_factory=set)


def _is_loaded(c: Candidate) -> bool:
    return c.residency is LOADED


def _is_free(c: Candidate) -> bool:
    return c.residency is LOADED and c.in_flight < c.slots


def _able(group: Sequence[Candidate], run: _Pass) -> list[Candidate]:
    """Those on which a load may be started now."""
    cold = (Residency.ON_DISK, Residency.UNKNOWN)
    return [
        c for c in group if c.load_token and c.residency in cold and c.backend not in run.loading_on
    ]


def _busier(c: Candidate, by: int) -> Candidate:
    return replace(c, in_flight=c.in_flight + by, host_in_flight=c.host_in_flight + by)
