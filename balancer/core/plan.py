"""
Plan and commit: each call waits here, and goes to the backend that will answer it first.

Laws:
- What a call would cost is predicted for every backend that may serve it: with a free slot, busy,
  loading, cold. The cheapest wins. Can it start now, it is committed; is it busy, the call holds,
  and that slot counts as promised to it; is it cold, one detached load begins.
- Plans are not kept. A pass starts from what is there; only commits, loads and drains have effects.
- A free slot may be declined for a better one, never without a cheaper option on record, and not
  for ever.
- Ties break by name, never by chance, and a pass ends by count, never by the clock, so that a
  recorded run can be replayed.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median_high
from typing import Any, Final, NamedTuple, Protocol

from balancer.core import names
from balancer.core.catalog import Copy, InMemory
from balancer.core.cost import GO, HOLD, LOAD, Need, Quote, price
from balancer.core.decisions import Choice, Decision, Decisions, listed, version
from balancer.core.decisions import rank as _rank
from balancer.core.demand import Demand
from balancer.core.domain import (
    Backend,
    Call,
    PlacementKey,
    Principal,
    Purpose,
    Residency,
    Role,
    Verdict,
)
from balancer.core.events import (
    DrainEnded,
    DrainRequested,
    SampleDiscarded,
    SlotsBelieved,
    Straggling,
)
from balancer.core.fair import FairQueue
from balancer.core.knobs import Knobs
from balancer.core.ledger import Drain, Ledger, Track
from balancer.core.lengths import Lengths
from balancer.core.pins import Pins, missing
from balancer.core.prefix import Prefixes
from balancer.core.room import DEFAULT_CONTEXT, GB, Room, estimate
from balancer.core.routes import find
from balancer.core.running import Run
from balancer.core.scheduler import (
    Began,
    Changed,
    Commit,
    CommitRefused,
    Effect,
    Ended,
    Fact,
    FirstByte,
    Load,
    LoadAnswered,
    LoadingNow,
    LoadRefused,
    Option,
    Rehearsal,
    Ticket,
    Turn,
    View,
    WakeAt,
)
from balancer.core.slots import SlotBelief
from balancer.core.speeds import Size, Speed, work

LOADED, LOADING, UNKNOWN = Residency.LOADED, Residency.LOADING, Residency.UNKNOWN
RUN: Final = Purpose.RUN
DEFAULT_ANSWER: Final = 200.0
FRONT: Final = -1.0  # the tag of a call that is tried again
CACHE_BYTES: Final = 8 << 30  # of prompts that a runner keeps in the host's memory
KV_BYTES: Final = 131_072
OVERDUE_FACTOR: Final = 3.0  # a load that takes so much longer than predicted is stuck
OVERDUE_EXTRA_S: Final = 30.0
LEAST_LEFT_S: Final = 0.2
FAILED_LOAD_S: Final = 10.0  # a load for nobody that failed is not repeated before
CLASS_WINDOW_S: Final = 60.0
BACKGROUND_TICKS: Final = 4
ASKED_TICKS: Final = 8
PINNED: Final = "24h"  # keep-alive of a pinned model; a client's own replaces it
NOBODY: Final = Principal("placement", Role.USER)
MOST_QUOTES: Final = 100_000
KEPT_TICKS: Final = 2  # for which a call behind others need not be weighed anew
WORSE_S: Final = 1e-6
QUOTE_S: Final = 1.0  # for which a quote holds where nothing moves; so they grow old one by one
JOURNAL: Final = 64
FEW: Final = 4  # backends that moved, up to which only these are priced again
RATIO_GAIN: Final = 0.05
PROMPT_GAIN: Final = 0.05
FOREIGN_S: Final = 60.0
BEYOND: Final = 1 << 20  # slots of what no count bounds


class Place(Protocol):
    """A backend that may serve a call."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def copy(self) -> Copy:
        """The model there."""

    @property
    def remote(self) -> bool:
        """It only passes calls on."""


class Sight(View, Protocol):
    """What the plan may see of the pool."""

    @property
    def pins(self) -> Pins:
        """What is to be kept in memory."""

    def backends(self) -> Sequence[Backend]:
        """All there are, those that are away included."""

    def places(
        self, call: Call, excluded: frozenset[str], *, exists: bool = True
    ) -> Sequence[Place]:
        """Where *call* may be served now; one that does not *exist* leaves no trace."""

    def slots(self, backend: str, model: str) -> int:
        """Calls at once that the loaded model may take there now."""

    def belief(self, backend: str) -> SlotBelief | None:
        """What is believed of slots there; None: it has left."""

    def loading_on(self, backend: str) -> LoadingNow | None:
        """The detached load under way there."""

    def memory(self, backend: str) -> Sequence[InMemory]:
        """What it has in memory."""

    def usual_s(self, backend: str, model: str) -> float:
        """Time to first byte of late; 0: not known."""

    def size(self, model: str) -> int:
        """Bytes of its files, 0: not known."""

    def parameters_b(self, model: str) -> float | None:
        """Its parameters in thousands of millions, None: not told."""

    def is_embedding_only(self, model: str) -> bool:
        """Whether it cannot generate."""


class _Making(NamedTuple):
    """
    What it takes to make room for a model on a backend.

    Args:
        stamp: Of all that this rests on.
        possible: Whether there is a way.
    """

    stamp: tuple[int, int, bool]
    possible: bool
    victims: tuple[PlacementKey, ...]
    evict_s: float


class Model(NamedTuple):
    """A model by the catalogue. `until`: the tick at which to ask again."""

    file_bytes: int
    size: Size
    embeds: bool
    until: int


@dataclass(slots=True, eq=False)
class Waiter:
    """A ticket in the plan's queue."""

    ticket: Ticket
    tag: float
    need: Need
    charge: float  # in the fair queue
    choice: Choice | None = None
    declined_at: float | None = None
    declined_until: float = math.inf
    gated_at: float | None = None  # when it gave way first, as batch
    barred: str = ""  # a backend whose slot was not to be had in this pass
    seen: int = -1  # what had moved when it was weighed last
    tick: int = -1  # from which on that may be kept for a while
    weighed: int = -1  # the tick at which it was weighed in full

    @property
    def order(self) -> tuple[float, int]:
        """Its place in the queue."""
        return (self.tag, self.ticket.seq)


@dataclass(slots=True, eq=False)
class Queue:
    """The calls that wait for one placement key, in order of their tags."""

    key: PlacementKey
    waiters: list[Waiter] = field(default_factory=list)
    fresh: bool = True  # who waits is not who was looked at last
    seen: int = -1  # what had moved when it was looked at
    tick: int = -1
    looked: list[Waiter] = field(default_factory=list)  # who was weighed last
    free: set[str] = field(default_factory=set)  # backends with a free slot, as of these
    free_of: Mapping[str, Place] | None = None
    free_seen: int = -1
    free_tick: int = -1
    mixed: bool = False  # routes that not every backend may have


@dataclass(slots=True)
class _Classes:
    """Commits of late, all and batch; they fade."""

    all: float = 0.0
    batch: float = 0.0
    at: float = 0.0

    def add(self, now: float, *, batch: bool) -> None:
        self.fade(now)
        self.all += 1.0
        self.batch += batch

    def fade(self, now: float) -> None:
        kept = math.exp((self.at - now) / CLASS_WINDOW_S)
        self.all, self.batch, self.at = self.all * kept, self.batch * kept, now


def _always(_: Call, __: int) -> bool:
    return True


class Plan:
    """
    The planner.

    Args:
        may_start: Whether its owner's own limit lets a call start now, besides so many that are
            not counted yet.
        decisions: Where they are kept.
    """

    def __init__(
        self,
        view: Sight,
        knobs: Knobs | None = None,
        *,
        may_start: Callable[[Call, int], bool] = _always,
        decisions: Decisions | None = None,
    ) -> None:
        self.knobs = knobs or Knobs()
        self.decisions = Decisions() if decisions is None else decisions
        self._version = version(self.knobs)
        self._passes = 0
        self.lengths = Lengths()
        self.demand = Demand(self.knobs.demand_fast_s, self.knobs.demand_slow_s)
        self.prefixes = Prefixes()
        self.fair = FairQueue()
        self.ledgers: dict[str, Ledger] = {}
        self.rooms: dict[str, Room] = {}
        self._view = view
        self._may_start = may_start
        self._queues: dict[PlacementKey, Queue] = {}
        self._waiters: dict[Ticket, Waiter] = {}
        self._sent: dict[Ticket, tuple[Waiter, str]] = {}  # in this turn
        self._tracks: dict[int, tuple[Ledger, Track]] = {}  # by identity of the call
        self._models: dict[str, Model] = {}
        self._counts: dict[str, int] | None = None  # copies, by model
        self._slots_of: dict[str, tuple[int, int]] = {}  # by model: tick, slots of all copies
        self._wants: dict[str, tuple[int, float, float]] = {}  # by model: tick, wanted, of late
        self._ratios: dict[str, float] = {}  # tokens to estimated tokens, by model
        self._quotes: dict[tuple[str, PlacementKey], tuple[int, float, Copy, Quote | None]] = {}
        self._rooms_made: dict[tuple[str, PlacementKey], _Making] = {}
        self._serial = 0  # counts what has moved
        self._journal: deque[str] = deque(maxlen=JOURNAL)  # the backends, the latest last
        self._editions: dict[str, int] = {}
        self._named: dict[tuple[PlacementKey, str], tuple[Sequence[Place], dict[str, Place]]] = {}
        self._promised: dict[PlacementKey, dict[str, int]] = {}  # in this pass
        self._memory: dict[str, tuple[InMemory, ...]] = {}
        self._foreign: dict[tuple[str, str], float] = {}
        self._in_flight: dict[tuple[str, str], int] = {}  # by model and key of fairness
        self._classes: dict[PlacementKey, _Classes] = {}
        self._tick_at = -math.inf
        self._ticks = 0
        self._last_tick = 0.0
        self._evaluations = 0
        self._started: Counter[str] = Counter()  # in this pass, by owner
        self._backends: dict[str, Backend] = {}
        self._tiers = False
        self._learned: Mapping[str, Any] = {}
        self._stand_ins: dict[PlacementKey, Call] = {}
        self._prompts: dict[str, float] = {}  # tokens as estimated, on average, by model
        self._refresh_backends()

    # -- the queue -----------------------------------------------------------------------------

    def enqueue(self, ticket: Ticket) -> None:
        """Take a waiting ticket in."""
        known = self._sent.pop(ticket, None)
        waiter = self._admit(ticket) if known is None else known[0]
        self._waiters[ticket] = waiter
        queue = self._queues.get(ticket.call.key)
        if queue is None:
            queue = self._queues[ticket.call.key] = Queue(ticket.call.key)
        bisect.insort(queue.waiters, waiter, key=_order)
        queue.fresh = True
        feature = ticket.call.route.feature
        queue.mixed = queue.mixed or feature != queue.waiters[0].ticket.call.route.feature

    def _admit(self, ticket: Ticket) -> Waiter:
        call, need = ticket.call, self._need(ticket.call)
        if ticket.attempts:
            return Waiter(ticket, FRONT, need, 0.0)
        now = ticket.queued_at
        self._arrived(call, now)
        charge = need.prompt / 3000.0 + need.answer / 60.0
        tag = self.fair.tag(call.fair_key, charge, self._weight(call), now)
        return Waiter(ticket, tag, need, charge)

    def _arrived(self, call: Call, now: float) -> None:
        key = call.key
        model, tokens = key.model, call.prompt_tokens
        usual = self._prompts.get(model)
        if usual is not None:
            self._prompts[model] = usual + PROMPT_GAIN * (tokens - usual)
        elif len(self._prompts) < 1000:
            self._prompts[model] = tokens
        self.demand.arrived(key, now)
        if key.options:  # what an eviction costs, all variants of the model have to bear
            self.demand.arrived(PlacementKey(key.model), now)

    def _weight(self, call: Call) -> float:
        return self.knobs.batch_weight if call.batch else 1.0

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket; one that is not here is no mistake."""
        waiter = self._remove(ticket)
        sent = self._sent.get(ticket)
        if waiter is None and sent is not None:
            waiter = self._recall_commit(ticket, sent[0])
        if waiter is not None and waiter.charge:
            call = ticket.call
            self.fair.give_back(call.fair_key, waiter.charge, self._weight(call), waiter.tag)

    def _recall_commit(self, ticket: Ticket, waiter: Waiter) -> Waiter | None:
        """It left before its commit was carried out: nothing runs; None: it does."""
        known = self._tracks.get(id(ticket.call))
        if known is None or known[1].run is not None:
            return None
        del self._sent[ticket], self._tracks[id(ticket.call)]
        self._strike(*known, known[0].at)
        return waiter

    def _remove(self, ticket: Ticket) -> Waiter | None:
        waiter = self._waiters.pop(ticket, None)
        if waiter is None:
            return None
        queue = self._queues[ticket.call.key]
        at = bisect.bisect_left(queue.waiters, waiter.order, key=_order)
        del queue.waiters[at]
        queue.fresh = True
        if not queue.waiters:
            del self._queues[ticket.call.key]
        return waiter

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, in order."""
        return [waiter.ticket for waiter in sorted(self._waiters.values(), key=_order)]

    def position(self, ticket: Ticket) -> int:
        """How many wait for the same before it."""
        waiter = self._waiters.get(ticket)
        queue = self._queues.get(ticket.call.key)
        if waiter is None or queue is None:
            return 0
        return bisect.bisect_left(queue.waiters, waiter.order, key=_order)

    # -- facts ---------------------------------------------------------------------------------

    def note(self, fact: Fact) -> None:
        """Learn what happened."""
        match fact:
            case Began(run):
                self._began(run)
            case FirstByte(run, at):
                self._first_byte(run, at)
            case Ended():
                self._ended(fact)
            case CommitRefused(ticket, backend):
                self._uncommit(ticket, backend)
            case LoadAnswered():
                self._load_answered(fact)
            case LoadRefused(backend, _):
                ledger = self._ledger(backend)
                ledger.asked_load, ledger.going = None, frozenset()
                ledger.moved()
            case Changed(backend, dead, at):
                self._changed(backend, at, dead=dead)

    def _uncommit(self, ticket: Ticket, backend: str) -> None:
        known_track = self._tracks.pop(id(ticket.call), None)
        if known_track is not None:
            self._strike(*known_track, known_track[0].at)
        known = self._sent.get(ticket)
        if known is not None:
            known[0].barred = backend

    def _began(self, run: Run) -> None:
        call = run.call
        known = self._tracks.get(id(call))
        if known is not None and known[0].name == run.backend and known[1].run is None:
            known[1].run = run
            return
        if known is not None:  # it runs elsewhere since
            self._strike(*known, run.at)
        track = self._enter(call, run.backend, run.at, self._need(call), None)
        track.run, track.probing = run, run.probe

    def _enter(
        self, call: Call, backend: str, now: float, need: Need, choice: Choice | None
    ) -> Track:
        """Count a call as begun on a backend."""
        ledger, model = self.ledgers.get(backend) or self._ledger(backend), call.key.model
        size = self._model(model).size
        if choice is not None:
            quote, terms = choice.quote, choice.terms
            cached, first_s, prefill_s = terms.cached, terms.first_token_s, terms.prefill
            share = quote.share
            is_clean = quote.resident and not ledger.is_reading
        else:
            cached, is_clean = 0.0, False
            share = float(ledger.look(model, now)[2])
            prefill_s = work(need.prompt, 0.0) / ledger.speed.prompt(model, size) + 0.02
            first_s = prefill_s * share
        track = Track(
            call, now, size, need.prompt, cached, prefill_s, first_s, need.answer, share, is_clean
        )
        ledger.enter(track, now)
        self._tracks[id(call)] = (ledger, track)
        self._count(call, 1)
        if call.chain or call.session:
            capacity = self._cache_tokens(backend, call.key)
            self.prefixes.insert(
                backend, call.key, call.chain, capacity, call.session, now, call.shared
            )
        return track

    def _count(self, call: Call, by: int) -> None:
        whose = (call.key.model, call.fair_key)
        count = self._in_flight.get(whose, 0) + by
        if count > 0:
            self._in_flight[whose] = count
        else:
            self._in_flight.pop(whose, None)

    def _cache_tokens(self, backend: str, key: PlacementKey) -> int:
        context = next(
            (it.context for it in self._in_memory(backend) if it.model == key.model and it.context),
            DEFAULT_CONTEXT,
        )
        return self._view.slots(backend, key.model) * context + CACHE_BYTES // KV_BYTES

    def _first_byte(self, run: Run, at: float) -> None:
        known = self._tracks.get(id(run.call))
        if known is None or known[1].run is not run:
            return
        ledger, track = known
        model = run.call.key.model
        ledger.first_byte(track, at)
        if not run.call.streaming or run.remote:
            return
        self.decisions.foretold(run.backend, track.first_token_s, at - track.at)
        belief = self._view.belief(run.backend)
        if belief is not None:
            track.probing = False
            before = belief.believed(model)
            if belief.first_byte(model, ledger.shown(model), at, run.probe):
                self._told_slots(run.backend, model, before, "seen", at)

    def _told_slots(self, backend: str, model: str, before: int, why: str, now: float) -> None:
        belief = self._view.belief(backend)
        if belief is not None:
            told = (backend, names.display(model), before, belief.believed(model), why)
            self.decisions.emit(SlotsBelieved(now, *told))

    def _ended(self, ended: Ended) -> None:
        run, outcome, now = ended.run, ended.outcome, ended.at
        call = run.call
        known = self._tracks.get(id(call))
        if known is None or known[1].run is not run:
            return
        del self._tracks[id(call)]
        ledger, track = known
        if not run.remote:
            ledger.learn(track, outcome, now)
        self._strike(ledger, track, now)
        self._learn_call(track, outcome, now)

    def _strike(self, ledger: Ledger, track: Track, now: float) -> None:
        """A call is not there any more, whatever came of it."""
        if track.probing:
            belief = self._view.belief(ledger.name)
            if belief is not None:
                belief.undecided(track.model, now)
        ledger.strike(track, now)
        self._count(track.call, -1)

    def _learn_call(self, track: Track, outcome: Any, now: float) -> None:
        """Lengths, tokens per byte, what the cache was worth, and what it truly cost."""
        call, model, usage = track.call, track.model, outcome.usage
        if outcome.verdict is not Verdict.OK or call.purpose is not RUN:
            return
        tokens_in, written = usage.tokens_in, track.written(usage)
        if tokens_in and call.prompt_tokens:
            ratio = min(8.0, max(1 / 8, tokens_in / call.prompt_tokens))
            known = self._ratios.get(model, 1.0)
            if model in self._ratios or len(self._ratios) < 1000:
                self._ratios[model] = known + RATIO_GAIN * (ratio - known)
        if call.embedding:
            return
        if written:
            self.lengths.learn(model, call.fair_key, written)
            if call.chain:
                self.prefixes.finished(
                    track.run.backend if track.run else "", call.key, call.chain, written
                )
        if track.cached >= 64 and tokens_in and usage.prompt_s is not None:
            ledger = self._ledger(track.run.backend if track.run else "")
            read = usage.prompt_s * ledger.speed.prompt(model, track.size)
            counts = self.decisions.prefix_tokens
            counts["expected"] += track.cached
            counts["seen"] += min(track.cached, max(0.0, tokens_in - read))
            ratio = (tokens_in - read) / track.cached * self.prefixes.reuse(model)
            self.prefixes.learn_reuse(model, min(1.0, max(0.0, ratio)))
        true = (tokens_in or track.prompt) / 3000.0 + (written or 0) / 60.0
        charged = track.prompt / 3000.0 + track.answer / 60.0
        self.fair.settle(call.fair_key, true - charged, self._weight(call))

    def _load_answered(self, fact: LoadAnswered) -> None:
        ledger = self._ledger(fact.backend)
        ledger.asked_load, ledger.going = None, frozenset()
        if fact.ok:
            if fact.load_s > 0.0:
                ledger.speed.learn_load(self._size(fact.key.model), fact.load_s)
            ledger.failed.pop(fact.key, None)
            ledger.loaded_at[fact.key.model] = self._last_tick
        else:
            ledger.failed[fact.key] = self._last_tick + FAILED_LOAD_S
        self._changed(fact.backend, self._last_tick)

    def _changed(self, backend: str, now: float, *, dead: bool = False) -> None:
        if not backend:
            self._refresh_backends()
            self._memory.clear()
            for ledger in self.ledgers.values():
                ledger.moved()
            return
        ledger = self._ledger(backend)
        ledger.moved()
        self._counts = None
        if dead:
            self.prefixes.drop(backend)
            ledger.drain, ledger.going = None, frozenset()
        before = self._memory.pop(backend, ())
        after = self._in_memory(backend)
        gone = {it.model for it in before} - {it.model for it in after}
        for model in gone:
            self.prefixes.drop(backend, model)
        self._see_strangers(ledger, before, after, now)
        self._room(backend).observe(after)
        self._learn_room(ledger, after)
        for it in after:
            if it.size_bytes:
                ledger.speed.offloaded(it.model, 0 < it.vram_bytes < it.size_bytes)
                if not it.vram_bytes:
                    ledger.speed.set_cpu()

    def _see_strangers(
        self, ledger: Ledger, before: Sequence[InMemory], after: Sequence[InMemory], now: float
    ) -> None:
        """Whose time to expire moved without a call of ours is used by somebody else."""
        known = {it.model: it.expires_ns for it in before}
        for it in after:
            was = known.get(it.model)
            moved = was is not None and was > 0 and it.expires_ns > was
            quiet_s = now - ledger.last_used.get(it.model, -math.inf)
            if moved and not ledger.is_busy(it.model) and quiet_s > FOREIGN_S:
                if len(self._foreign) > 1000:
                    self._foreign.clear()
                self._foreign[ledger.name, it.model] = now

    def _refresh_backends(self) -> None:
        before = self._backends
        self._backends = {backend.name: backend for backend in self._view.backends()}
        for name in self._backends.keys() - before.keys():
            self._recall_slots(name)
        self._tiers = len({backend.priority for backend in self._backends.values()}) > 1
        for name in [name for name in self.ledgers if name not in self._backends]:
            if self.ledgers[name].is_idle:
                del self.ledgers[name]
                self.decisions.forget(name)
                self.rooms.pop(name, None)
                self.prefixes.drop(name)
        self._quotes.clear()
        for name, backend in self._backends.items():
            self._room(name).configured = backend.vram_bytes

    def _recall_slots(self, backend: str) -> None:
        slots, belief = self._learned.get("slots"), self._view.belief(backend)
        told = slots.get(backend) if isinstance(slots, dict) else None
        if belief is not None and isinstance(told, dict):
            belief.restore(told)

    # -- what is known -------------------------------------------------------------------------

    def _ledger(self, backend: str) -> Ledger:
        ledger = self.ledgers.get(backend)
        if ledger is None:
            known = self._backends.get(backend)
            discarded = partial(self._discarded, backend)
            weight = known.weight if known is not None else 1.0
            speed = Speed(weight=weight, discarded=discarded)
            ledger = self.ledgers[backend] = Ledger(backend, speed)
            told = self._learned.get("speeds")
            if isinstance(told, dict) and isinstance(told.get(backend), dict):
                speed.restore(told[backend])
        return ledger

    def _discarded(self, backend: str, kind: str, value: float) -> None:
        """A measurement there was beyond belief."""
        at = self.ledgers[backend].at
        self.decisions.emit(SampleDiscarded(at, backend, kind, value))

    def _room(self, backend: str) -> Room:
        room = self.rooms.get(backend)
        if room is None:
            known = self._backends.get(backend)
            room = self.rooms[backend] = Room(None if known is None else known.vram_bytes)
            told = self._learned.get("rooms")
            if isinstance(told, dict):
                room.restore(told.get(backend))
        return room

    def _in_memory(self, backend: str) -> tuple[InMemory, ...]:
        known = self._memory.get(backend)
        if known is None:
            known = self._memory[backend] = tuple(self._view.memory(backend))
        return known

    def _model(self, model: str) -> Model:
        """What the catalogue tells of a model; asked again every few ticks."""
        known = self._models.get(model)
        if known is None or self._ticks >= known.until:
            view = self._view
            file_bytes = view.size(model)
            size = Size.of(file_bytes, view.parameters_b(model))
            if known is not None and known.size == size:
                size = known.size  # the same object: predictions are kept by it
            if len(self._models) > 4096:
                self._models.clear()
            embeds, until = view.is_embedding_only(model), self._ticks + ASKED_TICKS
            known = self._models[model] = Model(file_bytes, size, embeds, until)
        return known

    def _size(self, model: str) -> Size:
        return self._model(model).size

    def _need(self, call: Call) -> Need:
        """What a call asks for, as far as can be told."""
        model = call.key.model
        prompt = call.prompt_tokens * self._ratios.get(model, 1.0)
        if call.embedding or call.purpose is not RUN:
            return Need(prompt, 0.0, 0.0 if call.embedding else prompt)
        answer, limit = self.lengths.mean(model, call.fair_key), call.output_tokens
        if limit is not None and limit > 0:
            answer = min(answer, float(limit))
        return Need(prompt, answer, call.prompt_tokens + (limit or 0))

    # -- quotes --------------------------------------------------------------------------------

    def _quote(self, place: Place, key: PlacementKey, now: float) -> Quote | None:
        """The backend as *key* finds it; None: it is no candidate."""
        name, copy = place.name, place.copy
        ledger = self.ledgers.get(name) or self._ledger(name)
        known = self._quotes.get((name, key))
        if known is not None:
            edition, at, seen, quote = known
            if edition == ledger.edition and seen is copy and now - at < QUOTE_S:
                return quote
        elif len(self._quotes) > MOST_QUOTES:
            self._quotes.clear()
        quote = self._make_quote(place, key, ledger, now)
        self._quotes[name, key] = (ledger.edition, now, copy, quote)
        return quote

    def _make_quote(
        self, place: Place, key: PlacementKey, ledger: Ledger, now: float
    ) -> Quote | None:
        name, model, copy = place.name, key.model, place.copy
        residency, slots = copy.residency(now), self._view.slots(name, model)
        drain = ledger.drain
        if drain is not None and drain.victim == model and drain.wanted != key:
            return None
        size, speed = self._size(model), ledger.speed
        backend = self._backends.get(name)
        embeds = self._model(model).embeds
        backlog_s, decoding, share = ledger.look(model, now)
        quote = Quote(
            backend=name,
            key=key,
            at=now,
            resident=residency is LOADED or place.remote,
            load_left_s=None,
            in_flight=ledger.in_flight(model),
            slots=slots,
            may_probe=False,
            backlog_s=backlog_s,
            share=float(share),
            decoding=decoding,
            prompt_rate=speed.prompt(model, size),
            decode_rate=speed.decode(model, size),
            penalty=speed.penalty,
            mean_answer=0.0 if embeds else self.lengths.mean(model, ""),
            context=copy.context,
            embeds=embeds,
            remote=place.remote,
            slow=speed.slow_factor,
            measured=speed.is_measured,
        )
        if backend is not None:
            quote.tier = backend.priority
            if backend.prefer and _prefers(backend, model):
                quote.bonus_s = self.knobs.prefer_s
        if place.remote:
            quote.first_byte_s, quote.slots = self._view.usual_s(name, model), BEYOND
            return quote
        if quote.resident:
            if model in ledger.going:
                return None
            self._quote_runs(quote, ledger, now)
            return quote
        loading = self._view.loading_on(name)
        if loading is not None and loading.key == key:
            usual_s, passed_s = speed.load_s(size), now - loading.since
            is_stuck = passed_s > OVERDUE_FACTOR * usual_s + OVERDUE_EXTRA_S
            quote.load_left_s = passed_s if is_stuck else max(LEAST_LEFT_S, usual_s - passed_s)
            quote.in_flight = 0
            return quote
        quote.in_flight = 0
        if loading is None and ledger.asked_load == key:
            quote.load_left_s = speed.load_s(size)
            return quote
        if loading is None and ledger.asked_load is None:
            self._quote_load(quote, ledger, size, residency, now)
        return quote if quote.may_load else None

    def _quote_runs(self, quote: Quote, ledger: Ledger, now: float) -> None:
        """When the slots come free, and whether one more may be tried."""
        model = quote.key.model
        n = quote.in_flight
        if quote.embeds:
            quote.work_s = sum(t.prefill_s for t in ledger.on(model))
            return
        if not n:
            return
        per_token_s = quote.tpot_s(min(max(n, 1), quote.slots)) * quote.share
        releases = []
        for track in ledger.on(model):
            if track.decoding:
                releases.append(self._left(track) * per_token_s)
            else:
                releases.append(quote.backlog_s + quote.mean_answer * per_token_s)
        releases.sort()
        quote.releases = releases
        if n == quote.slots:
            belief = self._view.belief(quote.backend)
            if belief is not None and ledger.speed.slow_factor >= 0.7:
                quote.may_probe = belief.may_probe(model, now)

    def _left(self, track: Track) -> float:
        """Tokens that are still to come."""
        got = float(track.records) if track.call.streaming else track.virtual
        left = self.lengths.left(track.model, track.call.fair_key, got)
        limit = track.call.output_tokens
        if limit is not None and limit > 0:
            left = min(left, max(1.0, limit - got))
        return left

    def _quote_load(
        self, quote: Quote, ledger: Ledger, size: Size, residency: Residency, now: float
    ) -> None:
        """What a load there would take, and whom it would put out."""
        key = quote.key
        drain = ledger.drain
        if drain is not None and drain.wanted != key:
            return
        may_evict = residency is not UNKNOWN
        stamp = (ledger.shape, self._ticks, may_evict)
        made = self._rooms_made.get((ledger.name, key))
        if made is None or made.stamp != stamp:
            if len(self._rooms_made) > MOST_QUOTES:
                self._rooms_made.clear()
            gone = self._victims(ledger, key, now, may_evict=may_evict)
            victims = tuple(it.key or PlacementKey(it.model) for it in gone or ())
            evict_s = sum(self._eviction_s(ledger, it.model, now) for it in gone or ())
            made = self._rooms_made[ledger.name, key] = _Making(
                stamp, gone is not None, victims, evict_s
            )
        if not made.possible:
            return
        quote.victims, quote.evict_s = made.victims, made.evict_s
        quote.load_s = ledger.speed.load_s(size) + (0.5 if made.victims else 0.0)
        quote.may_load = True

    def _victims(
        self, ledger: Ledger, key: PlacementKey, now: float, *, may_evict: bool
    ) -> list[InMemory] | None:
        memory, room = self._in_memory(ledger.name), self._room(ledger.name)
        gone = room.victims(
            memory,
            lambda it: it.model == key.model,
            lambda it: self._may_go(ledger, it, now),
            lambda it: self._eviction_s(ledger, it.model, now),
            self._bytes(ledger.name, key),
            lambda it: self._bytes(ledger.name, it.key or PlacementKey(it.model)),
        )
        if gone and not may_evict and any(it.model != key.model for it in gone):
            return None
        return gone

    def _may_go(self, ledger: Ledger, it: InMemory, now: float) -> bool:
        """Whether nobody uses it, of ours or not, and no operator wants it there."""
        return (
            not ledger.is_busy(it.model)
            and not self._is_pinned(ledger.name, it.model)
            and now - self._foreign.get((ledger.name, it.model), -math.inf) > FOREIGN_S
            and not self._is_awaited(ledger, it.model, now)
        )

    def _is_awaited(self, ledger: Ledger, model: str, now: float) -> bool:
        """Whether it was just loaded for somebody who has not come to it yet."""
        at = ledger.loaded_at.get(model, -math.inf)
        if ledger.last_used.get(model, -math.inf) >= at:
            return False
        if now - at > 2.0 * ledger.speed.load_s(self._size(model)):
            return False
        return any(key.model == model for key in self._queues)

    def _bytes(self, backend: str, key: PlacementKey) -> int:
        """Memory that the model will take there."""
        model, context = key.model, dict(key.options).get("num_ctx")
        context = int(context) if isinstance(context, int | float) else None
        known = self._model(model)
        guess = estimate(
            known.file_bytes or round(4.9 * GB),
            self._view.slots(backend, model),
            context,
            embeds=known.embeds,
        )
        return self._room(backend).expected(model, context, guess)

    def _eviction_s(self, ledger: Ledger, model: str, now: float) -> float:
        """What it will cost others that the model is not there any more."""
        known = self._wants.get(model)
        if known is None or known[0] != self._ticks:
            if len(self._wants) > 4096:
                self._wants.clear()
            key = PlacementKey(model)
            wanted = 1.0 - math.exp(-self.demand.slow(key, now) * self.knobs.horizon_s)
            known = self._wants[model] = (self._ticks, wanted, self.demand.fast(key, now))
        _, wanted, fast = known
        load_s = ledger.speed.load_s(self._size(model))
        copies = self._copies().get(model, 1)
        return (wanted * load_s + 0.5 * fast * load_s * load_s) / (copies * copies)

    def _copies(self) -> Mapping[str, int]:
        """Backends that have a model in memory, or load it."""
        if self._counts is None:
            counts: Counter[str] = Counter()
            for name in self._backends:
                models = {it.model for it in self._in_memory(name)}
                loading = self._view.loading_on(name)
                if loading is not None and loading.key is not None:
                    models.add(loading.key.model)
                counts.update(models)
            self._counts = counts
        return self._counts

    def _is_pinned(self, backend: str, model: str) -> bool:
        """Whether an operator wants it to stay there."""
        pins = self._view.pins
        if not pins:
            return False
        holders = [
            name
            for name in self._backends
            if any(it.model == model for it in self._in_memory(name))
        ]
        return pins.protects(backend, model, holders)

    # -- choosing ------------------------------------------------------------------------------

    def _weigh(
        self, waiter: Waiter, promised: Mapping[str, int], now: float, *, exists: bool = True
    ) -> list[Choice]:
        """Every candidate with its price, in no order."""
        self._evaluations += 1
        self.decisions.evaluations += 1
        ticket, found = waiter.ticket, []
        for place in self._view.places(ticket.call, ticket.excluded, exists=exists):
            choice = self._priced(place, waiter, promised, now)
            if choice is not None:
                found.append(choice)
        return found

    def _by_name(self, call: Call, excluded: frozenset[str]) -> Mapping[str, Place]:
        """Where the call may be served now."""
        places = self._view.places(call, excluded)
        of = (call.key, call.route.feature)
        known = self._named.get(of)
        if known is None or known[0] is not places or len(known[0]) != len(places):
            if len(self._named) > 4096:
                self._named.clear()
            known = self._named[of] = (places, {place.name: place for place in places})
        return known[1]

    def _priced(
        self, place: Place, waiter: Waiter, promised: Mapping[str, int], now: float
    ) -> Choice | None:
        """One candidate with its price; None: it is none."""
        name, ticket, need = place.name, waiter.ticket, waiter.need
        call = ticket.call
        key = call.key
        quote = None if name == waiter.barred else self._quote(place, key, now)
        if quote is None:
            return None
        cached = 0.0
        if (call.chain or call.session) and self.prefixes.any(name, key):
            links = self.prefixes.cached(
                name, key, call.chain, call.shared, call.prompt_tokens, call.session, now
            )
            if links:  # they are estimates, as is the prompt's length
                share = links / call.prompt_tokens * self.prefixes.reuse(key.model)
                cached = min(share, 1.0) * need.prompt
        ahead = promised.get(name, 0)
        if quote.may_probe and (
            ticket.attempts or call.batch or call.embedding or not call.streaming
        ):
            quote = _without_probe(quote)
        terms = price(quote, need, cached, ahead, self.knobs)
        if terms is None:
            return None
        short = quote.context is not None and quote.context < need.context
        return Choice(name, terms, quote, ahead, short)

    def _best(self, found: Sequence[Choice]) -> Choice | None:
        """The cheapest; a lower tier only where the higher ones cost too much."""
        if not found:
            return None
        if len(found) == 1:
            return found[0]
        fits = [c for c in found if not c.short]
        usable = fits or found
        probes = [c for c in usable if c.is_probe]
        if probes and any(c.terms.kind is GO and not c.is_probe for c in usable):
            # What is tried beyond a backend's slots may have to wait: not beside a free one.
            usable = [c for c in usable if not c.is_probe]
        if not self._tiers:
            best_of_all = min(usable, key=_rank)
            if best_of_all.terms.kind is HOLD and not best_of_all.quote.measured:
                # Nobody waits for what a guess promises while something known is free.
                free = [c for c in usable if c.terms.kind is GO]
                return min(free, key=_rank) if free else best_of_all
            return best_of_all
        best: Choice | None = None
        for tier in sorted({c.quote.tier for c in usable}, reverse=True):
            here = min((c for c in usable if c.quote.tier == tier), key=_rank)
            if best is None or here.terms.total < best.terms.total:
                best = here
            if best.terms.total <= self.knobs.tier_patience_s:
                break
        return best

    # -- passes --------------------------------------------------------------------------------

    def begin(self, ticket: Ticket, now: float) -> Commit | None:
        """Decide for a ticket that waits nowhere yet, while no other does."""
        call = ticket.call
        if call.batch or not self._may_start(call, 0):
            return None
        need = self._need(call)
        waiter = Waiter(ticket, self.fair.virtual_time, need, 0.0)
        found = self._weigh(waiter, {}, now)
        best = self._best(found)
        if best is None or best.terms.kind is not GO:
            return None
        self._arrived(call, now)
        waiter.charge = need.prompt / 3000.0 + need.answer / 60.0
        waiter.tag = self.fair.tag(call.fair_key, waiter.charge, 1.0, now)
        if self._tick_at < now:
            self._start_ticking(now)
        return self._commit(waiter, best, found, now)

    def wake_at(self) -> float:
        """When to plan again though nothing happens; inf: never."""
        return self._tick_at if self._tracks or self._queues or self._is_wanted() else math.inf

    def _is_wanted(self) -> bool:
        """Whether there is something to watch though nothing runs and nobody waits."""
        return bool(self._view.pins)

    def _start_ticking(self, now: float) -> None:
        """After a pause nothing was watched: begin anew."""
        self._tick_at = now + self.knobs.tick_s
        self._last_tick = now

    def plan(self, now: float) -> list[Effect]:
        """One pass."""
        effects: list[Effect] = []
        self._passes += 1
        self._sent.clear()
        self._started.clear()
        self._counts = None
        for ledger in self.ledgers.values():
            ledger.asked_load = None
        if now >= self._tick_at:
            self._tick(now, effects)
        if self._queues:
            self._evaluations = 0
            self._sweep(now, effects)
        at = self.wake_at()
        if at < math.inf:
            effects.append(WakeAt(at))
        return effects

    def _sweep(self, now: float, effects: list[Effect]) -> None:
        """Serve every queue that may have something to decide, in order of the heads' tags."""
        self._mind_drains(now, effects)
        self._notice()
        self._promised.clear()
        serial, tick = self._serial, self._ticks
        queues = [
            q for q in self._queues.values() if q.fresh or q.seen != serial or q.tick != tick
        ]
        queues = [q for q in queues if q.fresh or q.tick != tick or not self._is_settled(q, now)]
        queues.sort(key=_head_order)
        for queue in queues:
            queue.looked.clear()
        overloaded = self._is_overloaded(now)
        for hopeful in (True, False) if overloaded else (None,):
            for queue in queues:
                if queue.waiters and not self._serve(queue, now, effects, hopeful):
                    effects.append(WakeAt(now))
                    return
        for queue in queues:
            queue.fresh, queue.seen, queue.tick = False, serial, tick

    def _is_settled(self, queue: Queue, now: float) -> bool:
        """Whether what has moved can change nothing for those who are next; quick to tell."""
        moved, looked = self._moved_since(queue.seen), queue.looked
        if moved is None or len(moved) > FEW or not 0 < len(looked) <= FEW:
            return False
        if queue.free or queue.mixed:
            return False
        for waiter in looked:
            best = waiter.choice
            if best is None or best.terms.kind is not HOLD or best.backend in moved:
                return False
            if not moved.isdisjoint(waiter.ticket.excluded):  # those behind it may go there
                return False
            places = self._by_name(waiter.ticket.call, waiter.ticket.excluded)
            for name in moved:
                place = places.get(name)
                option = None if place is None else self._priced(place, waiter, {}, now)
                if option is None:
                    continue
                if option.terms.kind is GO or option.terms.total < best.terms.total:
                    return False
        queue.seen = queue.free_seen = self._serial
        return True

    def _notice(self) -> None:
        """Count what has moved since it was looked at last."""
        editions = self._editions
        for name, ledger in self.ledgers.items():
            if editions.get(name) != ledger.edition:
                editions[name] = ledger.edition
                self._serial += 1
                self._journal.append(name)

    def _moved_since(self, serial: int) -> set[str] | None:
        """The backends that have moved since; None: more than are remembered."""
        count = self._serial - serial
        if count > len(self._journal):
            return None
        return {self._journal[-at] for at in range(1, count + 1)}

    def _is_overloaded(self, now: float) -> bool:
        knobs = self.knobs
        if len(self._waiters) <= knobs.triage_depth * max(1, len(self._backends)):
            return False
        oldest = min(waiter.ticket.queued_at for waiter in self._waiters.values())
        return now - oldest >= knobs.triage_after_s

    def _has_hope(self, waiter: Waiter, now: float) -> bool:
        """Whether it can still be quick, or has waited so long that it must not be put off."""
        knobs, waited_s = self.knobs, now - waiter.ticket.queued_at
        target_s = knobs.hope_s + knobs.hope_per_token_s * waiter.need.prompt
        return (
            waited_s <= target_s or waited_s >= knobs.triage_patience_s or waiter.ticket.call.batch
        )

    def _serve(
        self, queue: Queue, now: float, effects: list[Effect], hopeful: bool | None
    ) -> bool:
        """Serve one key's waiters until there is nothing left to decide; False: for this turn."""
        knobs, ticks = self.knobs, self._ticks
        promised = self._promised.setdefault(queue.key, {})
        gate: bool | None = None
        waiters = queue.waiters[: knobs.plan_depth]
        many = any(w.ticket.call.fair_key != waiters[0].ticket.call.fair_key for w in waiters)
        free = self._free(queue, now)
        share: int | None = None
        for depth, waiter in enumerate(waiters):
            ticket, found = waiter.ticket, None
            call = ticket.call
            if hopeful is not None and self._has_hope(waiter, now) is not hopeful:
                continue
            if call.batch:
                if gate is None:
                    gate = self._is_gate_open(queue, waiter, now)
                if not gate and now - ticket.queued_at < knobs.batch_patience_s:
                    if waiter.gated_at is None:
                        waiter.gated_at = now
                    continue
            if many:
                if share is None:
                    share = self._share_of_slots(queue.key)
                if self._in_flight.get((queue.key.model, call.fair_key), 0) >= share:
                    continue
            if not self._may_start(call, self._started[call.owner]):
                continue
            before = waiter.choice
            best = self._again(waiter, promised, now) if ticks - waiter.tick < KEPT_TICKS else None
            if best is None and not self._is_stuck(waiter):
                if self._evaluations >= knobs.evaluations and depth:
                    return False
                found = self._weigh(waiter, promised, now)
                best = self._best(found)
                waiter.weighed = ticks
                waiter.tick = ticks - (ticket.seq & 1)  # not all at once, next time
            waiter.choice, waiter.seen, waiter.barred = best, self._serial, ""
            queue.looked.append(waiter)
            if best is None:
                is_patient = now - ticket.queued_at >= knobs.drain_after_s
                if is_patient and self._is_nowhere(queue.key, waiter):
                    self._request_drain(queue.key, waiter, now)
                if ticket.excluded or queue.mixed:
                    continue
                break
            kind = best.terms.kind
            if kind is not GO and free and self._has_held_enough(waiter, best, now):
                found = found or self._weigh(waiter, promised, now)
                ready = [c for c in found if c.terms.kind is GO and c.short <= best.short]
                if ready:
                    best, kind = min(ready, key=_rank), GO
            name = best.backend
            if kind is GO:
                self._remove(ticket)
                self._started[call.owner] += 1
                effects.append(self._commit(waiter, best, found or [best], now))
                gate = None
                self._notice()
                free.discard(name)
                if self._has_room(name, call, promised, now):
                    free.add(name)
                continue
            promised[name] = promised.get(name, 0) + 1
            if name in free and not self._has_room(name, call, promised, now):
                free.discard(name)
            if before is None or before.backend != name or before.terms.kind is not kind:
                self._record(waiter, best, found or [best], now)
            if kind is LOAD:
                self._start_load(ticket, best.quote, "call", now, effects)
            if not free:
                rest = len(queue.waiters) - 1
                if kind is HOLD and rest and found is not None:
                    self._consider_copy(found, rest, now, effects)
                break
        return True

    def _free(self, queue: Queue, now: float) -> set[str]:
        """The backends where a slot of this key is free, for any route that is waited for."""
        call = queue.waiters[0].ticket.call
        if queue.mixed:
            by_feature = {w.ticket.call.route.feature: w.ticket.call for w in queue.waiters}
            return {
                place.name
                for each in by_feature.values()
                for place in self._by_name(each, frozenset()).values()
                if self._has_room(place.name, each, {}, now)
            }
        places = self._by_name(call, frozenset())
        moved = self._moved_since(queue.free_seen) if queue.free_of is places else None
        if moved is None or queue.free_tick != self._ticks:
            queue.free, moved = set(), set(places)
        for name in moved:
            queue.free.discard(name)
            place = places.get(name)
            quote = None if place is None else self._quote(place, queue.key, now)
            if quote is not None and (quote.is_free() or quote.may_probe):
                queue.free.add(name)
        queue.free_of, queue.free_seen, queue.free_tick = places, self._serial, self._ticks
        return set(queue.free)

    def _has_room(self, name: str, call: Call, promised: Mapping[str, int], now: float) -> bool:
        """Whether a slot is left there beyond those promised."""
        place = self._by_name(call, frozenset()).get(name)
        quote = None if place is None else self._quote(place, call.key, now)
        return quote is not None and quote.is_free(promised.get(name, 0))

    def _is_stuck(self, waiter: Waiter) -> bool:
        """Whether nobody could take it a moment ago, and nothing has moved since."""
        if waiter.choice is not None or waiter.barred:
            return False
        return waiter.weighed == self._ticks and waiter.seen == self._serial

    def _again(
        self, waiter: Waiter, promised: Mapping[str, int], now: float
    ) -> Choice | None:
        """What it did best before, where little has moved since; None: it is to be weighed."""
        best = waiter.choice
        if best is None or waiter.barred or best.terms.kind is LOAD:
            return None
        moved = self._moved_since(waiter.seen)
        if moved is None or len(moved) > FEW:
            return None
        if not moved:
            return best if best.terms.kind is HOLD else None
        if self._tiers:
            return None
        call = waiter.ticket.call
        places = self._by_name(call, waiter.ticket.excluded)
        if best.backend not in places:
            return None
        for name in sorted(moved):
            place = places.get(name)
            option = None if place is None else self._priced(place, waiter, promised, now)
            if name == best.backend:
                if option is None or option.terms.total > best.terms.total + WORSE_S:
                    return None
                best = option
            elif option is not None and not option.short and option[1].total < best[1].total:
                best = option
        return best

    def _has_held_enough(self, waiter: Waiter, best: Choice, now: float) -> bool:
        """Whether a free slot was declined for so long that the best of them is to be taken."""
        if waiter.declined_at is None:
            waiter.declined_at = now
            self.decisions.declined += 1
            waiter.declined_until = now + max(self.knobs.decline_s, 2.0 * best.terms.wait)
        return now > waiter.declined_until

    def _share_of_slots(self, key: PlacementKey) -> int:
        """Slots that one key may have while another waits."""
        return max(1, math.floor(self._all_slots(key) * (1.0 - self.knobs.batch_reserve)))

    def _all_slots(self, key: PlacementKey) -> int:
        """Slots of all copies in memory."""
        known = self._slots_of.get(key.model)
        if known is None or known[0] != self._ticks:
            total = sum(
                self._view.slots(name, key.model)
                for name in self._backends
                if any(it.model == key.model for it in self._in_memory(name))
            )
            known = self._slots_of[key.model] = (self._ticks, total)
        return known[1]

    def _is_gate_open(self, queue: Queue, waiter: Waiter, now: float) -> bool:
        """Whether batch may take slots of this key now."""
        key = queue.key
        slots = self._all_slots(key)
        if not slots:
            return True
        used = sum(ledger.in_flight(key.model) for ledger in self.ledgers.values())
        if slots - used > self.knobs.batch_reserve * slots:
            return True
        classes = self._classes.get(key)
        if classes is None:
            return False
        classes.fade(now)
        waited = now - waiter.ticket.queued_at > 1.0
        return waited and classes.all >= 5.0 and classes.batch < self.knobs.batch_floor * classes.all

    def _commit(
        self, waiter: Waiter, choice: Choice, found: Sequence[Choice], now: float
    ) -> Commit:
        ticket = waiter.ticket
        call = ticket.call
        self.fair.advance(waiter.tag)
        classes = self._classes.setdefault(call.key, _Classes(at=now))
        if len(self._classes) > 4096:
            self._classes.clear()
        classes.add(now, batch=call.batch)
        quote = choice.quote
        probe = not quote.embeds and not quote.remote and quote.in_flight >= quote.slots
        track = self._enter(call, choice.backend, now, waiter.need, choice)
        if probe:
            belief = self._view.belief(choice.backend)
            if belief is not None:
                belief.probing(call.key.model, now)
                track.probing = True
        self._sent[ticket] = (waiter, choice.backend)
        if waiter.gated_at is not None:
            self.decisions.gated.observe(now - waiter.gated_at)
            waiter.gated_at = None
        decision = self._record(waiter, choice, found, now)
        why = "short-context" if choice.short else "cold" if ticket.cold else "warm"
        slots = BEYOND if quote.embeds or quote.remote else None
        return Commit(ticket, choice.backend, why, probe=probe, slots=slots, planned=decision)

    def _record(
        self, waiter: Waiter, choice: Choice, found: Sequence[Choice], now: float
    ) -> Decision:
        ticket = waiter.ticket
        call = ticket.call
        decision = Decision(
            now,
            self._passes,
            call.id,
            len(ticket.attempts) + 1,
            call.key,
            waiter.need,
            choice,
            found,
            waiter.tag,
            self.fair.virtual_time,
            self._version,
        )
        self.decisions.add(decision)
        return decision

    # -- loads ---------------------------------------------------------------------------------

    def _start_load(
        self, ticket: Ticket | None, quote: Quote, why: str, now: float, effects: list[Effect]
    ) -> None:
        ledger = self._ledger(quote.backend)
        ledger.asked_load = quote.key
        ledger.going = frozenset(victim.model for victim in quote.victims)
        ledger.drain = None
        ledger.moved()
        self._expect(ledger, quote)
        for victim in quote.victims:
            self.prefixes.drop(quote.backend, victim.model)
        keep_alive = None  # a call that waits for a load gets the host's own default
        if ticket is None:
            keep_alive = PINNED if why == "pin" else f"{self.knobs.warm_keep_alive_s:.0f}s"
        told = (quote.key, why, quote.victims, keep_alive, quote.load_s, quote.evict_s)
        effects.append(Load(ticket, quote.backend, *told))

    def _expect(self, ledger: Ledger, quote: Quote) -> None:
        """Remember what should be in memory after this load."""
        gone = {victim.model for victim in quote.victims}
        stay = [it for it in self._in_memory(ledger.name) if it.model not in gone]
        ledger.expected = (quote.key.model, tuple(stay))

    def _learn_room(self, ledger: Ledger, after: Sequence[InMemory]) -> None:
        """What is missing after a load that should have had room was pushed out by it."""
        expected = ledger.expected
        if expected is None or self._view.loading_on(ledger.name) is not None:
            return
        model, stay = expected
        here = {it.model: it for it in after}
        if model not in here or not here[model].size_bytes:
            return
        ledger.expected = None
        if all(it.model in here for it in stay):
            return
        room = self._room(ledger.name)
        sizes = [room.size(it, 0) for it in stay]
        if all(sizes):
            room.pushed_out(here[model].size_bytes + sum(sizes), len(stay) + 1)

    def _consider_copy(
        self, found: Sequence[Choice], rest: int, now: float, effects: list[Effect]
    ) -> None:
        """Nothing is free and more wait: would another copy serve them sooner?"""
        weight = self.knobs.decode_weight
        copies = [c for c in found if c.terms.kind is HOLD]
        cold = [c for c in found if c.terms.kind is LOAD and not self._has_failed(c.quote, now)]
        if not cold:
            return
        per = math.ceil((rest + 1) / max(1, len(copies)))
        stay_s = math.inf
        for c in copies:
            q = c.quote
            if q.load_left_s is not None:
                wait_s = q.load_left_s + (q.slot_wait_s(per - q.slots) if per > q.slots else 0.0)
            else:
                wait_s = q.slot_wait_s(max(1, q.in_flight - q.slots + per))
            stay_s = min(stay_s, wait_s + weight * q.mean_answer * q.tpot_s(q.slots))
        best = min(cold, key=lambda c: (self._copy_s(c.quote), c.backend))
        if self._copy_s(best.quote) < stay_s:
            self._start_load(None, best.quote, "copy", now, effects)

    def _copy_s(self, quote: Quote) -> float:
        knobs = self.knobs
        return (
            quote.load_s
            + knobs.eviction_weight * quote.evict_s
            + knobs.decode_weight * quote.mean_answer * quote.tpot_s(quote.slots)
            + quote.backlog_s
        )

    def _is_nowhere(self, key: PlacementKey, waiter: Waiter) -> bool:
        """Whether no backend this call may use has it in memory, or loads it."""
        now = self._last_tick
        for place in self._view.places(waiter.ticket.call, waiter.ticket.excluded):
            if place.copy.residency(now) is LOADED:
                return False
            loading = self._view.loading_on(place.name)
            if loading is not None and loading.key == key:
                return False
        return True

    def _request_drain(self, key: PlacementKey, waiter: Waiter, now: float) -> None:
        """Every backend that could take it is full of busy models: let one of them run dry."""
        if any(ledger.drain and ledger.drain.wanted == key for ledger in self.ledgers.values()):
            return
        options: list[tuple[float, str, str, float]] = []
        for place in self._view.places(waiter.ticket.call, waiter.ticket.excluded):
            ledger = self._ledger(place.name)
            if ledger.drain is not None or self._view.loading_on(place.name) is not None:
                continue
            if now < ledger.rests_until:
                continue
            if ledger.failed.get(key, -math.inf) > now:
                continue
            options += self._drain_options(ledger, key, now)
        if not options:
            return
        cost_s, name, victim, last_s = min(options)
        until = now + max(60.0, 2.0 * last_s)
        ledger = self._ledger(name)
        ledger.drain = Drain(victim, key, now, until)
        ledger.moved()
        shown = names.display(victim), names.display(key.model)
        self.decisions.emit(DrainRequested(now, name, *shown, last_s, cost_s))

    def _drain_options(
        self, ledger: Ledger, key: PlacementKey, now: float
    ) -> Iterator[tuple[float, str, str, float]]:
        memory, room = self._in_memory(ledger.name), self._room(ledger.name)
        has_variant = any(it.model == key.model for it in memory)
        load_s = ledger.speed.load_s(self._size(key.model))
        for it in memory:
            if self._is_pinned(ledger.name, it.model) or not ledger.is_busy(it.model):
                continue
            if has_variant and it.model != key.model:
                continue
            own_load_s = ledger.speed.load_s(self._size(it.model))
            loaded_s = now - ledger.loaded_at.get(it.model, -math.inf)
            wanted = any(q.key.model == it.model for q in self._queues.values())
            if wanted and loaded_s < 2.0 * own_load_s:
                continue
            left = [o for o in memory if o is not it and not self._may_go(ledger, o, now)]
            total = sum(room.size(o, self._bytes(ledger.name, PlacementKey(o.model))) for o in left)
            if left and not room.fits(total + self._bytes(ledger.name, key), len(left) + 1):
                continue
            last_s = self._last_release_s(ledger, it.model, now)
            cost = last_s + self._eviction_s(ledger, it.model, now) + load_s
            yield (cost, ledger.name, it.model, last_s)

    def _last_release_s(self, ledger: Ledger, model: str, now: float) -> float:
        size = self._size(model)
        backlog_s, _, share = ledger.look(model, now)
        per_token_s = ledger.speed.tpot(model, size, ledger.in_flight(model)) * share
        mean = self.lengths.mean(model, "")
        return max(
            (
                self._left(t) * per_token_s if t.decoding else backlog_s + mean * per_token_s
                for t in ledger.on(model)
            ),
            default=0.0,
        )

    def _mind_drains(self, now: float, effects: list[Effect]) -> None:
        """End drains that have come to their end, or to nothing."""
        for ledger in self.ledgers.values():
            drain = ledger.drain
            if drain is None:
                continue
            queue = self._queues.get(drain.wanted)
            waiter = queue.waiters[0] if queue is not None and queue.waiters else None
            if waiter is None:
                self._end_drain(ledger, drain, "nobody waits", now)
                continue
            if now >= drain.until or not self._is_nowhere(drain.wanted, waiter):
                why = "found elsewhere"
                if now >= drain.until:
                    why, ledger.rests_until = "late", now + (now - drain.since)
                self._end_drain(ledger, drain, why, now)
                continue
            if ledger.is_busy(drain.victim):
                continue
            places = self._view.places(waiter.ticket.call, waiter.ticket.excluded)
            place = next((p for p in places if p.name == ledger.name), None)
            quote = None if place is None else self._quote(place, drain.wanted, now)
            if quote is None or not quote.may_load:
                self._end_drain(ledger, drain, "no room", now)
                continue
            self._start_load(waiter.ticket, quote, "drain", now, effects)

    def _end_drain(self, ledger: Ledger, drain: Drain, why: str, now: float) -> None:
        ledger.drain = None
        ledger.moved()
        shown = names.display(drain.victim), names.display(drain.wanted.model)
        self.decisions.emit(DrainEnded(now, ledger.name, *shown, why, now - drain.since))

    # -- ticks ---------------------------------------------------------------------------------

    def _tick(self, now: float, effects: list[Effect]) -> None:
        """Watch, and look at everything again."""
        window_s = now - self._last_tick
        self._ticks += 1
        self._last_tick = now
        self._tick_at = now + self.knobs.tick_s
        for ledger in self.ledgers.values():
            if window_s > 2.0 * self.knobs.tick_s:
                ledger.rest(now)
            elif not ledger.is_idle or ledger.speed.slow_factor < 1.0:
                loading = self._view.loading_on(ledger.name) is not None
                speed = ledger.speed
                before, rate = speed.slow_factor, speed.decode_rate
                ledger.watch(now, window_s, loading=loading)
                if speed.slow_factor != before:
                    self._tell_slowness(ledger, before, now, learned=speed.decode_rate != rate)
                self._mind_slots(ledger, now)
        if self._ticks % BACKGROUND_TICKS == 0:
            self._guess_speeds()
        self._place_ahead(now, effects)

    def _tell_slowness(
        self, ledger: Ledger, before: float, now: float, *, learned: bool
    ) -> None:
        """It became slow, or is no more; how slow it is meanwhile is only kept."""
        name, factor = ledger.name, ledger.speed.slow_factor
        if factor < 1.0:
            self.decisions.slow[name] = factor
        else:
            self.decisions.slow.pop(name, None)
        if factor < 1.0 and before < 1.0:
            return
        why = "slow" if factor < 1.0 else "learned" if learned else "recovered"
        self.decisions.emit(Straggling(now, name, factor, why))

    def _guess_speeds(self) -> None:
        """Whoever was never measured is taken to be as quick as those that were, in the middle."""
        measured = [x.speed for x in self.ledgers.values() if x.speed.is_measured]
        if not measured or len(measured) == len(self._backends):
            return
        prompt = median_high(speed.prompt_rate for speed in measured)
        decode = median_high(speed.decode_rate for speed in measured)
        load = median_high(speed.load_rate for speed in measured)
        for name in self._backends:
            ledger = self._ledger(name)
            before = ledger.speed.edition
            ledger.speed.assume(prompt, decode, load)
            if ledger.speed.edition != before:
                ledger.moved()

    def _mind_slots(self, ledger: Ledger, now: float) -> None:
        """Calls that wait behind fewer streams than slots are believed in: believe those."""
        belief = self._view.belief(ledger.name)
        if belief is None:
            return
        for model, tracks in ledger.models.items():
            waiting = [t for t in tracks.values() if t.reads and t.call.streaming]
            if not waiting or self._model(model).embeds:
                continue
            since = max(waiting[0].at, ledger.first_byte_at.get(model, -math.inf))
            before = belief.believed(model)
            belief.starved(
                model,
                len(waiting),
                ledger.shown(model),
                now - since,
                sum(t.prefill_s for t in ledger.tracks() if t.reads),
                now,
            )
            if belief.believed(model) != before:
                ledger.moved()
                self._told_slots(ledger.name, model, before, "starved", now)

    def _place_ahead(self, now: float, effects: list[Effect]) -> None:
        """At most one load that nobody waits for yet."""
        loading = sum(self._view.loading_on(name) is not None for name in self._backends)
        if loading >= max(1, len(self._backends) / 8):
            return
        part = self._ticks % BACKGROUND_TICKS  # each tick a part of them, so that none is long
        if not part and self._view.pins and self._load_pinned(now, effects):
            return
        best: tuple[float, str, Quote] | None = None
        for key in sorted(self.demand.keys(), key=_model)[part::BACKGROUND_TICKS]:
            option = self._copy_ahead(key, now)
            if option is not None and (best is None or option[:2] < best[:2]):
                best = option
        if best is not None:
            self._start_load(None, best[2], "ahead", now, effects)

    def _load_pinned(self, now: float, effects: list[Effect]) -> bool:
        """Begin to load a pinned model that is not where it should be; False: all are."""
        here: dict[str, list[PlacementKey]] = {}
        for name in self._backends:
            keys = [it.key or PlacementKey(it.model) for it in self._in_memory(name)]
            loading = self._view.loading_on(name)
            if loading is not None and loading.key is not None:
                keys.append(loading.key)
            here[name] = keys
        for pin in self._view.pins:
            places = self._by_name(self._stand_in(pin.key), frozenset())
            lack = missing(pin, here, list(places))
            if not lack.count:
                continue
            quotes = (self._quote(places[name], pin.key, now) for name in lack.where)
            able = [
                q for q in quotes if q is not None and q.may_load and not self._has_failed(q, now)
            ]
            if able:
                best = min(able, key=lambda q: (q.evict_s + q.load_s, q.backend))
                self._start_load(None, best, "pin", now, effects)
                return True
        return False

    def _has_failed(self, quote: Quote, now: float) -> bool:
        """Whether a load of it failed there lately: for nobody it is not repeated yet."""
        return self._ledger(quote.backend).failed.get(quote.key, -math.inf) > now

    def _copy_ahead(self, key: PlacementKey, now: float) -> tuple[float, str, Quote] | None:
        knobs = self.knobs
        fast = self.demand.fast(key, now)
        if self.demand.recent(key, now) < knobs.copy_demand:
            return None
        probe = self._stand_in(key)
        capacity, any_copy, cold = 0.0, False, []
        for place in self._view.places(probe, frozenset(), exists=False):
            quote = self._quote(place, key, now)
            if quote is None:
                continue
            if quote.remote:
                return None
            if quote.resident or quote.load_left_s is not None:
                any_copy = True
                capacity += self._capacity(quote)
            elif quote.may_load and not self._has_failed(quote, now):
                cold.append(quote)
        if any_copy and fast < knobs.copy_load * capacity:
            return None
        best: tuple[float, str, Quote] | None = None
        for quote in cold:
            if quote.victims and quote.evict_s > 0.5 * quote.load_s:
                continue
            gain = min(fast - knobs.copy_load * capacity, self._capacity(quote))
            cost = quote.evict_s - 2.0 * quote.load_s * quote.load_s * gain
            if best is None or (cost, quote.backend) < best[:2]:
                best = (cost, quote.backend, quote)
        return best

    def _capacity(self, quote: Quote) -> float:
        """Calls per second that a copy can work off."""
        if quote.embeds:
            return 20.0
        slots = max(1, quote.slots)
        return slots / (quote.mean_answer * quote.tpot_s(slots) + 0.3)

    def _stand_in(self, key: PlacementKey) -> Call:
        """A call that does not exist, for *key*."""
        known = self._stand_ins.get(key)
        if known is None:
            if len(self._stand_ins) > 1000:
                self._stand_ins.clear()
            embeds = self._model(key.model).embeds
            route = find("POST", "/api/embed" if embeds else "/api/generate")
            shown = names.display(key.model)
            known = self._stand_ins[key] = Call(
                "", route, shown, key, True, Purpose.LOAD, False, NOBODY, 0.0, None, b"",
                embedding=embeds,
            )
        return known

    # -- seeing --------------------------------------------------------------------------------

    def wait_estimate(self, ticket: Ticket, now: float) -> float:
        """Seconds until *ticket* may start; 0: at once; inf: nobody can tell."""
        waiter = self._waiters.get(ticket) or Waiter(ticket, math.inf, self._need(ticket.call), 0.0)
        queue = self._queues.get(ticket.call.key)
        position = 0
        if queue is not None:
            position = bisect.bisect_left(queue.waiters, waiter.order, key=_order)
        found = self._weigh(waiter, {}, now, exists=False)
        if not found:
            return math.inf
        if position == 0 and any(c.terms.kind is GO for c in found):
            return 0.0
        rate = sum(
            self._capacity(c.quote)
            for c in found
            if c.quote.resident or c.quote.load_left_s is not None
        )
        rate = rate or max(self._capacity(c.quote) for c in found)
        return min(c.terms.wait for c in found) + position / rate

    def rehearse(self, ticket: Ticket, view: View, now: float) -> Rehearsal:  # noqa: ARG002 - it sees more itself
        """What would be decided for *ticket*, whether it waits here or nowhere."""
        waiter, call, planned_with = self._waiters.get(ticket), ticket.call, None
        if waiter is None:
            if not call.prompt_tokens:
                planned_with = round(self._prompts.get(call.key.model, 0.0))
                call = replace(call, prompt_tokens=planned_with)
                ticket = replace(ticket, call=call)
            tag = FRONT if ticket.attempts else self.fair.next_tag(call.fair_key)
            waiter = Waiter(ticket, tag, self._need(call), 0.0)
        ahead = self._ahead(waiter)
        holds = [other.choice.backend for other in ahead if other.choice is not None]
        promised = Counter(holds)
        found = sorted(self._weigh(waiter, promised, now, exists=False), key=_rank)
        best = self._best(found)
        text = self._why_not_yet(waiter, now)
        effect: Commit | Load | None = None
        wait_s = math.inf if best is None else self.wait_estimate(ticket, now)
        if best is not None and not text:
            if best.terms.kind is GO:
                effect = Commit(ticket, best.backend, "short-context" if best.short else "warm")
            elif best.terms.kind is LOAD:
                effect = Load(ticket, best.backend, call.key, "call", best.quote.victims)
            else:
                text = _why_held(best, found)
            wait_s = wait_s if effect is None else best.terms.wait
        return Rehearsal(
            tuple(self._shown(each, best, waiter.need.prompt, now) for each in found),
            effect,
            wait_s,
            best.backend if best is not None and effect is None else "",
            text,
            self._barred(waiter, {each.backend for each in found}, now),
            Turn(len(ahead), waiter.tag, self.fair.virtual_time),
            planned_with,
        )

    def _ahead(self, waiter: Waiter) -> list[Waiter]:
        """Those that wait for the same and are before it."""
        queue = self._queues.get(waiter.ticket.call.key)
        if queue is None:
            return []
        return queue.waiters[: bisect.bisect_left(queue.waiters, waiter.order, key=_order)]

    def _why_not_yet(self, waiter: Waiter, now: float) -> str:
        """Why a call is not looked at now, whatever is free; for people, empty: it is."""
        call = waiter.ticket.call
        queue = self._queues.get(call.key) or Queue(call.key)
        if not self._may_start(call, 0):
            return "waits until fewer calls of its key run (limits.slots)"
        patience_s, waited_s = self.knobs.batch_patience_s, now - waiter.ticket.queued_at
        if call.batch and waited_s < patience_s and not self._is_gate_open(queue, waiter, now):
            return (
                "gives way, as batch: the slots that are free are kept for interactive calls, for "
                f"{patience_s:.0f} s at the longest"
            )
        others = any(each.ticket.call.fair_key != call.fair_key for each in queue.waiters)
        mine = self._in_flight.get((call.key.model, call.fair_key), 0)
        if others and mine >= self._share_of_slots(call.key):
            return "waits: its key has its share of the slots, and others wait"
        return ""

    def _barred(self, waiter: Waiter, found: Container[str], now: float) -> dict[str, str]:
        """Why the backends that may serve a call and were not *found* are no candidates."""
        call, excluded = waiter.ticket.call, waiter.ticket.excluded
        return {
            place.name: self._why_no_candidate(place, call.key, now)
            for place in self._view.places(call, excluded, exists=False)
            if place.name not in found
        }

    def _why_no_candidate(self, place: Place, key: PlacementKey, now: float) -> str:
        ledger, drain = self._ledger(place.name), self._ledger(place.name).drain
        loading = self._view.loading_on(place.name)
        if key.model in ledger.going:
            return "is being unloaded there, to make room"
        if drain is not None and drain.wanted != key:
            wanted = names.display(drain.wanted.model)
            if drain.victim == key.model:
                return f"runs dry there, for {wanted} to be loaded in its place"
            return f"not in memory, and room is being made there for {wanted}"
        if loading is not None or ledger.asked_load is not None:
            other = loading.key if loading is not None else ledger.asked_load
            shown = "another model" if other is None else names.display(other.model)
            return f"not in memory, and {shown} is being loaded there"
        until = ledger.failed.get(key, -math.inf)
        if until > now:
            return f"not in memory, and a load failed there; again in {until - now:.0f} s"
        held = ", ".join(names.display(it.model) for it in self._in_memory(place.name))
        return f"not in memory, and there is no room: {held or 'what is there'} is in use or pinned"

    def _shown(
        self, choice: Choice, best: Choice | None, prompt: float, now: float
    ) -> Option:
        """A candidate for people: what it would cost, and of what that is made."""
        quote, terms = choice.quote, choice.terms
        state = _STATES[terms.kind]
        if terms.kind is HOLD:
            state = "in memory, every slot is taken or promised"
            if quote.load_left_s is not None:
                state = "being loaded"
        if choice.short:
            state += f", context of {quote.context} is too short"
        lead = "costs least" if choice is best else "costs more"
        why = f"{lead}: {terms.total:.2f} s"
        ledger = self._ledger(choice.backend)
        victims = tuple(
            (victim, self._eviction_s(ledger, victim.model, now)) for victim in quote.victims
        )
        told = listed(choice, prompt)
        return Option(choice.backend, state, why, terms.kind.value, told, victims)

    # -- what is learned -----------------------------------------------------------------------

    def learned(self, now: float = 0.0) -> dict[str, Any]:
        """What would be a pity to forget, as plain data."""
        beliefs = {name: self._view.belief(name) for name in self._backends}
        return {
            "speeds": {name: ledger.speed.dump() for name, ledger in self.ledgers.items()},
            "rooms": {name: room.dump() for name, room in self.rooms.items()},
            "slots": {name: belief.dump() for name, belief in beliefs.items() if belief},
            "lengths": self.lengths.dump(),
            "demand": self.demand.dump(now),
            "ratios": dict(self._ratios),
            "reuse": self.prefixes.dump(),
        }

    def recall(self, learned: Mapping[str, Any], now: float = 0.0, age_s: float = 0.0) -> None:
        """Take over what another has learned; what cannot be believed is left out."""
        self._learned = learned
        for part, take in (("lengths", self.lengths.restore), ("reuse", self.prefixes.restore)):
            told = learned.get(part)
            if isinstance(told, dict):
                take(told)
        demand, ratios = learned.get("demand"), learned.get("ratios")
        if isinstance(demand, dict):
            self.demand.restore(demand, now, age_s)
        for model, ratio in ratios.items() if isinstance(ratios, dict) else ():
            if isinstance(ratio, int | float) and 1 / 8 <= ratio <= 8.0:
                self._ratios[model] = float(ratio)
        self.ledgers = {n: ledger for n, ledger in self.ledgers.items() if not ledger.is_idle}
        self.rooms.clear()
        self._backends = {}
        self._refresh_backends()


def _order(waiter: Waiter) -> tuple[float, int]:
    return waiter.order


def _head_order(queue: Queue) -> tuple[float, int]:
    return queue.waiters[0].order if queue.waiters else (math.inf, 0)


def _without_probe(quote: Quote) -> Quote:
    return replace(quote, may_probe=False)


def _prefers(backend: Backend, model: str) -> bool:
    name = names.parse(model)
    return any(names.matches(glob, name) for glob in backend.prefer)


_STATES: Final = {GO: "in memory, a slot is free", HOLD: "busy", LOAD: "not in memory"}


def _why_held(best: Choice, found: Sequence[Choice]) -> str:
    """What a call that could start nowhere better waits for, for people."""
    what = "the load" if best.quote.load_left_s is not None else "a slot"
    text = f"holds for {what} on {best.backend}"
    free = [each for each in found if each.terms.kind is GO]
    if free:
        other = min(free, key=_rank)
        text += f", which costs less than {other.backend}, where a slot is free"
    return text


def _model(key: PlacementKey) -> str:
    return key.model
