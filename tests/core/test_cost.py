"""Prices: each state by hand, and that a recorded decision can be priced again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from balancer.core.cost import GO, HOLD, LOAD, Need, Quote, Terms, price
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from tests.core.bench import GB, Bench, backend, key, outcome

KNOBS = Knobs(decode_weight=0.5, disturb_weight=0.25, eviction_weight=2.0)
NEED = Need(1000.0, 100.0, 1100.0)
READ_S = 1000 * 1.05 / 1000 + 0.02  # of NEED, at the rate below


def quote(**more: Any) -> Quote:
    """A free backend: reads 1000 tokens a second, writes 50, slower by a fifth for each stream."""
    told: dict[str, Any] = {
        "backend": "a",
        "key": key("m:1"),
        "at": 1000.0,
        "resident": True,
        "load_left_s": None,
        "in_flight": 0,
        "slots": 2,
        "may_probe": False,
        "backlog_s": 0.0,
        "share": 1.0,
        "decoding": 0,
        "prompt_rate": 1000.0,
        "decode_rate": 50.0,
        "penalty": 0.2,
        "mean_answer": 200.0,
    }
    return Quote(**{**told, **more})


def priced(of: Quote, cached: float = 0.0, promised: int = 0, need: Need = NEED) -> Terms:
    """Its price; there is one."""
    terms = price(of, need, cached, promised, KNOBS)
    assert terms is not None
    return terms


def test_free() -> None:
    """Reading and writing, and nobody else is in the way."""
    terms = priced(quote())
    assert (terms.kind, terms.wait, terms.evict, terms.disturb) == (GO, 0.0, 0.0, 0.0)
    assert terms.prefill == pytest.approx(READ_S)
    assert terms.decode == pytest.approx(0.5 * 100 / 50)
    assert terms.total == pytest.approx(READ_S + 1.0)
    assert terms.first_token_s == pytest.approx(READ_S)


def test_beside_others() -> None:
    """Their prompts come first, the GPU is shared with another model, and streams are disturbed."""
    terms = priced(quote(in_flight=1, backlog_s=3.0, share=2.0, decoding=4))
    assert terms.kind is GO
    assert terms.decode == pytest.approx(0.5 * 100 * (1.2 / 50) * 2.0)
    assert terms.disturb == pytest.approx(0.25 * 4 * (READ_S + 100 * 0.2 / 50))
    assert terms.first_token_s == pytest.approx(3.0 + 2.0 * READ_S)
    assert terms.total == pytest.approx(terms.first_token_s + terms.decode + terms.disturb)


def test_what_is_cached_is_not_read() -> None:
    """But what is new attends to it, which costs a little."""
    terms = priced(quote(), cached=900.0)
    assert terms.prefill == pytest.approx(100 * (1 + 1e-4 * (900 + 50)) / 1000 + 0.02)
    assert terms.cached == 900.0


def test_a_free_slot_that_is_promised_is_not_to_be_had_now() -> None:
    """With two free and one promised the other is held for; nobody overtakes."""
    assert priced(quote(), promised=1).kind is HOLD
    assert priced(quote(), promised=1).wait == 0.0


def test_streams_count_up_to_the_slots() -> None:
    """What waits behind them does not make the answer slower once it begins."""
    few, full = quote(in_flight=1), quote(in_flight=2, releases=(1.0, 4.0))
    assert priced(full, promised=3).decode == priced(few).decode > priced(quote()).decode


def test_busy() -> None:
    """The first in line waits for the first release, the second for the second."""
    full = quote(in_flight=2, releases=(1.5, 4.0))
    assert [priced(full, promised=n).kind for n in range(3)] == [HOLD] * 3
    assert [priced(full, promised=n).wait for n in range(2)] == [1.5, 4.0]


def test_busy_beyond_the_releases_that_are_known() -> None:
    """Whoever is there next holds its slot for a mean answer, in all slots alike."""
    full = quote(in_flight=2, releases=(1.5, 4.0), share=2.0)
    held_s = 200 * (1.2 / 50) * 2.0 + 0.2
    assert priced(full, promised=2).wait == pytest.approx(4.0 + held_s / 2)
    assert priced(full, promised=4).wait == pytest.approx(4.0 + 3 * held_s / 2)
    assert quote(slots=1).slot_wait_s(1) == pytest.approx(200 / 50 + 0.2)


def test_a_probe_goes_one_above() -> None:
    """When it is due and nobody ahead holds for a slot there."""
    full = quote(in_flight=2, releases=(1.5, 4.0), may_probe=True)
    assert (priced(full).kind, priced(full).wait) == (GO, 0.0)
    assert (priced(full, promised=1).kind, priced(full, promised=1).wait) == (HOLD, 4.0)


def test_loading() -> None:
    """As many as it has slots wait for the load alone, the others for those as well."""
    loading = quote(resident=False, load_left_s=7.0)
    held_s = 200 * (1.2 / 50) + 0.2
    waits = [priced(loading, promised=n).wait for n in range(4)]
    assert waits == [7.0, 7.0, pytest.approx(7.0 + held_s / 2), pytest.approx(7.0 + held_s)]
    assert {priced(loading, promised=n).kind for n in range(4)} == {HOLD}


def test_cold() -> None:
    """The load, and what it costs those whose model goes."""
    cold = quote(resident=False, may_load=True, load_s=6.0, evict_s=3.0, victims=(key("n:1"),))
    terms = priced(cold)
    assert (terms.kind, terms.wait, terms.evict) == (LOAD, 6.0, 6.0)
    assert terms.total == pytest.approx(READ_S + 1.0 + 6.0 + 6.0)
    assert terms.first_token_s == pytest.approx(6.0 + READ_S)


def test_cold_with_nothing_to_be_done() -> None:
    """Its token is taken, or nobody may go: no candidate at all."""
    assert price(quote(resident=False), NEED, 0.0, 0, KNOBS) is None


def test_embeddings_are_bounded_by_work() -> None:
    """Not by count: up to a second of it goes at once, whatever the slots."""
    need, embeds = Need(500.0, 0.0, 0.0), quote(embeds=True, slots=1, in_flight=9, mean_answer=0.0)
    light, heavy = replace(embeds, work_s=0.9), replace(embeds, work_s=1.6)
    assert priced(light, need=need).kind is GO
    assert priced(light, need=need).decode == 0.0
    assert priced(light, need=need, promised=1).kind is HOLD
    assert priced(heavy, need=need).kind is HOLD
    assert priced(heavy, need=need).wait == pytest.approx(0.8)


def test_remote() -> None:
    """All that is known is its time to first byte, of late."""
    far = quote(remote=True, first_byte_s=0.7, share=3.0, backlog_s=9.0, decoding=5)
    terms = priced(far)
    assert (terms.kind, terms.first_token_s) == (GO, 0.7)
    assert terms.total == pytest.approx(0.7 + 0.5 * 100 / 50)


def test_a_preference_is_worth_something() -> None:
    """It takes off what it is worth, and nothing else."""
    assert priced(quote(bonus_s=0.5)).total == pytest.approx(priced(quote()).total - 0.5)


def test_what_is_free() -> None:
    """By slots, by work, or not at all."""
    assert quote(in_flight=1).is_free()
    assert not quote(in_flight=1).is_free(1)
    assert not quote(in_flight=2).is_free()
    assert not quote(resident=False).is_free()
    assert quote(embeds=True, slots=1, in_flight=5, work_s=0.9).is_free()
    assert not quote(embeds=True, work_s=1.1).is_free()


def test_what_was_decided_can_be_priced_again() -> None:
    """From the record alone, to the last bit: free, busy, cold with victims, with a cache."""
    bench = Bench("plan")
    bench.shape(backend("a", slots=2, vram_bytes=7 * GB), backend("b", slots=1))
    bench.up("a", "m:1", "n:1", loaded=["m:1"])
    bench.up("b", "m:1", "n:1", loaded=["n:1"])
    chain = ((1, 200), (2, 900))
    for number, model in enumerate(["n:1", "m:1", "m:1", "n:1", "m:1", "n:1", "m:1"]):
        client = bench.submit(model, id=f"r{number}", prompt_tokens=1000 + number, chain=chain)
        bench.sleep(1.0)
        for lease in client.leases if number % 2 else ():
            lease.settle(outcome(now=bench.clock()))
    scheduler = bench.scheduler
    assert isinstance(scheduler, Plan)
    options = [(d.need, option) for d in scheduler.decisions.ring for option in d.options]
    for need, option in options:
        quote, told = option.quote, option.terms
        assert price(quote, need, told.cached, option.promised, scheduler.knobs) == told
    assert {option.terms.kind for _, option in options} == {GO, HOLD, LOAD}
    assert any(option.quote.victims for _, option in options)
    assert any(option.terms.cached for _, option in options)
    bench.close()
