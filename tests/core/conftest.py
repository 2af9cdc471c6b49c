"""Situations for the plan."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.core.bench import backend
from tests.core.planned import FAST, SLOW, Planned


@pytest.fixture
def bench() -> Iterator[Planned]:
    """A pool with nothing in it."""
    found = Planned()
    yield found
    found.close()


@pytest.fixture
def uneven(bench: Planned) -> Planned:
    """A fast one with one slot, which is busy and soon free, and a slow one that is free."""
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name, speed in (("a", FAST), ("b", SLOW)):
        bench.up(name, "m:1", loaded=["m:1"])
        bench.speed(name, **speed)
    return bench
