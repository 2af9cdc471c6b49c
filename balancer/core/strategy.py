"""The strategies by name."""

from __future__ import annotations

from typing import Final

from balancer.core.greedy import POLICIES, Greedy
from balancer.core.scheduler import Scheduler, View

STRATEGIES: Final = tuple(POLICIES)


def build(name: str, view: View) -> Scheduler:
    """The scheduler of that name. Raises KeyError for an unknown one."""
    return Greedy(POLICIES[name], view)
