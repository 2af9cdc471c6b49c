"""
What is in memory where: loads, copies, drains, and what operators want to be kept.

Laws:
- One load per backend at a time, and one asked for counts at once.
- A load that nobody waits for yet begins only where it pays, and is not repeated where it failed.
- A drain ends: with the load that it was for, with the wish, or by its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from balancer.core import names
from balancer.core.books import BACKGROUND_TICKS, Books, loaded_as
from balancer.core.cost import HOLD, LOAD, Quote
from balancer.core.decisions import Choice, Decisions
from balancer.core.domain import PlacementKey
from balancer.core.events import DrainEnded, DrainRequested
from balancer.core.knobs import Knobs
from balancer.core.ledger import Drain, Ledger
from balancer.core.pins import Pin, missing
from balancer.core.queues import Queues, Waiter
from balancer.core.quotes import LOADED, Quotes
from balancer.core.scheduler import Effect, Load, Ticket
from balancer.core.sight import Sight
from balancer.core.tiers import order

PINNED: Final = "24h"  # keep-alive of a pinned model; a client's own replaces it
LEAST_DRAIN_S: Final = 60.0  # for which a drain is given time
DEAR: Final = 0.5  # of a load: a copy ahead is not made at the cost of victims that cost more
LOADING_PART: Final = 8  # one backend in so many may load ahead at a time


class Placement:
    """Decides what is loaded and unloaded, apart from a single call's own load."""

    def __init__(
        self,
        view: Sight,
        knobs: Knobs,
        books: Books,
        queues: Queues,
        quotes: Quotes,
        decisions: Decisions,
    ) -> None:
        self._view = view
        self._knobs = knobs
        self._books = books
        self._queues = queues.by_key
        self._quotes = quotes
        self._decisions = decisions
        self._draining: dict[Ledger, None] = {}  # and some that are not any more

    # -- loads ---------------------------------------------------------------------------------

    def load(self, ticket: Ticket | None, quote: Quote, why: str, effects: list[Effect]) -> None:
        """Begin the load that was quoted; without a *ticket* nobody waits for it yet."""
        ledger = self._books.ledger(quote.backend)
        ledger.asked_load = quote.key
        ledger.going = frozenset(victim.model for victim in quote.victims)
        ledger.drain = None
        ledger.moved()
        stay = (it for it in self._books.in_memory(ledger.name) if it.model not in ledger.going)
        ledger.expected = (quote.key.model, tuple(stay))
        for victim in quote.victims:
            self._books.prefixes.drop(quote.backend, victim.model)
        keep_alive = None  # a call that waits for a load gets the host's own default
        if ticket is None:
            keep_alive = PINNED if why == "pin" else f"{self._knobs.warm_keep_alive_s:.0f}s"
        told = (quote.key, why, quote.victims, keep_alive, quote.load_s, quote.evict_s)
        effects.append(Load(ticket, quote.backend, *told))

    def _may_be_loaded(self, quote: Quote, now: float) -> bool:
        """Whether a load for nobody may begin there."""
        return quote.may_load and not self._has_failed(quote, now)

    def _has_failed(self, quote: Quote, now: float) -> bool:
        return self._books.ledger(quote.backend).has_failed(quote.key, now)

    # -- copies --------------------------------------------------------------------------------

    def consider_copy(
        self, found: Sequence[Choice], rest: int, now: float, effects: list[Effect]
    ) -> None:
        """Nothing is free and more wait: would another copy serve them sooner?"""
        copies = [c.quote for c in found if c.terms.kind is HOLD]
        cold = [
            c.quote for c in found if c.terms.kind is LOAD and not self._has_failed(c.quote, now)
        ]
        if not cold:
            return
        per = math.ceil((rest + 1) / max(1, len(copies)))
        best = min(cold, key=lambda quote: (-quote.tier, self._copy_s(quote), quote.backend))
        stays = [(quote.tier, self._stay_s(quote, per)) for quote in copies]
        above_s = min((stay_s for tier, stay_s in stays if tier > best.tier), default=math.inf)
        if above_s <= self._knobs.tier_patience_s:
            return  # they will all stay in the higher tier
        if self._copy_s(best) < min((stay_s for _, stay_s in stays), default=math.inf):
            self.load(None, best, "copy", effects)

    def _stay_s(self, quote: Quote, per: int) -> float:
        """What the last of so many more would cost here."""
        slots = quote.slots
        if quote.load_left_s is not None:
            wait_s = quote.load_left_s + (quote.slot_wait_s(per - slots) if per > slots else 0.0)
        else:
            wait_s = quote.slot_wait_s(max(1, quote.in_flight - slots + per))
        return wait_s + self._knobs.decode_weight * quote.mean_answer * quote.tpot_s(slots)

    def _copy_s(self, quote: Quote) -> float:
        knobs = self._knobs
        return (
            quote.load_s
            + knobs.eviction_weight * quote.evict_s
            + knobs.decode_weight * quote.mean_answer * quote.tpot_s(quote.slots)
            + quote.backlog_s
        )

    # -- ahead of the queue --------------------------------------------------------------------

    def look_ahead(self, now: float, effects: list[Effect]) -> None:
        """At most one load that nobody waits for yet."""
        count = len(self._books.backends)
        loading = sum(self._view.loading_on(name) is not None for name in self._books.backends)
        if loading >= max(1, count / LOADING_PART):
            return
        # Each tick a part of them, so that none is long.
        part = self._books.ticks % BACKGROUND_TICKS
        if not part and self._view.pins and self._load_pinned(now, effects):
            return
        wanted, asked = self._books.demand.keys(), self._books.asked
        keys = sorted((key for key in wanted if key in asked), key=_model)[part::BACKGROUND_TICKS]
        options = [option for key in keys if (option := self._copy_ahead(key, now)) is not None]
        if options:
            best = min(options, key=_cost)
            self.load(None, best[2], "ahead", effects)

    def _load_pinned(self, now: float, effects: list[Effect]) -> bool:
        """Begin to load a pinned model that is not where it should be; False: all are."""
        for pin in self._view.pins:
            best = self._lacking(pin, now)
            if best is not None:
                self.load(None, best, "pin", effects)
                return True
        return False

    def _lacking(self, pin: Pin, now: float) -> Quote | None:
        """
        Where a copy that it lacks is had, in the highest tier that takes it, at the least cost.

        None: none lacks, or nowhere.
        """
        places = self._books.keeping.places(pin.key)
        holders = set(self._books.keeping.holders(pin))
        for name in places:
            loading = self._view.loading_on(name)
            if loading is not None and loading.key is not None and pin.is_met_once(loading.key):
                holders.add(name)
        lack = missing(pin, holders, list(places))
        if not lack.count:
            return None
        quotes = (self._quotes.quote(places[name], pin.key, now) for name in lack.where)
        able = [
            q
            for q in quotes
            if q is not None and self._may_be_loaded(q, now) and not self._is_fresh(q, now)
        ]
        return min(able, key=lambda q: (-q.tier, q.evict_s + q.load_s, q.backend), default=None)

    def _is_fresh(self, quote: Quote, now: float) -> bool:
        """
        Whether another variant of the model was used there so lately that it is left in peace.

        Else calls that go on asking for it and the pin would take turns, with a load for each.
        """
        model = quote.key.model
        if all(victim.model != model for victim in quote.victims):
            return False
        used_at = self._books.ledger(quote.backend).last_used.get(model, -math.inf)
        return now - used_at < quote.load_s

    def _copy_ahead(self, key: PlacementKey, now: float) -> tuple[float, str, Quote] | None:
        """A further copy of what is asked for so often that those it has will not do."""
        books, knobs = self._books, self._knobs
        fast = books.demand.fast(key, now)
        if books.demand.recent(key, now) < knobs.copy_demand:
            return None
        capacity, any_copy, cold, top = 0.0, False, [], -math.inf
        for place in books.keeping.places(key).values():
            quote = self._quotes.quote(place, key, now)
            if quote is None:
                if self._view.loading_on(place.name) is not None:  # it may take it after that
                    top = max(top, self._tier(place.name))
                continue
            if quote.remote:
                return None
            if quote.resident or quote.load_left_s is not None:
                any_copy = True
                capacity += quote.capacity
            elif self._may_be_loaded(quote, now):
                cold.append(quote)
            else:
                continue
            top = max(top, quote.tier)
        lacking = fast - knobs.copy_load * capacity
        if any_copy and lacking < 0.0:
            return None
        options = (
            (q.evict_s - 2.0 * q.load_s * q.load_s * min(lacking, q.capacity), q.backend, q)
            for q in cold
            if q.tier >= top and (not q.victims or q.evict_s <= DEAR * q.load_s)
        )
        return min(options, key=_cost, default=None)

    # -- drains --------------------------------------------------------------------------------

    def want_drain(self, waiter: Waiter, now: float) -> None:
        """If every backend that could take it is full of busy models, let one of them run dry."""
        key = waiter.ticket.call.key
        if not self._is_nowhere(waiter):
            return
        ledgers = self._books.ledgers.values()
        if any(ledger.drain and ledger.drain.wanted == key for ledger in ledgers):
            return
        options = [
            option
            for place in self._view.places(waiter.ticket.call, waiter.ticket.excluded, exists=False)
            for option in self._drain_options(place.name, key, now)
        ]
        if not options:
            return
        cost_s, name, victim, last_s = min(options, key=self._by_tier)
        until = now + max(LEAST_DRAIN_S, 2.0 * last_s)
        ledger = self._books.ledger(name)
        ledger.drain = Drain(victim, key, now, until)
        self._draining[ledger] = None
        ledger.moved()
        shown = names.display(victim), names.display(key.model)
        self._decisions.emit(DrainRequested(now, name, *shown, last_s, cost_s))

    def _by_tier(
        self, option: tuple[float, str, str, float]
    ) -> tuple[tuple[bool, int], float, int, tuple[float, str, str, float]]:
        cost_s, tier = option[0], self._tier(option[1])
        return order(cost_s, tier, self._knobs.tier_patience_s), cost_s, -tier, option

    def _tier(self, name: str) -> int:
        backend = self._books.backends.get(name)
        return 0 if backend is None else backend.priority

    def _is_nowhere(self, waiter: Waiter) -> bool:
        """Whether no backend this call may use has it in memory, or loads it."""
        key, at = waiter.ticket.call.key, self._books.ticked_at
        for place in self._view.places(waiter.ticket.call, waiter.ticket.excluded, exists=False):
            if place.copy.residency(at) is LOADED:
                return False
            loading = self._view.loading_on(place.name)
            if loading is not None and loading.key == key:
                return False
        return True

    def _drain_options(
        self, name: str, key: PlacementKey, now: float
    ) -> Iterator[tuple[float, str, str, float]]:
        """Busy models that could go there: cost, backend, model, and when its last call ends."""
        books, quotes, ledger = self._books, self._quotes, self._books.ledger(name)
        if ledger.drain is not None or self._view.loading_on(name) is not None:
            return
        if now < ledger.rests_until or ledger.has_failed(key, now):
            return
        memory, room = books.in_memory(name), books.room(name)
        has_variant = any(it.model == key.model for it in memory)
        load_s = ledger.speed.load_s(books.model(key.model).size)
        for it in memory:
            if not ledger.is_busy(it.model) or books.keeping.is_pinned(name, it.model, key):
                continue
            if has_variant and it.model != key.model:
                continue
            own_load_s = ledger.speed.load_s(books.model(it.model).size)
            loaded_s = now - ledger.loaded_at.get(it.model, -math.inf)
            wanted = any(other.model == it.model for other in self._queues)
            if wanted and loaded_s < 2.0 * own_load_s:
                continue
            left = [o for o in memory if o is not it and not quotes.may_go(ledger, o, key, now)]
            total = sum(room.size(o, quotes.bytes(name, PlacementKey(o.model))) for o in left)
            if left and not room.fits(total + quotes.bytes(name, key), len(left) + 1):
                continue
            last_s = self._last_release_s(ledger, it.model, now)
            cost_s = last_s + quotes.eviction_s(ledger, loaded_as(it), now) + load_s
            yield (cost_s, name, it.model, last_s)

    def _last_release_s(self, ledger: Ledger, model: str, now: float) -> float:
        """Until the last call that runs there now will have ended."""
        size = self._books.model(model).size
        backlog_s, _, share = ledger.look(model, now)
        per_token_s = ledger.speed.tpot(model, size, ledger.in_flight(model)) * share
        mean = self._books.lengths.mean(model, "")
        left = (
            self._quotes.left(t) * per_token_s if t.decoding else backlog_s + mean * per_token_s
            for t in ledger.on(model)
        )
        return max(left, default=0.0)

    def mind_drains(self, now: float, effects: list[Effect]) -> None:
        """End drains that have come to their end, or to nothing."""
        for ledger, drain in self._drains():
            self._mind_drain(ledger, drain, now, effects)

    def end_wishes(self, now: float) -> None:
        """End drains for what nobody waits for any more."""
        for ledger, drain in self._drains():
            if drain.wanted not in self._queues:
                self._end_drain(ledger, drain, "nobody waits", now)

    def _drains(self) -> list[tuple[Ledger, Drain]]:
        """All that are under way."""
        found = [(each, each.drain) for each in self._draining if each.drain is not None]
        if len(found) < len(self._draining):
            self._draining = dict.fromkeys(ledger for ledger, _ in found)
        return found

    def _mind_drain(self, ledger: Ledger, drain: Drain, now: float, effects: list[Effect]) -> None:
        queue = self._queues.get(drain.wanted)
        waiters = () if queue is None else queue.waiters
        waiter = next((w for w in waiters if not w.ticket.call.is_guest), None)
        if waiter is None:
            self._end_drain(ledger, drain, "nobody waits", now)
            return
        if now >= drain.until:
            ledger.rests_until = now + (now - drain.since)
            self._end_drain(ledger, drain, "late", now)
            return
        if not self._is_nowhere(waiter):
            self._end_drain(ledger, drain, "found elsewhere", now)
            return
        if ledger.is_busy(drain.victim):
            return
        places = self._view.places(waiter.ticket.call, waiter.ticket.excluded, exists=False)
        place = next((p for p in places if p.name == ledger.name), None)
        quote = None if place is None else self._quotes.quote(place, drain.wanted, now)
        if quote is None or not quote.may_load:
            self._end_drain(ledger, drain, "no room", now)
            return
        self.load(waiter.ticket, quote, "drain", effects)

    def _end_drain(self, ledger: Ledger, drain: Drain, why: str, now: float) -> None:
        ledger.drain = None
        ledger.moved()
        shown = names.display(drain.victim), names.display(drain.wanted.model)
        self._decisions.emit(DrainEnded(now, ledger.name, *shown, why, now - drain.since))


def _model(key: PlacementKey) -> str:
    return key.model


def _cost(option: tuple[float, str, Quote]) -> tuple[float, str]:
    return option[:2]
