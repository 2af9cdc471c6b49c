"""Quotes: who is cheapest and whom a load may put out, as decisions show it."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.core.domain import Verdict
from tests.core.bench import GB, backend, call, key, tag
from tests.core.planned import FAST, M, Planned, crowded, where


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


@pytest.mark.parametrize(("prompt", "goes"), [(100, "a"), (30_000, "b")])
def test_one_more_slot_is_tried_though_one_is_free_in_a_lower_tier(
    bench: Planned, prompt: int, goes: str
) -> None:
    """Unless that would take too long: what is tried has its price as all else has."""
    bench.shape(backend("a", slots=None, priority=200), backend("b", slots=None))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
        bench.holds(name, "m:1", context=32768)
    bench.speed("b", **FAST)
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    more = bench.submit(id="more", prompt_tokens=prompt)
    assert where(*running, more) == ["a", "a", goes]
    assert more.lease.run.probe is (goes == "a")


def test_nothing_is_tried_beside_a_free_slot_of_its_tier(bench: Planned) -> None:
    """Nor in a lower one, whatever its price."""
    bench.shape(
        backend("a", slots=None, priority=200),
        backend("b", slots=None, priority=200),
        backend("c", slots=None),
    )
    for name in "abc":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("b", prompt_rate=500.0, decode_rate=30.0)
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    clients = [bench.submit(id=f"s{n}") for n in range(3)]
    assert where(*running, *clients) == ["a", "a", "b", "b", "a"]


@pytest.mark.parametrize(("above", "goes"), [(100, "b"), (200, "")])
def test_a_guess_is_not_waited_for_beside_what_is_free_in_its_tier(
    bench: Planned, above: int, goes: str
) -> None:
    """Of tiers as well: what is free in a lower one only is in nobody's way."""
    bench.shape(
        backend("a", slots=1, priority=above),
        backend("b", slots=1),
        backend("c", slots=1, priority=1),
    )
    for name in "abc":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("b", prompt_rate=150.0, decode_rate=6.0)
    running = bench.submit(id="running", prompt_tokens=100)
    bench.pour(1.0, 60, running)
    assert where(running, bench.submit(id="next", prompt_tokens=100)) == ["a", goes]


def test_a_context_that_is_too_short_is_for_who_finds_no_other_in_any_tier(bench: Planned) -> None:
    """An answer that is cut off is worse than one from a lower tier."""
    bench.shape(backend("a", priority=200), "b")
    bench.up("a", "m:1", loaded=["m:1"])
    bench.up("b", "m:1")
    bench.holds("b", "m:1", context=32_768)
    assert where(bench.submit(prompt_tokens=8000)) == ["b"]
    bench.go_down("b")
    assert where(bench.submit(id="r2", prompt_tokens=8000)) == ["a"]


def test_a_lower_tier_that_costs_as_much_is_no_better(bench: Planned) -> None:
    """However much that is: equals are of the higher tier first, then by name."""
    bench.shape("a", backend("b", priority=200), backend("c", priority=200))
    for name in "abc":
        bench.up(name, "m:1", loaded=["m:1"])
    for name in "abc":
        bench.holds(name, "m:1", context=131_072)
    assert where(bench.submit(prompt_tokens=60_000)) == ["b"]
    assert bench.last.chosen.terms.total > bench.plan.knobs.tier_patience_s


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
        bench.holds(name, "m:1", context=8192)
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


@pytest.mark.parametrize(
    "more",
    [{}, {"path": "/api/embed", "embedding": True, "streaming": False}],
    ids=["chat", "embed"],
)
@pytest.mark.parametrize("context", [4096, None], ids=["known", "as it was trained"])
def test_of_a_prompt_that_is_too_long_no_more_counts_than_the_host_reads(
    bench: Planned, context: int | None, more: dict[str, Any]
) -> None:
    """A prompt of 10 MB is as dear as one that fills the context, whatever is asked of it."""
    bench.shape(backend("a"))
    bench.up("a", "m:1")
    if context:
        bench.holds("a", "m:1", context=context)
    bench.speed("a")
    told = []
    for tokens in (context or 32768, 2_600_000):
        asked = call(prompt_tokens=tokens, arrived_at=bench.clock(), **more)
        (option,) = bench.dispatcher.forecast(asked).options
        told.append(option.terms)
    assert told[0] == told[1]
    assert told[0]["new_tokens"] == (context or 32768)
    if context:
        giant, late = bench.submit(id="giant", prompt_tokens=2_600_000, **more), call()
        ((_, track),) = bench.plan.books.tracks.values()
        assert where(giant) == ["a"]
        assert (track.prompt, bench.plan.ledgers["a"].look(M, bench.clock())[0]) == (
            context,
            track.prefill_s,
        )
        (option,) = bench.dispatcher.forecast(late).options
        assert option.terms["backlog_s"] == track.prefill_s < 10.0


def test_each_input_to_embed_is_read_up_to_the_context(bench: Planned) -> None:
    """A thousand short ones are read whole."""
    bench.shape(backend("a"))
    bench.up("a", "m:1", loaded=["m:1"])
    embed: dict[str, Any] = {"path": "/api/embed", "embedding": True, "streaming": False}
    for inputs, read in ((1, 4096), (10, 40_960), (1000, 50_000)):
        asked = call(prompt_tokens=50_000, inputs=inputs, **embed)
        (option,) = bench.dispatcher.forecast(asked).options
        assert option.terms["new_tokens"] == read


def test_giants_before_it_send_nobody_away(bench: Planned) -> None:
    """Two of them on the one host: others wait, as they would behind two that fill the context."""
    bench.shape(backend("a"))
    bench.up("a", "m:1", loaded=["m:1"])
    for number in range(2):
        bench.submit(id=f"giant{number}", prompt_tokens=2_600_000)
    other = bench.submit(id="other", prompt_tokens=20)
    assert other.waits
    assert other.ticket is not None
    assert bench.dispatcher.estimate_s(other.ticket) < 60.0


def test_what_a_giant_costs_its_owner_is_settled_by_what_was_read(bench: Planned) -> None:
    """Whoever sends it pays in the queue for what the host has read, not for what was cut off."""
    bench.shape(backend("a"))
    bench.up("a", "m:1", loaded=["m:1"])
    paid = []
    for number, tokens in enumerate((4096, 2_600_000)):
        client = bench.submit(id=f"r{number}", prompt_tokens=tokens, fair_key=f"k{number}")
        bench.end(client, tokens_in=4096, tokens_out=100)
        paid.append(bench.plan.turns.fair.next_tag(f"k{number}"))
    assert paid[1] == pytest.approx(paid[0])
