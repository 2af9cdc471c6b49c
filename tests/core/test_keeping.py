"""What pins protect, with backends as they are."""

from __future__ import annotations

import pytest

from balancer.core.domain import Switch
from balancer.core.keeping import Keeping
from balancer.core.pins import Pin, Pins
from tests.core.bench import PoolBench, canon, key

M = canon("m:1")
LONG = key("m:1", num_ctx=8192)


@pytest.fixture
def bench() -> PoolBench:
    """Two that have the model in memory, at the context that they give by themselves."""
    found = PoolBench()
    found.shape("a", "b")
    for name in "ab":
        found.up(name, "m:1", "n:1", loaded=["m:1", "n:1"])
    return found


def test_a_pinned_copy_stays(bench: PoolBench) -> None:
    """Of this model, on these backends, and no other."""
    keeping = Keeping(bench.pool)
    assert not keeping.is_pinned("a", M)
    bench.pool.pins = Pins([Pin(M, ("a",), 1, key("m:1"))])
    assert keeping.is_pinned("a", M, key("n:1"))
    assert not keeping.is_pinned("b", M, key("n:1"))
    assert not keeping.is_pinned("a", canon("n:1"))


def test_not_against_another_variant_of_itself(bench: PoolBench) -> None:
    """Whoever asks for that has to be served, and a backend runs one of them at a time."""
    bench.pool.pins = Pins([Pin(M, ("a",), 1, key("m:1"))])
    assert not Keeping(bench.pool).is_pinned("a", M, LONG)


def test_a_context_protects_what_has_it(bench: PoolBench) -> None:
    """And no runner with another one; what has it is told to come back."""
    keeping = Keeping(bench.pool)
    bench.pool.pins = Pins([Pin(M, ("a",), 1, LONG, exact=True)])
    assert (keeping.is_pinned("a", M), keeping.comes_back("a", M)) == (False, False)
    bench.holds("a", "m:1", context=8192)
    assert (keeping.is_pinned("a", M), keeping.comes_back("a", M)) == (True, True)
    assert not keeping.is_pinned("a", M, key("m:1"))


def test_what_is_beyond_the_copies_wanted_may_go(bench: PoolBench) -> None:
    """Copies on backends that may serve nobody do not count."""
    keeping = Keeping(bench.pool)
    bench.pool.pins = Pins([Pin(M, (), 1, key("m:1"))])
    assert not keeping.is_pinned("a", M)
    bench.pool.turn("b", Switch.DRAINING)
    assert keeping.is_pinned("a", M)
    bench.pool.turn("b", Switch.SERVING)
    bench.holds("b", "n:1")
    assert keeping.is_pinned("a", M)


def test_a_twin_that_a_name_would_use_is_pinned(bench: PoolBench) -> None:
    """One file may be in memory by another name."""
    row = {"name": "other:1", "model": "other:1", "context_length": 4096, "size": 5, "size_vram": 5}
    told = bench.catalog.digest("a", M)
    bench.pool.note_ps("a", [row | {"digest": told}], bench.clock())
    bench.pool.pins = Pins([Pin(M, ("a",), 1, key("m:1"))])
    assert Keeping(bench.pool).is_pinned("a", canon("other:1"), key("n:1"))
