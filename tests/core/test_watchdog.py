"""The progress watchdog: whose silence is suspect, and when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.watchdog import MAX_SAMPLES, Suspect, Waits, Watchdog
from tests.core.clocks import ManualClock

LLAMA, PHI = "llama", "phi"


class Bench:
    """A watchdog, its clock, and calls by short names."""

    def __init__(self, first_byte_s: float = 30.0) -> None:
        self.clock = ManualClock()
        self.dog = Watchdog(self.clock, first_byte_s)
        self.count = 0

    def call(
        self,
        backend: str = "a",
        model: str = LLAMA,
        *,
        prompt: int = 10,
        streaming: bool = True,
        output: int | None = None,
    ) -> int:
        """A call begins."""
        self.count += 1
        self.dog.began(self.count, backend, model, prompt, streaming, output)
        return self.count

    def suspects(self, *down: str) -> list[tuple[str, str]]:
        """Who is suspect now."""
        return [(s.backend, s.model) for s in self.dog.suspects(self.clock.now, down)]

    def suspect_after(self, *down: str) -> float:
        """Seconds from now until somebody is suspect, to the half second; inf: an hour passes."""
        began_at = self.clock.now
        while self.clock.now < began_at + 3600:
            if self.suspects(*down):
                return self.clock.now - began_at
            self.clock.advance(0.5)
        return math.inf

    def learn(self, wait_s: float, count: int = 8, *, streaming: bool = True) -> None:
        """Calls that begin to answer after *wait_s*."""
        for _ in range(count):
            lease = self.call("z", streaming=streaming)
            self.clock.advance(wait_s)
            self.dog.moved(lease)
            self.dog.ended(lease)


@pytest.fixture
def bench() -> Bench:
    """A watchdog with the default of 30 s in all."""
    return Bench()


def test_silence_is_suspect(bench: Bench) -> None:
    """A short prompt without a byte is suspect after 20 s, which leaves 10 s for the canary."""
    bench.call()
    bench.clock.advance(19.9)
    assert bench.suspects() == []
    bench.clock.advance(0.1)
    [suspect] = bench.dog.suspects(bench.clock.now)
    assert suspect == Suspect("a", LLAMA, bench.clock.now - 1000.0, others_move=False)


@pytest.mark.parametrize(
    ("in_all_s", "silence_s"), [(30, 20), (60, 50), (12, 6), (math.inf, math.inf)]
)
def test_the_canary_has_its_time(in_all_s: float, silence_s: float) -> None:
    """Silence and canary make up the configured time; a short one is halved, none is for ever."""
    bench = Bench(in_all_s)
    bench.call()
    assert bench.dog.silence_s == silence_s
    assert bench.suspect_after() == silence_s
    bench.dog.first_byte_s = 40.0
    assert bench.dog.silence_s == 30.0


def test_nothing_runs_nothing_is_suspect(bench: Bench) -> None:
    """An idle backend is silent by right, and so is one whose calls have ended."""
    assert bench.suspect_after() == math.inf
    bench.dog.ended(bench.call())
    assert bench.suspect_after() == math.inf


def test_a_begun_stream_is_the_idle_limits(bench: Bench) -> None:
    """After its first byte a call that stalls is not the watchdog's business."""
    bench.dog.moved(bench.call())
    assert bench.suspect_after() == math.inf


def test_a_moving_stream_excuses_those_who_wait(bench: Bench) -> None:
    """As long as one call of the group moves, others are only queued; then silence counts."""
    stream = bench.call()
    bench.call()
    for _ in range(60):
        bench.clock.advance(1)
        bench.dog.moved(stream)
        assert bench.suspects() == []
    assert bench.suspect_after() == 20


def test_a_stalled_stream_excuses_nobody(bench: Bench) -> None:
    """A stream that began and stopped leaves the waiting ones as silent as they are."""
    bench.dog.moved(bench.call())
    bench.clock.advance(1)
    bench.call()
    assert bench.suspect_after() == 20


def test_silence_counts_from_the_oldest_who_waits(bench: Bench) -> None:
    """A newcomer does not start the clock again; one who leaves takes his part of it along."""
    first = bench.call()
    bench.clock.advance(15)
    bench.call()
    assert bench.suspect_after() == 5
    bench.dog.ended(first)
    assert bench.suspects() == []
    assert bench.suspect_after() == 15


def test_groups_are_apart(bench: Bench) -> None:
    """The same model elsewhere, or another model here, does not speak for a group."""
    bench.call()
    other, elsewhere = bench.call(model=PHI), bench.call("b")
    for _ in range(25):
        bench.clock.advance(1)
        bench.dog.moved(other)
        bench.dog.moved(elsewhere)
    assert bench.suspects() == [("a", LLAMA)]


def test_tells_whether_others_move(bench: Bench) -> None:
    """Bytes of another model there within 10 s clear the backend, not those of another backend."""
    bench.call()
    bench.call("b", PHI)
    other = bench.call(model=PHI)
    bench.clock.advance(14)
    bench.dog.moved(other)
    bench.clock.advance(10)
    found = {s.backend: s.others_move for s in bench.dog.suspects(bench.clock.now)}
    assert found == {"a": True, "b": False}
    bench.clock.advance(0.1)
    assert not any(s.others_move for s in bench.dog.suspects(bench.clock.now))


def test_a_good_canary_starts_the_clock_again(bench: Bench) -> None:
    """Cleared, a group has its whole allowance once more; an unknown one is ignored."""
    bench.call()
    assert bench.suspect_after() == 20
    assert bench.suspect_after() == 0
    bench.dog.cleared("a", LLAMA)
    bench.dog.cleared("a", PHI)
    assert bench.suspect_after() == 20


def test_a_call_is_lost_after_twice_its_time(bench: Bench) -> None:
    """Waiting for double its own allowance it is given up; clearing the group does not save it."""
    lost = bench.call()
    bench.call(prompt=2500)
    bench.dog.moved(bench.call())
    bench.clock.advance(20)
    late = bench.call()
    bench.dog.cleared("a", LLAMA)
    bench.clock.advance(19.9)
    assert bench.dog.lost("a", LLAMA) == []
    bench.clock.advance(0.1)
    assert bench.dog.lost("a", LLAMA) == [lost]
    bench.dog.ended(lost)
    bench.clock.advance(20)
    assert bench.dog.lost("a", LLAMA) == [late]
    assert bench.dog.lost("a", PHI) == []


# -- allowances --------------------------------------------------------------------------------


def test_a_long_prompt_takes_its_time(bench: Bench) -> None:
    """A CPU reads 25 tokens a second; the longest prompt that waits sets the group's allowance."""
    bench.call(prompt=1000)
    bench.call(prompt=5)
    assert bench.suspect_after() == 40


@pytest.mark.parametrize(
    ("prompt", "output", "after_s"),
    [(250, None, 1810), (250, 500, 260), (0, 20, 20), (0, 0, 20), (0, -1, 1800)],
)
def test_a_whole_answer_takes_its_time(
    bench: Bench, prompt: int, output: int | None, after_s: float
) -> None:
    """Without streaming the answer's length counts too: its limit at 2/s, or half an hour."""
    bench.call(prompt=prompt, streaming=False, output=output)
    assert bench.suspect_after() == after_s


def test_learns_what_is_usual(bench: Bench) -> None:
    """After eight calls a model that always takes 15 s to begin has four times that."""
    bench.learn(15, 7)
    bench.call()
    assert bench.suspect_after() == 20
    bench.learn(15, 1)
    bench.dog.cleared("a", LLAMA)
    assert bench.suspect_after() == 60


def test_learns_by_model_and_streaming(bench: Bench) -> None:
    """What one model needs, or a whole answer, says nothing of another or of a stream."""
    bench.learn(60, streaming=False)
    bench.call()
    assert bench.suspect_after() == 20
    bench = Bench()
    bench.learn(60)
    bench.call(model=PHI)
    assert bench.suspect_after() == 20


def test_short_answers_do_not_hurry_long_ones(bench: Bench) -> None:
    """What was learned never shortens an allowance."""
    bench.learn(0.5, 100, streaming=False)
    bench.call(streaming=False, prompt=0)
    assert bench.suspect_after() == 1800


def test_a_long_answer_excuses_a_canary_and_not_the_others(bench: Bench) -> None:
    """A stream behind an answer without a limit is suspect in time, but proves nothing."""
    bench.call(streaming=False, prompt=0)
    stream = bench.call(prompt=5)
    assert bench.suspect_after() == 20
    (suspect,) = bench.dog.suspects(bench.clock(), ())
    assert suspect.excused
    bench.clock.advance(20)
    assert bench.dog.lost("a", LLAMA) == [stream]
    (hopeless,) = bench.dog.suspects(bench.clock(), {"a"})
    assert not hopeless.excused


def test_a_backend_that_is_down_has_no_excuse(bench: Bench) -> None:
    """Where checks fail, prompts and learning count no more, on that backend alone."""
    bench.call(prompt=100_000)
    bench.call("b", prompt=100_000)
    assert bench.suspect_after("a", "c") == 20
    assert bench.suspects("a", "c") == [("a", LLAMA)]


def test_strangers_are_ignored(bench: Bench) -> None:
    """News of calls that have ended, or never were, change nothing."""
    bench.dog.moved(7)
    bench.dog.ended(7)
    lease = bench.call()
    bench.dog.ended(lease)
    bench.dog.moved(lease)
    bench.dog.ended(lease)
    assert bench.suspect_after() == math.inf


@given(st.lists(st.tuples(st.sampled_from("bme"), st.integers(0, 9), st.integers(0, 2))))
def test_nothing_is_kept_of_what_ended(steps: list[tuple[str, int, int]]) -> None:
    """Whatever happens in whatever order, the calls kept are those that run, in their groups."""
    bench, running = Bench(), set()
    for what, lease, place in steps:
        bench.clock.advance(1)
        if what == "b" and lease not in running:
            bench.dog.began(lease, "ab"[place % 2], LLAMA if place else PHI, 1, True, None)
            running.add(lease)
        elif what == "m":
            bench.dog.moved(lease)
        elif what == "e":
            bench.dog.ended(lease)
            running.discard(lease)
        assert set(bench.dog._calls) == running
        grouped = [lease for group in bench.dog._groups.values() for lease in group.calls]
        assert set(grouped) == running
        assert len(grouped) == len(running)
        assert all(group.calls for group in bench.dog._groups.values())


def test_waits_are_bounded_and_ranked() -> None:
    """Of the last 256 samples, p99 is the third largest; older ones are forgotten."""
    waits = Waits()
    for wait_s in range(1000):
        waits.note(float(wait_s))
    assert waits.p99_s == 997
    for _ in range(MAX_SAMPLES):
        waits.note(1.0)
    assert waits.p99_s == 1.0
