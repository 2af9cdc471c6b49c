"""Looking for hosts on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Self

import pytest

from balancer.config import Candidate, Config, load
from balancer.core.events import Event, HostPassedOver
from balancer.net import discovery
from balancer.net.discovery import Discovery, Look, first_look, look
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream
from balancer.sim.fleet import Fleet
from balancer.sim.loop import run
from tests.conftest import Start
from tests.rig import dead_url

pytestmark = pytest.mark.usefixtures("quiet")


def config(*urls: str, source: str = "OLLAMA_BASE_URLS", backends: Any = ()) -> Config:
    """One whose only candidates these are."""
    read = load("", {}, overrides={"discovery.sources": "env", "backends": list(backends)})
    candidates = tuple(Candidate(url, source) for url in urls)
    return replace(read, discovery=replace(read.discovery, candidates=candidates))


def urls(looked: Look) -> list[str]:
    """What was found."""
    return [one.url for one in looked.found]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Two simulated hosts."""
    async with Fleet.test(2) as hosts:
        yield hosts


async def test_who_answers_as_ollama_is_found(fleet: Fleet) -> None:
    """In the order of the candidates; who is not there is not."""
    a, b = fleet.urls
    looked = await first_look(config(b, dead_url(), a, source="local port"))
    assert looked == Look((Candidate(b, "local port"), Candidate(a, "local port")))


async def test_nothing_to_look_for_asks_nobody() -> None:
    """Not even a session is opened."""
    assert await first_look(config()) == Look()


async def test_local_ports_are_those_of_the_machine(fleet: Fleet) -> None:
    """From the configuration to what was found."""
    ports = [host.port for host in fleet]
    read = load(
        "", {}, overrides={"discovery.sources": "local", "discovery.local.ports": sorted(ports)}
    )
    looked = await first_look(read)
    assert sorted(urls(looked)) == sorted(fleet.urls)


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"{}"), (200, b"nothing here"), (200, b'{"version": 1}'), (200, b'["version"]')],
)
async def test_another_program_is_no_host(fleet: Fleet, status: int, body: bytes) -> None:
    """Whatever it says; only a variable that names it is worth a word."""
    fleet["a"].script("/api/version", status=status, segments=[body])
    assert await first_look(config(fleet.urls[0], source="local port")) == Look()
    fleet["a"].script("/api/version", status=status, segments=[body])
    looked = await first_look(config(fleet.urls[0]))
    assert looked.found == ()
    (note,) = looked.notes
    assert note.startswith(f"{fleet.urls[0]} (OLLAMA_BASE_URLS) is left out until it answers")
    assert note.endswith(": not what Ollama says.")


async def test_a_variable_that_leads_nowhere_is_told() -> None:
    """With the reason."""
    (note,) = (await first_look(config(dead_url()))).notes
    assert note.endswith("cannot connect: connection refused.")


async def test_who_hangs_costs_no_more_than_the_limit(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are asked at once, so the others are found all the same."""
    monkeypatch.setattr(discovery, "LIMIT_S", 0.2)
    fleet["a"].faults.hang()
    looked = await first_look(config(*fleet.urls))
    assert urls(looked) == [fleet.urls[1]]
    assert "no answer in time" in looked.notes[0]


async def test_a_balancer_is_not_found(start: Start) -> None:
    """Ours or another: it would answer as Ollama does, and calls would go round."""
    rig = await start(1)
    for source in ("OLLAMA_HOST", "local port"):
        looked = await first_look(config(rig.url, source=source))
        assert looked.found == ()
        (note,) = looked.notes
        assert note.startswith(f"{rig.url} ({source}) is an ollama-balancer and is left out.")


async def test_one_host_under_two_names_is_found_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are resolved; the first counts; where the spelling hides it, it is told."""
    port = fleet["a"].port
    resolve(monkeypatch, **{"nas.local": "127.0.0.1"})
    names = [f"http://{name}:{port}" for name in ("127.0.0.1", "localhost", "nas.local")]
    looked = await first_look(config(*names))
    assert urls(looked) == names[:1]
    assert looked.notes == (
        f"{names[2]} (OLLAMA_BASE_URLS) is the same host as {names[0]}: used once.",
    )


async def test_what_is_written_is_not_found_under_another_name(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user says of a host counts; another port there is another host."""
    resolve(monkeypatch, box="127.0.1.1")
    a, b = (host.port for host in fleet)
    looked = await first_look(config(*fleet.urls, backends=[f"box:{a}"]))
    assert urls(looked) == [f"http://127.0.0.1:{b}"]
    assert looked.notes == (
        f"http://127.0.0.1:{a} (OLLAMA_BASE_URLS) is the same host as http://box:{a}: used once.",
    )


def resolve(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    """Have the machine know these names beside its own."""

    async def getaddrinfo(_: Any, host: str, port: Any, **__: Any) -> list[Any]:
        address = names.get(host, "127.0.0.1" if host == "localhost" else None)
        if address is None:
            raise OSError("unknown")
        return [(2, 1, 6, "", (address, port or 0))]

    kind = type(asyncio.get_running_loop())
    monkeypatch.setattr(kind, "getaddrinfo", getaddrinfo)


# -- again and again ---------------------------------------------------------------------------


class Watched:
    """A `Discovery` that runs, and what it told."""

    def __init__(self, start: Config, looked: Look | None) -> None:
        loop = asyncio.get_running_loop()
        self.events: list[Event] = []
        self.changes = 0
        self.tasks = Tasks(self.events.append, loop.time)
        self.upstream = ClientUpstream({}, self.tasks)
        self.discovery = Discovery(
            start, looked, self.upstream, self._changed, loop.time, self.events.append
        )

    def _changed(self) -> None:
        self.changes += 1

    @property
    def found(self) -> list[str]:
        """What was found so far."""
        return [one.url for one in self.discovery.found]

    async def __aenter__(self) -> Self:
        self.tasks.spawn(self.discovery.run(), "discovery")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tasks.close()
        await self.upstream.close()


def test_a_host_that_appears_is_found_later_and_stays() -> None:
    """Looked for at every interval; one that is gone again is its checks' business."""

    async def scene() -> None:
        async with Fleet.test(1) as fleet:
            (url,) = fleet.urls
            fleet["a"].faults.refuse()
            wanted = config(url)
            async with Watched(wanted, await first_look(wanted)) as watched:
                await asyncio.sleep(100)
                assert (watched.found, watched.changes) == ([], 0)
                fleet["a"].faults.heal()
                await asyncio.sleep(31)
                assert (watched.found, watched.changes) == ([url], 1)
                asked = len(fleet["a"].requests)
                fleet["a"].faults.refuse()
                await asyncio.sleep(100)
                assert (watched.found, watched.changes) == ([url], 1)
                assert len(fleet["a"].requests) == asked
                assert watched.events == []

    run(scene())


def test_without_a_first_look_it_looks_at_once_and_tells_each_note_once() -> None:
    """However often it looks."""

    async def scene() -> None:
        wanted = config(dead_url())
        async with Watched(wanted, None) as watched:
            await asyncio.sleep(1)
            assert [type(each) for each in watched.events] == [HostPassedOver]
            await asyncio.sleep(100)
            assert len(watched.events) == 1

    run(scene())


def test_a_new_configuration_is_looked_at_at_once() -> None:
    """And one without candidates ends all asking."""

    async def scene() -> None:
        async with Fleet.test(2) as fleet, Watched(config(fleet.urls[0]), None) as watched:
            await asyncio.sleep(1)
            assert watched.found == fleet.urls[:1]
            watched.discovery.follow(config(*fleet.urls))
            await asyncio.sleep(1)
            assert watched.found == fleet.urls
            watched.discovery.follow(config())
            asked = [len(host.requests) for host in fleet]
            await asyncio.sleep(100)
            assert [len(host.requests) for host in fleet] == asked

    run(scene())


async def test_what_is_known_is_not_asked_again(fleet: Fleet) -> None:
    """It counts as long as it is a candidate."""
    tasks = Tasks(lambda _: None, asyncio.get_running_loop().time)
    upstream = ClientUpstream({}, tasks)
    wanted = config(*fleet.urls)
    known = wanted.discovery.candidates[1:]
    looked = await look(upstream, wanted, known)
    await upstream.close()
    assert urls(looked) == [fleet.urls[1], fleet.urls[0]]
    assert (len(fleet["a"].requests), len(fleet["b"].requests)) == (2, 0)
