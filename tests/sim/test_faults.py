"""Trouble as an object: what is on, for how long, and what heals it."""

from random import Random

import pytest

from balancer.sim.faults import Faults
from balancer.sim.host import Host, SimModel


@pytest.fixture
def faults() -> Faults:
    """Of a host whose clock stands."""
    return Host([SimModel("m")], clock=lambda: 0.0, rng=Random(1)).faults


def test_healing_ends_everything(faults: Faults) -> None:
    """Every attribute is as on the first day."""
    fresh = vars(Host([], clock=lambda: 0.0, rng=Random(1)).faults)
    trouble: list[tuple[str, tuple[object, ...]]] = [
        ("refuse", ()),
        ("hang", ()),
        ("freeze", ()),
        ("hang_inference", ()),
        ("reset_head", ()),
        ("cut", (3,)),
        ("fail", ("m",)),
        ("queue_full", ()),
        ("slow_load", (2.0,)),
        ("slow", (2.0,)),
        ("slow_ps", (1.0,)),
        ("version", ("0",)),
        ("missing", ("/x",)),
    ]
    for fault, args in trouble:
        faults.apply(fault, *args)
    faults.heal()
    healed = {name: value for name, value in vars(faults).items() if name != "_host"}
    assert healed == {name: value for name, value in fresh.items() if name != "_host"}


def test_times_wear_off(faults: Faults) -> None:
    """Two requests are struck, the third is spared; without a number all are."""
    faults.reset_head(times=2)
    assert [faults.take_head() for _ in range(3)] == [b"", b"", None]
    faults.cut(5, times=1)
    assert [faults.take_stream() is not None for _ in range(2)] == [True, False]
    faults.stall(5)
    assert all(faults.take_stream() for _ in range(10))


def test_changes_are_told(faults: Faults) -> None:
    """So that sockets can follow."""
    told: list[str] = []
    faults.on_change = told.append
    for fault in ("refuse", "freeze", "heal", "restart"):
        faults.apply(fault)
    assert told == ["refuse", "freeze", "heal", "restart"]
