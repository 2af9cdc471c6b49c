"""Pins: what meets them, what is lacking, and which copy is one of those wanted."""

from __future__ import annotations

import pytest

from balancer.core.domain import PlacementKey
from balancer.core.pins import Lack, Pin, Pins, missing
from tests.core.bench import PoolBench, canon, key

M = canon("m:1")
PLAIN, LONG = key("m:1"), key("m:1", num_ctx=8192)


def pin(*backends: str, copies: int = 1, wanted: PlacementKey = PLAIN) -> Pin:
    """A pin of m:1, with options in just these."""
    return Pin(wanted.model, backends, copies, wanted, exact=bool(wanted.options))


@pytest.mark.parametrize(
    ("wanted", "holders", "usable", "where", "count"),
    [
        (pin("a", "b"), "a", "abc", "b", 1),
        (pin("a", "b"), "", "abc", "ab", 2),
        (pin("a", "b"), "", "bc", "b", 1),
        (pin("a", "b"), "", "c", "", 0),
        (pin(copies=2), "", "abc", "abc", 2),
        (pin(copies=2), "b", "abc", "ac", 1),
        (pin(copies=2), "ab", "abc", "c", 0),
        (pin(copies=1), "ab", "abc", "c", 0),
        (pin(copies=2), "a", "bc", "bc", 2),
        (pin(copies=9), "a", "ab", "b", 1),
        (pin(copies=9), "", "", "", 0),
    ],
)
def test_what_is_lacking(wanted: Pin, holders: str, usable: str, where: str, count: int) -> None:
    """Named backends each; else so many of those that can, where copies elsewhere do not count."""
    assert missing(wanted, list(holders), list(usable)) == Lack(wanted, tuple(where), count)


@pytest.mark.parametrize(
    ("loaded", "context", "any_will_do", "exact"),
    [("n:1", 8192, False, False), ("m:1", 4096, True, False), ("m:1", 8192, True, True)],
)
def test_what_meets_a_pin(loaded: str, context: int, any_will_do: bool, exact: bool) -> None:
    """With a context just that one, whoever loaded it; else the model, in whatever way."""
    bench = PoolBench()
    bench.shape("a")
    bench.up("a", "m:1", "n:1")
    bench.holds("a", loaded, context=context)
    met = [each.is_met_by(bench.catalog.copy("a", each.key)) for each in (pin(), pin(wanted=LONG))]
    assert met == [any_will_do, exact]


def test_what_a_load_under_way_will_meet() -> None:
    """As what is in memory."""
    told = [(pin().is_met_once(k), pin(wanted=LONG).is_met_once(k)) for k in (PLAIN, LONG)]
    assert told == [(True, False), (True, True)]
    assert not pin().is_met_once(key("n:1"))


def test_what_is_beyond_the_copies_wanted_is_not_kept() -> None:
    """The last that are wanted stay, wherever they are; on named backends each."""
    two = pin(copies=2)
    assert two.keeps("a", "a")
    assert two.keeps("a", "ab")
    assert not two.keeps("a", "abc")
    assert not two.keeps("a", "bc"), "its own copy is not one of those that count"
    assert pin("a").keeps("a", "abc")
    assert not pin("a").keeps("b", "b")


def test_all_pins() -> None:
    """In the order they were written; none is nothing."""
    both = pin("a"), pin("b", wanted=LONG)
    assert tuple(Pins(both)) == both
    assert Pins(both)
    assert not Pins()
