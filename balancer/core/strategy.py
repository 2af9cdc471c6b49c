"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from balancer.core import cells
from balancer.core.decisions import Decisions
from balancer.core.domain import Call
from balancer.core.greedy import POLICIES, Greedy
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.prefix import SESSION_S
from balancer.core.scheduler import Scheduler
from balancer.core.sight import Sight

STRATEGIES: Final = ("plan", *POLICIES)


def cell_count(view: Sight, before: int = 0) -> int:
    """
    How many cells the plan of such a pool has; as many as *before*, as long as that will do.

    Tiers are held over the whole pool, so with them it is one, whatever its size.
    """
    return 1 if view.priorities else cells.count(len(view.backends()), before)


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

    def planner(view: Sight, may_start: Callable[[Call, int], bool]) -> Plan:
        plan = Plan(view, knobs, may_start=may_start, decisions=decisions)
        plan.prefixes.session_s = session_s
        return plan

    if name == "plan":
        count = cell_count(view)
        if count > 1:
            return cells.Cells(view, planner, may_start, count)
        return planner(view, may_start)
    return Greedy(POLICIES[name], view, may_start)
