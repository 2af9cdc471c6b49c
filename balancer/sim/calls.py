"""
Calls as they are drawn, at any pace: by popularity, from traces, in conversations, by tenants.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Sequence
from typing import Final

from balancer.sim.jobs import Job
from balancer.sim.machine import Model
from balancer.sim.traces import BLOCK_TOKENS, Client, Traces, gap, lognormal

ZIPF: Final = 0.9
CUT: Final = (3500, 1500)  # prompt and answer, where models share a pool
EMBEDDED: Final = (50, 2000)  # tokens of an embedding call
USERS: Final = 10  # whose calls they are, where a workload has no clients of its own

STANDARD: Final = Model("llama3.1:8b")
EMBEDDER: Final = Model("nomic-embed-text", 0.3, 0.14, 0.0, embedding=True)
MODELS: Final = (
    STANDARD,
    Model("qwen2.5:7b", 4.7, 7.6, 0.055),
    EMBEDDER,
    Model("llama3.2:3b", 2.0, 3.2, 0.11),
    Model("qwen3:14b", 9.0, 14.8, 0.19),
    Model("mistral:7b", 4.1, 7.2, 0.125),
    Model("gemma2:9b", 5.4, 9.2, 0.33),
    Model("phi4:14b", 9.1, 14.7, 0.195),
    Model("qwen2.5:3b", 1.9, 3.1, 0.035),
    Model("qwen2.5-coder:14b", 9.0, 14.8, 0.19),
    Model("mxbai-embed-large", 0.7, 0.33, 0.0, embedding=True),
    Model("llama2:13b", 7.4, 13.0, 0.4),
    Model("llava:7b", 4.7, 7.2, 0.125),
    Model("gpt-oss:20b", 13.0, 4.0, 0.048),  # a mixture of experts: parameters at work
    Model("deepseek-r1:1.5b", 1.0, 1.5, 0.028),
    Model("codestral:22b", 13.0, 22.0, 0.22),
    Model("deepseek-r1:8b", 4.9, 8.0, 0.125),
    Model("olmo:7b", 4.0, 7.2, 0.06),
    Model("solar:10.7b", 6.1, 10.7, 0.19),
    Model("qwen2.5:0.5b", 0.4, 0.5, 0.012),
)
CODERS: Final = frozenset({"qwen2.5-coder:14b", "codestral:22b"})

# -- what calls are made of --------------------------------------------------------------------


class Popularity:
    """Draws of a model by Zipf's law."""

    def __init__(self, models: Sequence[Model]) -> None:
        shares = (rank**-ZIPF for rank in range(1, len(models) + 1))
        self._models = models
        self._sums = list(itertools.accumulate(shares))

    def draw(self, chance: random.Random) -> Model:
        """One of the models."""
        at = bisect.bisect(self._sums, chance.uniform(0.0, self._sums[-1]))
        return self._models[min(at, len(self._models) - 1)]


def _user(chance: random.Random) -> str:
    return f"user-{chance.randrange(USERS)}"


def _link(*parts: int) -> int:
    """A hash of 64 bits; of whole numbers it is the same everywhere."""
    return hash(parts) & (2**64 - 1)


def _sized(chance: random.Random, model: Model, traces: Traces) -> tuple[int, int]:
    """Prompt and answer of one call, where models share a pool."""
    if model.embedding:
        return chance.randint(*EMBEDDED), 0
    row = chance.choice(traces.azure("code" if model.name in CODERS else "conv"))
    return min(row.prompt, CUT[0]), min(row.output, CUT[1])


def zipf(
    chance: random.Random, *, traces: Traces, calls: int, models: Sequence[Model], cv: float = 1.0
) -> list[Job]:
    """Models by their popularity, gaps of that CV, lengths of production."""
    popular, at, jobs = Popularity(models), 0.0, []
    for _ in range(calls):
        at += gap(chance, 1.0, "g", cv**-2)
        model = popular.draw(chance)
        prompt, output = _sized(chance, model, traces)
        jobs.append(Job(at, model.name, prompt, output, who=_user(chance)))
    return jobs


def replayed(
    chance: random.Random, *, traces: Traces, kind: str, share: float, most: int
) -> list[Job]:
    """The first part of an Azure trace, its prompts cut at *most*; by whom is drawn."""
    rows = traces.azure(kind)
    return [
        Job(row.at_s, STANDARD.name, min(row.prompt, most), row.output, who=_user(chance))
        for row in rows[: round(len(rows) * share)]
    ]


def served(
    chance: random.Random, *, traces: Traces, clients: int, calls: int, models: Sequence[Model]
) -> list[Job]:
    """
    An hour of so many clients of ServeGen.

    All send equally much, as their real rates lie four orders of magnitude apart; when in the hour,
    in what bursts and of what lengths is as it was.
    """
    first = chance.randrange(138)
    chosen = [
        client
        for client in chance.sample(list(traces.clients()), len(traces.clients()))
        if any(window.rate for window in client.windows[first : first + 6])
    ][:clients]
    means = [sum(w.rate for w in client.windows[first : first + 6]) / 6.0 for client in chosen]
    popular = Popularity(models)
    jobs = []
    for client, mean in zip(chosen, means, strict=True):
        pace = calls / 3600.0 / len(chosen) / mean
        jobs += _sent(chance, client, first, pace, popular.draw(chance))
    return sorted(jobs, key=lambda job: job.at)


def _sent(
    chance: random.Random, client: Client, first: int, pace: float, model: Model
) -> list[Job]:
    """An hour of one client, its rate multiplied by *pace*."""
    jobs = []
    for number, window in enumerate(client.windows[first : first + 6]):
        if not window.rate:
            continue
        mean_s, ends = 1.0 / (window.rate * pace), 600.0 * (number + 1)
        quarter = min((first + number) // 36, len(client.prompts) - 1)
        at = 600.0 * number + gap(chance, mean_s, window.kind, window.shape)
        while at < ends:
            prompt = min(_quantile(chance, client.prompts[quarter]), CUT[0])
            output = min(_quantile(chance, client.outputs[quarter]), CUT[1])
            sizes = (min(prompt, EMBEDDED[1]), 0) if model.embedding else (prompt, output)
            jobs.append(Job(at, model.name, *sizes, who=client.name))
            at += gap(chance, mean_s, window.kind, window.shape)
    return jobs


def _quantile(chance: random.Random, quantiles: Sequence[int]) -> int:
    place = chance.uniform(0.0, len(quantiles) - 1.0)
    low = min(int(place), len(quantiles) - 2)
    return max(1, round(quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])))


# -- conversations -----------------------------------------------------------------------------

SYSTEM_TOKENS: Final = 300
MESSAGE: Final = (3.8, 1.1)
ANSWER_MOST: Final = 800
THINK: Final = (math.log(45.0), 1.0)


def _turns(chance: random.Random) -> int:
    if chance.uniform(0.0, 1.0) < 0.3:
        return 1
    return 2 + int(math.log(1.0 - chance.uniform(0.0, 1.0)) / math.log(0.8))


def chat(
    chance: random.Random, *, traces: Traces, conversations: int, context: int, common: bool
) -> list[Job]:
    """
    Each turn comes a while after the answer to the one before, and repeats all of it.

    Args:
        common: Hosts know the system prompt again in another conversation; else what is cached of
            one conversation is of use to itself alone.
    """
    answers = [tokens for tokens in traces.answers() if tokens <= ANSWER_MOST]
    at, jobs = 0.0, list[Job]()
    for number in range(conversations):
        at += chance.expovariate(1.0)
        who = f"user-{chance.randrange(5 * USERS)}"
        system = _link(0) if common else _link(number, 0, 2)
        chain: tuple[tuple[int, int], ...] = ((system, SYSTEM_TOKENS),)
        for turn in range(_turns(chance)):
            prompt = chain[-1][1] + lognormal(chance, MESSAGE, 2000)
            output = chance.choice(answers)
            if prompt + output > context:
                break
            chain += ((_link(number, turn, 0), prompt),)
            after = (len(jobs) - 1, chance.lognormvariate(*THINK)) if turn else None
            jobs.append(
                Job(
                    *(at, STANDARD.name, prompt, output),
                    who=who,
                    conversation=f"c{number}",
                    turn=turn,
                    chain=chain,
                    shared=int(common),
                    after=after,
                )
            )
            chain += ((_link(number, turn, 1), prompt + output),)
    return jobs


def mooncake(
    chance: random.Random, *, traces: Traces, conversations: float, share: float, context: int
) -> list[Job]:
    """A share of the trace's conversations at their own times; blocks after the first tell them."""
    rows = traces.mooncake()
    rows = rows[: round(len(rows) * share)]
    starts = sorted({row.blocks[:2] for row in rows})
    chosen = set(chance.sample(starts, round(len(starts) * conversations)))
    turns: dict[tuple[int, ...], int] = {}
    jobs = []
    for row in rows:
        start = row.blocks[:2]
        if start not in chosen:
            continue
        turns[start] = turn = turns.get(start, -1) + 1
        output = min(row.output, context // 2)
        prompt = min(row.prompt, context - output)
        blocks = row.blocks[: math.ceil(prompt / BLOCK_TOKENS)]
        ends = (min(BLOCK_TOKENS * (at + 1), prompt) for at in range(len(blocks)))
        jobs.append(
            Job(
                *(row.at_s, STANDARD.name, prompt, output),
                who=f"user-{start[-1] % (5 * USERS)}",
                conversation=f"c{start[-1]}",
                turn=turn,
                chain=tuple((_link(block), end) for block, end in zip(blocks, ends, strict=True)),
                shared=1,
            )
        )
    return jobs


# -- several callers ---------------------------------------------------------------------------

BATCH: Final = "batch"
CHATS: Final = 6
CHATTED: Final = MODELS[:2]  # by half of the chats and of the batch each


def tenants(chance: random.Random, *, traces: Traces, share: float) -> list[Job]:
    """Chats all the time; every five minutes a batch; every two minutes many embeddings."""
    rows, span_s, jobs = traces.azure("conv"), 3600.0 * share, list[Job]()

    def of(model: Model) -> tuple[str, int, int]:
        row = chance.choice(rows)
        return model.name, min(row.prompt, CUT[0]), min(row.output, CUT[1])

    for number in range(CHATS):
        model, at = CHATTED[number % 2], chance.expovariate(1400.0 / 3600.0)
        while at < span_s:
            jobs.append(Job(at, *of(model), who=f"chat-{number}"))
            at += chance.expovariate(1400.0 / 3600.0)
    for begin in range(60, int(span_s), 300):
        jobs += (
            Job(begin + 0.001 * number, *of(CHATTED[number % 2]), who=BATCH, batch=True)
            for number in range(300)
        )
    for begin in range(30, int(span_s), 120):
        jobs += (
            Job(begin + 0.001 * at, EMBEDDER.name, chance.randint(*EMBEDDED), 0, who="embeddings")
            for at in range(200)
        )
    return sorted(jobs, key=lambda job: job.at)


SMALL, LARGE = "small", "large"


def unequal(chance: random.Random, *, traces: Traces, small: int, large: int) -> list[Job]:
    """Two keys at random times of one span; those of the small one do not depend on *large*."""
    rows = traces.azure("conv")
    jobs = []
    for who, calls in ((SMALL, small), (LARGE, large)):
        own = random.Random(chance.randbytes(16))
        for _ in range(calls):
            at, row = own.uniform(0.0, 1.0), own.choice(rows)
            jobs.append(Job(at, STANDARD.name, min(row.prompt, 4096), row.output, who=who))
    return sorted(jobs, key=lambda job: job.at)
