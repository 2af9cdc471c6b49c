"""
What one key may use: requests and tokens a minute, calls at once, tokens of an answer.

Laws:
- Requests and tokens are counted before anything is asked of a backend; a call that is refused
  costs nothing. The tokens are an estimate then, and settled by what was really used.
- Who has used more than there was pays by waiting longer; nothing is taken back.
- Who may be forgotten, is: as many callers are remembered as there is room for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import copy
from typing import Final

from balancer.core.domain import Call, Usage
from balancer.core.errors import BadRequest, BalancerError, RateLimited
from balancer.core.scheduler import Began, Ended, Fact

MINUTE_S: Final = 60.0
USUAL_ANSWER: Final = 256  # tokens that are counted for an answer nobody has seen
MOST_DEBT: Final = 60.0  # minutes; what a backend tells may be nonsense
MOST_CALLERS: Final = 4096


class Bucket:
    """
    What is left of a minute's worth, refilled as time goes by.

    Args:
        most: That there can be.
    """

    __slots__ = ("_at", "_left", "most")

    def __init__(self, most: int, now: float) -> None:
        self.most = most
        self._left = float(most)
        self._at = now

    def fill(self, most: int, now: float) -> float:
        """What is left by now, of *most*; below 0: owed."""
        self._left = min(most, self._left + (now - self._at) * most / MINUTE_S)
        self.most, self._at = most, now
        return self._left

    def short_s(self, amount: float) -> float:
        """How long until *amount* is there, as of the last fill; 0: it is."""
        return max(0.0, (min(amount, self.most) - self._left) * MINUTE_S / self.most)

    def take(self, amount: float) -> None:
        """Take *amount*, there or not; below 0: give it back."""
        self._left = max(self._left - amount, -MOST_DEBT * self.most)


class Charge:
    """The tokens that one call was charged, to be settled once."""

    __slots__ = ("_bucket", "_charged", "_prompt")

    def __init__(self, bucket: Bucket, prompt: int, charged: int) -> None:
        self._bucket = bucket
        self._prompt = prompt
        self._charged = charged

    def settle(self, usage: Usage, records: int = 0, *, left: bool = False) -> None:
        """
        It is over.

        Args:
            usage: As the backend told it, if it did.
            records: Of the answer that came, about one for each token.
            left: The client did not stay to the end, while a backend was at it: what that has done
                unseen counts as it was charged.
        """
        if left and usage.tokens_out is None and not records:
            return
        answer = max(usage.tokens_out or 0, records)
        prompt = usage.tokens_in
        if prompt is None:
            prompt = self._prompt if answer else 0
        self._bucket.take(prompt + answer - self._charged)
        self._charged = prompt + answer


class Limits:
    """
    Counts for every caller that has limits.

    Attributes:
        refused: How often, by the limit.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.refused: dict[str, int] = {}
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], Bucket] = OrderedDict()
        self._running: dict[str, int] = {}
        self._slots: dict[str, int] = {}  # of those who run and may not have more

    def charge(self, call: Call) -> Charge | None:
        """
        Count one call against the limits of its owner; None: there is nothing to settle.

        Raises:
            BadRequest: It asks for a longer answer than its owner may have.
            RateLimited: This minute's share is used up; nothing is counted.
        """
        allowed = call.principal.allowance
        if allowed.max_num_predict is not None:
            self._check_length(call, allowed.max_num_predict)
        if not call.owner:
            return None
        now, requests, tokens = self._clock(), None, None
        estimate = call.prompt_tokens
        if not call.embedding:
            estimate += min(USUAL_ANSWER, call.output_tokens or USUAL_ANSWER)
        if allowed.rpm is not None:
            requests = self._bucket(call.owner, "rpm", allowed.rpm, now)
            self._check(call, requests, 1, "rpm", f"{allowed.rpm} requests")
        if allowed.tokens_per_minute is not None:
            most = allowed.tokens_per_minute
            tokens = self._bucket(call.owner, "tokens_per_minute", most, now)
            self._check(call, tokens, estimate, "tokens_per_minute", f"{most} tokens")
        if requests is not None:
            requests.take(1)
        if tokens is None:
            return None
        tokens.take(estimate)
        return Charge(tokens, call.prompt_tokens, estimate)

    def foresee(self, call: Call) -> BalancerError | None:
        """What `charge` would refuse it with now; nothing is counted, nor is anybody remembered."""
        asked = Limits(self._clock)
        owner = call.owner
        for limit in ("rpm", "tokens_per_minute"):
            bucket = self._buckets.get((owner, limit))
            if bucket is not None:
                asked._buckets[owner, limit] = copy(bucket)
        try:
            asked.charge(call)
        except BalancerError as error:
            return error
        return None

    def may_start(self, call: Call, more: int = 0) -> bool:
        """
        Whether its owner may have one more call at a backend.

        Args:
            more: Calls of the same owner that are about to start.
        """
        slots = call.principal.allowance.slots
        return slots is None or not call.owner or self.running(call.owner) + more < slots

    def standing(self, owner: str) -> dict[str, tuple[int, int]]:
        """What an owner has left, and of how much, by limit, as far as anything is counted."""
        now, told = self._clock(), {}
        for kind in ("rpm", "tokens_per_minute"):
            bucket = self._buckets.get((owner, kind))
            if bucket is not None:
                told[kind] = math.floor(bucket.fill(bucket.most, now)), bucket.most
        slots = self._slots.get(owner)
        if slots is not None:
            told["slots"] = max(0, slots - self.running(owner)), slots
        return told

    def running(self, owner: str) -> int:
        """Calls of an owner at backends now."""
        return self._running.get(owner, 0)

    def all_running(self) -> Mapping[str, int]:
        """Calls at backends now, by owner; who has none is not there."""
        return self._running

    def note(self, fact: Fact) -> None:
        """Count who begins and who ends."""
        if fact.__class__ is Began:
            self._began(fact.run.call)
        elif fact.__class__ is Ended:
            self._ended(fact.run.call.owner)

    def _began(self, call: Call) -> None:
        owner, slots = call.owner, call.principal.allowance.slots
        if owner:
            self._running[owner] = self._running.get(owner, 0) + 1
            if slots is not None:
                self._slots[owner] = slots
            else:
                self._slots.pop(owner, None)  # the limit was lifted

    def _ended(self, owner: str) -> None:
        if owner:
            left = self._running.get(owner, 0) - 1
            if left > 0:
                self._running[owner] = left
            else:
                self._running.pop(owner, None)
                self._slots.pop(owner, None)

    def _bucket(self, owner: str, kind: str, most: int, now: float) -> Bucket:
        key = owner, kind
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(most, now)
            if len(self._buckets) > MOST_CALLERS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        bucket.fill(most, now)
        return bucket

    def _check(self, call: Call, bucket: Bucket, amount: int, limit: str, what: str) -> None:
        short_s = bucket.short_s(amount)
        if short_s > 0.0:
            self.refused[limit] = self.refused.get(limit, 0) + 1
            raise RateLimited(
                f"{_whose(call)} may use {what} a minute (limits.{limit}), and has. "
                f"Retry after {math.ceil(short_s)} s.",
                retry_after_s=short_s,
            )

    def _check_length(self, call: Call, most: int) -> None:
        if call.output_tokens is not None and call.output_tokens > most:
            self.refused["max_num_predict"] = self.refused.get("max_num_predict", 0) + 1
            raise BadRequest(
                f"{_whose(call)} may ask for answers of at most {most} tokens "
                f"(limits.max_num_predict), not {call.output_tokens}."
            )


def _whose(call: Call) -> str:
    kind, _, name = call.owner.partition(":")
    return f"The key {name!r}" if kind == "key" else "A caller without a key"
