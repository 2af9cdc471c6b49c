"""Calls as they are drawn."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from balancer.sim import calls
from balancer.sim.calls import MODELS
from balancer.sim.jobs import Job
from balancer.sim.traces import Traces

TRACES = Traces()
EMBEDDERS = {model.name for model in MODELS if model.embedding}


def zipf(seed: int = 1, count: int = 20_000, **more: float) -> list[Job]:
    """Calls for all models."""
    return calls.zipf(random.Random(seed), traces=TRACES, calls=count, models=MODELS, **more)


def test_models_are_asked_for_by_zipfs_law() -> None:
    """The share of the k-th is k^-0.9 over the sum."""
    asked = Counter(job.model for job in zipf())
    total = sum(rank**-0.9 for rank in range(1, 21))
    for rank in (1, 2, 5, 20):
        share = asked[MODELS[rank - 1].name] / 20_000
        assert share == pytest.approx(rank**-0.9 / total, rel=0.1)


def test_lengths_are_cut_and_embeddings_answer_nothing() -> None:
    """3,500 and 1,500 tokens; an embedding has 50 to 2,000 and no answer."""
    jobs = zipf()
    assert max(job.prompt_tokens for job in jobs) == 3500
    assert max(job.output_tokens for job in jobs) <= 1500
    embedded = [job for job in jobs if job.model in EMBEDDERS]
    assert {job.output_tokens for job in embedded} == {0}
    assert min(job.prompt_tokens for job in embedded) >= 50
    assert max(job.prompt_tokens for job in embedded) <= 2000
    assert all(job.output_tokens for job in jobs if job.model not in EMBEDDERS)


def test_two_models_are_asked_for_code() -> None:
    """Long prompts, short answers."""
    jobs = zipf()
    code = sorted(job.output_tokens for job in jobs if job.model in calls.CODERS)
    rest = sorted(job.output_tokens for job in jobs if job.model not in calls.CODERS | EMBEDDERS)
    assert code[len(code) // 2] * 4 < rest[len(rest) // 2]


def test_the_sizes_of_the_twenty_models() -> None:
    """Two only embed; the biggest file is 13 GB."""
    assert len({model.name for model in MODELS}) == 20
    assert [at for at, model in enumerate(MODELS) if model.embedding] == [2, 10]
    assert sum(model.file_gb for model in MODELS) == pytest.approx(105.6)
    assert sum(model.params_b for model in MODELS) == pytest.approx(157.17)
    assert sum(model.kv_mb for model in MODELS) == pytest.approx(2.563)


def test_the_same_seed_draws_the_same() -> None:
    """And another one other calls."""
    assert zipf(3, 200) == zipf(3, 200) != zipf(4, 200)


def test_a_trace_keeps_its_times() -> None:
    """Its first part, prompts cut."""
    rows = TRACES.azure("conv")
    jobs = calls.replayed(random.Random(1), traces=TRACES, kind="conv", share=0.1, most=1000)
    assert [job.at for job in jobs] == [row.at_s for row in rows[: len(rows) // 10]]
    assert max(job.prompt_tokens for job in jobs) == 1000


def test_clients_are_bound_to_one_model_and_send_equally_much() -> None:
    """For an hour, in order."""
    jobs = calls.served(random.Random(2), traces=TRACES, clients=12, calls=6000, models=MODELS)
    models = {(job.who, job.model) for job in jobs}
    sent = Counter(job.who for job in jobs)
    assert len(models) == len(sent) == 12
    assert all(250 < count < 1000 for count in sent.values())
    assert [job.at for job in jobs] == sorted(job.at for job in jobs)
    assert jobs[-1].at < 3600.0


def chat(context: int = 8192, *, common: bool = True) -> list[Job]:
    """Some conversations."""
    return calls.chat(
        random.Random(1), traces=TRACES, conversations=2000, context=context, common=common
    )


def test_a_turn_repeats_all_before_it() -> None:
    """Its chain goes on from the answer to the one before, which it follows a while later."""
    jobs = chat()
    later = [(at, job) for at, job in enumerate(jobs) if job.turn]
    assert len(later) > 3000
    for at, job in later:
        before = jobs[at - 1]
        assert job.conversation == before.conversation
        assert job.turn == before.turn + 1
        assert job.after is not None
        assert job.after[0] == at - 1
        assert job.after[1] > 0.0
        assert job.chain[: len(before.chain)] == before.chain
        answer, message = job.chain[len(before.chain) :]
        assert answer[1] == before.prompt_tokens + before.output_tokens
        assert message[1] == job.prompt_tokens > answer[1]


def test_conversations_share_the_system_prompt_alone() -> None:
    """Every other link is of one conversation, and hashes are of 64 bits."""
    jobs = chat()
    whose: dict[int, set[str]] = {}
    for job in jobs:
        assert job.shared == 1
        assert job.chain[0][1] == 300
        for link, _ in job.chain:
            assert 0 <= link < 2**64
            whose.setdefault(link, set()).add(job.conversation)
    common = {link for link, names in whose.items() if len(names) > 1}
    assert common == {jobs[0].chain[0][0]}


def test_conversations_may_share_nothing() -> None:
    """Where hosts know a conversation again, but not a system prompt."""
    jobs = chat(common=False)
    whose: dict[int, set[str]] = {}
    for job in jobs:
        assert job.shared == 0
        for link, _ in job.chain:
            whose.setdefault(link, set()).add(job.conversation)
    assert all(len(names) == 1 for names in whose.values())
    sizes = [(job.prompt_tokens, job.output_tokens, job.after) for job in jobs]
    assert sizes == [(job.prompt_tokens, job.output_tokens, job.after) for job in chat()]


def test_turns_of_a_conversation() -> None:
    """Three in ten have one turn, the others six on average: 4.5 in all."""
    turns = Counter(job.conversation for job in chat())
    assert len(turns) == 2000
    assert sum(turns.values()) / 2000 == pytest.approx(4.5, rel=0.05)
    assert sum(count == 1 for count in turns.values()) / 2000 == pytest.approx(0.3, abs=0.03)


def test_prompt_and_answer_stay_within_the_context() -> None:
    """A conversation ends before it grows beyond it."""
    jobs = chat(1500)
    assert max(job.prompt_tokens + job.output_tokens for job in jobs) <= 1500
    assert all(job.output_tokens <= 800 for job in jobs)


def mooncake(seed: int, share: float = 1.0) -> list[Job]:
    """A quarter of the conversations."""
    return calls.mooncake(
        random.Random(seed), traces=TRACES, conversations=0.25, share=share, context=32768
    )


def test_a_quarter_of_the_conversations() -> None:
    """At their own times; every seed takes others."""
    jobs = mooncake(1)
    starts = {row.blocks[:2] for row in TRACES.mooncake()}
    assert len({job.conversation for job in jobs}) == round(len(starts) / 4)
    assert [job.at for job in jobs] == sorted(job.at for job in jobs)
    assert {job.conversation for job in jobs} != {job.conversation for job in mooncake(2)}


def test_blocks_become_links() -> None:
    """One for each 512 tokens, the last up to the prompt's end, which the context bounds."""
    for job in mooncake(1, 0.2):
        ends = [end for _, end in job.chain]
        assert ends[:-1] == [512 * at for at in range(1, len(ends))]
        assert ends[-1] == job.prompt_tokens <= 32768 - job.output_tokens


def test_tenants() -> None:
    """Six chats all the time, a batch every five minutes, embeddings every two."""
    jobs = calls.tenants(random.Random(1), traces=TRACES, share=1.0)
    sent = Counter(job.who for job in jobs)
    assert sent["batch"] == 12 * 300
    assert sent["embeddings"] == 30 * 200
    assert [sent[f"chat-{n}"] for n in range(6)] == pytest.approx([1400] * 6, rel=0.1)
    assert {job.who for job in jobs if job.batch} == {"batch"}


def test_the_large_key_does_not_touch_the_small_one() -> None:
    """Whatever it sends, the small one's calls are the same, so that the two can be compared."""
    few = calls.unequal(random.Random(1), traces=TRACES, small=20, large=30)
    many = calls.unequal(random.Random(1), traces=TRACES, small=20, large=2000)
    assert len(many) == 2020
    assert [j for j in few if j.who == "small"] == [j for j in many if j.who == "small"]
