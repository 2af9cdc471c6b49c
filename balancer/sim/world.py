"""
A world in virtual time: the real core, or a baseline, before simulated hosts, under one heap.

No socket, no task, no real clock: what happens depends on the arguments and the seed alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from balancer.core.admission import QueueLimits
from balancer.core.knobs import Knobs
from balancer.core.pool import PoolSettings
from balancer.sim import baselines
from balancer.sim.baselines import BASELINES
from balancer.sim.jobs import Job, Record, Report, with_chains
from balancer.sim.laws import Laws
from balancer.sim.machine import HOST_TYPES, Host, HostType, Loss, Machine, Model, Told, Work
from balancer.sim.mishaps import (
    Bypass,
    Crash,
    Hang,
    Mishap,
    Straggle,
    bypassing,
    deaths,
    flapping,
    stragglers,
)
from balancer.sim.shell import Shell
from balancer.sim.timeline import Timeline

__all__ = [
    "BASELINES",
    "HOST_TYPES",
    "Bypass",
    "Crash",
    "Hang",
    "HostType",
    "Job",
    "Machine",
    "Mishap",
    "Model",
    "Record",
    "Report",
    "Straggle",
    "World",
    "bypassing",
    "deaths",
    "flapping",
    "stragglers",
]

REST_S: Final = 1_200.0  # after the last answer, in which everything must come to rest


class Front(Protocol):
    """Whoever takes the calls in."""

    def take(self, job: Job, record: Record) -> None:
        """A call comes in."""

    def leave(self, record: Record) -> None:
        """Its client hangs up."""


class Stranger:
    """Somebody who asks a host past the balancer, and tells nobody what comes of it."""

    def first(self, work: Work) -> None:
        """Nothing."""

    def ended(self, work: Work, told: Told) -> None:
        """Nothing."""

    def failed(self, work: Work, loss: Loss) -> None:
        """Nothing."""


class World:
    """
    Machines, models and a policy, to be run once.

    Args:
        policy: A strategy of the core, or one of `BASELINES`.
        warm: Models in memory from the start, by machine.
        slots_known: Whether the core is told how many calls each machine takes at once.
        memory_known: Whether it is told how much memory each has for models.
        check_invariants: Look after every event whether all goes by the laws; slow.
        queue: Bounds on waiting, None: wide.
        knobs: Of the plan.
        settings: Of the core's pool, None: as in the product.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        models: Sequence[Model],
        *,
        policy: str = "plan",
        seed: int = 1,
        warm: Mapping[str, Sequence[str]] | None = None,
        slots_known: bool = False,
        memory_known: bool = True,
        mishaps: Sequence[Mishap] = (),
        check_invariants: bool = False,
        ps_interval_s: float = 2.5,
        queue: QueueLimits | None = None,
        knobs: Knobs | Mapping[str, float] | None = None,
        settings: PoolSettings | None = None,
    ) -> None:
        self.timeline = Timeline()
        self.settings: dict[str, object] = {
            "policy": policy,
            "seed": seed,
            "slots_known": slots_known,
            "memory_known": memory_known,
            "ps_interval_s": ps_interval_s,
            "machines": tuple(machines),
            "models": tuple(models),
            "mishaps": len(mishaps),
            "knobs": knobs,
        }
        self.hosts = {
            each.name: Host(each, models, self.timeline, place)
            for place, each in enumerate(machines)
        }
        for name, loaded in (warm or {}).items():
            for model in loaded:
                self.hosts[name].load_now(model)
        self.shell: Shell | None = None
        self._laws: Laws | None = None
        self._records: list[Record] = []
        self._jobs: Sequence[Job] = ()
        self._followers: dict[int, list[int]] = {}
        self._open = 0
        rng = random.Random(seed)
        self._front: Front
        if policy in BASELINES:
            self._front = baselines.build(policy, self.hosts, self.timeline, rng, self._over)
        else:
            laws = Laws(self.timeline, seed, policy) if check_invariants else None
            self._front = self.shell = Shell(
                policy,
                self.hosts,
                models,
                self.timeline,
                rng,
                self._over,
                slots_known=slots_known,
                memory_known=memory_known,
                ps_interval_s=ps_interval_s,
                queue=queue,
                watch=laws,
                settings=settings,
                knobs=_knobs(knobs),
            )
            if laws is not None:
                laws.shell, self._laws = self.shell, laws
                self.timeline.after_each = laws.look
        for mishap in mishaps:
            self.timeline.at(mishap.at, self._befall, mishap)

    def run(self, jobs: Sequence[Job], until: float | None = None) -> Report:
        """
        Let the jobs come in, and everything happen up to *until*; None: until all are answered.

        Raises:
            Broken: A law does not hold, and somebody looked.
        """
        self._jobs = with_chains(jobs)
        self._records = [Record(index, math.inf) for index in range(len(jobs))]
        self._open = len(jobs)
        for index, job in enumerate(self._jobs):
            if job.after is None:
                self.timeline.at(job.at, self._arrive, index)
            else:
                self._followers.setdefault(job.after[0], []).append(index)
        try:
            if self._open or until is not None:
                self.timeline.run(math.inf if until is None else until)
            if self._laws is not None and not self._open:
                self._come_to_rest(self._laws)
            return self._report()
        finally:
            if self.shell is not None:
                self.shell.close()

    def _come_to_rest(self, laws: Laws) -> None:
        """Loads that nobody waits for any more end in their time; then nothing may be left."""
        ended_at = self.timeline.now
        while laws.is_loading and self.timeline.now < ended_at + REST_S:
            self.timeline.run(self.timeline.now + 1.0)
        laws.at_rest()
        self.timeline.now = ended_at

    def _report(self) -> Report:
        shell = self.shell
        return Report(
            tuple(self._records),
            sum(host.loads for host in self.hosts.values()),
            {} if shell is None else dict(sorted(shell.loads_by.items())),
            sum(host.evictions for host in self.hosts.values()),
            self.timeline.now,
            self.settings,
            self.timeline.happened,
        )

    # -- jobs ----------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        job, record = self._jobs[index], self._records[index]
        record.arrived_at = self.timeline.now
        record.status = "unfinished"
        if job.leaves_after is not None:
            self.timeline.after(job.leaves_after, self._leave, record)
        self._front.take(job, record)

    def _leave(self, record: Record) -> None:
        if record.status == "unfinished":
            self._front.leave(record)

    def _over(self, record: Record, status: str) -> None:
        """A call was answered; those that follow it come in their time."""
        if record.status != "unfinished":
            raise AssertionError(f"call {record.job} was {record.status}, now {status}")
        record.status = status
        record.ended_at = self.timeline.now
        for index in self._followers.pop(record.job, ()):
            after = self._jobs[index].after
            assert after is not None  # noqa: S101 - that is how it came to follow
            self.timeline.after(after[1], self._arrive, index)
        self._open -= 1
        if not self._open:
            self.timeline.stop()

    # -- mishaps -------------------------------------------------------------------------------

    def _befall(self, mishap: Mishap) -> None:
        host = self.hosts[mishap.machine]
        if isinstance(mishap, Bypass):
            tokens = mishap.prompt_tokens, mishap.output_tokens
            host.submit(Work(mishap.model, Stranger(), *tokens))
        elif isinstance(mishap, Crash):
            host.crash()
            self.timeline.after(mishap.for_s, self._recover, host, True)
        elif isinstance(mishap, Hang):
            host.hang(connects=mishap.connects)
            self.timeline.after(mishap.for_s, self._recover, host, False)
        else:
            host.slow(mishap.factor)
            self.timeline.after(mishap.for_s, host.slow, 1.0)

    @staticmethod
    def _recover(host: Host, crashed: bool) -> None:  # noqa: FBT001 - what an event carries
        host.recover(crashed=crashed)


def _knobs(told: Knobs | Mapping[str, float] | None) -> Knobs | None:
    """Whole numbers stay whole, however they were written."""
    if told is None or isinstance(told, Knobs):
        return told
    usual = Knobs()
    return replace(usual, **{name: type(getattr(usual, name))(v) for name, v in told.items()})
