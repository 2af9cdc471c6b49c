"""
What each backend still has of prompts it has seen, by our own account.

A runner that has evaluated the beginning of a prompt need not do so again. Which beginnings it has
is told by nobody; but each went through us, and is remembered as the links of its chain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from balancer.core.domain import PlacementKey

COMMON: Final = 4  # a system prompt of more conversations says nothing of where to go
LEAST_CHARGE: Final = 16  # tokens that a link costs at least, so that links are bounded as well
MOST_TABLES: Final = 64  # per backend
MOST_FAMILIES: Final = 4096
MOST_SESSIONS: Final = 10_000
MOST_MODELS: Final = 1000
REUSE_GAIN: Final = 0.1
SESSION_S: Final = 3600.0

Chain = Sequence[tuple[int, int]]


class _Table:
    """
    Links known on one backend for one key, least lately used first.

    Whenever a link is known, so is all of its chain ahead of it: that is used later, and is
    forgotten later.
    """

    __slots__ = ("answers", "charges", "total")

    def __init__(self) -> None:
        self.charges: dict[int, int] = {}  # tokens that each link adds to what is cached
        self.answers: dict[int, int] = {}  # tokens answered to the prompt that ends there
        self.total = 0

    def insert(self, chain: Chain, capacity_tokens: float) -> None:
        charges = self.charges
        below = len(chain) - 1
        for link, tokens in reversed(chain):
            below -= 1
            charge = max(LEAST_CHARGE, tokens - (chain[below][1] if below >= 0 else 0))
            self.total += charge - charges.pop(link, 0)
            charges[link] = charge
        while self.total > capacity_tokens:
            self._forget(next(iter(charges)))

    def _forget(self, link: int) -> None:
        self.total -= self.charges.pop(link)
        self.total -= self.answers.pop(link, 0)

    def clear(self) -> None:
        """Let go of all; a session may still hold on to this table."""
        self.charges.clear()
        self.answers.clear()

    def answered(self, link: int, tokens: int) -> None:
        if link in self.charges:
            self.total += tokens - self.answers.get(link, 0)
            self.answers[link] = tokens

    def longest(self, chain: Chain) -> int:
        """How many leading links are known."""
        charges = self.charges
        for known in range(len(chain), 0, -1):
            if chain[known - 1][0] in charges:
                return known
        return 0


class Prefixes:
    """
    What is cached where.

    Args:
        session_s: How long a session's name is remembered.
    """

    def __init__(self, session_s: float = SESSION_S) -> None:
        self.session_s = session_s
        self._tables: dict[str, dict[PlacementKey, _Table]] = {}
        self._families: dict[int, set[int]] = {}  # by last shared link, what followed it
        self._sessions: dict[tuple[str, PlacementKey], tuple[_Table, float]] = {}
        self._reuse: dict[str, float] = {}

    # -- what is known -------------------------------------------------------------------------

    def any(self, backend: str, key: PlacementKey) -> bool:
        """Whether anything at all may be cached there."""
        tables = self._tables.get(backend)
        return tables is not None and key in tables

    def cached(
        self,
        backend: str,
        key: PlacementKey,
        chain: Chain,
        shared: int,
        prompt_tokens: int,
        session: str = "",
        now: float = 0.0,
    ) -> int:
        """
        Prompt tokens that need not be evaluated there, of the estimate *prompt_tokens*.

        What a runner really reuses of them is `reuse`.
        """
        tables = self._tables.get(backend)
        table = None if tables is None else tables.get(key)
        if table is None:
            return 0
        if not chain:
            return prompt_tokens // 2 if self._is_here(session, key, table, now) else 0
        # What is not known at its first own link is not known beyond.
        beginning = len(chain) if chain[min(shared, len(chain) - 1)][0] in table.charges else shared
        known = table.longest(chain[:beginning] if beginning < len(chain) else chain)
        if not known:
            return 0
        says_little = known <= shared < len(chain) and self._is_common(chain[shared - 1][0])
        if says_little and not self._is_here(session, key, table, now):
            return 0
        link, tokens = chain[known - 1]
        if known < len(chain) and link in table.answers:  # the next is that answer, as a message
            tokens = min(tokens + table.answers[link], chain[known][1])
        return max(0, min(tokens, prompt_tokens - 1))

    def _is_common(self, link: int) -> bool:
        return len(self._families.get(link, ())) > COMMON

    def _is_here(self, session: str, key: PlacementKey, table: _Table, now: float) -> bool:
        last = self._sessions.get((session, key)) if session else None
        return last is not None and last[0] is table and now - last[1] <= self.session_s

    # -- what happens --------------------------------------------------------------------------

    def insert(
        self,
        backend: str,
        key: PlacementKey,
        chain: Chain,
        capacity_tokens: float,
        session: str = "",
        now: float = 0.0,
        shared: int = 0,
    ) -> None:
        """A prompt goes there, to a runner whose cache holds so many tokens."""
        if not chain and not session:
            return
        tables = self._tables.setdefault(backend, {})
        table = tables.pop(key, None) or _Table()
        tables[key] = table
        if len(tables) > MOST_TABLES:
            tables.pop(next(iter(tables))).clear()
        table.insert(chain, capacity_tokens)
        if 0 < shared < len(chain):
            self._follow(chain[shared - 1][0], chain[shared][0])
        if session:
            self._sessions.pop((session, key), None)
            self._sessions[session, key] = (table, now)
            self._drop_sessions(now)

    def finished(self, backend: str, key: PlacementKey, chain: Chain, answer_tokens: int) -> None:
        """That prompt was answered, and the answer is cached behind it."""
        table = self._tables.get(backend, {}).get(key)
        if table is not None and chain and answer_tokens > 0:
            table.answered(chain[-1][0], answer_tokens)

    def drop(self, backend: str, model: str | None = None) -> None:
        """The runner of that model has gone, or the whole backend."""
        tables = self._tables.get(backend, {})
        for gone in [key for key in tables if model is None or key.model == model]:
            tables.pop(gone).clear()
        if not tables:
            self._tables.pop(backend, None)

    def _follow(self, link: int, follower: int) -> None:
        """Who begins so; counted over all backends, up to where it is common."""
        followers = self._families.pop(link, None) or set()
        if len(followers) <= COMMON:
            followers.add(follower)
        self._families[link] = followers
        if len(self._families) > MOST_FAMILIES:
            del self._families[next(iter(self._families))]

    def _drop_sessions(self, now: float) -> None:
        """Those too old or too many; the oldest stand first, and two at a time keep up."""
        for _ in range(2):
            oldest = next(iter(self._sessions))
            at = self._sessions[oldest][1]
            if now - at <= self.session_s and len(self._sessions) <= MOST_SESSIONS:
                return
            del self._sessions[oldest]

    # -- how much of it is reused --------------------------------------------------------------

    def reuse(self, model: str) -> float:
        """The share of expected hits that came about; some models can reuse nothing."""
        return self._reuse.get(model, 1.0)

    def learn_reuse(self, model: str, ratio: float) -> None:
        """What came of one expected hit."""
        if math.isfinite(ratio):
            known = self._reuse.pop(model, 1.0)
            ratio = min(max(ratio, 0.0), 1.0)
            self._reuse[model] = known + REUSE_GAIN * (ratio - known)
            if len(self._reuse) > MOST_MODELS:
                del self._reuse[next(iter(self._reuse))]

    def dump(self) -> dict[str, Any]:
        """The shares, as plain JSON; what is cached does not outlive us in our memory."""
        return {"reuse": dict(self._reuse)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `dump` gave, but for what cannot be."""
        shares = kept.get("reuse")
        for model, share in list(shares.items())[-MOST_MODELS:] if isinstance(shares, dict) else ():
            if isinstance(share, (int, float)) and 0.0 <= share <= 1.0:
                self._reuse[model] = float(share)
