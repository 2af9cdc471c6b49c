"""Lengths of answers: whose histogram counts, what is left, what is kept."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from balancer.core import lengths
from balancer.core.lengths import Lengths


@pytest.fixture
def learned() -> Lengths:
    """Nine in ten answers are of 20 tokens, the others of 1,000."""
    found = Lengths()
    for turn in range(500):
        found.learn("m", "ann", 1000 if turn % 10 == 0 else 20)
    return found


def test_nothing_known_is_two_hundred() -> None:
    """Before the first answer, and the more has come the more may come."""
    nothing = Lengths()
    assert nothing.mean("m", "ann") == 200
    assert nothing.left("m", "ann", 0) == 200
    assert nothing.left("m", "ann", 150) == 50
    assert nothing.left("m", "ann", 1000) == 300


def test_a_key_of_its_own_counts_from_eight_samples() -> None:
    """Until then it is the model's; other keys' answers go into that."""
    found = Lengths()
    for _ in range(100):
        found.learn("m", "ann", 500)
    for _ in range(7):
        found.learn("m", "bob", 10)
    assert found.mean("m", "bob") > 400
    found.learn("m", "bob", 10)
    assert found.mean("m", "bob") == 10
    assert found.mean("m", "eve") == pytest.approx((100 * 500 + 80) / 108)
    assert found.mean("other", "ann") == 200


def test_what_is_left_grows_once_the_short_ones_are_past(learned: Lengths) -> None:
    """An answer longer than most is one of the long ones: not mean minus what came."""
    assert learned.mean("m", "ann") == pytest.approx(118)
    assert learned.left("m", "ann", 0) == pytest.approx(118)
    assert learned.left("m", "ann", 50) == pytest.approx(950)
    assert learned.left("m", "ann", 400) == pytest.approx(600)


def test_past_everything_seen_it_is_a_guess(learned: Lengths) -> None:
    """Some, and more behind more."""
    assert learned.left("m", "ann", 30) == pytest.approx(970)
    assert learned.left("m", "ann", 3000) == 900
    few = Lengths()
    few.learn("m", "ann", 5)
    assert few.left("m", "ann", 30) == 20


def test_what_is_left_follows_new_samples() -> None:
    """The sums behind it are renewed, with few samples at each one."""
    found = Lengths()
    found.learn("m", "ann", 100)
    assert found.left("m", "ann", 0) == 100
    found.learn("m", "ann", 300)
    assert found.left("m", "ann", 0) == 200
    for _ in range(100):
        found.learn("m", "ann", 300)
    assert found.left("m", "ann", 0) == pytest.approx(298, abs=2)


def test_old_answers_fade() -> None:
    """After a few thousand, what was before hardly counts."""
    found = Lengths()
    for tokens in [1000] * 2000 + [10] * 8000:
        found.learn("m", "ann", tokens)
    assert found.mean("m", "ann") < 60


@pytest.mark.parametrize("tokens", [0, -5, 1_000_001])
def test_a_length_beyond_belief_is_discarded_and_told_once(tokens: int) -> None:
    """It changes nothing."""
    told = list[tuple[str, float]]()
    found = Lengths(discarded=lambda kind, value: told.append((kind, value)))
    found.learn("m", "ann", tokens)
    found.learn("m", "ann", tokens)
    assert told == [("length", tokens)]
    assert found.mean("m", "ann") == 200


def test_keys_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one not heard of for longest goes; the model's own histogram stays."""
    monkeypatch.setattr(lengths, "MOST_PAIRS", 3)
    found = Lengths()
    for _ in range(8):
        for who in ("ann", "bob", "eve"):
            found.learn("m", who, {"ann": 10, "bob": 100, "eve": 1000}[who])
    found.learn("m", "ann", 10)
    for _ in range(8):
        found.learn("m", "dan", 50)
    assert found.mean("m", "ann") == 10
    assert found.mean("m", "bob") == pytest.approx(found.mean("m", "nobody"))
    assert len(found._pairs) == 3


def test_residual_life_is_near_the_truth() -> None:
    """For lengths drawn from a long-tailed law, within a third of what really was left."""
    rng, found = random.Random(3), Lengths()
    drawn = [min(4000, 1 + int(rng.lognormvariate(5, 1))) for _ in range(1900)]
    for tokens in drawn:
        found.learn("m", "ann", tokens)
    for got in (0, 50, 150, 400, 900):
        rest = [tokens - got for tokens in drawn if tokens > got]
        assert found.left("m", "ann", got) == pytest.approx(sum(rest) / len(rest), rel=0.33)


def test_models_outlive_a_restart_and_keys_do_not(learned: Lengths) -> None:
    """As JSON; who asked for what is not written anywhere."""
    kept = json.dumps(learned.dump())
    again = Lengths()
    again.restore(json.loads(kept))
    assert "ann" not in kept
    assert again.mean("m", "bob") == pytest.approx(118)
    assert again.left("m", "bob", 50) == pytest.approx(950)


_COUNTS, _SUMS = [1.0] + [0.0] * 28, [3.0] + [0.0] * 28


@pytest.mark.parametrize(
    "row",
    [
        None,
        3,
        {"counts": _COUNTS},
        {"counts": _COUNTS[:5], "sums": _SUMS[:5]},
        {"counts": ["a"] * 29, "sums": _SUMS},
        {"counts": [-1.0, *_COUNTS[1:]], "sums": [-3.0, *_SUMS[1:]]},
        {"counts": [math.nan, *_COUNTS[1:]], "sums": _SUMS},
        {"counts": _COUNTS, "sums": [1e6, *_SUMS[1:]]},
        {"counts": [math.inf, *_COUNTS[1:]], "sums": [math.inf, *_SUMS[1:]]},
        {"counts": [0.0] * 29, "sums": [0.0] * 29},
    ],
)
def test_what_is_no_histogram_is_not_taken_up(row: Any) -> None:
    """It is told, and other models are taken up all the same."""
    told = list[str]()
    found = Lengths(discarded=lambda kind, _: told.append(kind))
    found.restore({"bad": row, "good": {"counts": _COUNTS, "sums": _SUMS}})
    assert (found.mean("bad", ""), found.mean("good", "")) == (200, 3)
    assert told == ["length"]
