"""The core put together on a clock by hand: pool, catalogue, scheduler, dispatcher; no sockets."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from balancer.core import names, routes
from balancer.core.admission import Admission, QueueLimits
from balancer.core.catalog import Catalog
from balancer.core.dispatch import Answer, Dispatcher
from balancer.core.domain import (
    Attempt,
    Backend,
    Call,
    CheckResult,
    Outcome,
    PlacementKey,
    Principal,
    Purpose,
    Role,
    Verdict,
)
from balancer.core.errors import BalancerError
from balancer.core.events import Event
from balancer.core.limits import Limits
from balancer.core.pool import Lease, Member, Pool, PoolSettings
from balancer.core.scheduler import Load, Scheduler, Ticket, Unload
from balancer.core.strategy import build
from tests.core.clocks import ManualClock

E = TypeVar("E", bound=Event)
GB = 1_000_000_000
USER = Principal("anonymous", Role.USER)


def canon(name: str) -> str:
    """The canonical name."""
    return names.parse(name).canonical


def key(name: str, **options: Any) -> PlacementKey:
    """A placement key."""
    return PlacementKey(canon(name), tuple(sorted(options.items())))


def digest(name: str) -> str:
    """A made-up digest, one per name."""
    return random.Random(name).randbytes(32).hex()


def tag(name: str, size: int = 4 * GB) -> dict[str, Any]:
    """A row of a backend's list."""
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-11-21T12:00:00Z",
        "size": size,
        "digest": digest(name),
        "details": {"format": "gguf", "context_length": 32768},
    }


def resident(name: str, context: int = 4096) -> dict[str, Any]:
    """A row of a backend's list of what is in memory."""
    return {
        "name": name,
        "model": name,
        "size": 5 * GB,
        "digest": digest(name),
        "expires_at": "2026-11-21T12:05:00Z",
        "size_vram": 5 * GB,
        "context_length": context,
    }


def call(model: str = "m:1", path: str = "/api/chat", **more: Any) -> Call:
    """A call of a client; *more* are fields of `Call`, `options` those of its key."""
    options = more.pop("options", {})
    told: dict[str, Any] = {
        "id": "r1",
        "route": routes.find("POST", path),
        "model": model,
        "key": key(model, **options),
        "streaming": True,
        "purpose": Purpose.RUN,
        "replayable": True,
        "principal": USER,
        "arrived_at": 0.0,
        "deadline": None,
        "body": b"{}",
    }
    return Call(**{**told, **more})


def outcome(verdict: Verdict = Verdict.OK, now: float = 0.0, **more: Any) -> Outcome:
    """How an attempt ended."""
    return Outcome(verdict, now, now, **{"text": f"was {verdict.value}", **more})


def tried(backend: str, verdict: Verdict = Verdict.FAULT, number: int = 1) -> Attempt:
    """An attempt that ended so."""
    return Attempt(number, backend, outcome(verdict))


class PoolBench:
    """A pool with everything around it in reach. Backends are named by single letters."""

    def __init__(self, *, seed: int = 1, settings: PoolSettings | None = None) -> None:
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.refreshed: list[str] = []
        self.changes = 0
        self.catalog = Catalog(self.clock)
        self.pool = Pool(
            settings or PoolSettings(),
            self.catalog,
            self.clock,
            random.Random(seed),
            self.events.append,
        )
        self.pool.refresh = self.refreshed.append
        self.pool.changed = self._changed

    def _changed(self) -> None:
        self.changes += 1

    def __getitem__(self, name: str) -> Member:
        return self.pool.members[name]

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def shape(self, *backends: Backend | str) -> tuple[list[str], list[str]]:
        """Configure these backends; a name alone stands for one with two slots."""
        return self.pool.reshape([b if isinstance(b, Backend) else backend(b) for b in backends])

    def up(self, name: str, *models: str, loaded: Iterable[str] = ()) -> None:
        """One good check, and what it has on disk and in memory."""
        self.check(name)
        self.lists(name, *models)
        self.holds(name, *loaded)

    def recover(self, name: str, *models: str, loaded: Iterable[str] = ()) -> None:
        """It was away, and has just come back."""
        self.check(name, ok=False, connected=False, count=3)
        while not self[name].health.up:
            self.clock.advance(1.0)
            self.check(name)
        self.lists(name, *models)
        self.holds(name, *loaded)

    def start(self, name: str, *models: str, loaded: Iterable[str] = ()) -> None:
        """Add one backend that is up."""
        present = [member.backend for member in self.pool.members.values()]
        self.shape(*present, name)
        self.up(name, *models, loaded=loaded)

    def check(
        self, name: str, *, ok: bool = True, connected: bool = True, count: int = 1, error: str = ""
    ) -> None:
        """Checks, a second apart."""
        for number in range(count):
            if number:
                self.clock.advance(1.0)
            text = "" if ok else error or "no answer in time"
            version = "0.12.0" if ok else None
            self.pool.observe(name, CheckResult(ok, 0.01, version, text, connected))

    def lists(self, name: str, *models: str, size: int = 4 * GB) -> None:
        """Its tags were read."""
        self.pool.note_tags(name, [tag(model, size) for model in models], self.clock())

    def holds(self, name: str, *models: str, context: int = 4096) -> None:
        """What is in its memory was read."""
        self.pool.note_ps(name, [resident(m, context) for m in models], self.clock())

    def close(self) -> None:
        """Give back what a test left out."""
        self.pool.changed = lambda: None
        for member in self.pool.members.values():
            for lease in list(member.leases):
                lease.release()

    def lease(self, name: str, model: str = "m:1", **more: Any) -> Lease | None:
        """A lease past the dispatcher."""
        return self.pool.lease(call(model, **more), name, 1, "warm")

    def blame(
        self, name: str, verdict: Verdict = Verdict.FAULT, count: int = 1, **more: Any
    ) -> None:
        """So many calls that end so, one after the other."""
        model = more.pop("model", "m:1")
        for _ in range(count):
            lease = self.lease(name, model)
            assert lease is not None
            lease.settle(outcome(verdict, self.clock(), **more))


def backend(name: str, **more: Any) -> Backend:
    """A configured backend with two slots."""
    return Backend(name, **{"url": f"http://{name}:11434", "slots": 2, **more})


@dataclass(eq=False)
class Client:
    """One call that was submitted, and what it heard."""

    call: Call
    leases: list[Lease] = field(default_factory=list)
    errors: list[BalancerError] = field(default_factory=list)
    ticket: Ticket | None = None

    @property
    def lease(self) -> Lease:
        """The lease it got."""
        (lease,) = self.leases
        return lease

    @property
    def error(self) -> BalancerError:
        """The refusal it got."""
        (error,) = self.errors
        return error

    @property
    def waits(self) -> bool:
        """Whether it has heard nothing."""
        return not self.leases and not self.errors


class Bench(PoolBench):
    """The same with a dispatcher; the shell is played by hand."""

    def __init__(
        self,
        policy: str = "least-loaded",
        *,
        seed: int = 1,
        limits: QueueLimits | None = None,
        settings: PoolSettings | None = None,
    ) -> None:
        super().__init__(seed=seed, settings=settings)
        self.loads: list[Load] = []
        self.unloads: list[Unload] = []
        self.wake_at = math.inf
        self.admission = Admission(limits or QueueLimits(), self.clock)
        self.limits = Limits(self.clock)
        self.scheduler: Scheduler = build(policy, self.pool, self.limits.may_start)
        self.dispatcher = Dispatcher(
            self.pool,
            self.scheduler,
            self.admission,
            self.clock,
            self.events.append,
            self._wake_at,
            self.loads.append,
            self.unloads.append,
            limits=self.limits,
        )
        self.pool.changed = self.dispatcher.kick

    def _wake_at(self, at: float) -> None:
        self.wake_at = at

    def submit(self, model: str = "m:1", **more: Any) -> Client:
        """
        One call comes in; a refusal is kept as an error like any other.

        *more*: of `call`, or `excluded`, `attempts`, `seq` of `Dispatcher.submit`.
        """
        again = {name: more.pop(name) for name in ("excluded", "attempts", "seq") if name in more}
        client = Client(call(model, **{"arrived_at": self.clock(), **more}))
        try:
            client.ticket = self.dispatcher.submit(
                client.call, client.leases.append, client.errors.append, **again
            )
        except BalancerError as error:
            client.errors.append(error)
        return client

    def loaded(self, *, verdict: Verdict = Verdict.OK, **more: Any) -> Load:
        """The oldest load under way is answered, as the shell tells it."""
        load = self.loads.pop(0)
        ended = outcome(verdict, self.clock(), caused_load=True, **more)
        self.pool.end_load(load.backend, load.key, ended)
        attempt = answer = None
        if verdict is not Verdict.OK:
            before = 0 if load.ticket is None else len(load.ticket.attempts)
            attempt = Attempt(before + 1, load.backend, ended)
            answer = Answer(500, "application/json", b'{"error":"no"}')
        self.dispatcher.load_ended(load, attempt, answer, 1.0)
        return load

    def sleep(self, seconds: float) -> None:
        """Let time pass; the timer fires whenever it was asked to."""
        end, rings = self.clock() + seconds, 0
        while self.wake_at <= end:
            rings += 1
            assert rings < 1000, f"the timer is asked for {self.wake_at} again and again"
            self.clock.now = max(self.clock(), self.wake_at)
            self.wake_at = math.inf
            self.dispatcher.kick()
        self.clock.now = end
