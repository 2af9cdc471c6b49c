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
    """At two per second both memories tell two per second, long before either is full."""
    found, now = Demand(), 0.0
    for step in range(20_000):
        now = step / 2
        found.arrived(K, now)
        if now == 240:
            assert found.fast(K, now) == pytest.approx(2, rel=0.05)
            assert found.slow(K, now) == pytest.approx(2, rel=0.05)
    assert found.fast(K, now) == pytest.approx(2, rel=0.01)
    assert found.slow(K, now) == pytest.approx(2, rel=0.01)


def test_the_short_memory_follows_a_change_sooner() -> None:
    """Ten times as many for two minutes: the short one has most of it, the long one little."""
    found = Demand()
    for step in range(3600):
        found.arrived(K, 2.0 * step)
    for step in range(600):
        found.arrived(K, 7200 + step / 5)
    assert 3.0 < found.fast(K, 7320) < 5.0
    assert 0.5 < found.slow(K, 7320) < 1.0


def heard(memory_s: float, seconds: float) -> float:
    """How full a memory is that has listened for so long."""
    return 1 - math.exp(-seconds / memory_s)


def test_both_fade_at_their_own_pace() -> None:
    """To an e-th within their own time; before any arrival there is nothing."""
    found = Demand(10, 100)
    assert (found.fast(K, 5), found.slow(K, 5)) == (0, 0)
    found.arrived(K, 0)
    assert found.fast(K, 10) == pytest.approx(0.1 / math.e / heard(10, 10))
    assert found.slow(K, 100) == pytest.approx(0.01 / math.e / heard(100, 100))
    assert found.fast(K, 1000) == pytest.approx(0.1 * math.exp(-100))


def test_a_memory_that_listens_since_a_moment_is_not_blown_up() -> None:
    """One arrival is no flood: less than a twentieth of the memory counts as a twentieth."""
    found = Demand(10, 100)
    found.arrived(K, 0)
    assert found.fast(K, 0) == pytest.approx(0.1 / heard(10, 0.5))
    assert found.slow(K, 0) == pytest.approx(0.01 / heard(100, 5))
    assert found.fast(K, -5) == pytest.approx(0.1 / heard(10, 0.5))


def test_listening_begins_with_the_first_arrival_of_all() -> None:
    """A key that comes later was not there before, and is taken for as rare as it is."""
    found = Demand(10, 100)
    found.arrived(OTHER, 0)
    found.arrived(K, 1000)
    assert found.slow(K, 1000) == pytest.approx(0.01, rel=0.001)


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
    assert again.fast(K, 7) == pytest.approx(found.fast(K, 160) * math.exp(-60 / 120))
    assert again.slow(K, 8) == pytest.approx(found.slow(K, 160) * math.exp(-61 / 1800))


def test_what_several_heard_adds_up_and_is_shared_out() -> None:
    """As if one had heard it all; a part of the calls is a part of each rate."""
    one, two, both = Demand(), Demand(), Demand()
    for step in range(600):
        one.arrived(K, float(step))
        two.arrived(OTHER if step % 2 else K, float(step))
    both.add(one, 600.0)
    both.add(two, 600.0)
    for key in (K, OTHER):
        assert both.fast(key, 600.0) == pytest.approx(one.fast(key, 600.0) + two.fast(key, 600.0))
        assert both.slow(key, 600.0) == pytest.approx(one.slow(key, 600.0) + two.slow(key, 600.0))
    part = Demand()
    part.restore(both.dump(600.0), 600.0, 0.0, share=0.25)
    assert part.fast(K, 600.0) == pytest.approx(both.fast(K, 600.0) / 4)
    assert part.slow(K, 600.0) == pytest.approx(both.slow(K, 600.0) / 4)


def test_what_nobody_wants_any_more_is_not_kept() -> None:
    """What is told of a pool at rest comes to an end: it need not be written for ever."""
    found = Demand()
    found.arrived(K, 0)
    assert len(found.dump(3600)["rates"]) == 1
    assert found.dump(12 * 3600) == {"rates": []}


def test_what_was_kept_is_not_set_right_again() -> None:
    """It was, when it was told; the clock before this one has listened for long enough."""
    again = Demand(10, 100)
    again.restore({"rates": [["m", [["num_ctx", 8192]], 0.5, 0.25]]}, 7.0, 0.0)
    again.arrived(K, 7.0)
    assert again.fast(K, 7.0) == pytest.approx(0.6)
    assert again.slow(K, 7.0) == pytest.approx(0.26)


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


def test_what_nobody_wants_any_more_is_forgotten_with_all_its_options() -> None:
    """And nothing else; who asks for it again counts from then on."""
    found = Demand()
    for key in (PlacementKey("m"), PlacementKey("m", (("num_ctx", 8192),)), PlacementKey("o")):
        found.arrived(key, 0.0)
    found.forget("m")
    assert found.keys() == (PlacementKey("o"),)
    found.arrived(PlacementKey("m"), 1.0)
    assert found.recent(PlacementKey("m"), 1.0) == pytest.approx(1.0)
