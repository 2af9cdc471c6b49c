"""
What a request's head tells of who sends it, kept for as long as the same head comes again.

A client says the same of itself with every request of a connection; only what concerns the one
request differs. So what was found out for one is good for the next: who it is, whether it may come
in, which of its headers go up.

Laws:
- Only who was let in is remembered, on its own connection, for a second: a key that expires or is
  withdrawn is noticed as soon.
- Whatever else decides is part of what is compared: every header but the body's length and the
  request's id, and the rules that held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from balancer.core.domain import Admitted
from balancer.core.sharing import Share, Sharing

REMEMBERED_S: Final = 1.0
REMEMBERED_BYTES: Final = 8 * 1024  # of a head; a connection at rest must not hold a large one
_OWN: Final = frozenset({b"content-length", b"x-request-id"})

Raw = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """
    What a head says of the calls behind it.

    Args:
        upward: The headers that go up.
        limit_s: The client's own time limit, seconds; None: none.
        share: Whose share of the pool they use up, and in which class, by these rules.
    """

    upward: tuple[tuple[str, str], ...]
    content_type: str
    limit_s: float | None
    share: Share
    rules: Sharing


@dataclass(slots=True, eq=False)
class Visitor:
    """
    One client as its head shows it.

    Args:
        raw: The head's lines.
        method: Of the request; one that pages of other origins send is admitted by it.
        rules: What decided on it, compared by identity.
        until: When it is to be looked at again, monotonic seconds.
        cors: Headers that its answers need.
        asked: What else its head says, once somebody has read it.
    """

    raw: Raw
    method: str
    rules: tuple[object, ...]
    until: float
    admitted: Admitted
    cors: tuple[tuple[str, str], ...]
    asked: Asked | None = None

    @property
    def is_small(self) -> bool:
        """Whether its head may be kept while the connection is at rest."""
        return sum(len(name) + len(value) for name, value in self.raw) <= REMEMBERED_BYTES

    def is_again(self, raw: Raw, method: str, rules: tuple[object, ...], now: float) -> bool:
        """Whether a request with that head comes from the same, and may come in as before."""
        if now >= self.until or len(raw) != len(self.raw) or method != self.method:
            return False
        for mine, other in zip(self.raw, raw, strict=False):
            if mine != other and (mine[0] != other[0] or mine[0].lower() not in _OWN):
                return False
        return all(mine is other for mine, other in zip(self.rules, rules, strict=True))
