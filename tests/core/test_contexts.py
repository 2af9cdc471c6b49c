"""What the operator's rules make of a call, by what is in memory where it may go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.contexts import (
    Contexts,
    Placed,
    Policy,
    Rule,
    Rules,
    Variant,
    applied,
    choose,
    context_of,
    kept,
    sized,
    written,
)
from balancer.core.domain import Call, Purpose
from tests.core.bench import PoolBench, call, canon, key, outcome

REUSE = Rule(Policy.REUSE)
NUMBERS = st.integers(1, 1 << 20)


@pytest.fixture
def bench() -> Iterator[PoolBench]:
    """Nothing in memory anywhere."""
    bench = PoolBench()
    for name in "ab":
        bench.start(name, "m:1")
    yield bench
    bench.close()


def placed(bench: PoolBench, rule: Rule = REUSE, **more: Any) -> Placed:
    """What becomes of a call; *more* as for `call`."""
    return Contexts(Rules(rule), bench.pool).place(call(**more))


def gets(bench: PoolBench, asked: int | None = None, rule: Rule = REUSE, **more: Any) -> int | None:
    """The context in the key of a call that asks for one, or for none."""
    options = more.pop("options", {}) | ({} if asked is None else {"num_ctx": asked})
    return context_of(placed(bench, rule, options=options, **more).key)


# --- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, 1, 4096])
def test_passthrough_leaves_everything(asked: int | None) -> None:
    """Whatever there is."""
    assert choose(Rule(), asked, 10**6, [Variant(8192)]) is None


@pytest.mark.parametrize(
    ("asked", "wanted"), [(None, 6000), (100, 6000), (9000, 6000), (6000, None)]
)
def test_pin_is_always_the_configured_context(asked: int | None, wanted: int | None) -> None:
    """Whatever is asked and whatever there is; who asks for just that needs no rewriting."""
    assert choose(Rule(Policy.PIN, default=6000), asked, 0, [Variant(8192)]) == wanted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(1, None), (3000, 4096), (4096, None), (4097, 8192), (None, None)],
)
def test_a_size_that_others_will_share(asked: int | None, wanted: int | None) -> None:
    """Where nothing suffices it is rounded up to a power of two; who asks for none gets none."""
    assert choose(REUSE, asked, 0, []) == wanted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(2000, 2048), (3000, 4000), (4096, 4000), (9000, 4000), (4000, None), (None, None)],
)
def test_clamp_is_at_most_its_most(asked: int | None, wanted: int | None) -> None:
    """Before and after it is rounded up."""
    assert choose(Rule(Policy.CLAMP, most=4000), asked, 0, []) == wanted


@pytest.mark.parametrize("asked", [(1 << 62) + 1, (1 << 63) - 1])
def test_the_absurd_is_not_made_more_so(asked: int) -> None:
    """Rounded up it would be no number of Ollama's, and come down as a tiny context."""
    assert choose(REUSE, asked, 0, []) is None


def test_clamp_takes_what_is_there_if_that_is_more() -> None:
    """It is in memory already: to load a smaller one beside it would save nothing."""
    assert choose(Rule(Policy.CLAMP, most=4000), 9000, 0, [Variant(8192)]) == 8192


@pytest.mark.parametrize(
    ("variants", "wanted"),
    [
        ([Variant(16384), Variant(8192), Variant(4096)], 8192),  # the smallest that suffices
        ([Variant(8192, free=False), Variant(16384)], 16384),  # rather a free slot
        ([Variant(8192, ready=False), Variant(16384)], 16384),  # rather what is there already
        ([Variant(8192, ready=False)], 8192),
        ([Variant(8192, free=False)], 8192),
        ([Variant(4096)], 8192),
        ([Variant(4096, trained=4096)], 4096),  # there can be no more
        ([Variant(6000, fits=True), Variant(8192)], None),  # served as it was sent
    ],
)
def test_the_best_of_what_there_is(variants: list[Variant], wanted: int | None) -> None:
    """A free slot, then what is there already, then nothing to rewrite, then the smallest."""
    for each in (variants, variants[::-1]):
        assert choose(REUSE, 6000, 0, each) == wanted


@pytest.mark.parametrize(
    ("variants", "need", "wanted"),
    [
        ([Variant(8192, default=4096)], 0, 8192),
        ([Variant(8192, default=32768)], 0, None),  # it would get more
        ([Variant(8192)], 0, 8192),
        ([Variant(2048)], 0, None),  # no host gives so little
        ([Variant(8192)], 9000, None),  # it needs more
        ([Variant(32768, fits=True), Variant(8192)], 0, None),
        ([Variant(32768, fits=True, free=False), Variant(8192)], 0, 8192),
    ],
)
def test_who_asks_for_none_gets_no_less_than_by_itself(
    variants: list[Variant], need: int, wanted: int | None
) -> None:
    """What is there is used if it has what the host would have given, and what the call needs."""
    assert choose(REUSE, None, need, variants) == wanted


def test_who_asks_for_none_counts_as_asking_for_the_default() -> None:
    """Where the rule has one: then it is asked for like any other."""
    rule = Rule(Policy.REUSE, default=6000)
    assert choose(rule, None, 0, []) == 8192
    assert choose(rule, None, 0, [Variant(32768, fits=True)]) == 32768
    assert choose(rule, 1024, 0, []) is None


@given(
    st.none() | NUMBERS,
    NUMBERS,
    st.lists(
        st.builds(
            Variant,
            NUMBERS,
            default=st.none() | NUMBERS,
            fits=st.booleans(),
            ready=st.booleans(),
            free=st.booleans(),
        ),
        max_size=4,
    ),
    st.none() | NUMBERS,
)
def test_nobody_gets_less_than_was_asked_for(
    asked: int | None, need: int, variants: list[Variant], most: int | None
) -> None:
    """But for a clamp, which gives no less than its most; and asked again, nothing changes."""
    rule = REUSE if most is None else Rule(Policy.CLAMP, most=most)
    chosen = choose(rule, asked, need, variants)
    assert chosen != asked or chosen is None
    got = asked if chosen is None else chosen
    if asked is not None:
        assert got is not None
        assert got >= min(asked, most or asked)
        assert got in {v.context for v in variants} or got < 2 * asked
    elif chosen is not None:
        assert chosen in {v.context for v in variants}


@pytest.mark.parametrize(
    ("keep_alive", "wanted"),
    [
        *((-1, 60.0), (-0.5, 60.0), ("-1m", 60.0), (61, 60.0), ("1h", 60.0), (1e300, 60.0)),
        *((None, None), (0, None), ("0", None), (60, None), ("1m", None), (0.5, None)),
    ],
)
def test_how_long_a_model_may_be_kept(keep_alive: Any, wanted: float | None) -> None:
    """For ever and too long are cut; nought, none and less stay as they are."""
    assert kept(Rule(keep_s=60.0), keep_alive) == wanted
    assert kept(Rule(), keep_alive) is None


# --- which rule --------------------------------------------------------------------------------


def test_the_first_that_covers_a_model_counts() -> None:
    """Globs as everywhere: case does not count, and no tag means latest."""
    first, second = Rule(Policy.PIN, default=1), Rule(Policy.PIN, default=2)
    rules = Rules(REUSE, [("Qwen3*", first), ("qwen3:8b", second), ("m", second)])
    assert rules.of(canon("qwen3:8b")) is first
    assert rules.of(canon("m")) is second
    assert rules.of(canon("m:1")) is REUSE


def test_whether_there_is_any_rule() -> None:
    """Where there is none, calls need not be looked at."""
    assert not Rules().any
    assert not Rules(Rule(), [("*", Rule())]).any
    assert Rules(Rule(keep_s=1.0)).any
    assert Rules(Rule(), [("m", REUSE)]).any


# --- by what is in memory ----------------------------------------------------------------------


def test_a_runner_that_suffices_is_used(bench: PoolBench) -> None:
    """The smallest of those in memory; the key is that of the runner."""
    bench.holds("a", "m:1", context=16384)
    bench.holds("b", "m:1", context=8192)
    assert placed(bench, options={"num_ctx": 5000}) == Placed(
        key("m:1", num_ctx=8192), 5000, 8192, None
    )
    assert gets(bench, 9000) == 16384
    assert gets(bench, 20000) == 32768
    assert gets(bench, 8192) == 8192
    assert gets(bench) is None  # somebody else's counts as the default


def test_a_busy_runner_gives_way(bench: PoolBench) -> None:
    """As long as another has a slot."""
    bench.holds("a", "m:1", context=8192)
    bench.holds("b", "m:1", context=16384)
    for _ in range(2):
        assert gets(bench, 5000) == 8192
        assert bench.lease("a", options={"num_ctx": 8192}) is not None
    assert gets(bench, 5000) == 16384


def test_only_where_the_call_may_go(bench: PoolBench) -> None:
    """A backend that is out has nothing to offer."""
    bench.holds("a", "m:1", context=16384)
    bench.check("a", ok=False, count=3)
    assert gets(bench, 5000) == 8192


def test_what_is_too_old_to_believe_is_not_used(bench: PoolBench) -> None:
    """It may have been pushed out since."""
    bench.holds("a", "m:1", context=16384)
    bench.clock.advance(31.0)
    assert gets(bench, 5000) == 8192


def test_other_options_must_be_the_same(bench: PoolBench) -> None:
    """A runner with other threads would be loaded anew all the same."""
    bench.catalog.note_loaded("a", key("m:1", num_ctx=16384, num_thread=4))
    assert gets(bench, 5000) == 8192
    assert gets(bench, 5000, options={"num_thread": 4}) == 16384
    told = placed(bench, options={"num_thread": 4, "num_ctx": 5000})
    assert told.key == key("m:1", num_ctx=16384, num_thread=4)


def test_what_is_being_loaded_is_waited_for(bench: PoolBench) -> None:
    """It will be there, and what is there now will not."""
    bench.holds("a", "m:1", context=32768)
    assert bench.pool.take_token("a", key("m:1", num_ctx=16384), "test")
    assert gets(bench, 5000) == 16384
    assert gets(bench, 20000) == 32768
    assert gets(bench, 5000, options={"num_thread": 4}) == 8192
    bench.pool.end_load("a", key("m:1", num_ctx=16384), outcome())


def test_a_runner_whose_context_is_not_known_yet(bench: PoolBench) -> None:
    """Loaded by us as the host pleases: it serves who asks for none, and nobody else yet."""
    bench.catalog.note_loaded("a", key("m:1"))
    assert gets(bench, 5000) == 8192
    assert gets(bench) is None
    bench.holds("a", "m:1", context=16384)
    assert gets(bench, 5000) == 16384


def test_more_than_the_model_was_made_for(bench: PoolBench) -> None:
    """No runner has more, so one that has all of it will do."""
    bench.holds("a", "m:1", context=32768)
    assert gets(bench, 100_000) == 100_000
    assert gets(bench, rule=Rule(Policy.REUSE, default=100_000)) == 32768


def test_the_prompt_counts_where_no_context_is_asked_for(bench: PoolBench) -> None:
    """With the answer it may have; too little would cut it off."""
    bench.catalog.note_loaded("a", key("m:1", num_ctx=8192))
    assert gets(bench, prompt_tokens=8000) == 8192
    assert gets(bench, prompt_tokens=8000, output_tokens=500) is None


def test_what_leaves_no_trace(bench: PoolBench) -> None:
    """A dry run brings its candidates along; nobody is looked up, and nothing noted."""
    bench.holds("a", "m:1", context=16384)
    bench["b"].gate.trip("test")
    contexts = Contexts(Rules(REUSE), bench.pool)
    asked = call(options={"num_ctx": 5000})
    candidates = [s.candidate for s in bench.pool.standings(asked, frozenset()) if not s.bar]
    assert contexts.place(asked, candidates).num_ctx == 16384
    assert contexts.place(asked, []).num_ctx == 8192
    assert bench["b"].asked == {}


# --- whom it concerns --------------------------------------------------------------------------

PIN = Rule(Policy.PIN, default=6000, keep_s=60.0)


@pytest.mark.parametrize(
    "more",
    [
        {"path": "/v1/chat/completions"},
        {"path": "/v1/embeddings"},
        {"purpose": Purpose.UNLOAD},
        {"model": "m:cloud"},
    ],
    ids=str,
)
def test_out_of_reach(bench: PoolBench, more: dict[str, Any]) -> None:
    """Who cannot ask for a context is given none; an unload and a cloud model want none."""
    told = placed(bench, PIN, keep_alive=-1, **more)
    assert (told.num_ctx, told.keep_s) == (None, None)


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/embeddings"])
@pytest.mark.parametrize("purpose", [Purpose.RUN, Purpose.LOAD])
def test_within_reach(bench: PoolBench, path: str, purpose: Purpose) -> None:
    """Every route of Ollama's own that runs a model, and a client's warm-up."""
    told = placed(bench, PIN, path=path, purpose=purpose, keep_alive=-1)
    assert (told.num_ctx, told.keep_s) == (6000, 60.0)


def test_a_stub_of_a_cloud_model_keeps_its_context(bench: PoolBench) -> None:
    """It runs elsewhere: there is no runner here to be shared."""
    row = {"name": "s:1", "model": "s:1", "remote_host": "https://ollama.com", "size": 1}
    bench.pool.note_tags("a", [row | {"digest": "0" * 64}], bench.clock())
    assert gets(bench, 5000, model="s:1") == 5000


# --- carried out -------------------------------------------------------------------------------


def test_the_body_and_the_key_never_differ() -> None:
    """Both have what was chosen; a call of which nothing changes is the same call."""
    asked = call(
        options={"num_ctx": 5000},
        body=b'{"options":{"num_ctx":5000},"keep_alive":-1}',
        keep_alive=-1,
    )
    told = applied(asked, Placed(key("m:1", num_ctx=8192), 5000, 8192, 60.0))
    assert told.key == key("m:1", num_ctx=8192)
    assert bytes(told.body) == b'{"options":{"num_ctx":8192},"keep_alive":60}'
    assert told.keep_alive == 60.0
    told = applied(asked, Placed(asked.key, 5000, None, 60.0))
    assert (told.key, told.keep_alive) == (asked.key, 60.0)
    assert bytes(told.body) == b'{"options":{"num_ctx":5000},"keep_alive":60}'
    assert applied(asked, Placed(asked.key, 5000, None, None)) is asked


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (Rule(), key("m:1")),
        (REUSE, key("m:1")),
        (Rule(Policy.REUSE, default=5000), key("m:1", num_ctx=8192)),
        (Rule(Policy.PIN, default=5000), key("m:1", num_ctx=5000)),
    ],
)
def test_the_usual_key(bench: PoolBench, rule: Rule, wanted: object) -> None:
    """What a warm-up of ours asks for, so that the calls that follow find it."""
    assert Contexts(Rules(rule), bench.pool).usual(canon("m:1")) == wanted
    assert Contexts(Rules(rule), bench.pool).usual(canon("m:cloud")) == key("m:cloud")


def test_a_key_with_another_context() -> None:
    """Other options stay, and the order is that of all keys."""
    assert sized(key("m:1", use_mmap=True, num_batch=1), 8) == key(
        "m:1", use_mmap=True, num_batch=1, num_ctx=8
    )


def test_a_context_that_was_there_is_given_up_with_the_runner(bench: PoolBench) -> None:
    """Who asked for nothing goes back to nothing; who asked for less, to that, rounded up."""
    contexts = Contexts(Rules(REUSE), bench.pool)
    bench.holds("a", "m:1", context=16384)
    bench.catalog.note_loaded("a", key("m:1", num_ctx=16384))
    for asked, own in ((call(), key("m:1")), (_asking(3000), key("m:1", num_ctx=4096))):
        guest = applied(asked, contexts.place(asked))
        assert guest.origin is not None
        assert (guest.key, guest.is_guest) == (key("m:1", num_ctx=16384), True)
        assert (guest.origin.sent, guest.origin.own) == (asked.key, own)
        bench.holds("a", "m:1", context=2048)
        assert guest.origin.instead(guest) == own
        assert not guest.origin.is_settled
        bench.holds("a", "m:1", context=16384)


def test_what_comes_while_a_call_waits_is_shared(bench: PoolBench) -> None:
    """Rather than have another loaded in its place; if that proves no use, it keeps its own."""
    contexts = Contexts(Rules(REUSE), bench.pool)
    asked = _asking(3000)
    waits = applied(asked, contexts.place(asked))
    assert waits.origin is not None
    assert (waits.key, waits.is_guest) == (key("m:1", num_ctx=4096), False)
    bench.holds("a", "m:1", context=16384)
    waits.rekey(waits.origin.instead(waits))
    assert waits.key == key("m:1", num_ctx=16384)
    waits.rekey(waits.origin.instead(waits))
    assert (waits.key, waits.origin.is_settled) == (waits.origin.own, True)
    assert waits.origin.instead(waits) == waits.origin.own


def test_the_body_says_what_the_key_does_when_it_goes_up(bench: PoolBench) -> None:
    """Each time anew; as it was sent, byte for byte, once the key is again what it was."""
    contexts = Contexts(Rules(REUSE), bench.pool)
    bench.holds("a", "m:1", context=16384)
    bench.catalog.note_loaded("a", key("m:1", num_ctx=16384))
    asked = call(body=b'{"model":"m:1"}')
    guest = applied(asked, contexts.place(asked))
    assert written(guest) == 16384
    assert bytes(guest.body) == b'{"options":{"num_ctx":16384},"model":"m:1"}'
    guest.rekey(asked.key)
    assert written(guest) is None
    assert guest.body == asked.body
    guest.let_go()
    assert guest.origin is not None
    assert guest.body == guest.origin.body == b""


def _asking(num_ctx: int) -> Call:
    return call(options={"num_ctx": num_ctx}, body=b'{"options":{"num_ctx":%d}}' % num_ctx)
