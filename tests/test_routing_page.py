"""The examples in docs/routing.md show what the text beside them says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from docs import situations

Doc = dict[str, Any]


def rows(doc: Doc) -> dict[str, Doc]:
    """By backend, in the order told."""
    return {row["name"]: row for row in doc["backends"]}


def adds_up(row: Doc) -> bool:
    """Whether the terms are what the total is made of."""
    seconds = {name: value for name, value in row["terms"].items() if name.endswith("_s")}
    return bool(seconds.pop("total_s") == pytest.approx(sum(seconds.values()), abs=1e-3))


@pytest.mark.parametrize("situation", [each for _, each in situations.SITUATIONS.values()])
def test_the_terms_add_up(situation: Callable[[], Doc]) -> None:
    """Of each candidate; the cheapest is first, and who is none says why."""
    found = situation()["backends"]
    priced = [row for row in found if row["order"] is not None]
    assert priced
    assert all(map(adds_up, priced))
    totals = [row["terms"]["total_s"] for row in priced]
    assert totals == sorted(totals)
    assert all(row["reason"] for row in found)


def test_warm_and_free() -> None:
    """It goes to the faster of two that are free."""
    doc = situations.warm_and_free()
    assert (doc["outcome"]["kind"], doc["outcome"]["backend"]) == ("now", "big")
    assert {row["kind"] for row in rows(doc).values()} == {"go"}


def test_held_for_the_faster() -> None:
    """It waits for the GPU, though the CPU could start."""
    doc = situations.held_for_the_faster()
    assert (doc["outcome"]["kind"], doc["outcome"]["backend"]) == ("queue", "gpu")
    assert (rows(doc)["gpu"]["kind"], rows(doc)["cpu"]["kind"]) == ("hold", "go")
    assert "cpu, where a slot is free" in doc["outcome"]["text"]


def test_cold_with_eviction() -> None:
    """The idle one goes, at a price; the busy one may not."""
    doc = situations.cold_with_eviction()
    assert (doc["outcome"]["kind"], doc["outcome"]["backend"]) == ("load", "calm")
    (victim,) = rows(doc)["calm"]["victims"]
    assert victim["model"] == "qwen2.5-coder:latest"
    assert victim["evict_s"] == rows(doc)["calm"]["terms"]["evict_s"] > 0
    assert rows(doc)["busy"]["order"] is None
    assert "no room" in rows(doc)["busy"]["reason"]


def test_another_context() -> None:
    """What goes is the same model with the other context."""
    doc = situations.another_context()
    assert (doc["outcome"]["kind"], doc["options"]) == ("load", {"num_ctx": 16384})
    best = rows(doc)[doc["outcome"]["backend"]]
    assert [victim["model"] for victim in best["victims"]] == [doc["model"]]
    assert "with other options" in best["state"]


def test_batch_gives_way() -> None:
    """It waits beside a slot that is free."""
    doc = situations.batch_gives_way()
    assert (doc["outcome"]["kind"], doc["call"]["waits"]) == ("queue", True)
    assert doc["call"]["id"] in situations.SITUATIONS["Batch gives way"][0]
    assert "batch" in doc["outcome"]["text"]
    shared = rows(doc)["shared"]
    assert (shared["kind"], shared["in_flight"], shared["slots"]) == ("go", 9, 10)


def test_what_the_command_says_is_what_was_asked() -> None:
    """The model at least."""
    for command, situation in situations.SITUATIONS.values():
        assert situation()["model"].removesuffix(":latest") == command.split()[1]
