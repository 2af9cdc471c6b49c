"""Prefixes: what is cached where, by our own account."""

from __future__ import annotations

import random
from typing import Any
from zlib import crc32

import pytest

from balancer.core import prefix
from balancer.core.domain import PlacementKey
from balancer.core.prefix import Prefixes

K, L = PlacementKey("m"), PlacementKey("l")
ROOM = 100_000.0


def talk(name: str, turns: int, system: int = 300) -> tuple[tuple[int, int], ...]:
    """A conversation under one system prompt: its first link, then 100 tokens a message."""
    links = [(1, system)]
    links += [
        (crc32(f"{name} {turn}".encode()), system + 100 * (turn + 1)) for turn in range(turns)
    ]
    return tuple(links)


@pytest.fixture
def prefixes() -> Prefixes:
    """Backend a has had the first message of Ann's conversation."""
    found = Prefixes(session_s=600)
    found.insert("a", K, talk("ann", 1), ROOM, "s", 0.0, shared=1)
    return found


def test_a_next_turn_finds_the_one_before(prefixes: Prefixes) -> None:
    """Up to the longest known link, on that backend and for that key only."""
    turn = talk("ann", 3)
    assert prefixes.cached("a", K, turn, 1, 600) == 400
    assert prefixes.cached("b", K, turn, 1, 600) == 0
    assert prefixes.cached("a", L, turn, 1, 600) == 0
    assert prefixes.any("a", K)
    assert not prefixes.any("a", L)
    assert not prefixes.any("b", K)


def test_the_answer_is_cached_as_well(prefixes: Prefixes) -> None:
    """It stands in the next turn as a message, and can be no longer than that."""
    first, next_turn = talk("ann", 1), talk("ann", 3)
    prefixes.finished("a", K, first, 60)
    assert prefixes.cached("a", K, next_turn, 1, 600) == 460
    prefixes.finished("a", K, first, 5000)
    assert prefixes.cached("a", K, next_turn, 1, 600) == 500
    assert prefixes.cached("a", K, first, 1, 600) == 400


def test_an_answer_to_what_is_not_known_is_nothing(prefixes: Prefixes) -> None:
    """The table may have been dropped meanwhile."""
    prefixes.finished("b", K, talk("ann", 1), 60)
    prefixes.finished("a", K, talk("bob", 1), 60)
    prefixes.finished("a", K, (), 60)
    assert prefixes.cached("a", K, talk("bob", 3), 1, 600) == 300


def test_at_least_one_token_is_evaluated(prefixes: Prefixes) -> None:
    """The same prompt again is not quite free, whatever the estimate."""
    assert prefixes.cached("a", K, talk("ann", 1), 1, 400) == 399
    assert prefixes.cached("a", K, talk("ann", 1), 1, 50) == 49
    assert prefixes.cached("a", K, talk("ann", 1), 1, 0) == 0


def test_a_common_system_prompt_says_nothing(prefixes: Prefixes) -> None:
    """Of few conversations it counts, of more than four it does not, on any backend."""
    for name in ("bob", "cid", "dan"):
        prefixes.insert("b", K, talk(name, 1), ROOM, shared=1)
        prefixes.insert("b", K, talk(name, 3), ROOM, shared=1)
    assert prefixes.cached("a", K, talk("eve", 1), 1, 600) == 300
    prefixes.insert("b", K, talk("eve", 1), ROOM, shared=1)
    assert prefixes.cached("a", K, talk("fay", 1), 1, 600) == 0
    assert prefixes.cached("a", K, talk("ann", 3), 1, 600) == 400


def test_a_session_counts_its_system_prompt_all_the_same(prefixes: Prefixes) -> None:
    """Where it last was, and while its name is remembered."""
    for name in "bcdef":
        prefixes.insert("b", K, talk(name, 1), ROOM, shared=1)
    edited = talk("ann, put otherwise", 1)
    assert prefixes.cached("a", K, edited, 1, 600, "s", 10.0) == 300
    assert prefixes.cached("a", K, edited, 1, 600, "other", 10.0) == 0
    assert prefixes.cached("b", K, edited, 1, 600, "s", 10.0) == 0
    assert prefixes.cached("a", K, edited, 1, 600, "s", 601.0) == 0


def test_a_session_whose_body_is_not_read_counts_half(prefixes: Prefixes) -> None:
    """There is no chain to compare; after the runner has gone there is nothing."""
    prefixes.insert("a", K, (), ROOM, "huge", 5.0)
    assert prefixes.cached("a", K, (), 0, 100_000, "huge", 6.0) == 50_000
    assert prefixes.cached("a", K, (), 0, 100_000, "", 6.0) == 0
    prefixes.drop("a", "m")
    prefixes.insert("a", K, talk("bob", 1), ROOM, "", 7.0)
    assert prefixes.cached("a", K, (), 0, 100_000, "huge", 8.0) == 0


def test_a_session_that_moved_is_where_it_moved_to(prefixes: Prefixes) -> None:
    """What it left behind is no more up to date."""
    prefixes.insert("b", K, talk("ann", 3), ROOM, "s", 5.0)
    assert prefixes.cached("b", K, (), 0, 100, "s", 6.0) == 50
    assert prefixes.cached("a", K, (), 0, 100, "s", 6.0) == 0


def test_dropped_is_forgotten(prefixes: Prefixes) -> None:
    """One model with all its keys, or the whole backend; also what is not there."""
    variant = PlacementKey("l", (("num_ctx", 8192),))
    prefixes.insert("a", L, talk("ann", 1), ROOM)
    prefixes.insert("a", variant, talk("ann", 1), ROOM)
    prefixes.insert("b", K, talk("ann", 1), ROOM)
    prefixes.drop("a", "l")
    prefixes.drop("a", "l")
    assert not prefixes.any("a", L)
    assert not prefixes.any("a", variant)
    assert prefixes.any("a", K)
    prefixes.drop("a")
    prefixes.drop("a")
    assert (prefixes.any("a", K), prefixes.any("b", K)) == (False, True)


def test_without_shared_links_the_first_counts() -> None:
    """A conversation without a system prompt is known by its first message."""
    found = Prefixes()
    chain = talk("ann", 3)[1:]
    found.insert("a", K, chain[:1], ROOM)
    assert found.cached("a", K, chain, 0, 900) == 400
    assert found.cached("a", K, talk("bob", 3)[1:], 0, 900) == 0


def test_a_chain_of_shared_links_only_counts() -> None:
    """There is nothing else to go by."""
    found = Prefixes()
    found.insert("a", K, talk("ann", 0), ROOM, shared=1)
    assert found.cached("a", K, talk("ann", 0), 1, 900) == 300


def test_what_the_cache_does_not_hold_is_forgotten() -> None:
    """The conversation not heard of for longest, from its end; the system prompt last."""
    found = Prefixes()
    for name in ("ann", "bob", "ann"):
        found.insert("a", K, talk(name, 4), 1100)
    found.insert("a", K, talk("cid", 2), 1100)
    assert found.cached("a", K, talk("ann", 4), 1, 2000) == 700
    assert found.cached("a", K, talk("bob", 4), 1, 2000) == 500
    assert found.cached("a", K, talk("cid", 4), 1, 2000) == 500


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    """The bound holds whatever comes; answers count towards it."""
    found = Prefixes()
    chain = talk("ann", 9)
    found.insert("a", K, chain, 600)
    assert found.cached("a", K, chain, 1, 5000) == 600
    found.finished("a", K, chain[:4], 400)
    found.insert("a", K, talk("bob", 1), 600)
    assert found.cached("a", K, talk("bob", 1), 1, 5000) == 400
    assert found.cached("a", K, chain, 1, 5000) <= 600


def test_the_table_agrees_with_a_simple_one() -> None:
    """Over random turns: known links are those of a cache that nothing was forgotten of."""
    rng, found = random.Random(1), Prefixes()
    seen: dict[str, set[int]] = {"a": set(), "b": set()}
    for _ in range(500):
        chain = talk(str(rng.randrange(30)), rng.randrange(1, 12))
        for backend, links in seen.items():
            known = max((tokens for link, tokens in chain if link in links), default=0)
            assert found.cached(backend, K, chain, 1, 10_000) == known
        backend = rng.choice("ab")
        found.insert(backend, K, chain, 1e9)
        seen[backend] |= {link for link, _ in chain}
        if rng.random() < 0.01:
            found.drop(backend)
            seen[backend].clear()


def test_a_link_is_known_only_with_all_ahead_of_it() -> None:
    """Over random turns in little room: what is charged adds up, and no link hangs in the air."""
    rng, found = random.Random(2), Prefixes()
    for _ in range(500):
        chain = talk(str(rng.randrange(10)), rng.randrange(1, 12))
        found.insert("a", K, chain, 2500)
        if rng.random() < 0.5:
            found.finished("a", K, chain, rng.randrange(1, 200))
        table = found._tables["a"][K]
        assert table.total == sum(table.charges.values()) + sum(table.answers.values())
        assert set(table.answers) <= set(table.charges)
        known = [link in table.charges for link, _ in talk(str(rng.randrange(10)), 12)]
        assert known == sorted(known, reverse=True)


def test_nothing_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, links, sessions and families: clients choose them all."""
    for bound in ("MOST_TABLES", "MOST_SESSIONS", "MOST_FAMILIES", "MOST_MODELS"):
        monkeypatch.setattr(prefix, bound, 5)
    found = Prefixes(session_s=50)
    for step in range(100):
        key = PlacementKey("m", (("num_ctx", step),))
        found.insert("a", key, ((step, 1), (step + 1, 1)), 100, str(step), step, shared=1)
        found.learn_reuse(str(step), 0.5)
    assert len(found._tables["a"]) == 5
    assert len(found._sessions) <= 6
    assert len(found._families) == 5
    assert len(found._reuse) == 5
    found.insert("a", K, tuple((link, 0) for link in range(1000, 2000)), 160)
    assert len(found._tables["a"][K].charges) == 10


def test_sessions_are_forgotten_in_time() -> None:
    """As others come."""
    found = Prefixes(session_s=50)
    for step in range(200):
        found.insert("a", K, ((step, 10),), 100, str(step), float(step))
    assert len(found._sessions) <= 52


def test_reuse_is_learned_slowly(prefixes: Prefixes) -> None:
    """By a tenth of each surprise; what is no ratio does not count."""
    assert prefixes.reuse("m") == 1.0
    prefixes.learn_reuse("m", 0.0)
    assert prefixes.reuse("m") == pytest.approx(0.9)
    prefixes.learn_reuse("m", float("nan"))
    prefixes.learn_reuse("m", 7.0)
    assert prefixes.reuse("m") == pytest.approx(0.91)
    again = Prefixes()
    again.restore(prefixes.dump())
    assert again.reuse("m") == prefixes.reuse("m")


@pytest.mark.parametrize("kept", [{}, {"reuse": 3}, {"reuse": {"m": 2.0}}, {"reuse": {"m": "1"}}])
def test_what_cannot_be_is_not_taken_up(kept: dict[str, Any]) -> None:
    """Everything is reused until something is measured."""
    found = Prefixes()
    found.restore(kept)
    assert found.reuse("m") == 1.0
