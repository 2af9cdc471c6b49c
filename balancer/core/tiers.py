"""
Tiers of backends: a lower one serves only what no higher one can.

Only those that *can* serve a call are looked at; a backend that is down, excluded or cooling off
stands in nobody's way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from balancer.core.domain import Backend, Candidate


def tiers(backends: Iterable[Backend]) -> dict[str, int]:
    """The priority of each by name; empty: all are alike, and there is nothing to choose by."""
    told = {backend.name: backend.priority for backend in backends}
    return told if len(set(told.values())) > 1 else {}


def order(cost_s: float, tier: int, patience_s: float) -> tuple[bool, int]:
    """
    By what one place goes before another, whatever they cost: the smallest comes first.

    That is its tier as long as the cost is at most *patience_s*; behind all of these, those that
    cost more are alike.
    """
    is_dear = cost_s > patience_s
    return is_dear, 0 if is_dear else -tier


def highest(candidates: Sequence[Candidate], priorities: Mapping[str, int]) -> Sequence[Candidate]:
    """
    Those of the highest tier that there is among *candidates*, in their order.

    Args:
        priorities: As `tiers` tells them; a backend that is not in it stands below all.
    """
    if not priorities:
        return candidates
    ranks = [priorities.get(c.backend, -1) for c in candidates]
    top = max(ranks, default=0)
    return [c for c, rank in zip(candidates, ranks, strict=True) if rank == top]
