"""What people are told of a call before anything comes of it: where it would go, when, and why."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Final

from balancer.core import names
from balancer.core.books import Books
from balancer.core.catalog import InMemory
from balancer.core.cost import GO, HOLD, LOAD, Need, Quote, price
from balancer.core.decisions import Choice, listed, rank
from balancer.core.domain import Call, PlacementKey
from balancer.core.knobs import Knobs
from balancer.core.ledger import Ledger
from balancer.core.queues import Queues, Waiter
from balancer.core.quotes import Quotes
from balancer.core.scheduler import Commit, Load, Option, Rehearsal, Ticket, Turn
from balancer.core.sight import Place, Sight
from balancer.core.tiers import order
from balancer.core.turns import Turns

MOST_LOOKED: Final = (
    256  # of those who are before a call; those behind them are taken to be like it
)
MOST_SPREAD: Final = 64  # for whom a backend is looked for one by one
_STATES: Final = {GO: "in memory, a slot is free", HOLD: "busy", LOAD: "not in memory"}


class Outlook:
    """Foretells; nothing comes of asking."""

    def __init__(
        self,
        view: Sight,
        knobs: Knobs,
        books: Books,
        queues: Queues,
        quotes: Quotes,
        turns: Turns,
        may_start: Callable[[Call, int], bool],
    ) -> None:
        self._view = view
        self._knobs = knobs
        self._books = books
        self._queues = queues
        self._quotes = quotes
        self._turns = turns
        self._may_start = may_start

    def wait_s(self, ticket: Ticket, now: float) -> float:
        """Until *ticket* may start; 0: at once; inf: nobody can tell."""
        waiter = self._queues.waiters.get(ticket)
        if waiter is None:
            waiter = self._turns.preview(ticket, self._books.need(ticket.call))
        best = self._quotes.best(self._weigh(waiter, now)[0])
        return math.inf if best is None else best.terms.wait

    def rehearse(self, ticket: Ticket, now: float) -> Rehearsal:
        """What would be decided for *ticket*, whether it waits here or nowhere."""
        waiter, planned_with = self._queues.waiters.get(ticket), None
        if waiter is None:
            if not ticket.call.prompt_tokens:
                planned_with = round(self._books.usual_prompt(ticket.call.key.model))
                call = replace(ticket.call, prompt_tokens=planned_with)
                ticket = replace(ticket, call=call)
            waiter = self._turns.preview(ticket, self._books.need(ticket.call))
        found, ahead = self._weigh(waiter, now)
        found = self._quotes.ranked(found)
        best = found[0] if found else None
        effect, text = None, self._why_not_yet(waiter, now)
        if best is not None and not text:
            effect = _effect(ticket, best)
            text = "" if effect is not None else _why_held(best, found)
        barred = self._barred(waiter, {each.backend for each in found}, now)
        if best is None and not text and barred:
            text = "waits until a backend has room for it"
        return Rehearsal(
            tuple(self._option(each, best, waiter.need, now) for each in found),
            effect,
            math.inf if best is None else best.terms.wait,
            best.backend if best is not None and effect is None else "",
            text,
            barred,
            Turn(ahead, waiter.tag, self._turns.fair.virtual_time),
            planned_with,
        )

    def _weigh(self, waiter: Waiter, now: float) -> tuple[list[Choice], int]:
        """Every candidate with its price behind those who go first, and how many these are."""
        before, more = self._before(waiter, now)
        promised = Counter(each.choice.backend for each in before if each.choice is not None)
        self._spread(promised, len(before) + more - promised.total(), waiter, now)
        found = self._quotes.weigh(waiter, promised, now, exists=False)
        return [_queued(choice) for choice in found], len(before) + more

    def _before(self, waiter: Waiter, now: float) -> tuple[list[Waiter], int]:
        """
        Who waits for the same and goes first: the next of them, and how many there are besides.

        Not those who are kept back now, if that does not keep *waiter* back as well.
        """
        queue = self._queues.by_key.get(waiter.ticket.call.key)
        if queue is None:
            return [], 0
        count, call = queue.place(waiter), waiter.ticket.call
        looked, gates = queue.waiters[: min(count, MOST_LOOKED)], list[bool]()
        before, started = [], Counter[str]()
        for each in looked:
            its = each.ticket.call
            if its.batch and not call.batch:
                gates = gates or [self._turns.is_gate_open(each, now, when_free=True)]
                patience_s = self._knobs.batch_patience_s
                if not gates[0] and now - each.ticket.queued_at < patience_s:
                    continue
            if its.owner != call.owner:
                if not self._may_start(its, started[its.owner]):
                    continue
                started[its.owner] += 1
            before.append(each)
        deeper = count - len(looked)
        return before, round(deeper * len(before) / len(looked)) if deeper else 0

    def _spread(self, promised: Counter[str], more: int, waiter: Waiter, now: float) -> None:
        """Promise slots to so *many more*, of whom nobody has thought yet, as they would choose."""
        call, need = waiter.ticket.call, waiter.need
        places = self._view.places(call, waiter.ticket.excluded, exists=False) if more else ()
        quotes = (self._quotes.quote(place, call.key, now) for place in places)
        able = [q for q in quotes if q is not None and (q.resident or q.load_left_s is not None)]
        if not able:
            return
        if more > MOST_SPREAD:
            most, rate = more, sum(quote.capacity for quote in able)
            for quote in able:
                share = math.floor((most - MOST_SPREAD) * quote.capacity / rate)
                promised[quote.backend] += share
                more -= share

        def place(quote: Quote) -> tuple[tuple[bool, int], float, int]:
            ahead = promised[quote.backend]
            terms = price(quote, need, 0.0, ahead, self._knobs)
            cost_s = math.inf if terms is None else terms.total + _queued_s(quote, ahead)
            return order(cost_s, quote.tier, self._knobs.tier_patience_s), cost_s, -quote.tier

        heap = [(place(quote), quote.backend, quote) for quote in able]
        heapq.heapify(heap)
        for _ in range(more):
            _, name, quote = heap[0]
            promised[name] += 1
            heapq.heapreplace(heap, (place(quote), name, quote))

    def _why_not_yet(self, waiter: Waiter, now: float) -> str:
        """Why a call is not looked at now, whatever is free; empty: it is."""
        call = waiter.ticket.call
        if not self._may_start(call, 0):
            return "waits until fewer calls of its key run (limits.slots)"
        patience_s, waited_s = self._knobs.batch_patience_s, now - waiter.ticket.queued_at
        if call.batch and waited_s < patience_s and not self._turns.is_gate_open(waiter, now):
            return (
                "gives way, as batch: the slots that are free are kept for interactive calls, for "
                f"{patience_s:.0f} s at the longest"
            )
        queue = self._queues.by_key.get(call.key)
        waiters = () if queue is None else queue.waiters
        others = any(each.ticket.call.fair_key != call.fair_key for each in waiters)
        if others and self._turns.has_its_share(call):
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
        ledger = self._books.ledger(place.name)
        drain, loading = ledger.drain, self._view.loading_on(place.name)
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
        if ledger.has_failed(key, now):
            again_s = ledger.failed[key] - now
            return f"not in memory, and a load failed there; again in {again_s:.0f} s"
        return self._why_no_room(ledger, key, now)

    def _why_no_room(self, ledger: Ledger, key: PlacementKey, now: float) -> str:
        """What is there stays there, and why."""
        stays = []
        for it in self._books.in_memory(ledger.name):
            why = self._quotes.why_it_stays(ledger, it, key, now)
            if why and it.model == key.model:
                return f"in memory with other options{_context(it)}: {why}"
            if why:
                stays.append(f"{names.display(it.model)} is {why}")
        if stays:
            return f"not in memory, and there is no room: {', '.join(stays)}"
        return "not in memory, and what is there was not read lately"

    def _option(self, choice: Choice, best: Choice | None, need: Need, now: float) -> Option:
        """A candidate for people: what it would cost, and of what that is made."""
        quote, terms = choice.quote, choice.terms
        state = _STATES[terms.kind]
        if terms.kind is HOLD:
            state = "in memory, every slot is taken or promised"
            if quote.load_left_s is not None:
                state = "being loaded"
        if choice.short:
            state += f", context of {quote.context} is too short"
        ledger = self._books.ledger(choice.backend)
        victims = tuple(
            (victim, self._quotes.eviction_s(ledger, victim, now)) for victim in quote.victims
        )
        best_s = None if choice is best or best is None else best.terms.total
        why, told = compared(terms.total, best_s), listed(choice, need)
        return Option(choice.backend, state, why, terms.kind.value, told, victims)


def compared(total_s: float, best_s: float | None) -> str:
    """A price beside that of the candidate that comes first, for people; None: it does itself."""
    lead = "comes first" if best_s is None else "costs less" if total_s < best_s else "costs more"
    return f"{lead}: {total_s:.2f} s"


def _queued_s(quote: Quote, ahead: int) -> float:
    """What those ahead take of a runner whose slots nobody counts; no price has that in it."""
    return ahead / quote.capacity if quote.embeds and not quote.remote else 0.0


def _queued(choice: Choice) -> Choice:
    """The choice with that."""
    more_s, terms = _queued_s(choice.quote, choice.promised), choice.terms
    if not more_s:
        return choice
    return choice._replace(
        terms=terms._replace(wait=terms.wait + more_s, total=terms.total + more_s)
    )


def _context(it: InMemory) -> str:
    return "" if it.context is None else f" (context {it.context})"


def _effect(ticket: Ticket, best: Choice) -> Commit | Load | None:
    """What would come of it now."""
    if best.terms.kind is GO:
        return Commit(ticket, best.backend, "short-context" if best.short else "warm")
    if best.terms.kind is LOAD:
        return Load(ticket, best.backend, ticket.call.key, "call", best.quote.victims)
    return None


def _why_held(best: Choice, found: Sequence[Choice]) -> str:
    """What a call that could start nowhere better waits for, for people."""
    what = "the load" if best.quote.load_left_s is not None else "a slot"
    text = f"holds for {what} on {best.backend}"
    free = [each for each in found if each.terms.kind is GO]
    if free:
        other = min(free, key=rank)
        is_higher = best.quote.tier > other.quote.tier
        why = "has a higher priority" if is_higher else "costs less"
        text += f", which {why} than {other.backend}, where a slot is free"
    return text
