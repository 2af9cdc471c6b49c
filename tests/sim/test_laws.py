"""The laws of the simulated world notice what breaks them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from balancer.core.domain import BreakerState, PlacementKey, Switch
from balancer.core.events import BreakerMoved
from balancer.core.pool import Lease
from balancer.sim.laws import Broken
from balancer.sim.shell import Course, Shell
from balancer.sim.world import HOST_TYPES, Job, Machine, Model, World

KEY = PlacementKey("registry.ollama.ai/library/m:latest")


def world() -> tuple[World, Shell]:
    """One host with two slots, that is looked at."""
    made = World(
        [Machine("h", HOST_TYPES["rtx3090"], slots=2)],
        [Model("m")],
        policy="least-loaded",
        seed=42,
        warm={"h": ["m"]},
        slots_known=True,
        check_invariants=True,
    )
    assert made.shell is not None
    return made, made.shell


def a_slot_is_lost(shell: Shell) -> None:
    """Counted, and nobody runs on it."""
    shell.pool.members["h"].load.enter(KEY.model)


def a_token_is_kept(shell: Shell) -> None:
    """Taken, and nothing loads."""
    assert shell.pool.take_token("h", KEY, "for nothing")


def a_waiter_is_forgotten(shell: Shell) -> None:
    """It counts as waiting, and nobody waits."""
    shell.dispatcher.admission.entered(KEY.model)


def nobody_plans(shell: Shell) -> None:
    """A slot comes free, and whoever waits is not told."""
    shell.pool.changed = lambda: None


def a_breaker_leaps(shell: Shell) -> None:
    """From open to closed without a trial."""
    open_, closed = BreakerState.OPEN, BreakerState.CLOSED
    shell._emit(BreakerMoved(0.0, "h", None, open_, closed, "magic", 0.0))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (a_slot_is_lost, "counted"),
        (a_token_is_kept, "token"),
        (a_waiter_is_forgotten, "admitted"),
        (nobody_plans, "have a free slot"),
        (a_breaker_leaps, "from"),
    ],
)
def test_what_breaks_a_law_is_told(harm: Callable[[Shell], None], told: str) -> None:
    """With the seed and the last events."""
    made, shell = world()
    made.timeline.at(1.5, harm, shell)
    with pytest.raises(Broken, match=told) as caught:
        made.run([Job(1.0 + n / 100, "m", 100, 300) for n in range(4)])
    assert "seed 42" in str(caught.value)
    assert "World._arrive" in str(caught.value)
    member = shell.pool.members["h"]
    member.loading = None


@pytest.mark.parametrize("switch", [Switch.DRAINING, Switch.DISABLED])
def test_a_grant_that_may_not_be_is_told(monkeypatch: pytest.MonkeyPatch, switch: Switch) -> None:
    """A backend that an operator has taken out, say."""
    made, shell = world()
    granted = shell._granted

    def late(course: Course, lease: Lease) -> None:
        shell.pool.members["h"].switch = switch
        granted(course, lease)

    monkeypatch.setattr(shell, "_granted", late)
    with pytest.raises(Broken, match="not serving"):
        made.run([Job(1.0, "m", 100, 300)])
    shell.pool.changed = lambda: None
    for lease in list(shell.pool.members["h"].leases):
        lease.release()


def test_a_call_is_answered_once() -> None:
    """And no more."""
    made, shell = world()
    course_ended = shell.over

    def twice(course: Course, status: str) -> None:
        course_ended(course, status)
        course_ended(course, status)

    shell.over = twice  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="was done, now done"):
        made.run([Job(1.0, "m", 100, 300)])


def test_a_calm_world_breaks_none() -> None:
    """Or all of this would prove nothing."""
    made, _ = world()
    report = made.run([Job(1.0 + n / 100, "m", 100, 300) for n in range(4)])
    assert {record.status for record in report.records} == {"done"}
