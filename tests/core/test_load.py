"""Load: what runs on a backend, what it takes, and when it is let be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.load import FADE_S, Load, PeakEwma
from balancer.core.slots import DEFAULT
from tests.core.clocks import ManualClock

A, B = "registry.ollama.ai/library/a:latest", "registry.ollama.ai/library/b:latest"


@pytest.fixture
def clock() -> ManualClock:
    """Time by hand."""
    return ManualClock()


@pytest.fixture
def load(clock: ManualClock) -> Load:
    """A backend configured for four slots."""
    return Load(clock, 4)


# -- in flight ---------------------------------------------------------------------------------


def test_counts_by_model_and_in_all(load: Load) -> None:
    """Calls are counted per model and for the whole backend."""
    load.enter(A)
    load.enter(A)
    load.enter(B)
    assert (load.in_flight(A), load.in_flight(B), load.in_flight("c"), load.in_flight()) == (
        2,
        1,
        0,
        3,
    )
    assert load.counts() == {A: 2, B: 1}


def test_leaves_nothing_behind(load: Load) -> None:
    """After the last call of a model, no trace of it is kept."""
    load.enter(A)
    load.leave(A)
    assert (load.in_flight(), load.counts()) == (0, {})


def test_never_counts_below_zero(load: Load) -> None:
    """Leaving without having entered is a bug, and said so."""
    with pytest.raises(ValueError, match="in flight"):
        load.leave(A)
    assert (load.in_flight(), load.counts()) == (0, {})


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([A, B])), max_size=50))
def test_the_sum_is_the_parts(steps: list[tuple[bool, str]]) -> None:
    """Whatever comes and goes, the whole is the sum of its models and never negative."""
    load = Load(ManualClock())
    for enters, model in steps:
        if enters or not load.in_flight(model):
            load.enter(model)
        else:
            load.leave(model)
        assert load.in_flight() == load.in_flight(A) + load.in_flight(B) >= 0


# -- slots -------------------------------------------------------------------------------------


def test_slots_are_configured_or_two(load: Load, clock: ManualClock) -> None:
    """Without a configured number two calls at once are believed; a new number counts at once."""
    assert load.slots(A) == 4
    assert Load(clock).slots(A) == DEFAULT == 2
    load.configured = 8
    assert load.slots(A) == 8
    load.configured = None
    assert load.slots(A) == 2


def test_slots_ramp_up_after_a_recovery(load: Load, clock: ManualClock) -> None:
    """One slot at first, all of them after 30 s, in equal steps between."""
    load.start_ramp()
    seen = []
    for _ in range(7):
        seen.append(load.slots(A))
        clock.advance(5)
    assert seen == [1, 1, 2, 2, 3, 3, 4]


def test_one_slot_stays_one(clock: ManualClock) -> None:
    """A backend with a single slot has nothing to ramp."""
    load = Load(clock, 1)
    load.start_ramp()
    assert (load.slots(A), load.next_change_s()) == (1, math.inf)


@given(slots=st.integers(1, 64), start=st.floats(0, 1e6))
def test_every_step_of_the_ramp_is_foretold(slots: int, start: float) -> None:
    """Waking exactly when the next change is foretold finds one slot more, each time."""
    clock = ManualClock(start)
    load = Load(clock, slots)
    load.start_ramp()
    for expected in range(1, slots):
        assert load.slots(A) == expected
        clock.advance(load.next_change_s())
    assert load.slots(A) == slots
    assert load.next_change_s() == math.inf


def test_what_is_believed_of_each_model_has_its_own_steps(clock: ManualClock) -> None:
    """The next slot of any model is foretold where none is configured."""
    load = Load(clock)
    load.belief.restore({"believed": {A: 4, B: 3}})
    load.start_ramp()
    seen = []
    while (left_s := load.next_change_s()) < math.inf:
        clock.advance(left_s)
        seen.append((load.slots(A), load.slots(B)))
    assert seen == [(2, 1), (2, 2), (3, 2), (4, 3)]


# -- speed -------------------------------------------------------------------------------------


def test_nothing_known_is_zero(load: Load) -> None:
    """Before a sample, the estimate says so."""
    assert (load.first_byte_s(A), load.first_byte_s(None)) == (0, 0)


def test_bad_news_count_at_once(load: Load) -> None:
    """A slower first byte replaces the estimate; each model has its own, the worst is shown."""
    load.note_first_byte(A, 0.5)
    load.note_first_byte(A, 3.0)
    load.note_first_byte(B, 1.0)
    assert (load.first_byte_s(A), load.first_byte_s(B), load.first_byte_s(None)) == (3.0, 1.0, 3.0)


def test_good_news_count_by_half_lives(load: Load, clock: ManualClock) -> None:
    """A faster first byte draws the estimate half-way down for each 10 s since the last one."""
    load.note_first_byte(A, 9.0)
    clock.advance(10)
    load.note_first_byte(A, 1.0)
    assert load.first_byte_s(A) == pytest.approx(5.0)
    clock.advance(20)
    load.note_first_byte(A, 1.0)
    assert load.first_byte_s(A) == pytest.approx(2.0)


def test_beside_others_only_good_news_count(load: Load, clock: ManualClock) -> None:
    """A first byte that had to wait for other calls says nothing of the backend's speed."""
    load.note_first_byte(A, 1.0)
    load.note_first_byte(A, 9.0, alone=False)
    assert load.first_byte_s(A) == 1.0
    load.note_first_byte(A, 0.5, alone=False)
    clock.advance(10)
    load.note_first_byte(A, 0.5, alone=False)
    assert load.first_byte_s(A) < 1.0


def test_what_was_believed_of_an_unused_backend_fades(load: Load, clock: ManualClock) -> None:
    """Who is avoided for one slow answer would else never get to show a quick one."""
    load.note_first_byte(A, 8.0)
    clock.advance(FADE_S)
    assert load.first_byte_s(A) == pytest.approx(4.0)
    clock.advance(2 * FADE_S)
    assert load.first_byte_s(A) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1))
def test_the_estimate_stays_within_the_samples(samples: list[tuple[float, float]]) -> None:
    """Never below the latest sample, never above the largest."""
    ewma, now = PeakEwma(10.0), 0.0
    for sample, passed_s in samples:
        now += passed_s
        ewma.observe(sample, now)
        assert sample <= ewma.value <= max(s for s, _ in samples) + 1e-9


@pytest.mark.parametrize("sample", [-0.1, math.nan, math.inf])
def test_impossible_times_are_refused(load: Load, sample: float) -> None:
    """A time that cannot be is a bug of whoever measured it."""
    with pytest.raises(ValueError, match="finite"):
        load.note_first_byte(A, sample)


# -- saturation --------------------------------------------------------------------------------


def cool_offs(load: Load, clock: ManualClock, count: int, model: str | None = A) -> list[float]:
    """The lengths of *count* cool-offs, one right after the other."""
    lengths = []
    for _ in range(count):
        load.note_busy(model)
        lengths.append(load.cooling_s(model))
        clock.advance(lengths[-1])
        assert load.cooling_s(model) == 0
    return lengths


def test_cools_off_longer_each_time(load: Load, clock: ManualClock) -> None:
    """1, 2, 4, 8 s, and not longer; other models are not touched."""
    assert cool_offs(load, clock, 5) == pytest.approx([1, 2, 4, 8, 8])
    load.note_busy(A)
    assert load.cooling_s(B) == 0


def test_the_whole_backend_cools_off_all_models(load: Load) -> None:
    """What is noted of the backend holds for each model; asked for all, the longest counts."""
    load.note_ok(A)
    load.note_busy(None)
    assert load.cooling_s(A) == load.cooling_s(None) == pytest.approx(1)
    load.note_busy(B, 5.0)
    assert load.cooling_s(A) == pytest.approx(1)
    assert load.cooling_s(B) == load.cooling_s(None) == pytest.approx(5)


def test_a_burst_of_refusals_is_one(load: Load, clock: ManualClock) -> None:
    """Twenty calls refused at the same moment do not add up to 8 s."""
    for _ in range(20):
        load.note_busy(A)
    assert load.cooling_s(A) == pytest.approx(1)
    clock.advance(1)
    load.note_busy(A)
    assert load.cooling_s(A) == pytest.approx(2)


def test_a_rest_that_is_over_is_forgotten(load: Load, clock: ManualClock) -> None:
    """Once answers have taken back what refusals added; not while it lasts."""
    assert not load.is_resting
    load.note_busy(A)
    load.note_ok(A)
    assert load.is_resting
    clock.advance(1.0)
    load.note_ok(B)
    assert load.is_resting
    load.note_ok(A)
    assert not load.is_resting
    assert cool_offs(load, clock, 2) == pytest.approx([1, 2])


@pytest.mark.parametrize(("asked_s", "cools_s"), [(20.0, 20), (3600.0, 60), (0.0, 1), (-5.0, 1)])
def test_retry_after_is_honoured(load: Load, asked_s: float, cools_s: float) -> None:
    """What the backend asks for counts, up to a minute, and never shortens our own."""
    load.note_busy(A, asked_s)
    assert load.cooling_s(A) == pytest.approx(cools_s)


def test_an_answer_relaxes(load: Load, clock: ManualClock) -> None:
    """Each good answer takes one step back, for model and backend; a cool-off under way stays."""
    cool_offs(load, clock, 4)
    cool_offs(load, clock, 4, model=None)
    load.note_ok(A)
    load.note_busy(A)
    assert load.cooling_s(A) == pytest.approx(4)
    load.note_ok(A)
    assert load.cooling_s(A) == pytest.approx(4)
    clock.advance(4)
    for _ in range(5):
        load.note_ok(A)
    assert cool_offs(load, clock, 1) == pytest.approx([1])
    assert cool_offs(load, clock, 1, model=None) == pytest.approx([1])


def test_the_end_of_a_cool_off_is_foretold(load: Load, clock: ManualClock) -> None:
    """The next change is the first cool-off to end or slot to come; past ones do not count."""
    assert load.next_change_s() == math.inf
    load.note_busy(A)
    load.note_busy(B, 3.0)
    assert load.next_change_s() == pytest.approx(1)
    clock.advance(1)
    assert load.next_change_s() == pytest.approx(2)
    load.configured = 31
    load.start_ramp()
    assert load.next_change_s() == pytest.approx(1)
