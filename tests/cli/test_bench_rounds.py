"""The order of calls in a benchmark: what is paired with what, and when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import pytest

from balancer.cli.bench_rounds import Sample, at_once, by_turns, the_others


class Fleet:
    """Answers at once; a call through the balancer goes where the list says, then to ``a``."""

    def __init__(self, goes: Iterable[str] = (), wrong: Iterable[str | None] = ()) -> None:
        self.calls: list[str | None] = []
        self._goes = list(goes)
        self._wrong = set(wrong)

    def __call__(self, backend: str | None) -> Sample:
        self.calls.append(backend)
        wrong = "no" if backend in self._wrong else ""
        there = (self._goes.pop(0) if self._goes else "a") if backend is None else backend
        return Sample(there, 1.0, wrong=wrong)


def always() -> bool:
    """There is time."""
    return True


def times(count: int) -> Callable[[], bool]:
    """There is time, so many times."""
    left = iter([True] * count)
    return lambda: next(left, False)


def test_a_call_each_way_by_turns() -> None:
    """The first two make ready; then now the one, now the other comes first."""
    fleet = Fleet()
    made = by_turns(fleet, ["a"], 3, always)
    assert fleet.calls == [None, "a", None, "a", "a", None, None, "a"]
    assert (made.rounds, len(made.pairs), len(made.first_calls)) == (3, 3, 2)
    assert all(direct.backend == through.backend == "a" for direct, through in made.pairs)


def test_a_call_that_goes_elsewhere_is_paired_with_one_there() -> None:
    """Never with another backend's, which may be a faster one."""
    fleet = Fleet(["a", "a", "b"])
    made = by_turns(fleet, ["a", "b"], 2, always)
    assert fleet.calls == [None, "a", None, "a", "a", None, "b"]
    assert [(d.backend, t.backend) for d, t in made.pairs] == [("a", "a"), ("b", "b")]
    assert len(made.direct) == 3


def test_a_backend_that_cannot_be_reached_is_not_called() -> None:
    """Calls through the balancer are measured none the less."""
    fleet = Fleet(["b", "b", "b"])
    made = by_turns(fleet, ["a"], 2, always)
    assert fleet.calls == [None, None, None]
    assert (len(made.through), made.direct, made.pairs) == (2, [], [])


@pytest.mark.parametrize("wrong", [None, "a"])
def test_failures_make_no_pairs_and_soon_an_end(wrong: str | None) -> None:
    """Three in a row are enough, whichever way they went."""
    made = by_turns(Fleet(wrong=[wrong]), ["a"], 50, always)
    assert (made.rounds, made.pairs, made.fails) == (3, [], True)


def test_it_ends_when_it_is_told_to() -> None:
    """Before a round, and before the very first call."""
    assert by_turns(Fleet(), ["a"], 50, times(3)).rounds == 2
    fleet = Fleet()
    assert by_turns(fleet, ["a"], 50, times(0)).rounds == 0
    assert fleet.calls == []


def test_the_others_are_seen_too() -> None:
    """Those that had no direct call: one to make ready, and a few that count."""
    fleet = Fleet()
    made = by_turns(fleet, ["a", "b"], 1, always)
    fleet.calls.clear()
    the_others(fleet, made, ["a", "b"], always)
    assert fleet.calls == ["b"] * 4
    assert [sample.backend for sample in made.direct] == ["a", "b", "b", "b"]
    the_others(fleet, made, ["a", "b", "c"], times(0))
    assert len(fleet.calls) == 4


def test_callers_at_once() -> None:
    """All of them call while the others do; each as often as wanted."""
    meeting = threading.Barrier(3, timeout=10.0)

    def call(backend: str | None) -> Sample:
        meeting.wait()
        assert backend is None
        return Sample("a")

    moments = iter([0.0, 3.0, 5.0, 4.0])
    crowd = at_once([call] * 3, 2, always, lambda: next(moments))
    assert (crowd.callers, len(crowd.samples), crowd.took_s) == (3, 6, 5.0)


def test_a_caller_whose_call_failed_leaves() -> None:
    """The failure is among the samples; a caller without time makes none."""
    crowd = at_once([Fleet(wrong=[None])], 5, always, lambda: 0.0)
    assert [sample.wrong for sample in crowd.samples] == ["no"]
    assert at_once([Fleet()], 5, times(2), lambda: 0.0).samples == (Sample("a", 1.0),) * 2


def test_the_rate_leaves_the_first_token_out() -> None:
    """Its wait is told by itself; of one token, or of all at once, there is none."""
    assert Sample("a", 5.0, (0.1, 0.1), tokens=3).rate == pytest.approx(10.0)
    assert Sample("a", 5.0, (0.1, 0.1), tokens=5).rate == pytest.approx(20.0)
    assert Sample("a", 5.0, (), tokens=1).rate is None
    assert Sample("a", 5.0, (0.0,), tokens=2).rate is None
