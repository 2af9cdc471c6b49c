"""
What a call would cost on a backend, in seconds of somebody's waiting.

Laws:
- A price is a pure function of a quote (what the backend is like for this model now), of the call's
  sizes and of the slots promised to those ahead. A recorded decision can be priced again.
- All terms are seconds. The least total wins; ties go by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from balancer.core.domain import PlacementKey
from balancer.core.knobs import Knobs
from balancer.core.speeds import work

FIXED_PREFILL_S: Final = 0.02
REMOTE_AT_ONCE: Final = 8  # calls that whoever only passes them on takes without slowing down
EMBEDS_PER_S: Final = 20.0
BETWEEN_S: Final = 0.2  # from one call's end to the next one's begin in a runner's queue


class Kind(Enum):
    """What a candidate can do for a call now."""

    GO = "go"
    HOLD = "hold"
    LOAD = "load"

    __hash__ = object.__hash__


GO, HOLD, LOAD = Kind.GO, Kind.HOLD, Kind.LOAD


class Need(NamedTuple):
    """
    What a call asks of a backend.

    Args:
        prompt: Tokens to be read.
        answer: Tokens expected to be written; 0: it embeds.
        context: Tokens it may come to at most, as far as can be told; 0: it matters not.
        inputs: Texts that the prompt consists of, each with a context of its own.
    """

    prompt: float
    answer: float
    context: float
    inputs: float = 1

    def read(self, most: int | None) -> float:
        """Tokens of the prompt that are read where *most* of an input are; None: not known."""
        return self.prompt if most is None else min(self.prompt, self.inputs * most)


@dataclass(slots=True, eq=False)
class Quote:
    """
    One backend as one placement key finds it.

    Args:
        at: When this was so.
        resident: In memory with these options.
        load_left_s: Of a load of it that is under way; None: none is.
        in_flight: Our calls on the model here.
        slots: That the loaded model is believed to take.
        may_probe: One more call than that may be tried.
        backlog_s: Predicted reading of prompts, of our calls here that have no first byte yet.
        share: 1, and one more for each other model with a stream of ours: they share a GPU.
        decoding: Our streams here, of all models.
        prompt_rate: Tokens read per second.
        decode_rate: Tokens written per second, by a stream alone.
        penalty: How much slower each further stream makes it.
        mean_answer: Tokens of an answer of this model, on average.
        load_s: That a load would take, with the unloads before it.
        evict_s: What its victims' users will pay.
        victims: What would be unloaded for it.
        may_load: The load token is free, and it fits.
        releases: Seconds after *at* until each call in flight ends, sorted.
        context: Tokens, None: not known.
        reads: Tokens of a prompt, at most: Ollama cuts off what is longer; None: not known.
        work_s: Predicted work in flight on the model here, where it only embeds.
        embeds: It only embeds.
        remote: It only passes calls on; *first_byte_s* is all that is known of it.
        bonus_s: For a preference.
        tier: Higher ones come first.
        measured: Its speeds are more than a guess.
        slow: Today's speed there as a share of its own past; the rates have it in them.
    """

    backend: str
    key: PlacementKey
    at: float
    resident: bool
    load_left_s: float | None
    in_flight: int
    slots: int
    may_probe: bool
    backlog_s: float
    share: float
    decoding: int
    prompt_rate: float
    decode_rate: float
    penalty: float
    mean_answer: float
    load_s: float = math.inf
    evict_s: float = 0.0
    victims: tuple[PlacementKey, ...] = ()
    may_load: bool = False
    releases: Sequence[float] = ()
    context: int | None = None
    reads: int | None = None
    work_s: float = 0.0
    embeds: bool = False
    remote: bool = False
    first_byte_s: float = 0.0
    bonus_s: float = 0.0
    tier: int = 0
    slow: float = 1.0
    measured: bool = True

    def tpot_s(self, streams: float) -> float:
        """Seconds for a token with that many streams of the model here."""
        return (1.0 + self.penalty * (streams - 1.0)) / self.decode_rate

    @property
    def capacity(self) -> float:
        """Calls per second that it can work off."""
        if self.embeds:
            return EMBEDS_PER_S
        slots = max(1, self.slots)
        return slots / (self.mean_answer * self.tpot_s(slots) + 0.3)

    def is_free(self, promised: int = 0, embed_work_s: float = 1.0) -> bool:
        """Whether a slot is free beyond those promised."""
        if not self.resident:
            return False
        if self.embeds:
            return self.work_s < embed_work_s and not promised
        return self.in_flight + promised < self.slots

    def slot_wait_s(self, nth: int) -> float:
        """Seconds until the *nth* slot comes free, counted from 1."""
        releases = self.releases
        if nth <= len(releases):
            return releases[nth - 1]
        last = releases[-1] if releases else 0.0
        held_s = self.mean_answer * self.tpot_s(self.slots) * self.share + BETWEEN_S
        return last + (nth - len(releases)) * held_s / self.slots


class Terms(NamedTuple):
    """The price of one candidate; seconds, but for *cached* (tokens) and *kind*."""

    total: float
    kind: Kind
    wait: float
    backlog: float
    prefill: float
    share: float
    decode: float
    disturb: float
    evict: float
    bonus: float
    cached: float

    @property
    def first_token_s(self) -> float:
        """Predicted time to the first token."""
        return self.wait + self.backlog + self.prefill * self.share


def price(quote: Quote, need: Need, cached: float, promised: int, knobs: Knobs) -> Terms | None:
    """What a call would cost there; None: it cannot be served there as things are."""
    evict = 0.0
    if quote.resident:
        free = quote.slots - quote.in_flight - promised
        if quote.embeds:
            if quote.is_free(promised, knobs.embed_work_s):
                kind, wait = (HOLD if promised else GO), 0.0
            else:
                kind, wait = HOLD, max(0.0, quote.work_s - knobs.embed_work_s) + BETWEEN_S
        elif free > 0:
            kind, wait = (HOLD if promised else GO), 0.0
        elif quote.may_probe and not promised:
            kind, wait = GO, 0.0
        else:
            kind, wait = HOLD, quote.slot_wait_s(1 - free)
    elif quote.load_left_s is not None:
        ahead = promised - quote.slots
        kind, wait = HOLD, quote.load_left_s
        if ahead >= 0:
            held_s = quote.mean_answer * quote.tpot_s(quote.slots) * quote.share + BETWEEN_S
            wait += (ahead + 1) * held_s / quote.slots
    elif quote.may_load:
        kind, wait = LOAD, quote.load_s
        evict = knobs.eviction_weight * quote.evict_s
    else:
        return None
    if quote.remote:
        decode = knobs.decode_weight * need.answer / quote.decode_rate
        crowd = 1.0 + quote.in_flight / REMOTE_AT_ONCE
        total = (quote.first_byte_s + decode) * crowd
        return Terms(total, kind, 0.0, 0.0, quote.first_byte_s, 1.0, decode, 0.0, 0.0, 0.0, 0.0)
    share, answer = quote.share, need.answer
    prefill = work(need.read(quote.reads) - cached, cached) / quote.prompt_rate + FIXED_PREFILL_S
    streams = quote.in_flight + promised + 1
    streams = min(streams, quote.slots)
    decode = disturb = 0.0
    if answer:
        per_token_s = (1.0 + quote.penalty * (streams - 1.0)) / quote.decode_rate
        decode = knobs.decode_weight * answer * per_token_s * share
    if quote.decoding:
        slower = answer * quote.penalty / quote.decode_rate
        disturb = knobs.disturb_weight * quote.decoding * (prefill + slower)
    backlog, bonus = quote.backlog_s, quote.bonus_s
    total = wait + backlog + prefill * share + decode + disturb + evict - bonus
    return Terms(total, kind, wait, backlog, prefill, share, decode, disturb, evict, bonus, cached)
