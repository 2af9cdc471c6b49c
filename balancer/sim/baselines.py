"""
What others do, to be measured against: calls pushed on as they come, or one plain queue.

Pushed calls know no queue and no limit of slots. A backend counts as up by its checks alone, and
has the models that it lists. A call whose connection is refused goes on to the next; whatever
breaks later, or is answered with a 503, is lost.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from balancer.sim.jobs import Job, Record
from balancer.sim.machine import Host, Loss, Told, Work
from balancer.sim.timeline import Timeline

BASELINES: Final = ("push-least-loaded", "push-warm-first", "push-round-robin", "central-warm")
CHECK_S: Final = 5.0
JITTER: Final = 0.2
CHECK_TIMEOUT_S: Final = 2.0
FALL: Final = 3
RISE: Final = 2
PATIENCE_S: Final = 10.0  # of the central queue, for a warm backend
LOOK_S: Final = 0.5

Over = Callable[[Record, str], None]


class Checks:
    """Asks every host in turn whether it is alive, as a plain load balancer does."""

    def __init__(self, hosts: Mapping[str, Host], timeline: Timeline, rng: random.Random) -> None:
        self.up = dict.fromkeys(hosts, True)
        self._streaks = dict.fromkeys(hosts, 0)
        self._timeline = timeline
        self._rng = rng
        for host in hosts.values():
            self._later(host)

    def _later(self, host: Host) -> None:
        delay_s = CHECK_S * self._rng.uniform(1 - JITTER, 1 + JITTER)
        self._timeline.after(delay_s, self._ask, host)

    def _ask(self, host: Host) -> None:
        silent = not host.is_alive and not host.is_refusing
        self._timeline.after(CHECK_TIMEOUT_S if silent else 0.0, self._hear, host, host.is_alive)

    def _hear(self, host: Host, ok: bool) -> None:  # noqa: FBT001 - what an event carries
        name = host.name
        streak = self._streaks[name] = 0 if ok is self.up[name] else self._streaks[name] + 1
        if streak >= (RISE if ok else FALL):
            self.up[name], self._streaks[name] = ok, 0
        self._later(host)


class _Pushed:
    """One call on its way."""

    __slots__ = ("_by", "host", "job", "record", "tried", "work")

    def __init__(self, by: Baseline, job: Job, record: Record) -> None:
        self._by = by
        self.job = job
        self.record = record
        self.tried: set[str] = set()
        self.host: Host | None = None
        self.work: Work | None = None

    def send(self, host: Host) -> None:
        """Go there."""
        job = self.job
        self.host, self.work = host, work_for(job, self)
        self.tried.add(host.name)
        self.record.backend = host.name
        self.record.attempts += 1
        host.submit(self.work)

    def first(self, work: Work) -> None:  # noqa: ARG002 - a sink
        """Its first token came."""
        self.record.first_at = self._by.now

    def ended(self, work: Work, told: Told) -> None:  # noqa: ARG002 - a sink
        """It was answered."""
        self.record.cached = told.cached
        self._by.ended(self, "done")

    def failed(self, work: Work, loss: Loss) -> None:  # noqa: ARG002 - a sink
        """It came to nothing there."""
        if loss in (Loss.REFUSED, Loss.UNREACHABLE) and self._by.sent_on(self):
            return
        self.record.error = loss.value
        self._by.ended(self, "lost" if self.record.first_at is None else "cut")


class Baseline:
    """
    One of `BASELINES`, before the same hosts.

    Args:
        over: Told once of each call how it ended.
    """

    def __init__(
        self,
        policy: str,
        hosts: Mapping[str, Host],
        timeline: Timeline,
        rng: random.Random,
        over: Over,
    ) -> None:
        self._hosts = hosts
        self._timeline = timeline
        self._over = over
        self._checks = Checks(hosts, timeline, rng)
        self._rank = _RANKS[policy]
        self._in_flight = dict.fromkeys(hosts, 0)
        self._last_used = dict.fromkeys(hosts, 0)
        self._uses = 0
        self._running: dict[int, _Pushed] = {}

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self._timeline.now

    def take(self, job: Job, record: Record) -> None:
        """A call comes in."""
        self._place(_Pushed(self, job, record))

    def leave(self, record: Record) -> None:
        """Its client hangs up."""
        pushed = self._running.pop(record.job, None)
        if pushed is None or pushed.host is None or pushed.work is None:
            return
        pushed.host.cancel(pushed.work)
        self._free(pushed)
        self._over(record, "left")

    def sent_on(self, pushed: _Pushed) -> bool:
        """Whether another backend takes a call that found nobody listening."""
        chosen = self._choose(pushed)
        if chosen is None:
            return False
        self._free(pushed)
        self._send(pushed, chosen)
        return True

    def ended(self, pushed: _Pushed, status: str) -> None:
        """A call is over."""
        self._running.pop(pushed.record.job, None)
        self._free(pushed)
        self._over(pushed.record, status)

    def _place(self, pushed: _Pushed) -> None:
        chosen = self._choose(pushed)
        if chosen is None:
            pushed.record.error = "no backend is up that has the model"
            self._over(pushed.record, "lost")
        else:
            self._send(pushed, chosen)

    def _send(self, pushed: _Pushed, host: Host) -> None:
        self._uses += 1
        self._last_used[host.name] = self._uses
        self._in_flight[host.name] += 1
        self._running[pushed.record.job] = pushed
        pushed.send(host)

    def _free(self, pushed: _Pushed) -> None:
        if pushed.host is not None:
            self._in_flight[pushed.host.name] -= 1

    def _choose(self, pushed: _Pushed) -> Host | None:
        found = self._usable(pushed)
        return min(found, key=lambda host: self._rank(self, host, pushed.job)) if found else None

    def _usable(self, pushed: _Pushed) -> list[Host]:
        model, up, tried = pushed.job.model, self._checks.up, pushed.tried
        return [
            host
            for name, host in self._hosts.items()
            if up[name] and name not in tried and model in host.models
        ]

    def _load(self, host: Host) -> tuple[int, int]:
        return self._in_flight[host.name], self._last_used[host.name]


_RANKS: Final[Mapping[str, Callable[[Baseline, Host, Job], tuple[int, ...]]]] = {
    "push-least-loaded": lambda by, host, _: by._load(host),  # noqa: SLF001 - its own table
    "push-warm-first": lambda by, host, job: (
        not host.has_or_loads(job.model),
        *by._load(host),  # noqa: SLF001 - its own table
    ),
    "push-round-robin": lambda by, host, _: (by._last_used[host.name],),  # noqa: SLF001 - as above
    "central-warm": lambda by, host, _: by._load(host),  # noqa: SLF001 - as above
}


class Central(Baseline):
    """
    One queue for all, first come first served for each model.

    A call goes where its model is in memory and a slot is free. If it is in memory nowhere and
    nobody loads it, or after ten seconds, it goes to the least loaded host that has it, with a
    free slot first. It knows the slots.
    """

    def __init__(
        self,
        policy: str,
        hosts: Mapping[str, Host],
        timeline: Timeline,
        rng: random.Random,
        over: Over,
    ) -> None:
        super().__init__(policy, hosts, timeline, rng, over)
        self._queues: dict[str, deque[_Pushed]] = {}
        self._by_model: dict[tuple[str, str], int] = {}
        timeline.after(LOOK_S, self._look)

    def leave(self, record: Record) -> None:
        """Its client hangs up, waiting or not."""
        for queue in self._queues.values():
            waiting = next((each for each in queue if each.record is record), None)
            if waiting is not None:
                queue.remove(waiting)
                self._over(record, "left")
                return
        super().leave(record)

    def ended(self, pushed: _Pushed, status: str) -> None:
        """A call is over: the next of its model may go."""
        super().ended(pushed, status)
        self._serve(pushed.job.model)

    def _look(self) -> None:
        for model in list(self._queues):
            self._serve(model)
        self._timeline.after(LOOK_S, self._look)

    def _place(self, pushed: _Pushed) -> None:
        self._queues.setdefault(pushed.job.model, deque()).append(pushed)
        self._serve(pushed.job.model)

    def _serve(self, model: str) -> None:
        queue = self._queues.get(model)
        while queue:
            chosen = self._warm(queue[0])
            if chosen is None:
                break
            pushed = queue.popleft()
            pushed.record.queued_s = self.now - pushed.record.arrived_at
            self._send(pushed, chosen)
        if not queue:
            self._queues.pop(model, None)

    def _warm(self, pushed: _Pushed) -> Host | None:
        """Where it may go now."""
        job = pushed.job
        usable = self._usable(pushed)
        warm = [host for host in usable if job.model in host.runners and self._room(host, job)]
        if warm:
            return min(warm, key=self._load)
        late = self.now - pushed.record.arrived_at >= PATIENCE_S
        if not late and any(host.has_or_loads(job.model) for host in usable):
            return None
        able = [host for host in usable if self._room(host, job)]
        return min(able, key=self._load) if able else None

    def _room(self, host: Host, job: Job) -> bool:
        slots = host.models[job.model].slots(host.machine)
        return self._by_model.get((host.name, job.model), 0) < slots

    def _send(self, pushed: _Pushed, host: Host) -> None:
        self._count_model(host, pushed.job.model, 1)
        super()._send(pushed, host)

    def _free(self, pushed: _Pushed) -> None:
        super()._free(pushed)
        if pushed.host is not None:
            self._count_model(pushed.host, pushed.job.model, -1)

    def _count_model(self, host: Host, model: str, by: int) -> None:
        place = (host.name, model)
        self._by_model[place] = self._by_model.get(place, 0) + by


def work_for(job: Job, sink: _Pushed) -> Work:
    """What goes to a host for a job."""
    return Work(
        job.model,
        sink,
        job.prompt_tokens,
        job.output_tokens,
        chain=job.chain,
        conversation=job.conversation,
    )


def build(
    policy: str, hosts: Mapping[str, Host], timeline: Timeline, rng: random.Random, over: Over
) -> Baseline:
    """The baseline of that name. Raises KeyError for an unknown one."""
    kind = Central if policy == "central-warm" else Baseline
    return kind(policy, hosts, timeline, rng, over)
