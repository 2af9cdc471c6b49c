"""The short memory of what happened: what is worth a row, and what must not push it out."""

from __future__ import annotations

import pytest

from balancer.core.domain import Attempt, BreakerState, Outcome, Switch, Verdict
from balancer.core.events import (
    AttemptFailed,
    BackendDrained,
    BreakerMoved,
    BreakersReset,
    CheckEnded,
    ConfigApplied,
    ConfigRejected,
    Event,
    HealthFlipped,
    LoadEnded,
    MemberJoined,
    MemberLeft,
    OrderEnded,
    RetryGranted,
    Suspected,
    SwitchesLost,
    SwitchMoved,
)
from balancer.ops.log import LogWriter
from balancer.ops.recent import FAILURES, FOLD_S, ROWS, Recent, Row
from tests.core.clocks import ManualClock
from tests.ops.test_log import make

CLOSED, OPEN, HALF = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


@pytest.fixture
def clock() -> ManualClock:
    """Stands for the wall clock."""
    return ManualClock()


@pytest.fixture
def recent(clock: ManualClock) -> Recent:
    """An empty memory."""
    return Recent(clock)


def moved(old: BreakerState, new: BreakerState, model: str | None = None) -> BreakerMoved:
    return BreakerMoved(1.0, "a", model, old, new, "3 in a row", 2.0)


def failed(text: str = "reset") -> AttemptFailed:
    outcome = Outcome(Verdict.FAULT, 0.0, 1.0, text=text)
    return AttemptFailed(1.0, "r", "chat", "m", "a", 1, outcome)


def again(text: str = "reset") -> RetryGranted:
    after = Attempt(1, "a", failed(text).outcome)
    return RetryGranted(1.0, "r", "m", "b", 2, 0.0, "failover", after)


TOLD: list[tuple[Event, str, str, str]] = [
    (HealthFlipped(1.0, "a", True, "Ollama 0.33.0"), "a", "", "Ollama 0.33.0"),
    (HealthFlipped(1.0, "a", False, "refused"), "a", "", "refused"),
    (moved(CLOSED, OPEN, "m"), "a", "m", "3 in a row"),
    (moved(HALF, OPEN), "a", "", "3 in a row"),
    (moved(HALF, CLOSED), "a", "", "3 in a row"),
    (Suspected(1.0, "a", "m", 31.0), "a", "m", "silent for 31 s"),
    (SwitchMoved(1.0, "a", Switch.DRAINING, "ops"), "a", "", "by ops"),
    (SwitchMoved(1.0, "a", Switch.DISABLED), "a", "", ""),
    (SwitchMoved(1.0, "a", Switch.SERVING), "a", "", ""),
    (BackendDrained(1.0, "a"), "a", "", ""),
    (BreakersReset(1.0, "a", "ops"), "a", "", "by ops"),
    (MemberJoined(1.0, "a", "http://a:11434"), "a", "", "http://a:11434"),
    (MemberLeft(1.0, "a"), "a", "", ""),
    (ConfigApplied(1.0, ("queue.max_wait",), ()), "", "", "queue.max_wait"),
    (ConfigApplied(1.0, (), ()), "", "", "nothing has changed"),
    (ConfigRejected(1.0, ("x: no", "y: no")), "", "", "x: no; y: no"),
    (SwitchesLost(1.0, "/s", "not JSON"), "", "", "/s: not JSON"),
    (LoadEnded(1.0, "a", "m", False, 1.0, "out of memory"), "a", "m", "out of memory"),
]


@pytest.mark.parametrize(("event", "backend", "model", "text"), TOLD)
def test_what_is_worth_a_row(
    recent: Recent, clock: ManualClock, event: Event, backend: str, model: str, text: str
) -> None:
    """It has the name that the log has for it, and the time of the wall."""
    log, _ = make("json")
    _, name, _ = LogWriter(log).line(event)
    recent(event)
    assert recent.rows() == [Row(clock(), name, backend, model, text)]


@pytest.mark.parametrize(
    "event",
    [
        CheckEnded(1.0, "a", True, 0.01),
        moved(OPEN, HALF),
        LoadEnded(1.0, "a", "m", True, 1.0, ""),
        failed(),
    ],
)
def test_what_is_everyday_is_not(recent: Recent, event: Event) -> None:
    """Checks, trials and calls come by the thousand."""
    recent(event)
    assert recent.rows() == []


def test_it_asks_for_what_it_remembers() -> None:
    """Of nothing else there is a row or a failure, and so nobody need make it."""
    assert {type(event) for event, *_ in TOLD} | {AttemptFailed, RetryGranted, OrderEnded} == {
        *Recent.KINDS
    }


def test_the_newest_is_first_and_the_oldest_forgotten(recent: Recent) -> None:
    """The memory is bounded."""
    for number in range(ROWS + 5):
        recent(BackendDrained(1.0, f"b{number}"))
    rows = recent.rows()
    assert len(rows) == ROWS
    assert (rows[0].backend, rows[-1].backend) == (f"b{ROWS + 4}", "b5")


def test_a_failover_tells_from_where_and_why(recent: Recent) -> None:
    """What failed, and where it goes on."""
    recent(again("connection\nreset"))
    (row,) = recent.rows()
    assert (row.event, row.backend, row.model) == ("failover", "b", "m")
    assert row.text == "after a: connection\\nreset", "a backend's words are made safe"


def test_a_storm_of_failovers_is_one_row(recent: Recent, clock: ManualClock) -> None:
    """Counted, with the last time and reason; what happened before it is still to be seen."""
    recent(HealthFlipped(1.0, "a", False, "refused"))
    for number in range(ROWS * 2):
        clock.advance(1.0)
        recent(failed(f"reset {number}"))
        recent(again(f"reset {number}"))
    row, down = recent.rows()
    assert down.event == "backend_down"
    assert (row.count, row.at) == (ROWS * 2, clock())
    assert row.text.endswith(f"reset {ROWS * 2 - 1}")
    clock.advance(FOLD_S + 1)
    recent(again())
    assert [each.count for each in recent.rows()] == [1, ROWS * 2, 1]


def test_a_client_that_pulls_at_each_start_is_one_row(recent: Recent) -> None:
    """As often as it starts: what else happened is still to be seen."""
    recent(HealthFlipped(1.0, "a", False, "refused"))
    for _ in range(ROWS * 2):
        recent(OrderEnded(1.0, "pull", "m:latest", "ops", ("a",), (), finished=True))
    pull, down = recent.rows()
    assert (pull.event, pull.count, pull.text) == ("model_pull", ROWS * 2, "done on a (by ops)")
    assert down.event == "backend_down"


def test_openings_are_never_folded(recent: Recent) -> None:
    """Each is news."""
    for _ in range(3):
        recent(moved(CLOSED, OPEN))
    assert len(recent.rows()) == 3


def test_the_last_failures_of_a_backend(recent: Recent, clock: ManualClock) -> None:
    """Attempts and loads; gone with the backend."""
    for number in range(FAILURES + 2):
        recent(failed(f"reset {number}"))
    recent(LoadEnded(1.0, "a", "m", False, 1.0, "out of memory"))
    kept = recent.failures("a")
    assert len(kept) == FAILURES
    assert (kept[0].verdict, kept[0].text, kept[0].at) == ("load", "out of memory", clock())
    assert (kept[1].verdict, kept[1].model) == ("fault", "m")
    recent(MemberLeft(1.0, "a"))
    assert recent.failures("a") == []
