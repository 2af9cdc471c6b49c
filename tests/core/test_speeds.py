"""Speeds: priors, what each sample teaches, the watch for stragglers, what is kept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.speeds import BOUNDS, Size, Speed, work

STANDARD = Size(4.9, 8.0)
LARGE = Size(9.8, 16.0)
SMALL = Size(0.3, 0.14)


@pytest.fixture
def speed() -> Speed:
    """A backend of which nothing is known."""
    return Speed()


# -- sizes and priors --------------------------------------------------------------------------


def test_work_grows_with_what_is_attended_to() -> None:
    """New tokens cost more behind cached ones, and the more of them there are."""
    assert work(1000, 0) == pytest.approx(1050)
    assert work(1000, 4000) == pytest.approx(1450)
    assert work(0, 4000) == 0


@pytest.mark.parametrize(
    ("size_bytes", "params_b", "size"),
    [
        (2_000_000_000, 3.2, Size(2.0, 3.2)),
        (3_000_000_000, None, Size(3.0, 5.0)),
        (0, None, Size(4.9, 8.0)),
        (0, 10.0, Size(6.0, 10.0)),
        (3_000_000_000, 0.0, Size(3.0, 5.0)),
    ],
)
def test_sizes_are_guessed_from_what_is_told(
    size_bytes: int, params_b: float | None, size: Size
) -> None:
    """File and parameters stand for each other; without either it is a standard model."""
    found = Size.of(size_bytes, params_b)
    assert (found.file_gb, found.params_b) == pytest.approx((size.file_gb, size.params_b))


def test_an_unknown_backend_has_the_priors(speed: Speed) -> None:
    """A pair never seen is guessed from the size, a tiny model not without end."""
    assert speed.prompt("m", STANDARD) == 1500
    assert speed.prompt("l", LARGE) == 750
    assert speed.prompt("s", SMALL) == 12 * 1500
    assert speed.decode("m", STANDARD) == 60
    assert speed.decode("l", LARGE) == pytest.approx(60 * 0.5**0.95)
    assert speed.decode("s", SMALL) == 6 * 60
    assert speed.tpot("m", STANDARD, 3) == pytest.approx(1.3 / 60)
    assert speed.tpot("m", STANDARD, 0.5) == pytest.approx(1 / 60)
    assert speed.load_s(STANDARD) == pytest.approx(5.9)


def test_another_size_under_the_same_name_is_another_guess(speed: Speed) -> None:
    """What is remembered of a model is not held against its next version."""
    assert speed.prompt("m", STANDARD) != speed.prompt("m", LARGE)


def test_without_an_accelerator_the_priors_are_a_processor_s(speed: Speed) -> None:
    """It is told at the start or found later, but not after a measurement."""
    speed.set_cpu()
    first = speed.edition
    speed.set_cpu()
    assert (speed.prompt_rate, speed.decode_rate, speed.penalty) == (75, 9, 0.5)
    assert speed.edition == first
    assert Speed(cpu=True).prompt_rate == 75
    measured = Speed()
    measured.learn_decode("m", STANDARD, 55, 1)
    measured.set_cpu()
    assert measured.decode_rate > 50


def test_the_operator_s_weight_counts_until_eight_samples() -> None:
    """Then measurement is better than opinion; and what is learned is not bent by it."""
    speed = Speed(weight=2.0)
    assert speed.prompt("m", STANDARD) == 3000
    for _ in range(8):
        assert speed.prompt("m", STANDARD) == 3000
        speed.learn_prompt("m", STANDARD, 1500)
    assert speed.prompt("m", STANDARD) == pytest.approx(1500)
    assert speed.decode("m", STANDARD) == 120


# -- samples -----------------------------------------------------------------------------------


def test_the_first_sample_is_believed_wholly(speed: Speed) -> None:
    """Most of the error is the backend's, so its other models are guessed better too."""
    speed.learn_prompt("m", STANDARD, 6000)
    assert speed.prompt("m", STANDARD) == pytest.approx(6000)
    assert speed.prompt("other", STANDARD) == pytest.approx(1500 * 4**0.7)


def test_no_sample_moves_it_by_more_than_eight_times(speed: Speed) -> None:
    """A single one may be a fluke."""
    speed.learn_prompt("m", STANDARD, 150_000)
    assert speed.prompt("m", STANDARD) == pytest.approx(12_000)


def test_prediction_converges_on_what_is_measured() -> None:
    """After two hundred noisy samples it is within a tenth for two unlike models."""
    rng, speed = random.Random(5), Speed()
    truth = {"m": (STANDARD, 3000.0, 100.0), "l": (LARGE, 900.0, 70.0)}
    for _ in range(200):
        model = rng.choice(("m", "l"))
        size, prompt, decode = truth[model]
        streams = rng.choice((1.0, 2.0, 3.5, 4.0))
        speed.learn_prompt(model, size, prompt * rng.uniform(0.9, 1.1))
        slowed = decode / (1 + 0.3 * (streams - 1))
        speed.learn_decode(model, size, slowed * rng.uniform(0.95, 1.05), streams)
    assert speed.penalty == pytest.approx(0.3, abs=0.06)
    for model, (size, prompt, decode) in truth.items():
        assert speed.prompt(model, size) == pytest.approx(prompt, rel=0.1)
        assert speed.decode(model, size) == pytest.approx(decode, rel=0.1)


def test_the_penalty_is_not_fitted_to_streams_that_were_alone(speed: Speed) -> None:
    """A slope needs points apart."""
    for rate in (50, 60, 70) * 10:
        speed.learn_decode("m", STANDARD, rate, 1.0)
    assert speed.penalty == 0.15


def test_loads_teach_the_load_rate(speed: Speed) -> None:
    """The first is believed, later ones count for a third."""
    speed.learn_load(STANDARD, 1.0 + 4.9 / 2)
    assert speed.load_rate == pytest.approx(2.0)
    for _ in range(20):
        speed.learn_load(STANDARD, 1.0 + 4.9 / 0.5)
    assert speed.load_s(STANDARD) == pytest.approx(10.8, rel=0.01)


@pytest.mark.parametrize("value", [0.0, -3.0, math.nan, math.inf, 200_001.0])
def test_a_sample_beyond_belief_is_discarded_and_told_once(value: float) -> None:
    """Whatever it is, nothing moves; the second of its kind is not told again."""
    told = list[tuple[str, float]]()
    speed = Speed(discarded=lambda kind, given: told.append((kind, given)))
    before = speed.edition
    for _ in range(2):
        speed.learn_prompt("m", STANDARD, value)
        speed.learn_decode("m", STANDARD, value, 1)
    assert [kind for kind, _ in told] == ["prompt_rate", "decode_rate"]
    assert speed.edition == before
    speed.learn_load(Size(4000.0, 8.0), 1.0)
    assert told[2] == ("load_rate", 20_000.0)


def test_each_change_has_an_edition(speed: Speed) -> None:
    """Whoever keeps predictions sees that they may be stale; nothing changes without."""
    seen = [speed.edition]
    changes: tuple[Callable[[], None], ...] = (
        lambda: speed.learn_prompt("m", STANDARD, 1000),
        lambda: speed.learn_decode("m", STANDARD, 50, 1),
        lambda: speed.learn_load(STANDARD, 4),
        lambda: speed.offloaded("m", True),
        lambda: speed.observe(0.1, 0),
    )
    for change in changes:
        change()
        assert speed.edition > seen[-1]
        seen.append(speed.edition)
    speed.offloaded("m", True)
    speed.prompt("m", STANDARD)
    assert speed.edition == seen[-1]


def test_models_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those measured the ones of longest ago go; what was predicted is predicted anew."""
    monkeypatch.setattr("balancer.core.speeds.MOST_MODELS", 5)
    speed = Speed()
    for number in range(50):
        speed.learn_prompt(str(number), STANDARD, 2000)
    for number in range(50):
        speed.prompt(str(number), STANDARD)
    assert [row[0] for row in speed.dump()["pairs"]] == ["45", "46", "47", "48", "49"]
    assert len(speed._known) <= 5


# -- partly offloaded --------------------------------------------------------------------------


def test_an_offloaded_model_is_slow_until_measured(speed: Speed) -> None:
    """It says nothing of the backend's others, and whole again it is as fast as before."""
    speed.learn_prompt("m", STANDARD, 3000)
    other = speed.prompt("other", STANDARD)
    speed.offloaded("m", True)
    assert speed.prompt("m", STANDARD) == pytest.approx(450)
    assert speed.decode("m", STANDARD) == pytest.approx(9)
    for _ in range(3):
        speed.learn_prompt("m", STANDARD, 200)
    assert speed.prompt("m", STANDARD) == pytest.approx(200, rel=0.01)
    assert speed.prompt("other", STANDARD) == other
    assert speed.decode("m", STANDARD) == pytest.approx(9)
    speed.offloaded("m", False)
    assert speed.prompt("m", STANDARD) == pytest.approx(3000)


# -- stragglers --------------------------------------------------------------------------------


def test_slowness_is_smoothed_and_forgiven_when_idle(speed: Speed) -> None:
    """One slow tick is none; several make it slow; without work it is tried again in time."""
    speed.observe(0.5, 0.0)
    assert speed.slow_factor == 1.0
    speed.observe(0.2, 0.5)
    assert speed.slow_factor == pytest.approx(0.475)
    assert speed.prompt("m", STANDARD) == pytest.approx(1500 * 0.475)
    for tick in range(22):
        speed.observe(None, 1.0 + tick / 2)
    assert speed.slow_factor < 0.7
    speed.observe(None, 20.0)
    assert speed.slow_factor == 1.0


def test_nothing_is_learned_while_slow(speed: Speed) -> None:
    """Or the past would be forgotten that it is compared with."""
    speed.observe(0.0, 0.0)
    speed.learn_prompt("m", STANDARD, 300)
    speed.learn_decode("m", STANDARD, 10, 1)
    assert (speed.prompt_rate, speed.decode_rate) == (1500, 60)


def test_slow_for_long_is_the_truth(speed: Speed) -> None:
    """After three minutes the rates themselves are lower, and it counts as well again."""
    for tick in range(360):
        speed.observe(0.5, tick / 2)
    assert speed.prompt_rate == 1500
    speed.observe(0.5, 180.5)
    assert speed.slow_factor == 1.0
    assert speed.prompt("m", STANDARD) == pytest.approx(750, rel=0.01)
    assert speed.decode("m", STANDARD) == pytest.approx(30, rel=0.01)


def test_dead_slow_is_still_some_speed(speed: Speed) -> None:
    """Nobody divides by nought."""
    for tick in range(50):
        speed.observe(0.0, tick / 2)
    assert speed.slow_factor == 0.05


# -- kept --------------------------------------------------------------------------------------


def test_what_was_learned_outlives_a_restart(speed: Speed) -> None:
    """As JSON; predictions are the same afterwards, and the next sample weighs no more."""
    for _ in range(9):
        speed.learn_prompt("m", STANDARD, 2500)
        speed.learn_decode("m", LARGE, 40, 2)
        speed.learn_load(STANDARD, 4)
    speed.offloaded("o", True)
    speed.learn_decode("o", LARGE, 3, 1)
    again = Speed(weight=3.0)
    again.offloaded("o", True)
    again.restore(json.loads(json.dumps(speed.dump())))
    for each in (speed, again):
        each.learn_prompt("m", STANDARD, 2000)
    for model in ("m", "o", "new"):
        assert again.prompt(model, STANDARD) == speed.prompt(model, STANDARD)
        assert again.tpot(model, LARGE, 3) == speed.tpot(model, LARGE, 3)
    assert again.load_s(LARGE) == speed.load_s(LARGE)


def test_what_was_never_measured_is_not_kept() -> None:
    """Priors may be others by now: a host with an accelerator put in is not slow for ever."""
    again = Speed()
    again.restore(Speed(cpu=True).dump())
    assert (again.prompt_rate, again.penalty) == (1500, 0.15)


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"samples": 3, "pairs": 4},
        {"samples": {"prompt": 5}, "prompt_rate": math.nan},
        {"samples": {"prompt": 5}, "prompt_rate": 1e9},
        {"samples": {"prompt": True}, "prompt_rate": 1000.0},
        {"samples": {"prompt": 5}, "prompt_rate": "fast"},
        {"pairs": [["m", False, 1000.0, 1.0, 1, 1], ["m"], 3, [1, False, 1.0, 1.0, 1, 1]]},
        {"pairs": [["m", False, 1.0, 1.0, -1, 1]]},
        {"samples": {"prompt": 5}, "prompt_rate": 10**400},
        {"samples": {"prompt": -(10**400)}, "prompt_rate": 1000.0},
    ],
)
def test_what_cannot_be_is_not_taken_up(kept: dict[str, Any]) -> None:
    """Malformed or out of bounds: the prior stands, and it is told."""
    told = list[str]()
    speed = Speed(discarded=lambda kind, _: told.append(kind))
    speed.restore(kept)
    assert speed.prompt("m", STANDARD) == 1500
    assert told


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["prompt", "decode", "load", "observe", "offloaded"]),
            st.sampled_from(["a", "b"]),
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(min_value=0, max_value=64),
        ),
        max_size=60,
    )
)
def test_no_samples_make_a_prediction_absurd(steps: list[tuple[str, str, float, float]]) -> None:
    """Whatever comes, speeds are finite and positive, and rates stay in bounds."""
    speed = Speed()
    for now, (kind, model, value, streams) in enumerate(steps):
        if kind == "prompt":
            speed.learn_prompt(model, LARGE, value)
        elif kind == "decode":
            speed.learn_decode(model, LARGE, value, streams)
        elif kind == "load":
            speed.learn_load(LARGE, value)
        elif kind == "observe":
            speed.observe(None if math.isnan(value) else value, 30.0 * now)
        else:
            speed.offloaded(model, streams > 32)
        for size in (SMALL, LARGE):
            for figure in (speed.prompt(model, size), speed.decode(model, size)):
                assert 0 < figure < math.inf
            assert 0 < speed.tpot(model, size, streams) < math.inf
            assert 0 < speed.load_s(size) < math.inf
        for kind in ("prompt_rate", "decode_rate", "load_rate", "penalty"):
            low, high = BOUNDS[kind]
            assert low <= getattr(speed, kind) <= high
