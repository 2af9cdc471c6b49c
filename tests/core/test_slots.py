"""Slots: what is believed, tried, and seen."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from balancer.core.slots import LONGEST_BACKOFF_S, MOST, SlotBelief


@pytest.fixture
def belief() -> SlotBelief:
    """A backend of which nothing is known; its model m has begun to answer at 0."""
    found = SlotBelief()
    found.first_byte("m", 1, 0.0, was_probe=False)
    return found


def fail(belief: SlotBelief, now: float) -> None:
    """A probe in vain, all at one time."""
    assert belief.may_probe("m", now)
    belief.probing("m", now)
    belief.first_byte("m", belief.believed("m"), now, was_probe=True)


# -- what is believed --------------------------------------------------------------------------


def test_two_are_believed_of_what_is_unknown(belief: SlotBelief) -> None:
    """Of another model, what is believed of the backend's others."""
    assert belief.believed("m") == 2
    assert belief.first_byte("m", 4, 1.0, was_probe=False)
    assert (belief.believed("m"), belief.believed("other")) == (4, 4)
    belief.starved("slim", 1, 1, 9.0, 0.0, 2.0)
    assert (belief.believed("slim"), belief.believed("other")) == (1, 4)


def test_nothing_above_the_configured_is_believed() -> None:
    """It is also what is believed at first; evidence may lower it."""
    belief = SlotBelief(3)
    assert belief.believed("m") == 3
    assert not belief.first_byte("m", 9, 0.0, was_probe=False)
    assert belief.believed("m") == 3
    assert not belief.may_probe("m", 100.0)
    assert belief.starved("m", 2, 2, 9.0, 0.0, 100.0)
    assert (belief.believed("m"), belief.believed("other")) == (2, 3)
    assert belief.may_probe("m", 120.0)
    belief.first_byte("m", 9, 121.0, was_probe=False)
    assert belief.believed("m") == 3


def test_more_may_be_configured_than_would_ever_be_believed() -> None:
    """The operator knows his host: that many are used from the first call on."""
    assert SlotBelief(4 * MOST).believed("m") == 4 * MOST


def test_a_new_configuration_counts_at_once(belief: SlotBelief) -> None:
    """Whoever kept the number sees by the edition that it may be stale."""
    belief.first_byte("m", 8, 1.0, was_probe=False)
    edition = belief.edition
    belief.configured = 4
    assert belief.edition > edition
    assert belief.configured == 4
    assert (belief.believed("m"), belief.believed("other")) == (4, 4)
    belief.configured = None
    assert belief.believed("m") == 8


def test_fewer_streams_than_believed_say_nothing(belief: SlotBelief) -> None:
    """There may have been no more to do; and no edition is spent on it."""
    edition = belief.edition
    assert not belief.first_byte("m", 2, 1.0, was_probe=False)
    assert not belief.first_byte("m", 1, 1.0, was_probe=False)
    assert (belief.believed("m"), belief.edition) == (2, edition)


def test_belief_has_an_end(belief: SlotBelief) -> None:
    """However many streams seem to run side by side."""
    belief.first_byte("m", 10_000, 1.0, was_probe=False)
    assert belief.believed("m") == MOST
    assert not belief.may_probe("m", 1e9)


# -- probes ------------------------------------------------------------------------------------


def test_the_first_probe_is_due_five_seconds_after_the_first_byte(belief: SlotBelief) -> None:
    """Of a model that has not answered yet, none."""
    assert not belief.may_probe("m", 4.9)
    assert belief.may_probe("m", 5.0)
    assert not belief.may_probe("silent", 1000.0)


def test_one_probe_at_a_time(belief: SlotBelief) -> None:
    """On the whole backend, until its first byte or its end."""
    belief.first_byte("n", 1, 0.0, was_probe=False)
    belief.probing("m", 5.0)
    assert belief.probe == "m"
    assert not belief.may_probe("m", 1000.0)
    assert not belief.may_probe("n", 1000.0)
    belief.first_byte("m", 2, 1000.0, was_probe=True)
    assert belief.may_probe("n", 1000.0)


def test_a_probe_that_decodes_beside_the_others_is_believed(belief: SlotBelief) -> None:
    """One more, and the next is tried after five seconds."""
    belief.probing("m", 5.0)
    assert belief.first_byte("m", 3, 6.0, was_probe=True)
    assert belief.believed("m") == 3
    assert not belief.may_probe("m", 10.9)
    assert belief.may_probe("m", 11.0)


def test_a_probe_that_had_to_wait_has_failed(belief: SlotBelief) -> None:
    """It answered when another had ended; the next wait is twice as long, to an end."""
    now = 5.0
    for wait_s in (20, 40, 80, 160, 320, 640, 1280, 1800, 1800):
        fail(belief, now)
        assert belief.believed("m") == 2
        assert not belief.may_probe("m", now + wait_s - 0.1)
        now += wait_s
    assert LONGEST_BACKOFF_S == 1800
    belief.probing("m", now)
    belief.first_byte("m", 3, now, was_probe=True)
    fail(belief, now + 5)
    assert belief.may_probe("m", now + 25)


def test_others_first_bytes_do_not_end_a_probe(belief: SlotBelief) -> None:
    """Nor do they speak against it; but they may prove it right."""
    belief.probing("m", 5.0)
    assert not belief.first_byte("m", 2, 5.5, was_probe=False)
    assert belief.probe == "m"
    assert belief.first_byte("m", 3, 6.0, was_probe=False)
    assert belief.probe == "m"
    assert not belief.first_byte("m", 3, 7.0, was_probe=True)
    assert belief.probe is None
    assert belief.may_probe("m", 11.0)


def test_a_probe_is_judged_by_what_was_believed_when_it_went(belief: SlotBelief) -> None:
    """Lowered meanwhile, two streams side by side are no success above the old belief."""
    belief.first_byte("m", 4, 0.0, was_probe=False)
    belief.probing("m", 5.0)
    belief.starved("m", 2, 2, 9.0, 0.0, 15.0)
    assert belief.first_byte("m", 3, 16.0, was_probe=True)
    assert belief.believed("m") == 3


def test_a_probe_without_first_byte_is_undecided(belief: SlotBelief) -> None:
    """Cancelled or failed: nothing is learned, and the wait is not doubled."""
    belief.probing("m", 5.0)
    belief.undecided("n", 6.0)
    assert belief.probe == "m"
    belief.undecided("m", 6.0)
    assert belief.probe is None
    assert not belief.may_probe("m", 25.9)
    fail(belief, 26.0)
    assert belief.may_probe("m", 46.0)


# -- starved -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "decoding", "since_s", "backlog_s", "slots"),
    [
        (2, 2, 1.6, 0.0, 2),  # waits behind two: two
        (2, 2, 1.4, 0.0, 4),  # not for long
        (2, 2, 5.0, 1.0, 4),  # behind prompts that take their time
        (2, 2, 5.6, 1.0, 2),
        (0, 2, 99.0, 0.0, 4),  # nobody waits
        (1, 4, 99.0, 0.0, 4),  # all slots are in use
        (1, 0, 99.0, 0.0, 4),  # alone: it waits for something else
        (2, 0, 99.0, 0.0, 1),  # not even the first gets on
    ],
)
def test_calls_that_wait_in_vain_lower_it(
    belief: SlotBelief, waiting: int, decoding: int, since_s: float, backlog_s: float, slots: int
) -> None:
    """Behind fewer streams than believed, for longer than the prompts ahead explain."""
    belief.first_byte("m", 4, 1.0, was_probe=False)
    edition = belief.edition
    lowered = belief.starved("m", waiting, decoding, since_s, backlog_s, 50.0)
    assert belief.believed("m") == slots
    assert lowered == (slots < 4) == (belief.edition > edition)


def test_what_was_lowered_is_not_tried_at_once(belief: SlotBelief) -> None:
    """Those that wait are in the way yet."""
    belief.starved("m", 1, 1, 9.0, 0.0, 50.0)
    assert not belief.may_probe("m", 69.9)
    assert belief.may_probe("m", 70.0)


def test_headers_that_come_early_make_no_slot(belief: SlotBelief) -> None:
    """A backend with two slots is never believed to have three, however calls come and go."""
    rng = random.Random(6)
    decoding, queued, now = 0, list[bool](), 0.0
    for _ in range(5000):
        now += rng.uniform(0.1, 2.0)
        slots = belief.believed("m")
        in_flight = decoding + len(queued)
        if in_flight < slots:
            queued.append(False)
        elif in_flight == slots and belief.may_probe("m", now):
            belief.probing("m", now)
            queued.append(True)
        while queued and decoding < 2:
            decoding += 1
            belief.first_byte("m", decoding, now, was_probe=queued.pop(0))
        if decoding and rng.random() < 0.4:
            decoding -= 1
        assert belief.believed("m") == 2


def test_real_slots_are_found_and_lost_again(belief: SlotBelief) -> None:
    """Under load belief climbs to what the backend takes, and falls to what is left of it."""
    for slots in (6, 3):
        decoding, now = 0, 1000.0 * slots
        for _ in range(400):
            now += 1.0
            wanted = belief.believed("m")
            probe = belief.may_probe("m", now)
            if probe:
                belief.probing("m", now)
            decoding = min(wanted, slots)
            waiting = wanted - decoding
            belief.starved("m", waiting, decoding, 9.0, 0.0, now)
            if probe:
                decoding = min(wanted + 1, slots)
                belief.first_byte("m", decoding, now, was_probe=True)
        assert belief.believed("m") == slots


# -- kept --------------------------------------------------------------------------------------


def test_belief_outlives_a_restart(belief: SlotBelief) -> None:
    """As JSON; also for models it was never asked about."""
    belief.first_byte("m", 5, 1.0, was_probe=False)
    again = SlotBelief()
    again.restore(json.loads(json.dumps(belief.dump())))
    assert (again.believed("m"), again.believed("other")) == (5, 5)


@pytest.mark.parametrize("slots", [0, -1, 65, 2.5, "4", None, True, [3]])
def test_what_cannot_be_is_not_taken_up(slots: Any) -> None:
    """Neither a malformed number nor a malformed table."""
    belief = SlotBelief()
    belief.restore({"believed": {"m": slots}})
    belief.restore({"believed": slots})
    belief.restore({})
    assert (belief.believed("m"), belief.edition) == (2, 0)


def test_models_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one believed in for longest goes."""
    monkeypatch.setattr("balancer.core.slots.MOST_MODELS", 3)
    belief = SlotBelief()
    for model in "abcdef":
        belief.first_byte(model, 5, 0.0, was_probe=False)
        belief.starved(model, 2, 1, 9.0, 0.0, 0.0)
    assert set(belief.dump()["believed"]) == {"d", "e", "f"}
    assert len(belief._trying) == 3
