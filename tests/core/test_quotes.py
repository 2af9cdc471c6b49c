"""Quotes: who is cheapest and whom a load may put out, as decisions show it."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.core.domain import Verdict
from tests.core.bench import GB, backend, key, tag
from tests.core.planned import FAST, Planned, crowded, where


def test_cold_with_the_cheapest_victim(bench: Planned) -> None:
    """Of the idle models the one goes that nobody asks for; the call follows its load."""
    bench.shape(backend("a", slots=1, vram_bytes=11 * GB))
    bench.up("a", "m:1", "n:1", "o:1", loaded=["m:1", "n:1"])
    for number in range(5):
        bench.end(bench.submit("m:1", id=f"m{number}"))
        bench.sleep(1.0)
    client = bench.submit("o:1")
    (load,) = bench.loads
    assert (load.backend, load.why, load.victims) == ("a", "call", (key("n:1"),))
    assert load.keep_alive is None  # the host's own default
    assert where(client) == [""]
    bench.end_load("m:1")
    assert where(client) == ["a"]
    assert client.ticket is not None
    assert client.ticket.cold


def test_nobody_is_sent_to_a_model_that_is_about_to_go(bench: Planned) -> None:
    """Its unload is under way: who asks for it now would only load it again."""
    crowded(bench)
    cold = bench.submit("o:1", id="cold")
    assert [load.victims for load in bench.loads] == [(key("m:1"),)]
    late = bench.submit("m:1", id="late")
    assert where(late) == [""]
    bench.loaded(verdict=Verdict.UNFIT)
    assert len(cold.errors) == 1
    assert where(late) == ["a"]


def test_what_a_stranger_uses_is_not_put_out(bench: Planned) -> None:
    """Its time to expire moved without us; also where we have not been for hours."""
    crowded(bench)
    bench.sleep(7200.0)
    bench.holds("a", "m:1", minute=6)
    client = bench.submit("o:1")
    bench.sleep(59.0)
    assert bench.loads == []
    bench.sleep(3.0)
    assert [load.key for load in bench.loads] == [key("o:1")]
    assert where(client) == [""]


def test_what_we_use_is_no_strangers(bench: Planned) -> None:
    """Our own calls move the time to expire as well."""
    crowded(bench)
    bench.end(bench.submit())
    bench.sleep(2.5)
    bench.holds("a", "m:1", minute=6)
    bench.submit("o:1")
    assert len(bench.loads) == 1


def test_what_was_loaded_for_somebody_is_not_put_out_before_he_came(bench: Planned) -> None:
    """Not even overloaded, when those that came later and can still be quick go first."""
    crowded(bench)
    old = [bench.submit("o:1", id=f"o{n}") for n in range(3)]
    bench.sleep(5.0)
    new = bench.submit("m:1", id="new")
    assert where(new) == [""]
    bench.sleep(1.0)
    late = bench.submit("m:1", id="late")
    bench.end_load()
    assert where(*old, new, late) == ["a", "a", "", "", ""]
    assert bench.loads == []


@pytest.mark.parametrize(("rate", "goes"), [(120.0, ""), (5.0, "b")])
def test_a_lower_tier_waits_for_its_turn(bench: Planned, rate: float, goes: str) -> None:
    """Until the higher one would take too long, though it is free and would be sooner."""
    bench.shape(backend("a", slots=1, priority=200), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("a", decode_rate=rate)
    first = bench.submit(prompt_tokens=100)
    second = bench.submit(id="r2", prompt_tokens=100)
    assert where(first, second) == ["a", goes]
    bench.go_down("a")
    assert where(second) == ["b"]
    first.lease.release()


def test_a_preference_decides_between_equals(bench: Planned) -> None:
    """And is worth half a second, no more."""
    bench.shape("a", backend("b", prefer=("m:*",)))
    for name in "ab":
        bench.up(name, "m:1", "n:1", loaded=["m:1", "n:1"])
    clients = [bench.submit("m:1"), bench.submit("n:1", id="r2")]
    assert where(*clients) == ["b", "a"]
    bench.speed("a", **FAST)
    assert where(bench.submit("m:1", id="r3", prompt_tokens=8000)) == ["a"]


def test_a_weight_counts_until_it_is_measured(bench: Planned) -> None:
    """Then measurement knows better."""
    bench.shape("a", backend("b", weight=2.0))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    client = bench.submit(prompt_tokens=1000)
    assert where(client) == ["b"]
    bench.end(client)
    bench.speed("b")
    assert where(bench.submit(id="r2", prompt_tokens=1000)) == ["a"]


def test_a_conversation_goes_where_it_was(bench: Planned) -> None:
    """As long as what is cached there is worth more than what it has to wait for."""
    bench.shape(*(backend(name, slots=4) for name in "ab"))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    beside = bench.submit(id="beside")
    first = bench.submit(id="first", prompt_tokens=4000, chain=((1, 1000), (2, 4000)))
    assert where(beside, first) == ["a", "b"]
    bench.end(beside, first)
    chain = ((1, 1000), (2, 4000), (3, 4100), (4, 4200))
    second = bench.submit(id="second", prompt_tokens=4200, chain=chain)
    assert where(second) == ["b"]
    assert bench.last.chosen.terms.cached == pytest.approx(4000)


def test_embeddings_are_sent_by_work_not_by_slots(bench: Planned) -> None:
    """Many short ones at once, on the one slot such a model has; of long ones few."""
    bench.shape(backend("a", slots=1))
    bench.up("a")
    row = tag("e:1", GB) | {"capabilities": ["embedding"]}
    bench.pool.note_tags("a", [row], bench.clock())
    bench.holds("a", "e:1")
    asked: dict[str, Any] = {"path": "/api/embed", "embedding": True, "streaming": False}
    short = [bench.submit("e:1", id=f"s{n}", prompt_tokens=50, **asked) for n in range(8)]
    assert where(*short) == ["a"] * 8
    bench.end(*short)
    long = [bench.submit("e:1", id=f"l{n}", prompt_tokens=8000, **asked) for n in range(8)]
    sent = where(*long).count("a")
    assert 1 <= sent < 8
    bench.end(*(client for client in long if client.leases))
    assert where(*long).count("a") > sent


def test_what_is_only_passed_on_has_no_slots(bench: Planned) -> None:
    """No GPU of ours is in the way."""
    bench.shape(backend("a", cloud=True, slots=1))
    bench.up("a", "m:1")
    clients = [bench.submit("far:cloud", id=f"r{n}") for n in range(20)]
    assert where(*clients) == ["a"] * 20
