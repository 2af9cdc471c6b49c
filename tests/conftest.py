"""Fixtures for tests of the whole: a fleet, a balancer, and a log that must stay quiet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Protocol
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.http_exceptions import HttpProcessingError
from aioresponses import aioresponses

from balancer.sim import loop as virtual
from tests.loops import LOOPS, VIRTUAL
from tests.rig import Rig, running


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--loop uvloop` runs what is asynchronous there, in virtual time as in real time."""
    parser.addoption("--loop", choices=list(LOOPS), default="asyncio", help="the event loop")


def pytest_configure(config: pytest.Config) -> None:
    """Have `balancer.sim.loop.run` make the loops that were asked for."""
    kind: Any = VIRTUAL[config.getoption("--loop")]
    virtual.VirtualLoop = kind  # type: ignore[misc]


def pytest_asyncio_loop_factories(
    config: pytest.Config,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The same for tests that are coroutines; their names stay as they are."""
    name = config.getoption("--loop")
    return {name: LOOPS[name]}


class Start(Protocol):
    """Starts a fleet and a balancer; takes what `tests.rig.running` takes."""

    def __call__(self, hosts: int = 3, **more: Any) -> Awaitable[Rig]:
        """The started rig."""


@pytest.fixture
async def start(quiet: None) -> AsyncIterator[Start]:
    """A factory of rigs that end with the test."""
    async with AsyncExitStack() as stack:

        async def begin(hosts: int = 3, **more: Any) -> Rig:
            return await stack.enter_async_context(running(hosts, **more))

        yield begin


@pytest.fixture
async def rig(start: Start) -> Rig:
    """Three hosts and a balancer."""
    return await start()


class _Response(aiohttp.ClientResponse):
    """What aioresponses makes; since 3.14 aiohttp wants one argument more than it gives."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, stream_writer=Mock(), **given)


@pytest.fixture(params=VIRTUAL)
def each_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `balancer.sim.loop.run` make one kind of loops, then the other."""
    monkeypatch.setattr(virtual, "VirtualLoop", VIRTUAL[request.param])


@pytest.fixture
def control_plane(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Answers to whatever a session asks, without a socket; for whole answers only."""
    monkeypatch.setattr("aioresponses.core.ClientResponse", _Response)
    with aioresponses() as answers:
        yield answers


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails the test if a library complains; of a malformed request it may (see `ops.log`)."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call"), *caplog.records]
    told = [r for r in records if r.name.startswith(("asyncio", "aiohttp")) and r.levelno > 20]
    errors = [(r.exc_info[1] if r.exc_info else None, r.getMessage()) for r in told]
    assert [text for error, text in errors if not isinstance(error, HttpProcessingError)] == []
