"""The collector: how it is set, what it tells, and that it is left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from balancer.ops.garbage import THRESHOLDS, Garbage
from tests.core.clocks import ManualClock


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.told: list[tuple[int, float]] = []
        self.garbage = Garbage(self.clock, lambda *pause: self.told.append(pause))


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A collector that is steered, and given back."""
    bench = Bench()
    yield bench
    bench.garbage.end()
    gc.unfreeze()


def test_it_is_set_and_left_as_it_was(bench: Bench) -> None:
    """Whatever else runs in this process has its own thresholds back; twice is no mistake."""
    before, callbacks = gc.get_threshold(), list(gc.callbacks)
    bench.garbage.begin()
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > 1000
    bench.garbage.end()
    bench.garbage.end()
    assert gc.get_threshold() == before
    assert gc.callbacks == callbacks


def test_each_look_is_told(bench: Bench) -> None:
    """Its generation and how long it took; none before the beginning or after the end."""
    gc.collect()
    bench.garbage.begin()
    gc.callbacks.append(lambda *_: bench.clock.advance(0.5))
    try:
        gc.collect(1)
        gc.collect()
    finally:
        del gc.callbacks[-1]
    bench.garbage.end()
    gc.collect()
    assert bench.told == [(1, 0.5), (2, 0.5)]
