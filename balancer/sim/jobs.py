"""What a simulated world is asked to do, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

# Of a record: answered in full; refused before anything was tried; broken off after its first
# byte; failed before it; the client left; still open at the end; never came in.
STATUSES: Final = ("done", "refused", "cut", "lost", "left", "unfinished", "never")


@dataclass(frozen=True, slots=True)
class Job:
    """
    One call of a client.

    Args:
        at: When it comes in, seconds.
        who: Whose share of the pool it uses up.
        conversation: Whose turn it is; without a *chain* each turn begins with the one before.
        chain: Links of the prompt: hash, tokens up to its end.
        shared: How many leading links are common to many conversations.
        after: Another job, by its place in the list, and how long after the end of that one this
            one comes in; then *at* is ignored.
        leaves_after: The client hangs up so long after it came in, if it has no answer by then.
    """

    at: float
    model: str
    prompt_tokens: int
    output_tokens: int
    who: str = ""
    batch: bool = False
    conversation: str = ""
    turn: int = 0
    chain: tuple[tuple[int, int], ...] = ()
    shared: int = 0
    after: tuple[int, float] | None = None
    leaves_after: float | None = None


@dataclass(slots=True)
class Record:
    """
    What came of one job. Instants are virtual seconds, None: it never came to that.

    Args:
        job: Its place in the list.
        arrived_at: inf for one that never came in.
        backend: The last one tried.
        status: One of `STATUSES`.
        cached: Prompt tokens that were not evaluated.
        predicted_s: To the first byte, as the scheduler foresaw it.
        queued_s: That it waited with the balancer.
        attempts: That were sent.
        error: What the client was told.
    """

    job: int
    arrived_at: float
    first_at: float | None = None
    ended_at: float | None = None
    backend: str = ""
    status: str = "never"
    cached: int = 0
    predicted_s: float | None = None
    queued_s: float = 0.0
    attempts: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """
    How a world went.

    Args:
        records: One for each job, in the order of the list.
        loads: Models that were loaded on the hosts, lost loads included.
        loads_by: Loads that the balancer asked for, by its reason.
        evictions: Models taken out of memory for another.
        until: When it ended.
        settings: What the world was made of.
        events: That happened.
    """

    records: tuple[Record, ...]
    loads: int
    loads_by: Mapping[str, int]
    evictions: int
    until: float
    settings: Mapping[str, object] = field(default_factory=dict)
    events: int = 0


def with_chains(jobs: Sequence[Job]) -> list[Job]:
    """
    The same jobs; those of conversations that tell no chain get one.

    Each turn's prompt begins with the prompt of the turn before: one link for each turn so far.
    """
    turns: dict[str, dict[int, int]] = {}
    for job in jobs:
        if job.conversation and not job.chain:
            turns.setdefault(job.conversation, {})[job.turn] = job.prompt_tokens
    links = {name: _links(name, sizes) for name, sizes in turns.items()}
    return [
        job
        if job.chain or not job.conversation
        else _chained(job, [each for each in links[job.conversation] if each[0] <= job.turn])
        for job in jobs
    ]


def _links(name: str, sizes: dict[int, int]) -> list[tuple[int, int, int]]:
    return [(turn, _hash(f"{name}/{turn}"), tokens) for turn, tokens in sorted(sizes.items())]


def _chained(job: Job, links: list[tuple[int, int, int]]) -> Job:
    return replace(job, chain=tuple((link, tokens) for _, link, tokens in links))


def _hash(text: str) -> int:
    """64 bits that are the same in every run, unlike those of `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
