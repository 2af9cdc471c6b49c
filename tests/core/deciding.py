"""Decisions made by hand."""

from __future__ import annotations

from typing import Any

from balancer.core.cost import Need, Quote, price
from balancer.core.decisions import Choice, Decision, version
from balancer.core.domain import PlacementKey
from balancer.core.knobs import Knobs

KNOBS = Knobs()
KEY = PlacementKey("m:1")
NEED = Need(500.0, 100.0, 600.0)


def quote(backend: str, **more: Any) -> Quote:
    """A backend with the model in memory and a slot free."""
    told: dict[str, Any] = {
        "backend": backend,
        "key": KEY,
        "at": 1.0,
        "resident": True,
        "load_left_s": None,
        "in_flight": 1,
        "slots": 2,
        "may_probe": False,
        "backlog_s": 0.0,
        "share": 1.0,
        "decoding": 0,
        "prompt_rate": 1000.0,
        "decode_rate": 50.0,
        "penalty": 0.1,
        "mean_answer": 100.0,
    }
    return Quote(**{**told, **more})


def choice(backend: str, cached: float = 0.0, promised: int = 0, **more: Any) -> Choice:
    """That backend as weighed for a call of `NEED`."""
    made = quote(backend, **more)
    terms = price(made, NEED, cached, promised, KNOBS)
    assert terms is not None
    return Choice(backend, terms, made, promised, short=False)


def decision(*found: Choice, call: str = "r1") -> Decision:
    """For the first of those found."""
    return Decision(
        2.0, 7, call, 1, KEY, NEED, found[0], list(reversed(found)), 3.5, 3.0, version(KNOBS)
    )
