"""
What was decided, and from what: the last thousand decisions, and how well the plan foretells.

Laws:
- A decision is kept by reference to what it was made from, which costs next to nothing; it is
  written out only where somebody hears `Planned`.
- What is written out can be priced again: `replay` gives the terms that stand in the record.
- Everything here outlives the plan that writes it.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from heapq import nsmallest
from typing import Final, NamedTuple

from balancer.core.cost import GO, Kind, Need, Quote, Terms, price
from balancer.core.domain import PlacementKey
from balancer.core.events import Emit, Event, Foreseen, Hears, Planned, Weighed
from balancer.core.knobs import Knobs
from balancer.core.spread import Spread

KEPT: Final = 1000  # decisions on record
TOLD: Final = 5  # options of each, the chosen one first
MANY: Final = 8  # options from which on only the best are kept
# Of the time to a first token, as a share of what was predicted.
RATIOS: Final = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
GATED_S: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
_INPUTS: Final = tuple(each.name for each in fields(Quote))


class Choice(NamedTuple):
    """
    One backend as it was weighed for a call.

    Args:
        promised: Slots there that calls ahead hold for.
        short: Its context may not take the call.
    """

    backend: str
    terms: Terms
    quote: Quote
    promised: int
    short: bool

    @property
    def is_probe(self) -> bool:
        """Whether it would take one slot more than is believed in."""
        return (
            self.terms.kind is GO
            and self.quote.may_probe
            and self.quote.in_flight >= self.quote.slots
        )


def rank(choice: Choice) -> tuple[float, int, str]:
    """By what the cheapest is found; ties go to the higher tier, then by name."""
    return (choice.terms.total, -choice.quote.tier, choice.backend)


class Decision(NamedTuple):
    """
    One decision, with all that it was made from.

    Args:
        number: Of the planning pass.
        attempt: Of the call; 1: its first.
        found: All that it was chosen from, or the cheapest of them, in no order.
        tag: Of the call in the fair queue.
        virtual: The fair queue's time.
        knobs: Which set of them, see `version`.
    """

    at: float
    number: int
    call: str
    attempt: int
    key: PlacementKey
    need: Need
    chosen: Choice
    found: Sequence[Choice]
    tag: float
    virtual: float
    knobs: str

    @property
    def options(self) -> list[Choice]:
        """The chosen one, then the cheapest others."""
        others = [each for each in self.found if each is not self.chosen]
        return [self.chosen, *nsmallest(TOLD - 1, others, key=rank)]

    @property
    def kind(self) -> str:
        """go, hold or load."""
        return self.chosen.terms.kind.value

    @property
    def backend(self) -> str:
        """Where it went, or what it holds for."""
        return self.chosen.backend

    @property
    def runner_up(self) -> str:
        """The cheapest other one; empty: there was none."""
        name, least, chosen = "", math.inf, self.chosen
        for each in self.found:
            total = each[1][0]
            if (total < least or (total == least and each[0] < name)) and each is not chosen:
                name, least = each[0], total
        return name

    def foreseen(self) -> Foreseen:
        """What the log tells of it."""
        chosen = self.chosen
        terms = chosen.terms
        total, kind, wait, cached = terms[0], terms[1], terms[2], terms[-1]
        first_s = terms.first_token_s
        runner_up, name = self.runner_up, chosen.backend
        return Foreseen(kind.value, name, runner_up, total, wait, first_s, round(cached))


def listed(choice: Choice, need: Need) -> dict[str, float]:
    """A price by name, in the order in which it adds up; its last is the sum."""
    terms, quote = choice.terms, choice.quote
    return {
        "wait_s": terms.wait,
        "backlog_s": terms.backlog,
        "prefill_s": terms.prefill * terms.share,
        "new_tokens": need.read(quote.reads) - terms.cached,
        "cached_tokens": terms.cached,
        "share": terms.share,
        "decode_s": terms.decode,
        "disturb_s": terms.disturb,
        "evict_s": terms.evict,
        "prefer_s": -terms.bonus,
        "total_s": terms.total,
        "in_flight": quote.in_flight,
        "slots": quote.slots,
        "promised": choice.promised,
        "slow_factor": quote.slow,
    }


def _cheapest(found: Sequence[Choice], chosen: Choice) -> list[Choice]:
    """So many as are told, in no order; quick where there are many."""
    ranked = sorted([(each[1][0], each[0]) for each in found if each is not chosen])
    names = {name for _, name in ranked[: TOLD - 1]}
    return [each for each in found if each[0] in names or each is chosen]


def version(knobs: Knobs) -> str:
    """The same for equal knobs, in every process."""
    return f"{zlib.crc32(repr(knobs).encode()):08x}"


def told(decision: Decision) -> Planned:
    """A decision written out."""
    return Planned(
        decision.at,
        decision.number,
        decision.call,
        decision.key,
        decision.attempt,
        decision.kind,
        decision.backend,
        decision.need._asdict(),
        tuple(_weighed(choice) for choice in decision.options),
        decision.tag,
        decision.virtual,
        decision.knobs,
    )


def _weighed(choice: Choice) -> Weighed:
    quote = choice.quote
    inputs = {name: getattr(quote, name) for name in _INPUTS}
    terms = choice.terms._asdict()
    return Weighed(choice.backend, choice.promised, inputs, terms | {"kind": terms["kind"].value})


def replay(planned: Planned, weighed: Weighed, knobs: Knobs) -> Terms | None:
    """The price of one option of a record, found anew from what stands in the record."""
    need, cached = Need(**planned.need), weighed.terms["cached"]
    return price(Quote(**weighed.inputs), need, cached, weighed.promised, knobs)


def terms_of(weighed: Weighed) -> Terms:
    """The price as it stands in the record."""
    return Terms(**{**weighed.terms, "kind": Kind(weighed.terms["kind"])})


def _ignore(event: Event) -> None:
    """Nobody hears."""


def _deaf(kind: type[Event]) -> bool:  # noqa: ARG001 - see `Hears`
    return False


class Decisions:
    """
    The record.

    Args:
        emit: Told of everything that is rare, and of decisions if they are heard.

    Attributes:
        evaluations: Calls for which all backends were priced.
        declined: Calls that held for a better backend beside a free slot.
        ratios: Of each backend, time to first token over what was predicted.
        gated: Seconds for which batch calls gave way.
        prefix_tokens: Of prompts thought to be cached, and how many of these were, as far as the
            time it took tells.
        slow: Backends that are slow today, by how much.
    """

    def __init__(self, emit: Emit = _ignore, hears: Hears = _deaf) -> None:
        self.emit = emit
        self.hears = hears
        self.ring: deque[Decision] = deque(maxlen=KEPT)
        self._kinds = dict.fromkeys(Kind, 0)
        self.evaluations = 0
        self.declined = 0
        self.ratios: dict[str, Spread] = {}
        self.gated = Spread(GATED_S)
        self.prefix_tokens = {"expected": 0.0, "seen": 0.0}
        self.slow: dict[str, float] = {}

    @property
    def kinds(self) -> dict[str, int]:
        """How many there were of each."""
        return {kind.value: count for kind, count in self._kinds.items()}

    def add(self, decision: Decision) -> None:
        """Keep one."""
        if len(decision.found) > MANY:
            decision = decision._replace(found=_cheapest(decision.found, decision.chosen))
        self.ring.append(decision)
        self._kinds[decision.chosen.terms.kind] += 1
        if self.hears(Planned):
            self.emit(told(decision))

    def of(self, wanted: Callable[[Decision], bool], most: int) -> list[Decision]:
        """The newest that are *wanted*, newest first."""
        found: list[Decision] = []
        for decision in reversed(self.ring):
            if len(found) >= most:
                break
            if wanted(decision):
                found.append(decision)
        return found

    def foretold(self, backend: str, predicted_s: float, took_s: float) -> None:
        """A first token came."""
        if predicted_s > 0.0:
            ratios = self.ratios.get(backend)
            if ratios is None:
                ratios = self.ratios[backend] = Spread(RATIOS)
            ratios.observe(took_s / predicted_s)

    def forget(self, backend: str) -> None:
        """It has left."""
        self.ratios.pop(backend, None)
        self.slow.pop(backend, None)
