"""Memory for models on one backend: what fits, what is learned of it, and who has to go."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.core.catalog import InMemory
from balancer.core.room import GB, Room, estimate
from tests.core.bench import key


def runner(model: str, gb: float, gpu_gb: float | None = None, context: int = 4096) -> InMemory:
    """One in memory; all of it on a GPU unless told."""
    vram = gb if gpu_gb is None else gpu_gb
    return InMemory(model, key(model), context, round(gb * GB), round(vram * GB), 0)


def victims(
    room: Room,
    memory: list[InMemory],
    need_gb: float,
    costs: dict[str, float] | None = None,
    *,
    keep: str = "",
    variant: str = "",
) -> list[str] | None:
    """Who goes for so much; *keep*: letters of those that must not, *variant*: of who must."""
    gone = room.victims(
        memory,
        lambda it: it.model in variant,
        lambda it: it.model not in keep,
        lambda it: (costs or {}).get(it.model, 1.0),
        round(need_gb * GB),
        lambda _: 4 * GB,
    )
    return None if gone is None else sorted(it.model for it in gone)


# -- what fits ----------------------------------------------------------------------------------


def test_an_estimate_counts_file_context_and_slots() -> None:
    """Every slot has its own context; what only embeds needs next to none."""
    assert (
        estimate(5 * GB, 2, 8192, embeds=False) == round(5.25 * GB) + 16384 * 131072 + 400_000_000
    )
    assert estimate(5 * GB, 2, None, embeds=False) == estimate(5 * GB, 2, 4096, embeds=False)
    assert estimate(GB, 2, 8192, embeds=True) == round(1.1 * GB) + 300_000_000


def test_what_is_configured_counts() -> None:
    """Whatever was seen beside."""
    room = Room(configured=20 * GB)
    room.observe([runner("a", 30)])
    assert room.fits(20 * GB, 1)
    assert not room.fits(20 * GB + 1, 1)


def test_what_is_not_known_is_worth_a_try() -> None:
    """But no more models at once than Ollama loads by default."""
    room = Room()
    assert room.fits(10**14, 3)
    assert not room.fits(1, 4)


def test_what_lay_there_whole_fits() -> None:
    """And what did not, does not; in between is worth a try."""
    room = Room()
    room.observe([runner("a", 10), runner("b", 8)])
    room.observe([runner("a", 10), runner("c", 14, gpu_gb=9)])
    assert (room.whole, room.too_much) == (18 * GB, 24 * GB)
    assert room.fits(18 * GB, 2)
    assert room.fits(23 * GB, 2)
    assert not room.fits(24 * GB, 2)


def test_bounds_come_closer_and_never_cross() -> None:
    """Less that did not fit counts, unless as much did lie there whole; more of it does not."""
    room = Room()
    room.observe([runner("a", 18)])
    room.overfull(30 * GB)
    room.overfull(24 * GB)
    room.overfull(40 * GB)
    room.overfull(18 * GB)
    assert (room.whole, room.too_much) == (18 * GB, 24 * GB)
    room.observe([runner("a", 25)])  # somebody put another card in
    assert (room.whole, room.too_much) == (25 * GB, None)


def test_a_host_without_accelerator_teaches_nothing_of_it() -> None:
    """All of it lies in the host's memory: that is not too much for the GPUs."""
    room = Room()
    room.observe([runner("a", 18, gpu_gb=0)])
    assert (room.whole, room.too_much) == (0, None)


def test_what_is_not_told_yet_is_not_summed_up() -> None:
    """A sum that lacks one says too little."""
    room = Room()
    room.observe([runner("a", 18), runner("b", 0)])
    assert room.whole == 0


def test_more_models_than_thought_may_lie_there() -> None:
    """Seen once, they fit."""
    room = Room()
    room.observe([runner(name, 1) for name in "abcde"])
    assert room.fits(5 * GB, 5)
    assert not room.fits(5 * GB, 6)


def test_what_was_pushed_out_despite_room_tells_how_many_there_may_be() -> None:
    """Where memory is configured, and well enough; else it was memory that lacked."""
    known, near, unknown = Room(configured=40 * GB), Room(configured=20 * GB), Room()
    for room in (known, near, unknown):
        room.pushed_out(18 * GB, 3)
    assert (known.most_models, known.too_much) == (2, None)
    assert (near.most_models, near.too_much) == (3, None)
    assert (unknown.most_models, unknown.too_much) == (3, 18 * GB)
    known.pushed_out(1 * GB, 1)
    assert known.most_models == 2


def test_sizes_are_remembered() -> None:
    """By context; one whose context is not known counts as any variant seen."""
    room = Room()
    room.observe([runner("a", 6), runner("b", 9, context=8192)])
    assert room.expected("a", 4096, 1) == 6 * GB
    assert room.expected("a", None, 1) == 6 * GB
    assert room.expected("b", 4096, 1) == 1
    assert room.size(runner("a", 0), 1) == 6 * GB
    assert room.size(runner("a", 7), 1) == 7 * GB
    assert room.size(runner("c", 0), 1) == 1


def test_sizes_do_not_grow_without_end() -> None:
    """Clients choose contexts."""
    room = Room()
    for context in range(1000):
        room.observe([runner("a", 6, context=context)])
    assert len(room._seen) <= 300


# -- who has to go ------------------------------------------------------------------------------


def test_nobody_goes_where_there_is_room() -> None:
    """However cheap it would be."""
    assert victims(Room(20 * GB), [runner("a", 6)], 10, {"a": 0.0}) == []
    assert victims(Room(20 * GB), [], 10) == []


def test_the_cheapest_go() -> None:
    """One after the other until it fits; ties by name."""
    memory = [runner(name, 6) for name in "abc"]
    assert victims(Room(20 * GB), memory, 6, {"a": 3, "b": 1, "c": 2}) == ["b"]
    assert victims(Room(20 * GB), memory, 12, {"a": 3, "b": 1, "c": 2}) == ["b", "c"]
    assert victims(Room(20 * GB), memory[::-1], 6) == ["a"]


def test_who_went_in_vain_stays() -> None:
    """A cheap small one makes no room; the dear large one that must go makes enough for it."""
    memory = [runner("a", 2), runner("b", 12), runner("c", 2)]
    costs = {"a": 1.0, "c": 2.0, "b": 3.0}
    assert victims(Room(17 * GB), memory, 12, costs) == ["b"]
    assert victims(Room(15 * GB), memory, 12, costs) == ["a", "b"]


def test_the_dearest_is_spared_first() -> None:
    """Where only one of two that went in vain can stay."""
    memory = [runner("a", 3), runner("b", 3), runner("c", 12)]
    assert victims(Room(15 * GB), memory, 12, {"a": 1, "b": 2, "c": 3}) == ["a", "c"]


def test_a_variant_of_the_same_model_always_goes() -> None:
    """There is room for both, but one runner of it."""
    memory = [runner("a", 2), runner("b", 2)]
    assert victims(Room(90 * GB), memory, 2, variant="b") == ["b"]
    assert victims(Room(90 * GB), memory, 2, variant="b", keep="b") is None


def test_a_variant_that_goes_makes_room() -> None:
    """Nobody else need go if that is enough."""
    memory = [runner("a", 8), runner("b", 8)]
    assert victims(Room(18 * GB), memory, 9, {"a": 0.0, "b": 9.0}, variant="b") == ["b"]


def test_who_may_not_go_stays() -> None:
    """Busy, pinned or used by strangers; if that leaves no room there is no way."""
    memory = [runner(name, 6) for name in "abc"]
    assert victims(Room(20 * GB), memory, 6, {"a": 0.0}, keep="a") == ["b"]
    assert victims(Room(20 * GB), memory, 12, keep="ab") is None
    assert victims(Room(20 * GB), memory, 6, keep="abc") is None


def test_too_many_models_push_one_out_too() -> None:
    """Whatever their size."""
    memory = [runner(name, 1) for name in "abc"]
    assert victims(Room(90 * GB), memory, 1) == ["a"]


def test_what_fits_nowhere_is_loaded_alone() -> None:
    """Ollama leaves a part of it to the CPU; else it would never be tried."""
    memory = [runner("a", 6), runner("b", 6)]
    assert victims(Room(20 * GB), memory, 30) == ["a", "b"]
    assert victims(Room(20 * GB), [], 30) == []
    assert victims(Room(20 * GB), memory, 30, keep="b") is None


# -- what is kept -------------------------------------------------------------------------------


def test_it_outlives_a_restart() -> None:
    """As JSON."""
    room, again = Room(), Room()
    room.observe([runner(name, 6) for name in "abcd"])
    room.overfull(30 * GB)
    again.restore(json.loads(json.dumps(room.dump())))
    assert again.dump() == room.dump() == {"whole": 24 * GB, "too_much": 30 * GB, "most_models": 4}


@pytest.mark.parametrize(
    "kept",
    [
        None,
        [],
        {"whole": -1, "too_much": -1, "most_models": 0},
        {"whole": "1", "too_much": 0, "most_models": 10**6},
        {"whole": 1e99, "too_much": 10**15, "most_models": 2.5},
    ],
)
def test_what_cannot_be_is_not_taken_up(kept: Any) -> None:
    """It is as if nothing had been kept."""
    room = Room()
    room.restore(kept)
    assert room == Room()
