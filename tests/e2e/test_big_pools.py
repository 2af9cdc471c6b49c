"""Big pools: the scheduler is of as many cells as there are backends for, from the start."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.app import Balancer
from balancer.config import Config, load
from balancer.core.cells import Cells
from balancer.core.plan import Plan
from balancer.core.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("quiet")


def configured(count: int) -> Config:
    """So many backends at addresses where nobody listens."""
    places = [{"name": f"g{n}", "url": f"http://127.0.0.{n + 2}:9"} for n in range(count)]
    told: dict[str, Any] = {"server.listen": ["127.0.0.1:0"], "discovery.sources": "none"}
    return load("", {}, overrides={**told, "backends": places})


def scheduler(balancer: Balancer) -> Scheduler:
    """Who decides now."""
    return balancer.dispatcher._scheduler


async def test_a_big_pool_is_in_cells_whoever_makes_it_big() -> None:
    """Started with, reloaded, or found; a few backends more or less change nothing."""
    balancer = Balancer(configured(70))
    await balancer.start()
    try:
        first = scheduler(balancer)
        assert isinstance(first, Cells)
        balancer.apply(configured(64))
        assert scheduler(balancer) is first
        balancer.apply(configured(30))
        assert isinstance(scheduler(balancer), Plan)
        balancer.reload.current = configured(90)  # what discovery finds is joined with it
        balancer._found()
        assert isinstance(scheduler(balancer), Cells)
    finally:
        await balancer.close()
