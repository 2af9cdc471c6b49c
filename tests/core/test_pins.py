"""Pins: what is lacking, and what must stay."""

from __future__ import annotations

import pytest

from balancer.core.domain import PlacementKey
from balancer.core.pins import Lack, Pin, Pins, missing
from tests.core.bench import canon, key

M, N = canon("m:1"), canon("n:1")
PLAIN, LONG = key("m:1"), key("m:1", num_ctx=8192)
OTHER = key("n:1")


def pin(*backends: str, copies: int = 1, wanted: PlacementKey = PLAIN) -> Pin:
    """A pin of m:1, with options in just these."""
    return Pin(wanted.model, backends, copies, wanted, exact=bool(wanted.options))


@pytest.mark.parametrize(
    ("wanted", "resident", "usable", "where", "count"),
    [
        (pin("a", "b"), {"a": [PLAIN]}, "abc", "b", 1),
        (pin("a", "b"), {"a": [OTHER]}, "abc", "ab", 2),
        (pin("a", "b"), {}, "bc", "b", 1),
        (pin("a", "b"), {}, "c", "", 0),
        (pin(copies=2), {}, "abc", "abc", 2),
        (pin(copies=2), {"b": [OTHER, PLAIN]}, "abc", "ac", 1),
        (pin(copies=2), {"a": [PLAIN], "b": [PLAIN]}, "abc", "c", 0),
        (pin(copies=1), {"a": [PLAIN], "b": [PLAIN]}, "abc", "c", 0),
        (pin(copies=2), {"a": [PLAIN]}, "bc", "bc", 2),
        (pin(copies=9), {"a": [PLAIN]}, "ab", "b", 1),
        (pin(copies=9), {}, "", "", 0),
    ],
)
def test_what_is_lacking(
    wanted: Pin, resident: dict[str, list[PlacementKey]], usable: str, where: str, count: int
) -> None:
    """Named backends each; else so many of those that can, where copies elsewhere do not count."""
    assert missing(wanted, resident, list(usable)) == Lack(wanted, tuple(where), count)


def test_an_exact_pin_wants_just_its_variant() -> None:
    """And another is content with what callers asked for."""
    resident = {"a": [LONG], "b": [PLAIN]}
    assert missing(pin("a", "b", wanted=LONG), resident, "ab").where == ("b",)
    assert missing(pin("a", "b"), resident, "ab").where == ()


def test_a_pinned_copy_stays() -> None:
    """Of this model, on these backends, and no other."""
    pins = Pins([pin("a")])
    assert pins.protects("a", M)
    assert not pins.protects("b", M)
    assert not pins.protects("a", N)
    assert not Pins().protects("a", M)


def test_what_is_beyond_the_copies_wanted_may_go() -> None:
    """As far as the holders are known; the last that are wanted stay, wherever they are."""
    pins = Pins([pin(copies=2)])
    assert pins.protects("a", M)
    assert not pins.protects("a", M, "abc")
    assert pins.protects("a", M, "ab")
    assert pins.protects("a", M, "bc"[:1])
    assert not pins.protects("a", M, "bc"), "its own copy is not one of those that count"


def test_pins_of_one_model_each_count() -> None:
    """It stays where any of them wants it."""
    both = pin("a"), pin("b", wanted=LONG)
    pins = Pins(both)
    assert tuple(pins) == both
    assert [name for name in "abc" if pins.protects(name, M)] == ["a", "b"]
    assert pins
    assert not Pins()
