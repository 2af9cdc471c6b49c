"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from balancer.core.decisions import Decisions
from balancer.core.domain import Call
from balancer.core.greedy import POLICIES, Greedy
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.prefix import SESSION_S
from balancer.core.scheduler import Scheduler
from balancer.core.sight import Sight

STRATEGIES: Final = ("plan", *POLICIES)


def build(
    name: str,
    view: Sight,
    may_start: Callable[[Call, int], bool] = lambda *_: True,
    knobs: Knobs | None = None,
    session_s: float = SESSION_S,
    decisions: Decisions | None = None,
) -> Scheduler:
    """
    The scheduler of that name.

    Args:
        may_start: See `Limits.may_start`.
        knobs: Of the plan.
        session_s: How long the plan remembers where a named session went; below 0: not at all.
        decisions: Where the plan keeps them.

    Raises:
        KeyError: There is none of that name.
    """
    if decisions is not None:
        decisions.slow.clear()  # as seen by whoever went before
    if name == "plan":
        plan = Plan(view, knobs, may_start=may_start, decisions=decisions)
        plan.prefixes.session_s = session_s
        return plan
    return Greedy(POLICIES[name], view, may_start)
