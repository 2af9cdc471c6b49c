"""
Plan and commit: each call waits here, and goes to the backend that will answer it first.

Laws:
- What a call would cost is predicted for every backend that may serve it: with a free slot, busy,
  loading, cold. The cheapest wins. Can it start now, it is committed; is it busy, the call holds,
  and that slot counts as promised to it; is it cold, one detached load begins.
- Plans are not kept. A pass starts from what is there; only commits, loads and drains have effects.
- A free slot may be declined for a better one, never without a cheaper option, or one of a
  higher tier, on record, and not for ever.
- Ties break by tier and name, never by chance, and a pass ends by count, never by the clock, so
  that a recorded run can be replayed.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from balancer.core.books import Books
from balancer.core.cost import GO, HOLD, LOAD
from balancer.core.decisions import Choice, Decision, Decisions, version
from balancer.core.domain import Call, PlacementKey
from balancer.core.knobs import Knobs
from balancer.core.outlook import Outlook
from balancer.core.placement import Placement
from balancer.core.queues import Queue, Queues, Waiter, head_order
from balancer.core.quotes import BEYOND, Quotes
from balancer.core.scheduler import (
    Began,
    Changed,
    Commit,
    CommitRefused,
    Effect,
    Ended,
    Fact,
    FirstByte,
    LoadAnswered,
    LoadRefused,
    Rehearsal,
    Ticket,
    Unwanted,
    View,
    WakeAt,
)
from balancer.core.sight import Sight
from balancer.core.turns import Turns

KEPT_TICKS: Final = 2  # for which a call behind others need not be weighed anew
WORSE_S: Final = 1e-6
JOURNAL: Final = 64
FEW: Final = 4  # backends that moved, up to which only these are priced again


def _has_guests(waiter: Waiter) -> bool:
    """Whether others may share what was loaded for this call: it goes before them."""
    call = waiter.ticket.call
    return waiter.ticket.cold and call.origin is not None and not call.is_guest


def _always(_: Call, __: int) -> bool:
    return True


class Plan:
    """
    The planner.

    Args:
        may_start: Whether its owner's own limit lets a call start now, besides so many that are
            not counted yet.
        decisions: Where they are kept.

    Attributes:
        ledgers, prefixes: Those of the books.
    """

    def __init__(
        self,
        view: Sight,
        knobs: Knobs | None = None,
        *,
        may_start: Callable[[Call, int], bool] = _always,
        decisions: Decisions | None = None,
    ) -> None:
        self.knobs = knobs = knobs or Knobs()
        self.decisions = decisions = Decisions() if decisions is None else decisions
        self.queues = queues = Queues()
        self.books = books = Books(view, knobs, decisions)
        self.turns = turns = Turns(view, knobs, books, queues)
        self.quotes = quotes = Quotes(view, knobs, books, queues, decisions)
        self.placement = Placement(view, knobs, books, queues, quotes, decisions)
        self.outlook = Outlook(view, knobs, books, queues, quotes, turns, may_start)
        self.ledgers, self.prefixes = books.ledgers, books.prefixes
        self._view = view
        self._may_start = may_start
        self._version = version(knobs)
        self._passes = 0
        self._tick_at = -math.inf
        self._unfinished = 0  # turns that ended by count, since the last tick
        # What has moved, counted; the backends, the latest last; each one's edition then.
        self._serial = 0
        self._journal: deque[str] = deque(maxlen=JOURNAL)
        self._editions: dict[str, int] = {}
        # In this pass: who was committed, how many of each owner, slots promised.
        self._sent: dict[Ticket, Waiter] = {}
        self._started: Counter[str] = Counter()
        self._promised: dict[PlacementKey, dict[str, int]] = {}

    # -- who waits -----------------------------------------------------------------------------

    def enqueue(self, ticket: Ticket) -> None:
        """Take a waiting ticket in; one that could not be sent keeps its place."""
        waiter = self._sent.pop(ticket, None)
        if waiter is None:
            call, now = ticket.call, ticket.queued_at
            need = self.books.need(call)
            if not ticket.attempts:
                self.books.arrived(call, now)
            waiter = self.turns.admit(ticket, need, now)
        self.queues.add(waiter)

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket; one that is not here is no mistake."""
        waiter = self.queues.remove(ticket)
        if waiter is None and ticket in self._sent and self.books.is_promised(ticket.call):
            waiter = self._sent.pop(ticket)
            self.books.take_back(ticket.call)
        if waiter is not None:
            self.turns.give_back(waiter)

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, in order."""
        return self.queues.waiting()

    def wait_estimate(self, ticket: Ticket, now: float) -> float:
        """Seconds until *ticket* may start; 0: at once; inf: nobody can tell."""
        return self.outlook.wait_s(ticket, now)

    def rehearse(self, ticket: Ticket, view: View, now: float) -> Rehearsal:  # noqa: ARG002 - it sees more itself
        """What would be decided for *ticket*, whether it waits here or nowhere."""
        return self.outlook.rehearse(ticket, now)

    # -- facts ---------------------------------------------------------------------------------

    def note(self, fact: Fact) -> None:
        """Learn what happened."""
        books = self.books
        match fact:
            case Began(run):
                books.began(run)
            case FirstByte(run, at):
                books.first_byte(run, at)
            case Ended():
                track = books.ended(fact)
                if track is not None:
                    self.turns.settle(track, fact.outcome)
            case CommitRefused(ticket, backend):
                books.take_back(ticket.call)
                if ticket in self._sent:
                    self._sent[ticket].barred = backend
            case LoadAnswered():
                books.load_answered(fact)
            case LoadRefused(backend, _):
                books.load_refused(backend)
            case Unwanted(model):
                books.demand.forget(model)
            case Changed("", _, _):
                books.all_changed()
                self.quotes.forget()
                self._serial += 1  # and no journal of it: nothing holds that was thought before
                self._journal.clear()
            case Changed(backend, dead, at):
                books.changed(backend, at, dead=dead)

    def learned(self, now: float = 0.0) -> dict[str, Any]:
        """What would be a pity to forget, as plain data."""
        return self.books.learned(now)

    def recall(
        self, learned: Mapping[str, Any], now: float = 0.0, age_s: float = 0.0, share: float = 1.0
    ) -> None:
        """Take over what another has learned; as for `Books.recall`."""
        self.books.recall(learned, now, age_s, share)
        self.quotes.forget()

    # -- passes --------------------------------------------------------------------------------

    def begin(self, ticket: Ticket, now: float) -> Commit | None:
        """Decide for a ticket that waits nowhere yet, while no other does."""
        call = ticket.call
        if call.batch or not self._may_start(call, 0):
            return None
        self._sent.clear()  # what was sent before has been leased, or noted back
        waiter = Waiter(ticket, self.turns.fair.virtual_time, self.books.need(call), 0.0)
        found = self.quotes.weigh(waiter, {}, now)
        best = self.quotes.best(found)
        if best is None or best.terms.kind is not GO:
            return None
        self.books.arrived(call, now)
        self.turns.charge(waiter, now)
        if self._tick_at < now:  # after a pause nothing was watched: begin anew
            self._tick_at = now + self.knobs.tick_s
            self.books.ticked_at = now
        return self._commit(waiter, best, found, now)

    def wake_at(self) -> float:
        """When to plan again though nothing happens; inf: never."""
        is_needed = self.books.tracks or self.queues.by_key or self._view.pins
        return self._tick_at if is_needed else math.inf

    def plan(self, now: float) -> list[Effect]:
        """One pass."""
        effects: list[Effect] = []
        self._passes += 1
        self._sent.clear()
        self._started.clear()
        self.books.open_pass()
        if now >= self._tick_at:
            self._tick_at = now + self.knobs.tick_s
            self._unfinished = 0
            self.books.tick(now)
            self.placement.look_ahead(now, effects)
        if self.queues.by_key:
            self.quotes.evaluations = 0
            self._sweep(now, effects)
        self.placement.end_wishes(now)
        at = self.wake_at()
        if at < math.inf:
            effects.append(WakeAt(at))
        return effects

    def _sweep(self, now: float, effects: list[Effect]) -> None:
        """Serve every queue that may have something to decide, in order of the heads' tags."""
        self.placement.mind_drains(now, effects)
        self._notice()
        self._promised.clear()
        serial, tick = self._serial, self.books.ticks
        queues = [
            q
            for q in self.queues.by_key.values()
            if q.fresh or q.tick != tick or (q.seen != serial and not self._is_settled(q, now))
        ]
        queues.sort(key=head_order)
        for queue in queues:
            queue.looked.clear()
        overloaded = self.turns.is_overloaded(now)
        for hopeful in (True, False) if overloaded else (None,):
            for queue in queues:
                if queue.waiters and not self._serve(queue, now, effects, hopeful=hopeful):
                    self._unfinished += 1
                    if self._unfinished <= FEW + 2 * len(self.queues.waiters):
                        effects.append(WakeAt(now))
                        return
                    break  # it comes to no end; what is left, the next tick looks at
        for queue in queues:
            queue.fresh, queue.seen, queue.tick = False, serial, tick

    def _serve(
        self, queue: Queue, now: float, effects: list[Effect], *, hopeful: bool | None
    ) -> bool:
        """Serve one key's waiters until there is nothing left to decide; False: for this turn."""
        knobs, ticks, turns, quotes = self.knobs, self.books.ticks, self.turns, self.quotes
        promised = self._promised.setdefault(queue.key, {})
        gate: bool | None = None
        waiters = queue.waiters[: knobs.plan_depth]
        if queue.choosy:
            waiters.sort(key=_has_guests, reverse=True)
        many = any(w.ticket.call.fair_key != waiters[0].ticket.call.fair_key for w in waiters)
        free = self._free(queue, now)
        share: int | None = None
        for depth, waiter in enumerate(waiters):
            ticket, found = waiter.ticket, None
            call = ticket.call
            if hopeful is not None:
                hope = _has_guests(waiter) or turns.has_hope(waiter, now)
                if hope is not hopeful:
                    continue
            if call.batch:
                if gate is None:
                    gate = turns.is_gate_open(waiter, now)
                if not gate and now - ticket.queued_at < knobs.batch_patience_s:
                    if waiter.gated_at is None:
                        waiter.gated_at = now
                    continue
            if many:
                if share is None:
                    share = turns.share(queue.key)
                if self.books.in_flight.get((queue.key.model, call.fair_key), 0) >= share:
                    continue
            if not self._may_start(call, self._started[call.owner]):
                continue
            before = waiter.choice
            best = self._again(waiter, promised, now) if ticks - waiter.tick < KEPT_TICKS else None
            if best is None and not self._is_stuck(waiter):
                if quotes.evaluations >= knobs.evaluations and depth:
                    return False
                found = quotes.weigh(waiter, promised, now)
                best = quotes.best(found)
                waiter.weighed = ticks
                waiter.tick = ticks - (ticket.seq & 1)  # not all at once, next time
            waiter.choice, waiter.seen, waiter.barred = best, self._serial, ""
            queue.looked.append(waiter)
            if best is None:
                if now - ticket.queued_at >= knobs.drain_after_s:
                    if self._is_rekeyed(waiter, now, effects):
                        continue
                    self.placement.want_drain(waiter, now)
                if ticket.excluded or queue.mixed:
                    continue
                break
            kind = best.terms.kind
            if kind is LOAD and self._is_rekeyed(waiter, now, effects):
                continue
            declines = kind is not GO and free and not free <= ticket.excluded
            if declines and self._has_held_enough(waiter, best, now):
                found = found or quotes.weigh(waiter, promised, now)
                ready = quotes.best(
                    [c for c in found if c.terms.kind is GO and c.short <= best.short]
                )
                if ready is not None:
                    best, kind = ready, GO
                else:  # it is for others; to ask at each turn would be all that a turn is for
                    waiter.declined_until = now + knobs.tick_s
            name = best.backend
            if kind is GO:
                self.queues.remove(ticket)
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
                self.placement.load(ticket, best.quote, "call", effects)
            if not free:
                rest = len(queue.waiters) - 1
                if kind is HOLD and rest and found is not None and not call.is_guest:
                    self.placement.consider_copy(found, rest, now, effects)
                break
        return True

    def _is_rekeyed(self, waiter: Waiter, now: float, effects: list[Effect]) -> bool:
        """Whether the call waits for another context now, rather than have one loaded."""
        ticket = waiter.ticket
        call = ticket.call
        key = call.key if call.origin is None else call.origin.instead(call)
        if key == call.key:
            return False
        self.queues.remove(ticket)
        call.rekey(key)
        waiter.choice, waiter.barred = None, ""
        waiter.seen = waiter.tick = waiter.weighed = -1
        waiter.declined_at, waiter.declined_until = None, math.inf
        self.queues.add(waiter)
        effects.append(WakeAt(now))  # its queue may have been looked at already
        return True

    def _free(self, queue: Queue, now: float) -> set[str]:
        """The backends where a slot of this key is free, for any route that is waited for."""
        call, ticks = queue.waiters[0].ticket.call, self.books.ticks
        if queue.mixed:
            by_feature = {w.ticket.call.route.feature: w.ticket.call for w in queue.waiters}
            return {
                name
                for each in by_feature.values()
                for name in self.quotes.places(each, frozenset())
                if self._has_room(name, each, {}, now)
            }
        places = self.quotes.places(call, frozenset())
        moved = self._moved_since(queue.free_seen) if queue.free_of is places else None
        if moved is None or queue.free_tick != ticks:
            queue.free, moved = set(), set(places)
        for name in moved:
            queue.free.discard(name)
            place = places.get(name)
            quote = None if place is None else self.quotes.quote(place, queue.key, now)
            if quote is not None and (quote.is_free() or quote.may_probe):
                queue.free.add(name)
        queue.free_of, queue.free_seen, queue.free_tick = places, self._serial, ticks
        return set(queue.free)

    def _has_room(self, name: str, call: Call, promised: Mapping[str, int], now: float) -> bool:
        """Whether a slot is left there beyond those promised."""
        place = self.quotes.places(call, frozenset()).get(name)
        quote = None if place is None else self.quotes.quote(place, call.key, now)
        return quote is not None and quote.is_free(promised.get(name, 0))

    def _has_held_enough(self, waiter: Waiter, best: Choice, now: float) -> bool:
        """Whether a free slot was declined for so long that the best of them is to be taken."""
        if waiter.declined_at is None:
            waiter.declined_at = now
            self.decisions.declined += 1
            waiter.declined_until = now + max(self.knobs.decline_s, 2.0 * best.terms.wait)
        return now > waiter.declined_until

    # -- what need not be decided again --------------------------------------------------------

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
            places = self.quotes.places(waiter.ticket.call, waiter.ticket.excluded)
            for name in sorted(moved):  # quotes are kept by when they were asked for
                place = places.get(name)
                option = None if place is None else self.quotes.priced(place, waiter, {}, now)
                if option is None:
                    continue
                if option.terms.kind is GO or option.terms.total < best.terms.total:
                    return False
                if option.quote.tier > best.quote.tier:
                    return False
        queue.seen = queue.free_seen = self._serial
        return True

    def _is_stuck(self, waiter: Waiter) -> bool:
        """Whether nobody could take it a moment ago, and nothing has moved since."""
        if waiter.choice is not None or waiter.barred:
            return False
        return waiter.weighed == self.books.ticks and waiter.seen == self._serial

    def _again(self, waiter: Waiter, promised: Mapping[str, int], now: float) -> Choice | None:
        """What it did best before, where little has moved since; None: it is to be weighed."""
        best = waiter.choice
        if best is None or waiter.barred or best.terms.kind is LOAD:
            return None
        moved = self._moved_since(waiter.seen)
        if moved is None or len(moved) > FEW:
            return None
        if not moved:
            return best if best.terms.kind is HOLD else None
        if self.books.has_tiers:
            return None
        places = self.quotes.places(waiter.ticket.call, waiter.ticket.excluded)
        if best.backend not in places:
            return None
        for name in sorted(moved):
            place = places.get(name)
            option = None if place is None else self.quotes.priced(place, waiter, promised, now)
            if name == best.backend:
                if option is None or option.is_probe:
                    return None
                if option.terms.total > best.terms.total + WORSE_S:
                    return None
                best = option
            elif option is not None and option.terms.total < best.terms.total:
                return None
        return best

    # -- deciding ------------------------------------------------------------------------------

    def _commit(
        self, waiter: Waiter, choice: Choice, found: Sequence[Choice], now: float
    ) -> Commit:
        ticket, quote = waiter.ticket, choice.quote
        call = ticket.call
        self.turns.went(waiter, now)
        probe = not quote.embeds and not quote.remote and quote.in_flight >= quote.slots
        track = self.books.enter(call, choice.backend, now, waiter.need, choice)
        if probe:
            belief = self._view.belief(choice.backend)
            if belief is not None:
                belief.probing(call.key.model, now)
                track.probing = True
        self._sent[ticket] = waiter
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
            self.turns.fair.virtual_time,
            self._version,
        )
        self.decisions.add(decision)
        return decision
