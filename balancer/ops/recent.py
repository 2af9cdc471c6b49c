"""
What happened lately, for the status document: a short memory of events worth an operator's look.

Times are Unix seconds. Names of events are those of the log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from balancer.core.domain import BreakerState
from balancer.core.events import (
    AttemptFailed,
    BackendDrained,
    BreakerMoved,
    BreakersReset,
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
from balancer.ops.log import SWITCHED, breaker_name, escape

ROWS: Final = 100
FAILURES: Final = 5  # remembered of each backend
FOLD_S: Final = 300.0
# Of these there may be many in a time of trouble; they must not push everything else out.
# (Some clients pull their model at each of their starts.)
FOLDED: Final = frozenset({"failover", "breaker_reopened", "load_failed", "model_pull"})


@dataclass(frozen=True, slots=True)
class Row:
    """
    One event, for people.

    Args:
        at: When it happened (the last time).
        backend: Empty: it concerns none.
        model: As listed; empty: none.
        count: How often it happened in a short while.
    """

    at: float
    event: str
    backend: str = ""
    model: str = ""
    text: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt or a load that failed on a backend."""

    at: float
    model: str
    verdict: str
    text: str


class Recent:
    """
    A subscriber that remembers.

    Args:
        wall: Unix time.
    """

    KINDS: Final = (
        AttemptFailed,
        BackendDrained,
        BreakerMoved,
        BreakersReset,
        ConfigApplied,
        ConfigRejected,
        HealthFlipped,
        LoadEnded,
        MemberJoined,
        MemberLeft,
        OrderEnded,
        RetryGranted,
        Suspected,
        SwitchMoved,
        SwitchesLost,
    )

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._rows: deque[Row] = deque(maxlen=ROWS)
        self._failures: dict[str, deque[Failure]] = {}

    def rows(self) -> list[Row]:
        """Newest first."""
        return list(reversed(self._rows))

    def failures(self, backend: str) -> list[Failure]:
        """The last ones there, newest first."""
        return list(reversed(self._failures.get(backend, ())))

    def __call__(self, event: Event) -> None:
        """Remember one event, if it is worth it."""
        match event:
            case AttemptFailed(backend=backend, model=model, outcome=outcome):
                self._fail(backend, model, outcome.verdict.value, outcome.text)
            case RetryGranted(backend=backend, model=model, after=after):
                text = f"after {after.backend}: {after.outcome.text}"
                self._add("failover", backend, model, text)
            case LoadEnded(backend=backend, model=model, ok=False, text=text):
                self._fail(backend, model, "load", text)
                self._add("load_failed", backend, model, text)
            case _:
                self._state_changed(event)

    def _state_changed(self, event: Event) -> None:
        """What concerns a backend or the balancer as a whole."""
        match event:
            case HealthFlipped(backend=backend, up=up, reason=reason):
                self._add("backend_up" if up else "backend_down", backend, "", reason)
            case BreakerMoved(backend=backend, new=new, reason=reason):
                if new is not BreakerState.HALF_OPEN:
                    self._add(breaker_name(event), backend, event.model or "", reason)
            case Suspected(backend=backend, model=model, silent_s=silent_s):
                text = f"silent for {silent_s:.0f} s"
                self._add("backend_suspected", backend, model, text)
            case SwitchMoved(backend=backend, switch=switch, by=by):
                self._add(SWITCHED[switch], backend, "", by and f"by {by}")
            case BreakersReset(backend=backend, by=by):
                self._add("breaker_reset", backend, "", by and f"by {by}")
            case BackendDrained(backend=backend):
                self._add("backend_drained", backend, "", "")
            case MemberJoined(backend=backend, url=url):
                self._add("backend_added", backend, "", url)
            case MemberLeft(backend=backend):
                self._failures.pop(backend, None)
                self._add("backend_removed", backend, "", "")
            case ConfigApplied(changed=changed):
                self._add("config_reloaded", "", "", ", ".join(changed) or "nothing has changed")
            case ConfigRejected(problems=problems):
                self._add("config_rejected", "", "", "; ".join(problems))
            case OrderEnded(operation=operation, model=model, failed=failed):
                told = "; ".join(failed) or f"done on {', '.join(event.done) or 'none'}"
                self._add(f"model_{operation}", "", model, f"{told} (by {event.by})")
            case SwitchesLost(path=path, error=error):
                self._add("switches_lost", "", "", f"{path}: {error}")
            case _:
                pass

    def _add(self, name: str, backend: str, model: str, text: str) -> None:
        row = Row(self._now(), name, backend, model, escape(text))
        if name in FOLDED:
            row = self._folded(row)
        self._rows.append(row)

    def _folded(self, row: Row) -> Row:
        """The same row, instead of its like of a short while ago."""
        for old in reversed(self._rows):
            if row.at - old.at > FOLD_S:
                break
            if (old.event, old.backend, old.model) == (row.event, row.backend, row.model):
                self._rows.remove(old)
                return replace(row, count=old.count + 1)
        return row

    def _fail(self, backend: str, model: str, verdict: str, text: str) -> None:
        kept = self._failures.setdefault(backend, deque(maxlen=FAILURES))
        kept.append(Failure(self._now(), model, verdict, escape(text)))

    def _now(self) -> float:
        return round(self._wall(), 3)
