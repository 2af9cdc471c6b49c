"""What was decided is kept, told only to who hears, and can be priced again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from balancer.core.cost import Kind
from balancer.core.decisions import (
    KEPT,
    MANY,
    TOLD,
    Decisions,
    listed,
    replay,
    terms_of,
    told,
    version,
)
from balancer.core.events import Event, Foreseen, Planned
from balancer.core.knobs import Knobs
from tests.core.deciding import KNOBS, NEED, choice, decision

KINDS: list[dict[str, Any]] = [
    {},
    {"in_flight": 2, "releases": [1.5, 4.0]},
    {"in_flight": 2, "may_probe": True},
    {"resident": False, "load_left_s": 3.0},
    {"resident": False, "may_load": True, "load_s": 6.0, "evict_s": 2.0},
    {"embeds": True, "work_s": 2.0, "mean_answer": 0.0},
    {"remote": True, "first_byte_s": 0.7},
    {"bonus_s": 0.5, "decoding": 3, "share": 2.0, "backlog_s": 1.0, "slow": 0.4},
]


@pytest.mark.parametrize("more", KINDS)
@pytest.mark.parametrize("promised", [0, 1, 3])
def test_a_price_in_the_record_can_be_found_again(more: dict[str, Any], promised: int) -> None:
    """To the last digit, whatever the backend was like."""
    weighed = choice("a", cached=120.0, promised=promised, **more)
    record = told(decision(weighed))
    assert replay(record, record.options[0], KNOBS) == terms_of(record.options[0]) == weighed.terms


def test_other_knobs_make_another_price() -> None:
    """So the record says which they were; equal ones are the same anywhere."""
    record = told(decision(choice("a")))
    other = Knobs(decode_weight=0.9)
    assert replay(record, record.options[0], other) != terms_of(record.options[0])
    assert version(other) != version(KNOBS) == version(Knobs()) == record.knobs


def test_the_record_tells_the_chosen_one_and_the_cheapest_others() -> None:
    """Five in all; ties go by name."""
    rates = {name: 1000.0 - 10 * number for number, name in enumerate("bcdefg")}
    found = [choice("z", prompt_rate=5.0), *(choice(n, prompt_rate=r) for n, r in rates.items())]
    made = decision(*found, choice("a", prompt_rate=1000.0))
    record = told(made)
    assert [each.backend for each in record.options] == ["z", "a", "b", "c", "d"]
    assert len(record.options) == TOLD
    assert (record.kind, record.backend, made.runner_up) == ("go", "z", "a")
    assert (record.tag, record.virtual, record.number, record.need) == (3.5, 3.0, 7, NEED._asdict())


def test_what_the_log_tells() -> None:
    """Of the chosen one; nobody is the runner-up of an only one."""
    made = decision(choice("a", cached=120.4))
    terms = made.chosen.terms
    told_ = Foreseen("go", "a", "", terms.total, 0.0, terms.first_token_s, 120)
    assert made.foreseen() == told_


def test_only_who_hears_is_told() -> None:
    """It is kept all the same."""
    heard: list[Event] = []
    kinds: set[type[Event]] = set()
    decisions = Decisions(heard.append, kinds.__contains__)
    made = decision(choice("a"), choice("b"))
    decisions.add(made)
    assert (heard, list(decisions.ring)) == ([], [made])
    kinds.add(Planned)
    decisions.add(made)
    assert heard == [told(made)]
    assert decisions.kinds == {"go": 2, "hold": 0, "load": 0}
    Decisions().add(made)  # to nobody


def test_the_ring_keeps_the_last() -> None:
    """And of many options no more than are told."""
    decisions = Decisions()
    for number in range(KEPT + 5):
        decisions.add(decision(choice("a"), call=f"r{number}"))
    assert len(decisions.ring) == KEPT
    assert [each.call for each in decisions.of(lambda _: True, 2)] == ["r1004", "r1003"]
    assert decisions.of(lambda each: each.call == "r0", 2) == []
    many = [choice(f"b{number}") for number in range(MANY + 1)]  # all alike
    dear = choice("dear", prompt_rate=1.0)
    for first, names in ((many[0], "b0 b1 b2 b3 b4"), (dear, "dear b0 b1 b2 b3")):
        decisions.add(decision(first, *(each for each in (*many, dear) if each is not first)))
        kept = decisions.ring[-1]
        assert len(kept.found) == TOLD
        assert [each.backend for each in kept.options] == names.split()


def test_terms_by_name_add_up() -> None:
    """All but the sum itself, and what is no time."""
    weighed = choice("a", cached=100.0, in_flight=2, releases=[2.0], bonus_s=0.5, decoding=2)
    assert weighed.terms.kind is Kind.HOLD
    terms = listed(weighed, NEED)
    seconds = {name: value for name, value in terms.items() if name.endswith("_s")}
    assert seconds.pop("total_s") == pytest.approx(sum(seconds.values()))
    assert (terms["new_tokens"], terms["cached_tokens"], terms["slots"]) == (400.0, 100.0, 2)


def test_how_well_it_foretells() -> None:
    """As a ratio, of each backend; what was not predicted does not count."""
    decisions = Decisions()
    decisions.foretold("a", 2.0, 3.0)
    decisions.foretold("a", 0.0, 3.0)
    assert (decisions.ratios["a"].sum, sum(decisions.ratios["a"].counts)) == (1.5, 1)
    decisions.slow["a"] = 0.5
    decisions.forget("a")
    decisions.forget("nobody")
    assert (decisions.ratios, decisions.slow) == ({}, {})


def test_a_need_may_differ() -> None:
    """The record holds what the call asked for then, not what it would ask for now."""
    made = decision(choice("a"))
    record = told(made)
    other = replace(record, need={**record.need, "prompt": 9.0})
    assert replay(other, other.options[0], KNOBS) != terms_of(record.options[0])
