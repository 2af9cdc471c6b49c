"""Several simulated hosts at once, ready-made fleets, and trouble that follows a script.

    async with Fleet.test(3) as fleet:
        fleet.urls
        fleet["b"].faults.refuse()

Trouble is data: `Trouble(8.0, "flaky", "refuse")` calls `faults.refuse()` on that host eight
seconds after the start. The loop's clock drives it, so under `sim.loop.run` it costs no time.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase
from typing import Any, Self

from balancer.sim.host import GIB, Settings, SimModel
from balancer.sim.management import Registry
from balancer.sim.ollama import SimOllama

PREFIX = "[simulated]"
PULL_BYTES_PER_S = 500e6


@dataclass(frozen=True, slots=True)
class Trouble:
    """One line of a script: what befalls which host, when, and how often."""

    at_s: float
    host: str
    fault: str
    """The name of a method of Faults, `heal` among them."""
    args: tuple[Any, ...] = ()
    every_s: float | None = None
    """Again and again after so many seconds; None: once."""


class Fleet:
    """Hosts that start and stop together."""

    def __init__(
        self,
        hosts: Iterable[SimOllama],
        *,
        script: Sequence[Trouble] = (),
        emit: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._hosts = {host.name: host for host in hosts}
        self._script = tuple(script)
        self._emit = emit
        self._timers: dict[Trouble, asyncio.TimerHandle] = {}

    # -- ready-made -----------------------------------------------------------------------------

    @classmethod
    def demo(
        cls,
        *,
        hosts: int = 3,
        ports: Sequence[int] = (),
        emit: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """`fast` (one slot), `slow` (much memory), `flaky` (refuses callers now and then)."""
        return cls(_demo_hosts(hosts, ports), script=SCENARIOS["flaky"], emit=emit)

    @classmethod
    def test(
        cls,
        count: int = 3,
        *,
        ports: Sequence[int] = (),
        settings: Settings | None = None,
        models: Iterable[SimModel] | None = None,
        speed: float = 1.0,
        **more: Any,
    ) -> Self:
        """Equal hosts `a`, `b`, `c` … with the models of `standard_models`."""
        chosen = standard_models(speed) if models is None else tuple(models)
        return cls(
            SimOllama(
                chosen,
                name=ascii_lowercase[index] if count <= len(ascii_lowercase) else f"h{index}",
                settings=settings,
                port=ports[index] if ports else 0,
                seed=index,
                **more,
            )
            for index in range(count)
        )

    # -- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        started: list[SimOllama] = []
        try:
            for host in self:
                await host.start()
                started.append(host)
        except OSError:
            for host in started:
                await host.stop()
            raise
        start = asyncio.get_running_loop().time()
        for trouble in self._script:
            if trouble.host in self._hosts:
                self._schedule(trouble, start + trouble.at_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        for timer in self._timers.values():
            timer.cancel()
        for host in self:
            await host.stop()

    def _schedule(self, trouble: Trouble, at: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[trouble] = loop.call_at(at, self._strike, trouble, at)

    def _strike(self, trouble: Trouble, at: float) -> None:
        self._emit(" ".join([trouble.host, trouble.fault, *map(str, trouble.args)]))
        self[trouble.host].faults.apply(trouble.fault, *trouble.args)
        if trouble.every_s is not None:
            self._schedule(trouble, at + trouble.every_s)

    # -- its hosts ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[SimOllama]:
        return iter(self._hosts.values())

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, name: str) -> SimOllama:
        return self._hosts[name]

    @property
    def urls(self) -> list[str]:
        """Where the hosts listen, in order."""
        return [host.url for host in self]


def standard_models(speed: float) -> tuple[SimModel, ...]:
    """Two chat models, one with tools, one that embeds, and `big`, which takes 20 s to load.

    `speed` makes everything so many times faster.
    """
    model = partial(SimModel, prompt_tps=2000.0 * speed, decode_tps=50.0 * speed)
    return (
        model("llama3.2"),
        model(
            "qwen3:0.6b",
            size_bytes=GIB // 2,
            family="qwen3",
            capabilities=("completion", "tools", "thinking"),
        ),
        model("tooled", capabilities=("completion", "tools")),
        model(
            "nomic-embed-text",
            size_bytes=GIB // 4,
            family="nomic-bert",
            context_length=2048,
            capabilities=("embedding",),
        ),
        model("big", size_bytes=40 * GIB, load_s=20.0 / speed),
    )


def _demo_models(decode_tps: float, load_s: float) -> tuple[SimModel, ...]:
    model = partial(SimModel, prompt_tps=decode_tps * 20, decode_tps=decode_tps, load_s=load_s)
    return (
        model("demo/haiku", capabilities=("completion", "tools")),
        model("demo/embed", size_bytes=GIB // 4, capabilities=("embedding",)),
    )


def _demo_hosts(count: int, ports: Sequence[int]) -> Iterator[SimOllama]:
    """The three characters of the demo, over and over for a larger fleet; all may pull the rest."""
    registry = Registry(standard_models(1.0), bytes_per_s=PULL_BYTES_PER_S)
    kinds = (
        ("fast", _demo_models(80.0, 1.0), Settings(num_parallel=1, vram_bytes=12 * GIB)),
        ("slow", _demo_models(15.0, 4.0), Settings(num_parallel=4, vram_bytes=96 * GIB)),
        ("flaky", _demo_models(40.0, 2.0), Settings(num_parallel=2, vram_bytes=24 * GIB)),
    )
    for index in range(count):
        name, models, settings = kinds[index % len(kinds)]
        yield SimOllama(
            models,
            name=name if index < len(kinds) else f"{name}{index // len(kinds) + 1}",
            settings=settings,
            port=ports[index] if ports else 0,
            prefix=PREFIX,
            seed=index,
            registry=registry,
        )


SCENARIOS: Mapping[str, tuple[Trouble, ...]] = {
    "calm": (),
    "flaky": (
        Trouble(8.0, "flaky", "refuse", every_s=60.0),
        Trouble(16.0, "flaky", "heal", every_s=60.0),
    ),
    "rough": (
        Trouble(5.0, "flaky", "cut", (5,), every_s=40.0),
        Trouble(15.0, "flaky", "heal", every_s=40.0),
        Trouble(10.0, "slow", "slow", (4.0,), every_s=60.0),
        Trouble(25.0, "slow", "heal", every_s=60.0),
        Trouble(30.0, "fast", "freeze", every_s=90.0),
        Trouble(38.0, "fast", "heal", every_s=90.0),
        Trouble(60.0, "slow", "restart", (5.0,), every_s=120.0),
    ),
}
"""Scripts for `run`, written for the hosts of the demo."""


async def run(hosts: int, scenario: str, listen: str, emit: Callable[[str], None]) -> None:
    """Runs a fleet on `listen` (`host:port`) and the ports after it until cancelled.

    Port 0 takes free ports. `emit` gets one line per host and one per trouble.

    Raises:
        ValueError: an unknown scenario, or an address that is not `host:port`.
        OSError: a port is taken.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: one of {', '.join(SCENARIOS)}")
    address, colon, port_text = listen.rpartition(":")
    if not colon or not port_text.isdecimal():
        raise ValueError(f"not host:port: {listen!r}")
    port = int(port_text)
    if port + hosts - 1 > 65535:
        raise ValueError(f"ports end at 65535: {hosts} hosts from {port} on do not fit")
    ports = range(port, port + hosts) if port else [0] * hosts
    members = list(_demo_hosts(hosts, ports))
    for member in members:
        member.address = address.strip("[]") or "127.0.0.1"
    async with Fleet(members, script=SCENARIOS[scenario], emit=emit) as fleet:
        for member in fleet:
            emit(f"{member.name} {member.url}")
        await asyncio.get_running_loop().create_future()
