"""Demand: two memories of arrivals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from balancer.core import demand
from balancer.core.demand import Demand
from balancer.core.domain import PlacementKey

K = PlacementKey("m", (("num_ctx", 8192),))
OTHER = PlacementKey("n")


def test_steady_arrivals_are_learned() -> None:
    """At two per second both memories come to two per second, the short one sooner."""
    found, now = Demand(), 0.0
    for step in range(20_000):
        now = step / 2
        found.arrived(K, now)
        if now == 240:
            assert found.fast(K, now) > 5 * found.slow(K, now)
    assert found.fast(K, now) == pytest.approx(2, rel=0.01)
    assert found.slow(K, now) == pytest.approx(2, rel=0.01)


def test_both_fade_at_their_own_pace() -> None:
    """To an e-th within their own time; before any arrival there is nothing."""
    found = Demand(10, 100)
    assert (found.fast(K, 5), found.slow(K, 5)) == (0, 0)
    found.arrived(K, 0)
    assert found.fast(K, 10) == pytest.approx(0.1 / math.e)
    assert found.slow(K, 100) == pytest.approx(0.01 / math.e)
    assert found.fast(K, -5) == pytest.approx(0.1)


def test_what_nobody_wants_is_forgotten() -> None:
    """With some delay, at others' arrivals; what is wanted stays, the latest last."""
    found = Demand(10, 100)
    found.arrived(OTHER, 0)
    found.arrived(K, 0)
    assert found.keys() == (OTHER, K)
    for step in range(200):
        found.arrived(K, 10.0 * step)
    assert found.keys() == (K,)


def test_keys_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients choose options; those asked for longest ago go first."""
    monkeypatch.setattr(demand, "MOST_KEYS", 100)
    found = Demand()
    for context in range(1000):
        found.arrived(PlacementKey("m", (("num_ctx", context),)), 1.0)
    assert len(found.keys()) <= 200
    assert found.keys()[-1].options == (("num_ctx", 999),)


def test_rates_outlive_a_restart_by_their_age() -> None:
    """As JSON; on another clock; what happened while away has faded."""
    found = Demand()
    for _ in range(10):
        found.arrived(K, 100)
    again = Demand()
    again.restore(json.loads(json.dumps(found.dump(160))), 7.0, 60.0)
    assert again.keys() == (K,)
    assert again.fast(K, 7) == pytest.approx(found.fast(K, 220))
    assert again.slow(K, 8) == pytest.approx(found.slow(K, 221))


@pytest.mark.parametrize(
    "rows",
    [
        7,
        [3],
        [["m", [], 1.0]],
        [[5, [], 1.0, 1.0]],
        [["m", [], -1.0, 1.0]],
        [["m", [], math.nan, 1.0]],
        [["m", [], 1e9, 1.0]],
        [["m", [], "1", 1.0]],
        [["m", [["num_ctx", [1]]], 1.0, 1.0]],
        [["m", [["num_ctx"]], 1.0, 1.0]],
    ],
)
def test_what_cannot_be_is_not_taken_up(rows: Any) -> None:
    """Malformed or out of bounds; the row behind it counts."""
    found = Demand()
    kept = [*rows, ["good", [], 1.0, 1.0]] if isinstance(rows, list) else rows
    found.restore({"rates": kept}, 0.0, 0.0)
    assert found.keys() == ((PlacementKey("good"),) if isinstance(rows, list) else ())


@pytest.mark.parametrize("memories", [(0, 10), (10, -1), (math.nan, 10)])
def test_a_memory_must_last(memories: tuple[float, float]) -> None:
    """None at all would divide by nought."""
    with pytest.raises(ValueError, match="positive"):
        Demand(*memories)
