"""
Quotes: what each backend is like for a placement key now, and what a call would cost there.

Laws:
- A quote is kept until its ledger's edition moves, or it is too old; asking changes nothing else.
- Nobody's model is put out that anybody uses, that an operator wants there, or that was loaded for
  somebody who has not come to it yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from balancer.core import names
from balancer.core.books import Books, loaded_as
from balancer.core.catalog import Copy, InMemory
from balancer.core.cost import GO, HOLD, Quote, price
from balancer.core.decisions import Choice, Decisions, rank
from balancer.core.domain import Backend, Call, PlacementKey, Residency
from balancer.core.knobs import Knobs
from balancer.core.ledger import Ledger, Track
from balancer.core.queues import Queues, Waiter
from balancer.core.room import GB, estimate
from balancer.core.sight import Place, Sight
from balancer.core.tiers import order

OVERDUE_FACTOR: Final = 3.0  # a load that takes so much longer than predicted is stuck
OVERDUE_EXTRA_S: Final = 30.0
LEAST_LEFT_S: Final = 0.2
UNLOAD_S: Final = 0.5
MOST_QUOTES: Final = 100_000
MOST_KEPT: Final = 4096
MOST_RANKED: Final = 16  # options that are put in order by all rules; the rest, by tier and price
QUOTE_S: Final = 1.0  # for which a quote holds where nothing moves; so they grow old one by one
LOADING_S: Final = 0.1  # where every second that has passed makes it the better choice
BEYOND: Final = 1 << 20  # slots of what no count bounds
USUAL_BYTES: Final = round(4.9 * GB)  # of a model's files, where nobody tells
PROBED_FROM: Final = 0.7  # of its own speed: whoever is slower than that is not tried further

LOADED, UNKNOWN = Residency.LOADED, Residency.UNKNOWN


@dataclass(slots=True, eq=False)
class _Kept:
    """
    A quote, and what it rests on; None: the backend was no candidate.

    Args:
        idle: Editions of what it rests on where nothing of ours runs; None: something did.
    """

    edition: int
    shape: int
    tick: int
    at: float
    copy: Copy
    quote: Quote | None
    idle: tuple[int, int] | None


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


class _Lying(NamedTuple):
    """
    What is in memory on a backend, as it was at one tick with one shape of its ledger.

    Args:
        idle: Models there that nobody uses.
        sizes: Bytes that each model is guessed to take, where nobody tells.
    """

    stamp: tuple[int, int]
    memory: tuple[InMemory, ...]
    idle: frozenset[str]
    sizes: dict[str, int]


class Quotes:
    """
    The quotes.

    Attributes:
        evaluations: Calls for which all backends were priced, since somebody set it to nothing.
    """

    def __init__(
        self, view: Sight, knobs: Knobs, books: Books, queues: Queues, decisions: Decisions
    ) -> None:
        self.evaluations = 0
        self._view = view
        self._knobs = knobs
        self._books = books
        self._decisions = decisions
        self._ledgers = books.ledgers
        self._prefixes = books.prefixes
        self._queues = queues.by_key
        self._kept: dict[PlacementKey, dict[str, _Kept]] = {}
        self._count = 0  # of these
        self._makings: dict[tuple[str, PlacementKey], _Making] = {}
        self._lie: dict[str, _Lying] = {}  # by backend
        self._wants: dict[
            PlacementKey, tuple[int, float, float]
        ] = {}  # by model: tick, wanted, of late
        self._named: dict[tuple[PlacementKey, str], tuple[Sequence[Place], dict[str, Place]]] = {}

    def forget(self) -> None:
        """Backends are not those that they were."""
        self._kept.clear()
        self._count = 0
        self._makings.clear()
        self._lie.clear()

    # -- choosing ------------------------------------------------------------------------------

    def places(self, call: Call, excluded: frozenset[str]) -> Mapping[str, Place]:
        """Where the call may be served now, by name."""
        places = self._view.places(call, excluded, exists=False)  # only a weighing leaves traces
        of = (call.key, call.route.feature)
        known = self._named.get(of)
        if known is None or known[0] is not places or len(known[0]) != len(places):
            if len(self._named) > MOST_KEPT:
                self._named.clear()
            known = self._named[of] = (places, {place.name: place for place in places})
        return known[1]

    def weigh(
        self, waiter: Waiter, promised: Mapping[str, int], now: float, *, exists: bool = True
    ) -> list[Choice]:
        """Every candidate with its price, in no order."""
        self.evaluations += 1
        self._decisions.evaluations += 1
        ticket, found, quote_of = waiter.ticket, [], self.quote
        key = ticket.call.key
        for place in self._view.places(ticket.call, ticket.excluded, exists=exists):
            quote = quote_of(place, key, now)
            if quote is not None or place.name == ticket.loaded_on:
                choice = self._priced(place, quote, waiter, promised, now)
                if choice is not None:
                    found.append(choice)
        return found

    def priced(
        self, place: Place, waiter: Waiter, promised: Mapping[str, int], now: float
    ) -> Choice | None:
        """One candidate with its price; None: it is none."""
        quote = self.quote(place, waiter.ticket.call.key, now)
        return self._priced(place, quote, waiter, promised, now)

    def _priced(
        self,
        place: Place,
        quote: Quote | None,
        waiter: Waiter,
        promised: Mapping[str, int],
        now: float,
    ) -> Choice | None:
        name, ticket, need = place.name, waiter.ticket, waiter.need
        if name == waiter.barred:
            return None
        call = ticket.call
        key = call.key
        if ticket.loaded_on == name and (quote is None or not quote.resident):
            # It was loaded for this very call. Whatever the host tells of it since, it is not
            # loaded for it again: that could go on for ever.
            quote = self._make(place, key, self._books.ledger(name), now, loaded=True)
        if quote is None:
            return None
        cached = 0.0
        if (call.chain or call.session) and self._prefixes.any(name, key):
            links = self._prefixes.cached(
                name, key, call.chain, call.shared, call.prompt_tokens, call.session, now
            )
            if links:  # they are estimates, as is the prompt's length
                share = links / call.prompt_tokens * self._prefixes.reuse(key.model)
                cached = min(share, 1.0) * need.read(quote.reads) * self._knobs.cache_weight
        ahead = promised.get(name, 0)
        if quote.may_probe and (
            ticket.attempts or call.batch or call.embedding or not call.streaming
        ):
            quote = replace(quote, may_probe=False)
        terms = price(quote, need, cached, ahead, self._knobs)
        if terms is None:
            return None
        short = quote.context is not None and quote.context < need.context
        return Choice(name, terms, quote, ahead, short)

    def best(self, found: Sequence[Choice]) -> Choice | None:
        """The cheapest; a lower tier only where the higher ones cost too much."""
        if not found:
            return None
        if len(found) == 1:
            return found[0]
        if not self._books.has_tiers and not any(c.short or c.quote.may_probe for c in found):
            return _best_of(found)
        usable = [c for c in found if not c.short]
        if len(usable) < len(found):  # where one has too little, another's default is no better
            usable = [c for c in usable if c.quote.context is not None or c.quote.resident]
        usable = usable or list(found)
        if self._books.has_tiers:  # all other rules are for those of one tier
            groups = [self._group(c) for c in usable]
            first = min(groups)
            usable = [c for c, its in zip(usable, groups, strict=True) if its == first]
        probes = [c for c in usable if c.is_probe]
        if probes and any(c.terms.kind is GO and not c.is_probe for c in usable):
            # What is tried beyond a backend's slots may have to wait: not beside a free one.
            usable = [c for c in usable if not c.is_probe]
        return _best_of(usable)

    def ranked(self, found: Sequence[Choice]) -> list[Choice]:
        """In the order in which they would be chosen, each if those before it were not there."""
        rest, chosen = list(found), list[Choice]()
        while len(chosen) < MOST_RANKED and (best := self.best(rest)) is not None:
            chosen.append(best)
            rest = [c for c in rest if c is not best]
        return chosen + sorted(rest, key=lambda c: (c.short, self._group(c), rank(c)))

    def _group(self, choice: Choice) -> tuple[bool, int]:
        return order(choice.terms.total, choice.quote.tier, self._knobs.tier_patience_s)

    # -- quotes --------------------------------------------------------------------------------

    def quote(self, place: Place, key: PlacementKey, now: float) -> Quote | None:
        """The backend as *key* finds it; None: it is no candidate."""
        name, copy = place.name, place.copy
        ledger = self._ledgers.get(name) or self._books.ledger(name)
        here = self._kept.get(key)
        known = None if here is None else here.get(name)
        if known is not None and known.copy is copy:
            quote = known.quote
            holds_s = QUOTE_S if quote is None or quote.load_left_s is None else LOADING_S
            if now - known.at < holds_s and (
                known.edition == ledger.edition or self._is_as_before(known, ledger)
            ):
                known.edition = ledger.edition
                return quote
        quote = self._make(place, key, ledger, now)
        shape, tick, idle = ledger.shape, self._books.ticks, _idle(ledger)
        self._keep(key, name, _Kept(ledger.edition, shape, tick, now, copy, quote, idle))
        return quote

    def _is_as_before(self, known: _Kept, ledger: Ledger) -> bool:
        """Whether what began and ended there since makes no difference."""
        quote = known.quote
        if quote is None:  # to make room takes more than that
            return known.shape == ledger.shape and known.tick == self._books.ticks
        if known.idle is None or not quote.resident or quote.remote:
            return False
        slots = self._view.slots(ledger.name, quote.key.model)
        return known.idle == _idle(ledger) and slots == quote.slots

    def _keep(self, key: PlacementKey, name: str, kept: _Kept) -> None:
        if self._count > MOST_QUOTES:
            self.forget()
        here = self._kept.setdefault(key, {})
        self._count += name not in here
        here[name] = kept

    def _make(
        self,
        place: Place,
        key: PlacementKey,
        ledger: Ledger,
        now: float,
        *,
        loaded: bool = False,
    ) -> Quote | None:
        name, model, copy, books = place.name, key.model, place.copy, self._books
        drain = ledger.drain
        if drain is not None and drain.victim == model and drain.wanted != key:
            return None
        residency, making, loading = copy.residency(now), None, self._view.loading_on(name)
        # Ollama before 0.30 lists a model from the beginning of its load on.
        is_coming = loading is not None and loading.key == key
        is_resident = (residency is LOADED and not is_coming) or place.remote or loaded
        if is_resident:
            if model in ledger.going and not place.remote:
                return None
        else:
            coming = ledger.asked_load if loading is None else loading.key
            if loading is None and coming is None:
                making = self._making(ledger, key, residency, now)
                if making is None:
                    return None
            elif coming != key:
                return None
        _, size, embeds, _ = books.model(model)
        speed = ledger.speed
        backlog_s, decoding, share = ledger.look(model, now)
        quote = Quote(
            backend=name,
            key=key,
            at=now,
            resident=is_resident,
            load_left_s=None,
            in_flight=ledger.in_flight(model) if is_resident else 0,
            slots=self._view.slots(name, model),
            may_probe=False,
            backlog_s=backlog_s,
            share=float(share),
            decoding=decoding,
            prompt_rate=speed.prompt(model, size),
            decode_rate=speed.decode(model, size),
            penalty=speed.penalty,
            mean_answer=0.0 if embeds else books.lengths.mean(model, ""),
            context=copy.context,
            reads=copy.reads,
            embeds=embeds,
            remote=place.remote,
            slow=speed.slow_factor,
            measured=speed.is_measured,
        )
        backend = books.backends.get(name)
        if backend is not None:
            quote.tier = backend.priority
            if backend.prefer and _prefers(backend, model):
                quote.bonus_s = self._knobs.prefer_s
        if place.remote:
            quote.first_byte_s, quote.slots = self._view.usual_s(name, model), BEYOND
        elif is_resident:
            self._tell_runs(quote, ledger, now)
        elif making is not None:
            quote.victims, quote.evict_s, quote.may_load = making.victims, making.evict_s, True
            quote.load_s = speed.load_s(size) + (UNLOAD_S if making.victims else 0.0)
        else:
            usual_s = speed.load_s(size)
            left_s = usual_s if loading is None else _left_s(now - loading.since, usual_s)
            quote.load_left_s = left_s
        return quote

    def _tell_runs(self, quote: Quote, ledger: Ledger, now: float) -> None:
        """When the slots come free, and whether one more may be tried."""
        model = quote.key.model
        n = quote.in_flight
        if quote.embeds:
            quote.work_s = sum(t.prefill_s for t in ledger.on(model))
            return
        if not n or n + self._knobs.plan_depth <= quote.slots:
            return  # no pass promises so many: nobody will ask when one comes free
        per_token_s = quote.tpot_s(min(max(n, 1), quote.slots)) * quote.share
        releases = []
        for track in ledger.on(model):
            if track.decoding:
                releases.append(self.left(track) * per_token_s)
            else:
                releases.append(quote.backlog_s + quote.mean_answer * per_token_s)
        releases.sort()
        quote.releases = releases
        if n == quote.slots:
            belief = self._view.belief(quote.backend)
            if belief is not None and ledger.speed.slow_factor >= PROBED_FROM:
                quote.may_probe = belief.may_probe(model, now)

    def left(self, track: Track) -> float:
        """Tokens that are still to come."""
        got = float(track.records) if track.call.streaming else track.virtual
        left = self._books.lengths.left(track.model, track.call.fair_key, got)
        limit = track.call.output_tokens
        if limit is not None and limit > 0:
            left = min(left, max(1.0, limit - got))
        return left

    # -- room ----------------------------------------------------------------------------------

    def _making(
        self, ledger: Ledger, key: PlacementKey, residency: Residency, now: float
    ) -> _Making | None:
        """What a load there would put out; None: there is no way."""
        drain = ledger.drain
        if drain is not None and drain.wanted != key:
            return None
        may_evict = residency is not UNKNOWN
        stamp = (ledger.shape, self._books.ticks, may_evict)
        made = self._makings.get((ledger.name, key))
        if made is None or made.stamp != stamp:
            if len(self._makings) > MOST_QUOTES:
                self._makings.clear()
            gone = self._victims(ledger, key, now, may_evict=may_evict)
            victims = tuple(it.key or PlacementKey(it.model) for it in gone or ())
            evict_s = sum(self.eviction_s(ledger, loaded_as(it), now) for it in gone or ())
            made = _Making(stamp, gone is not None, victims, evict_s)
            self._makings[ledger.name, key] = made
        return made if made.possible else None

    def _victims(
        self, ledger: Ledger, key: PlacementKey, now: float, *, may_evict: bool
    ) -> list[InMemory] | None:
        lying, room, name = self._lying(ledger, now), self._books.room(ledger.name), ledger.name
        if lying.memory and not lying.idle:  # as most are where many wait: no need to try
            is_full = len(lying.memory) >= room.most_models
            if is_full or any(it.model == key.model for it in lying.memory):
                return None
        gone = room.victims(
            lying.memory,
            lambda it: it.model == key.model,
            lambda it: (
                it.model in lying.idle and not self._books.keeping.is_pinned(name, it.model, key)
            ),
            lambda it: self.eviction_s(ledger, loaded_as(it), now),
            self.bytes(name, key),
            lambda it: lying.sizes[it.model],
        )
        if gone and not may_evict and any(it.model != key.model for it in gone):
            return None
        return gone

    def _lying(self, ledger: Ledger, now: float) -> _Lying:
        """What is in memory there, looked at once for all that could take its place."""
        stamp = (ledger.shape, self._books.ticks)
        known = self._lie.get(ledger.name)
        if known is None or known.stamp != stamp:
            memory = self._books.in_memory(ledger.name)
            models = [it.model for it in memory]
            idle = frozenset(m for m in models if not self._who_uses(ledger, m, now))
            sizes = {it.model: self.bytes(ledger.name, loaded_as(it)) for it in memory}
            known = self._lie[ledger.name] = _Lying(stamp, memory, idle, sizes)
        return known

    def may_go(self, ledger: Ledger, it: InMemory, wanted: PlacementKey, now: float) -> bool:
        """Whether it may be put out for *wanted*."""
        return not self.why_it_stays(ledger, it, wanted, now)

    def why_it_stays(self, ledger: Ledger, it: InMemory, wanted: PlacementKey, now: float) -> str:
        """Who uses it, of ours or not, or wants it there, for people; empty: nobody."""
        is_busy = ledger.is_busy(it.model)
        if not is_busy and self._books.keeping.is_pinned(ledger.name, it.model, wanted):
            return "pinned"
        return self._who_uses(ledger, it.model, now)

    def _who_uses(self, ledger: Ledger, model: str, now: float) -> str:
        """For people; empty: nobody."""
        if ledger.is_busy(model):
            return "in use"
        if self._books.is_strangers(ledger.name, model, now):
            return "in use past this balancer"
        return "awaited by calls it was loaded for" if self._is_awaited(ledger, model, now) else ""

    def _is_awaited(self, ledger: Ledger, model: str, now: float) -> bool:
        """Whether it was just loaded for somebody who has not come to it yet."""
        at = ledger.loaded_at.get(model, -math.inf)
        if ledger.last_used.get(model, -math.inf) >= at:
            return False
        if now - at > 2.0 * ledger.speed.load_s(self._books.model(model).size):
            return False
        return any(key.model == model for key in self._queues)

    def bytes(self, backend: str, key: PlacementKey) -> int:
        """Memory that the model will take there."""
        model, context = key.model, dict(key.options).get("num_ctx")
        context = int(context) if isinstance(context, int | float) else None
        known, slots = self._books.model(model), self._view.slots(backend, model)
        guess = estimate(known.file_bytes or USUAL_BYTES, slots, context, embeds=known.embeds)
        return self._books.room(backend).expected(model, context, guess)

    def eviction_s(self, ledger: Ledger, key: PlacementKey, now: float) -> float:
        """
        What it will cost others that a runner is not there any more; another variant is none.

        One that a pin would bring back costs that load as well.
        """
        books, model = self._books, key.model
        known = self._wants.get(key)
        if known is None or known[0] != books.ticks:
            if len(self._wants) > MOST_KEPT:
                self._wants.clear()
            wanted = 1.0 - math.exp(-books.demand.slow(key, now) * self._knobs.horizon_s)
            known = self._wants[key] = (books.ticks, wanted, books.demand.fast(key, now))
        _, wanted, fast = known
        load_s = ledger.speed.load_s(books.model(model).size)
        copies = books.copies(key)
        cost_s = (wanted * load_s + 0.5 * fast * load_s * load_s) / (copies * copies)
        return cost_s + load_s if books.keeping.comes_back(ledger.name, model) else cost_s


def _idle(ledger: Ledger) -> tuple[int, int] | None:
    """What prices rest on where nothing of ours runs; None: something does."""
    return None if ledger.models else (ledger.changes, ledger.speed.edition)


def _left_s(passed_s: float, usual_s: float) -> float:
    """Of a load that is under way."""
    is_stuck = passed_s > OVERDUE_FACTOR * usual_s + OVERDUE_EXTRA_S
    return passed_s if is_stuck else max(LEAST_LEFT_S, usual_s - passed_s)


def _best_of(usable: Sequence[Choice]) -> Choice:
    best = min(usable, key=rank)
    if best.terms.kind is HOLD and not best.quote.measured:
        # Nobody waits for what a guess promises while something known is free.
        free = [c for c in usable if c.terms.kind is GO]
        return min(free, key=rank) if free else best
    return best


def _prefers(backend: Backend, model: str) -> bool:
    name = names.parse(model)
    return any(names.matches(glob, name) for glob in backend.prefer)
