"""What people are told of a call before anything comes of it: where it would go, when, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Final

from balancer.core import names
from balancer.core.books import Books
from balancer.core.cost import GO, HOLD, LOAD
from balancer.core.decisions import Choice, listed, rank
from balancer.core.domain import Call, PlacementKey
from balancer.core.knobs import Knobs
from balancer.core.queues import Queues, Waiter
from balancer.core.quotes import Quotes
from balancer.core.scheduler import Commit, Load, Option, Rehearsal, Ticket, Turn
from balancer.core.sight import Place, Sight
from balancer.core.turns import Turns

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
        if waiter is None:  # it comes last
            waiter = Waiter(ticket, math.inf, self._books.need(ticket.call), 0.0)
        found = self._quotes.weigh(waiter, {}, now, exists=False)
        if not found:
            return math.inf
        ahead = len(self._queues.ahead(waiter))
        if not ahead and any(c.terms.kind is GO for c in found):
            return 0.0
        quotes = [c.quote for c in found]
        rate = sum(q.capacity for q in quotes if q.resident or q.load_left_s is not None)
        rate = rate or max(q.capacity for q in quotes)
        return min(c.terms.wait for c in found) + ahead / rate

    def rehearse(self, ticket: Ticket, now: float) -> Rehearsal:
        """What would be decided for *ticket*, whether it waits here or nowhere."""
        waiter, planned_with = self._queues.waiters.get(ticket), None
        if waiter is None:
            if not ticket.call.prompt_tokens:
                planned_with = round(self._books.usual_prompt(ticket.call.key.model))
                call = replace(ticket.call, prompt_tokens=planned_with)
                ticket = replace(ticket, call=call)
            waiter = self._turns.preview(ticket, self._books.need(ticket.call))
        ahead = self._queues.ahead(waiter)
        promised = Counter(each.choice.backend for each in ahead if each.choice is not None)
        found = sorted(self._quotes.weigh(waiter, promised, now, exists=False), key=rank)
        best = self._quotes.best(found)
        effect, text = None, self._why_not_yet(waiter, now)
        if best is not None and not text:
            effect = _effect(ticket, best)
            text = "" if effect is not None else _why_held(best, found)
        wait_s = math.inf
        if best is not None:
            wait_s = self.wait_s(ticket, now) if effect is None else best.terms.wait
        return Rehearsal(
            tuple(self._option(each, best, waiter.need.prompt, now) for each in found),
            effect,
            wait_s,
            best.backend if best is not None and effect is None else "",
            text,
            self._barred(waiter, {each.backend for each in found}, now),
            Turn(len(ahead), waiter.tag, self._turns.fair.virtual_time),
            planned_with,
        )

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
        here = ", ".join(names.display(it.model) for it in self._books.in_memory(place.name))
        return f"not in memory, and there is no room: {here or 'what is there'} is in use or pinned"

    def _option(self, choice: Choice, best: Choice | None, prompt: float, now: float) -> Option:
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
        ledger = self._books.ledger(choice.backend)
        victims = tuple(
            (victim, self._quotes.eviction_s(ledger, victim, now)) for victim in quote.victims
        )
        why, told = f"{lead}: {terms.total:.2f} s", listed(choice, prompt)
        return Option(choice.backend, state, why, terms.kind.value, told, victims)


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
        text += f", which costs less than {other.backend}, where a slot is free"
    return text
