"""
What the choice of a backend is tried on: hosts, models, calls and mishaps, each from a seed.

Calls are drawn at any pace and then stretched in time until they load the hosts as wanted: the
utilisation is the arrival rate over what the hosts could answer, if every call were spread over
them in proportion to their speed and all their slots were busy.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from balancer.sim import calls
from balancer.sim.calls import EMBEDDER, MODELS, STANDARD
from balancer.sim.jobs import Job
from balancer.sim.machine import HOST_TYPES, Machine, Model, work_of
from balancer.sim.mishaps import Mishap, bypassing, deaths, stragglers
from balancer.sim.traces import Traces

AFTER_S: Final = 3600.0  # a run goes on so long after the last arrival

Draw = Callable[[random.Random], list[Job]]
Told = tuple[list[Job], list[Mishap]]
Harm = Callable[[list[Job], Sequence[str], int], Told]


def _no_harm(jobs: list[Job], names: Sequence[str], seed: int) -> Told:
    del names, seed
    return jobs, []


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """
    Hosts, and calls for them.

    Args:
        about: Arrivals and lengths, for people.
        machines: The hosts.
        u: Utilisation that the calls are stretched to; 0: they keep their own times.
        draw: Calls in order of arrival, from chance; those that follow another's end where it ends.
        warm: Models in memory at the start, by machine.
        harm: Adds mishaps to the calls; may take some of these to make mishaps of.
        skip_s: What arrives before that is not counted.
        cached: Share of each prompt that counts as cached in the utilisation.
        kin: Workloads of one kin get equal chance.
    """

    name: str
    about: str
    machines: tuple[Machine, ...]
    u: float
    draw: Draw
    models: tuple[Model, ...] = (STANDARD,)
    warm: Mapping[str, Sequence[str]] = field(default_factory=dict)
    harm: Harm = _no_harm
    skip_s: float = 0.0
    cached: float = 0.0
    kin: str = ""

    def cast(self, seed: int) -> Told:
        """The calls, and what goes wrong meanwhile."""
        jobs = self.draw(random.Random(f"{self.kin or self.name} {seed}"))
        jobs = stretched(jobs, self.machines, self.models, self.u, self.cached)
        return self.harm(jobs, [machine.name for machine in self.machines], seed)

    def jobs(self, seed: int) -> list[Job]:
        """The calls."""
        return self.cast(seed)[0]

    def mishaps(self, seed: int) -> list[Mishap]:
        """What goes wrong."""
        return self.cast(seed)[1]

    def parameters(self) -> str:
        """All that defines it, for people."""
        kinds = itertools.groupby(
            self.machines, key=lambda m: (m.type.name, m.slots, m.context, m.max_models)
        )
        hosts = ", ".join(
            f"{len(list(group))}×{kind} (S={slots}, ctx {context}, {most} models)"
            for (kind, slots, context, most), group in kinds
        )
        parts = [
            hosts,
            f"{len(self.models)} models",
            f"u={self.u:g}" if self.u else "own times",
            f"{self.cached:.0%} of prompts counted as cached" if self.cached else "",
            self.about,
            "all warm" if len(self.warm) == len(self.machines) else "",
            f"first {self.skip_s:g} s not counted" if self.skip_s else "",
        ]
        return "; ".join(part for part in parts if part)


# -- utilisation -------------------------------------------------------------------------------


def service_s(machine: Machine, model: Model, job: Job, cached: float = 0.0) -> float:
    """Seconds of a whole host that a call takes, its slots all busy."""
    known = round(job.prompt_tokens * cached)
    prompt_s = work_of(job.prompt_tokens - known, known) / model.prompt_rate(machine) + 0.02
    slowed = 1.0 + machine.type.penalty * (machine.slots - 1)
    rate = machine.slots * model.decode_rate(machine)
    return prompt_s + max(0, job.output_tokens - 1) * slowed / rate


def capacity(
    machines: Iterable[Machine], models: Iterable[Model], jobs: Sequence[Job], cached: float = 0.0
) -> float:
    """Calls per second that the hosts could answer."""
    by_name = {model.name: model for model in models}
    alike: dict[tuple[str, int], list[Machine]] = {}
    for machine in machines:
        alike.setdefault((machine.type.name, machine.slots), []).append(machine)
    return sum(
        len(group)
        * len(jobs)
        / math.fsum(service_s(group[0], by_name[job.model], job, cached) for job in jobs)
        for group in alike.values()
    )


def stretched(
    jobs: list[Job], machines: Sequence[Machine], models: Sequence[Model], u: float, cached: float
) -> list[Job]:
    """The calls with their times stretched to that utilisation; 0: as they are."""
    if not u or not jobs:
        return jobs
    span_s = len(jobs) / (u * capacity(machines, models, jobs, cached))
    by = span_s / max(job.at for job in jobs)
    return [replace(job, at=job.at * by) for job in jobs]


# -- mishaps -----------------------------------------------------------------------------------


def _straggle(jobs: list[Job], names: Sequence[str], seed: int) -> Told:
    return jobs, stragglers(names, _last(jobs), seed)


def _die(jobs: list[Job], names: Sequence[str], seed: int) -> Told:
    return jobs, deaths(names, _last(jobs), seed)


def _last(jobs: Sequence[Job]) -> float:
    return max(job.at for job in jobs)


# -- the table ---------------------------------------------------------------------------------


def hosts(*kinds: tuple[int, str], slots: int = 4, context: int = 4096) -> tuple[Machine, ...]:
    """So many of each type."""
    return tuple(
        Machine(f"{kind}-{number}", HOST_TYPES[kind], slots, context)
        for count, kind in kinds
        for number in range(1, count + 1)
    )


UNLIKE: Final = hosts(*((1, kind) for kind in HOST_TYPES))
SHARED: Final = hosts((2, "rtx3060"), (3, "rtx3090"), (2, "rtx4090"), (1, "a100"))
TWELVE: Final = ((6, "rtx3060"), (4, "rtx3090"), (2, "rtx4090"))
EQUAL: Final = hosts((8, "rtx3090"))
CONVERSATION: Final = "Azure conversation 2023 at its own times, prompts up to the context"


def _warm(machines: Sequence[Machine], *models: Model) -> dict[str, list[str]]:
    return {machine.name: [model.name for model in models or (STANDARD,)] for machine in machines}


def _dealt(machines: Sequence[Machine], models: Sequence[Model]) -> dict[str, list[str]]:
    """Memory filled in turn, each time with what is rarest for its popularity."""
    copies = dict.fromkeys(models, 0)
    popular = {model: rank**calls.ZIPF for rank, model in enumerate(models, 1)}
    dealt: dict[str, list[str]] = {}
    for machine in machines:
        room, names = machine.type.memory_gb, dealt.setdefault(machine.name, [])
        ranked = sorted(models, key=lambda model: (copies[model] + 1) * popular[model])
        for model in ranked:
            takes = model.memory_gb(machine)
            if takes <= room and len(names) < machine.max_models:
                names.append(model.name)
                copies[model] += 1
                room -= takes
    return dealt


def workloads(traces: Traces, share: float = 1.0) -> dict[str, Workload]:
    """
    All workloads by name.

    Args:
        share: How much of each is wanted; what is left out is the end, rates stay.
    """
    found = (
        *_many_models(traces, share),
        *_one_model(traces, share),
        *_conversations(traces, share),
        *_tenants(traces, share),
        *_big(traces, share),
    )
    return {workload.name: workload for workload in found}


def _many_models(traces: Traces, share: float) -> Iterator[Workload]:
    """More models than memory."""
    yield Workload(
        name="many-models",
        about="20,000 calls, Poisson, models by Zipf 0.9; lengths of Azure conversation (coders: "
        "Azure code), cut at 3,500 and 1,500; embeddings of 50 to 2,000 tokens; all empty",
        machines=SHARED,
        models=MODELS,
        u=0.35,
        draw=partial(calls.zipf, traces=traces, calls=round(20000 * share), models=MODELS),
        skip_s=120.0,
    )
    yield Workload(
        name="bursty",
        about="an hour of 40 ServeGen clients, each bound to one model by Zipf 0.9, all with "
        "equally many calls; lengths cut at 3,500 and 1,500; all empty",
        machines=SHARED,
        models=MODELS,
        u=0.35,
        draw=partial(
            calls.served, traces=traces, clients=40, calls=round(20000 * share), models=MODELS
        ),
        skip_s=120.0,
    )


def _replaying(
    name: str,
    machines: tuple[Machine, ...],
    traces: Traces,
    share: float,
    *,
    u: float,
    kind: str = "conv",
    about: str = CONVERSATION,
    harm: Harm = _no_harm,
) -> Workload:
    most = machines[0].context
    draw = partial(calls.replayed, traces=traces, kind=kind, share=share, most=most)
    warm = _warm(machines)
    return Workload(
        name=name,
        about=about,
        machines=machines,
        u=u,
        draw=draw,
        warm=warm,
        harm=harm,
    )


def _one_model(traces: Traces, share: float) -> Iterator[Workload]:
    """The standard model, warm everywhere."""
    yield _replaying("six-unlike", UNLIKE, traces, share, u=0.6)
    yield _replaying("twelve-mixed", hosts(*TWELVE), traces, share, u=0.6)
    yield _replaying("equal", EQUAL, traces, share, u=0.7)
    yield _replaying("one-slot", hosts((8, "rtx3090"), slots=1), traces, share, u=0.6)
    yield _replaying(
        "code-bursts",
        hosts((8, "rtx3090"), context=8192),
        traces,
        share,
        u=0.3,
        kind="code",
        about="Azure code 2023 at its own times",
    )
    machines = hosts((5, "rtx3090"), (3, "rtx4090"))
    yield Workload(
        name="bursts",
        about="an hour of 24 ServeGen clients, all with equally many calls; lengths cut at "
        "3,500 and 1,500",
        machines=machines,
        u=0.6,
        draw=partial(
            calls.served,
            traces=traces,
            clients=24,
            calls=round(25000 * share),
            models=(STANDARD,),
        ),
        warm=_warm(machines),
    )
    about = f"{CONVERSATION}; each host five times slower for 20 + exp(60) s every exp(600) s"
    yield _replaying("stragglers", EQUAL, traces, share, u=0.6, about=about, harm=_straggle)
    about = (
        f"{CONVERSATION}; two crashes and two hangs of 90 s; one host up for 20 s and down for "
        "10 s from the beginning on"
    )
    yield _replaying("deaths", EQUAL, traces, share, u=0.55, about=about, harm=_die)
    about = f"{CONVERSATION}; a quarter goes straight to the hosts, 40 % of it to one of them"
    yield _replaying("bypass", EQUAL, traces, share, u=0.6, about=about, harm=bypassing)


def _conversations(traces: Traces, share: float) -> Iterator[Workload]:
    """Prompts that begin as others did."""
    machines = hosts((8, "rtx3090"), context=8192)
    for name, common in (("chat", False), ("chat-common", True)):
        cached = "for all conversations" if common else "by the conversation alone"
        yield Workload(
            name=name,
            about="5,000 conversations, Poisson; system prompt of 300 tokens, known again "
            f"{cached}; 30 % one turn, else 1 + geometric (mean 5); messages lognormal(3.8, 1.1); "
            "answers of ShareGPT up to 800; next turn lognormal(ln 45 s, 1) after the answer",
            machines=machines,
            u=0.75,
            cached=0.7,
            kin="chat",
            draw=partial(
                calls.chat,
                traces=traces,
                conversations=round(5000 * share),
                context=8192,
                common=common,
            ),
            warm=_warm(machines),
        )
    machines = hosts((3, "rtx3090"), (3, "rtx4090"), slots=2, context=32768)
    yield Workload(
        name="mooncake",
        about="a quarter of the conversations of the Mooncake trace at its own times, cut at the "
        "context; its prefix blocks of 512 tokens",
        machines=machines,
        u=0.0,
        draw=partial(calls.mooncake, traces=traces, conversations=0.25, share=share, context=32768),
        warm=_warm(machines),
    )


SMALL_CALLS: Final = 200


def _tenants(traces: Traces, share: float) -> Iterator[Workload]:
    """Several keys, and not all alike."""
    machines = hosts((6, "rtx3090"), (2, "rtx4090"))
    models = (*calls.CHATTED, EMBEDDER)
    yield Workload(
        name="tenants",
        about="six chat keys of equally many calls, Poisson; a batch key with 300 calls at once "
        "for every 700 chats and an embedding key with 200 for every 280 (in an unstretched hour "
        "8,400 chats, 3,600 batch calls, 6,000 embeddings); half of chats and batch on each of "
        "two models of about 8B; lengths of Azure conversation cut at 3,500 and 1,500, "
        "embeddings of 50 to 2,000 tokens",
        machines=machines,
        models=models,
        u=0.6,
        draw=partial(calls.tenants, traces=traces, share=share),
        warm=_warm(machines, *models),
    )
    machines = hosts((2, "rtx3090"))
    small = round(SMALL_CALLS * share)
    part = 3.0 / 101.0  # of the capacity, the small one's
    for name, large, u in (
        ("fair-calm", round(small * (0.7 - part) / part), 0.7),
        ("fair-flood", 100 * small, 3.0),
    ):
        yield Workload(
            name=name,
            about=f"two keys of {small} and {large} calls, Poisson; lengths of Azure conversation",
            machines=machines,
            u=u,
            draw=partial(calls.unequal, traces=traces, small=small, large=large),
            warm=_warm(machines),
            kin="fair",
        )


BIG: Final = (64, 256, 1000)


def _big(traces: Traces, share: float) -> Iterator[Workload]:
    """Many hosts, in the proportions of `TWELVE`; arrivals with gamma gaps of CV 1.5."""
    for count in BIG:
        small, middle = round(count / 2), round(count / 3)
        machines = hosts(
            (small, "rtx3060"), (middle, "rtx3090"), (count - small - middle, "rtx4090")
        )
        for models, name in (((STANDARD,), f"big-{count}"), (MODELS, f"big-{count}-models")):
            yield Workload(
                name=name,
                about="gamma gaps of CV 1.5; lengths as of many-models",
                machines=machines,
                models=models,
                u=0.6 if len(models) == 1 else 0.35,
                draw=partial(
                    calls.zipf,
                    traces=traces,
                    calls=round(200 * count * share),
                    models=models,
                    cv=1.5,
                ),
                warm=_warm(machines) if len(models) == 1 else _dealt(machines, models),
            )
