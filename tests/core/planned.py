"""The core with the plan, and what its tests share."""

from __future__ import annotations

from typing import Any

from balancer.core.admission import QueueLimits
from balancer.core.decisions import Decision
from balancer.core.domain import Usage
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.scheduler import Load
from tests.core.bench import GB, Bench, Client, backend, canon, outcome, resident

FAST = {"prompt_rate": 6000.0, "decode_rate": 120.0}
SLOW = {"prompt_rate": 75.0, "decode_rate": 9.0}
M = canon("m:1")


class Planned(Bench):
    """The core with the plan, and with what hosts do played by hand."""

    def __init__(self, knobs: Knobs | None = None) -> None:
        super().__init__("plan", limits=QueueLimits(10_000, 10_000, 900.0))
        self.memory: dict[str, list[dict[str, Any]]] = {}
        self.take(Plan(self.pool, knobs, may_start=self.limits.may_start))

    def take(self, plan: Plan) -> None:
        """Exchange the scheduler."""
        plan.decisions.emit = self.events.append
        self.dispatcher.exchange(plan)
        self.scheduler = plan

    @property
    def plan(self) -> Plan:
        """The planner."""
        assert isinstance(self.scheduler, Plan)
        return self.scheduler

    def speed(self, name: str, load_rate: float = 1.0, **rates: float) -> None:
        """How fast one is, as if learned."""
        ledger = self.plan.ledgers[name]
        told = {"prompt_rate": 1500.0, "decode_rate": 60.0, "load_rate": load_rate, **rates}
        ledger.speed.restore({**told, "samples": dict.fromkeys(("prompt", "decode", "load"), 20)})
        ledger.moved()

    @property
    def last(self) -> Decision:
        """What was decided last."""
        return self.plan.decisions.ring[-1]

    def pour(self, seconds: float, rate: float, *clients: Client) -> None:
        """Let answers come at that rate, for a time."""
        for _ in range(round(2 * seconds)):
            for client in clients:
                for lease in client.leases:
                    if not lease.settled:
                        lease.moved(round(rate / 2))
            self.sleep(0.5)

    def holds(self, name: str, *models: str, context: int = 4096, minute: int = 5) -> None:
        """What is in its memory was read, and is read again from then on."""
        told = {"expires_at": f"2026-11-21T12:{minute:02d}:00Z"}
        self.memory[name] = [resident(model, context) | told for model in models]
        self.pool.note_ps(name, self.memory[name], self.clock())

    def sleep(self, seconds: float) -> None:
        """Let time pass; memory is read now and then."""
        end = self.clock() + seconds
        while self.clock() < end:
            super().sleep(min(5.0, end - self.clock()))
            for name, rows in self.memory.items():
                if name in self.pool.members and self[name].health.up:
                    self.pool.note_ps(name, rows, self.clock())

    def end(self, *clients: Client, **usage: Any) -> None:
        """They end well."""
        for client in clients:
            client.lease.settle(outcome(now=self.clock(), usage=Usage(**usage)))

    def end_load(self, *stays: str) -> Load:
        """The oldest load is done, and what is in memory then is read: it, and what *stays*."""
        self.sleep(0.1)
        self.holds(self.loads[0].backend, *stays)
        load = self.loaded()
        self.holds(load.backend, *stays, load.key.model.rpartition("/")[2])
        return load

    def go_down(self, *names: str) -> None:
        """Their checks fail."""
        for name in names:
            self.check(name, ok=False, connected=False, count=3)


def where(*clients: Client) -> list[str]:
    """Where each runs; empty: it waits."""
    return [client.leases[0].backend.name if client.leases else "" for client in clients]


def at_rest(plan: Plan) -> bool:
    """Whether nothing is counted any more."""
    idle = all(ledger.is_idle for ledger in plan.ledgers.values())
    return idle and not plan.books.tracks and not plan.books.in_flight and not plan.queues.by_key


def crowded(bench: Planned, **more: Any) -> None:
    """Room for one model; m:1 is there, o:1 is wanted."""
    bench.shape(backend("a", slots=2, vram_bytes=7 * GB, **more))
    bench.up("a", "m:1", "o:1", loaded=["m:1"])
