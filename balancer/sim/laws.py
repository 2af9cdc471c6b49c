"""
What must hold in a simulated world after every event, whatever happens.

A law that is broken raises with the seed and the last events, so that it can be seen again.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from balancer.core.domain import BreakerState, Residency, Switch
from balancer.core.events import BreakerMoved, Event
from balancer.core.pool import Lease, Member
from balancer.core.scheduler import split_by_context
from balancer.sim.shell import Course, Shell
from balancer.sim.timeline import Timeline

LATE_S: Final = 0.05
GREEDY: Final = frozenset({"least-loaded", "warm-first", "round-robin"})
MOVES: Final = frozenset(
    {
        (BreakerState.CLOSED, BreakerState.OPEN),
        (BreakerState.OPEN, BreakerState.HALF_OPEN),
        (BreakerState.HALF_OPEN, BreakerState.OPEN),
        (BreakerState.HALF_OPEN, BreakerState.CLOSED),
    }
)


class Broken(AssertionError):
    """A law does not hold."""


class Laws:
    """Looks at everything after every event, and at each grant."""

    def __init__(self, timeline: Timeline, seed: int, policy: str) -> None:
        self._timeline = timeline
        self._seed = seed
        self._policy = policy
        self.shell: Shell | None = None

    def _broken(self, what: str) -> Broken:
        recent = "\n  ".join(self._timeline.recent)
        return Broken(
            f"{what} (seed {self._seed}, {self._policy}, at {self._timeline.now:.6f} s); "
            f"the last events:\n  {recent}"
        )

    def hold(self, *, that: bool, what: str) -> None:
        """Raise Broken unless it is so."""
        if not that:
            raise self._broken(what)

    # -- as things happen ----------------------------------------------------------------------

    def heard(self, event: Event) -> None:
        """Breakers move only as they may."""
        self._timeline.recent.append(f"  {self._timeline.now:.6f} {str(event)[:200]}")
        if isinstance(event, BreakerMoved):
            legal = (event.old, event.new) in MOVES
            self.hold(that=legal, what=f"{event.backend}: from {event.old} to {event.new}")

    def granted(self, course: Course, lease: Lease) -> None:
        """Only what may serve gets a call, within its slots, and each at most once."""
        name, model = lease.backend.name, lease.call.key.model
        shell = self._shell
        member = shell.pool.members[name]
        told = f"{course} on {name}"
        self.hold(that=not course.is_over, what=f"{told}: it was answered before")
        self.hold(that=course.attempt is None, what=f"{told}: it runs elsewhere")
        self.hold(that=name not in course.excluded, what=f"{told}: it was excluded")
        self.hold(that=member.health.up, what=f"{told}, which is down")
        self.hold(that=member.switch is Switch.SERVING, what=f"{told}, which is not serving")
        gate = member.models.get(model)
        closed = member.gate.state is BreakerState.CLOSED
        closed = closed and (gate is None or gate.state is BreakerState.CLOSED)
        self.hold(that=closed, what=f"{told}: its breaker is open")
        self.hold(that=model not in member.suspects, what=f"{told}: it is suspect")
        self.hold(that=shell.catalog.lists(name, model), what=f"{told}, which lists it not")
        in_flight, slots = member.load.in_flight(model), member.load.slots(model)
        # What only embeds is bounded by work, not by count: all of it waits in one slot's queue.
        within = in_flight <= slots + lease.run.probe
        self.hold(
            that=within or lease.call.embedding,
            what=f"{told}: {in_flight} in flight on {slots} slots",
        )

    # -- after every event ---------------------------------------------------------------------

    def look(self) -> None:
        """All that holds whenever nothing is happening."""
        shell = self._shell
        running: Counter[tuple[str, str]] = Counter()
        for attempt in shell.running:
            lease = attempt.lease
            self.hold(that=not lease.settled, what=f"{attempt.course} runs, its lease is settled")
            running[lease.backend.name, lease.call.key.model] += 1
        for member in shell.pool.members.values():
            self._look_at(member, running)
        self._look_at_queue()

    def _look_at(self, member: Member, running: Counter[tuple[str, str]]) -> None:
        name, counts = member.name, member.load.counts()
        mine = {model: n for (backend, model), n in running.items() if backend == name}
        self.hold(that=counts == mine, what=f"{name}: {counts} counted, {mine} run")
        leases = len(member.leases)
        self.hold(that=leases == sum(mine.values()), what=f"{name}: {leases} leases, {mine} run")
        total = member.load.in_flight()
        self.hold(that=total == sum(mine.values()), what=f"{name}: {total} in all, {mine} run")
        loading = self._shell.prober.loads.get(name)
        token = member.loading
        told = f"{name}: token {token}, under way {loading}"
        self.hold(that=(token is None) == (loading is None), what=told)
        self.hold(that=token is None or loading is None or token.key == loading.key, what=told)

    def _look_at_queue(self) -> None:
        shell, now = self._shell, self._timeline.now
        tickets = shell.dispatcher.waiting()
        depth = shell.dispatcher.admission.depth
        self.hold(that=depth == len(tickets), what=f"{depth} admitted, {len(tickets)} wait")
        for ticket in tickets:
            told = f"{ticket.call.id}, which waits since {ticket.queued_at:.3f}"
            late = now > ticket.limit_at + LATE_S and not shell.pool.loading(ticket.call.key)
            self.hold(that=not late, what=f"{told}, is late")
            if self._policy in GREEDY:
                candidates = shell.pool.candidates(ticket.call, ticket.excluded)
                fits, _ = split_by_context(ticket.call, candidates)
                free = [
                    c.backend
                    for c in fits
                    if c.residency is Residency.LOADED and c.in_flight < c.slots
                ]
                self.hold(that=not free, what=f"{told}: {free} have a free slot")

    @property
    def is_loading(self) -> bool:
        """Whether a load is under way."""
        return bool(self._shell.prober.loads)

    def at_rest(self) -> None:
        """When everything is answered nothing is left over."""
        shell = self._shell
        self.look()
        self.hold(that=not shell.dispatcher.waiting(), what="somebody waits still")
        self.hold(that=not shell.running, what="something runs still")
        self.hold(that=not shell.prober.loads, what="a load is under way still")
        self.hold(that=not shell.pool.running, what="leases are out still")
        self.hold(that=not shell.dispatcher.admission.depth, what="somebody counts as waiting")

    @property
    def _shell(self) -> Shell:
        assert self.shell is not None  # noqa: S101 - set before anything happens
        return self.shell
