# ruff: noqa: INP001 - for `generate.py`, no package
"""Five situations of a simulated pool, as `explain` tells them; for ``docs/routing.md``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from balancer.cli import screen
from balancer.core.contexts import Contexts, Rules
from balancer.core.domain import Principal, Role
from balancer.core.sharing import Sharing
from balancer.ops.explain import Explain
from balancer.sim.world import HOST_TYPES, Job, Machine, Model, World

CHAT, CODE, BIG = Model("llama3.1"), Model("qwen2.5-coder", 4.7, 7.6), Model("phi4", 9.1, 14.7)
SMALL = Model("llama3.2", 2.0, 3.2, 0.11)
LATER_S: Final = 1000.0


class Query(dict[str, str]):
    """What follows the question mark of a request."""

    def getall(self, key: str, default: list[str]) -> list[str]:
        """All values of that name."""
        return [self[key]] if key in self else default


def explained(world: World, jobs: Sequence[Job], at: float, **query: str) -> dict[str, Any]:
    """What `explain` tells of that world at that second, after and amid these jobs."""
    told: list[dict[str, Any]] = []

    def look() -> None:
        shell = world.shell
        assert shell is not None  # noqa: S101 - the policy is the core's
        explain = Explain(
            shell.pool,
            shell.dispatcher,
            world.timeline.clock,
            lambda: "plan",
            Contexts(Rules(), shell.pool),
            shell.scheduler.decisions,  # type: ignore[attr-defined]  # it is the plan
            lambda name: Principal(name, Role.USER),
            Sharing,
        )
        told.append(explain(Query(query)))

    world.timeline.at(at, look)
    world.run([*jobs, Job(at + LATER_S, jobs[0].model, 1, 1)], at + 0.001)
    return told[0]


def _world(machines: Sequence[Machine], **warm: Sequence[Model]) -> World:
    """A pool that was told its slots."""
    return World(
        machines,
        (CHAT, CODE, BIG, SMALL),
        warm={name: [model.name for model in models] for name, models in warm.items()},
        slots_known=True,
    )


def _machine(name: str, kind: str, **more: int) -> Machine:
    return Machine(name, HOST_TYPES[kind], **more)


def _history(model: Model, until: float, every: float = 5.0, together: int = 1) -> list[Job]:
    """Calls by which the plan has come to know its hosts."""
    return [
        Job(5.0 + every * turn + 0.01 * number, model.name, 600, 200)
        for turn in range(int((until - 15.0) / every))
        for number in range(together)
    ]


def warm_and_free() -> dict[str, Any]:
    """Two hosts have the model in memory, with free slots."""
    world = _world([_machine("big", "rtx4090"), _machine("old", "rtx3090")], big=[CHAT], old=[CHAT])
    return explained(world, _history(CHAT, 200.0, 3.0, 3), 200.0, model=CHAT.name)


def held_for_the_faster() -> dict[str, Any]:
    """The only slot of the GPU is taken, and the CPU box has two that are free."""
    world = _world(
        [_machine("gpu", "rtx4090", slots=1), _machine("cpu", "cpu", slots=2)],
        gpu=[CHAT],
        cpu=[CHAT],
    )
    jobs = [*_history(CHAT, 200.0, 10.0), Job(200.0, CHAT.name, 800, 260)]
    return explained(world, jobs, 201.0, model=CHAT.name, prompt_tokens="900")


def cold_with_eviction() -> dict[str, Any]:
    """Nobody has the model in memory, and no host has room for it beside what it has."""
    world = _world(
        [_machine("busy", "rtx3060"), _machine("calm", "rtx3060")], busy=[CHAT], calm=[CODE]
    )
    jobs = [*_history(CHAT, 300.0), *_history(CODE, 300.0, 60.0), Job(298.0, CHAT.name, 600, 900)]
    return explained(world, jobs, 300.0, model=SMALL.name, prompt_tokens="400")


def another_context() -> dict[str, Any]:
    """The model is in memory, but with another context than the call asks for."""
    world = _world([_machine("one", "rtx3090"), _machine("two", "rtx3090")], one=[CHAT], two=[CHAT])
    jobs = [*_history(CHAT, 300.0, 4.0, 2), Job(299.0, CHAT.name, 600, 900)]
    return explained(world, jobs, 300.0, model=CHAT.name, num_ctx="16384")


def batch_gives_way() -> dict[str, Any]:
    """A batch call waits beside the last free slot."""
    world = _world([_machine("shared", "a100", slots=10)], shared=[CHAT])
    history = _history(CHAT, 200.0)
    chats = [Job(299.0 + 0.01 * turn, CHAT.name, 300, 900) for turn in range(9)]
    batch = Job(299.1, CHAT.name, 2000, 300, who="nightly", batch=True)
    jobs = [*history, *chats, batch]
    return explained(world, jobs, 300.0, model=CHAT.name, call=f"c{len(jobs) - 1}")


SITUATIONS: Final = {
    "Warm and free": ("explain llama3.1", warm_and_free),
    "Held for a fast busy one, while a slow one is free": (
        "explain llama3.1 --prompt-tokens 900",
        held_for_the_faster,
    ),
    "A cold load with an eviction": (
        "explain llama3.2 --prompt-tokens 400",
        cold_with_eviction,
    ),
    "Another num_ctx": ("explain llama3.1 --num-ctx 16384", another_context),
    "Batch gives way": ("explain llama3.1 --call c46", batch_gives_way),
}


def texts() -> dict[str, str]:
    """Each as the command prints it."""
    return {
        title: f"$ ollama-balancer {command}\n" + "\n".join(screen.explained(situation()))
        for title, (command, situation) in SITUATIONS.items()
    }
