"""Knobs: what they may be."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from balancer.core.knobs import Knobs

NAMES = [field.name for field in fields(Knobs)]
WEIGHTS = (
    "decode_weight",
    "disturb_weight",
    "cache_weight",
    "eviction_weight",
    "batch_reserve",
    "prefer_s",
)


def changed(name: str, value: float) -> dict[str, Any]:
    """That one knob."""
    return {name: value}


@pytest.mark.parametrize("name", NAMES)
def test_none_may_be_negative(name: str) -> None:
    """Nor what is no number."""
    for value in (-1, -0.001, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            replace(Knobs(), **changed(name, value))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_may_be_nothing(name: str) -> None:
    """What it weighs does not count then."""
    assert getattr(replace(Knobs(), **changed(name, 0)), name) == 0


@pytest.mark.parametrize(
    "name", ["batch_weight", "tick_s", "horizon_s", "plan_depth", "evaluations"]
)
def test_what_is_divided_by_or_counted_must_be_something(name: str) -> None:
    """Nought would divide by nothing, or plan nothing."""
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        replace(Knobs(), **changed(name, 0))


def test_each_is_explained() -> None:
    """Whoever varies one can read what it does."""
    assert Knobs.__doc__ is not None
    assert [name for name in NAMES if name not in Knobs.__doc__] == []
