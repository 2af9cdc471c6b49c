"""The official SDKs come back when a refusal says, and stay away when it says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import anthropic
import openai
import pytest

from balancer.core.domain import Switch
from balancer.core.errors import BalancerError, Loop
from balancer.core.events import CallEnded, Event
from tests.e2e.stage import HELLO, models, virtual
from tests.rig import Rig, running

pytestmark = pytest.mark.compat
TRIES = 3
SDKS: dict[str, Callable[[Rig, str], Awaitable[None]]] = {}


def sdk(ask: Callable[[Rig, str], Awaitable[None]]) -> Callable[[Rig, str], Awaitable[None]]:
    """Take it into the table, without the last part of its name."""
    SDKS[ask.__name__.removesuffix("_sdk")] = ask
    return ask


@sdk
async def openai_sdk(rig: Rig, model: str) -> None:
    """One chat, tried as often as the SDK likes."""
    at = f"{rig.url}/v1"
    async with openai.AsyncOpenAI(base_url=at, api_key="k", max_retries=TRIES - 1) as client:
        await client.chat.completions.create(model=model, messages=HELLO)  # type: ignore[arg-type]


@sdk
async def anthropic_sdk(rig: Rig, model: str) -> None:
    """One message, tried as often as the SDK likes."""
    async with anthropic.AsyncAnthropic(
        base_url=rig.url, api_key="k", max_retries=TRIES - 1
    ) as client:
        await client.messages.create(model=model, max_tokens=9, messages=HELLO)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the machine's stands between."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


async def close(rig: Rig, how: str) -> None:
    """The operator takes the only backend out."""
    done = await rig.ask(
        "POST", f"/_balancer/backends/a/{how}", {}, Content_Type="application/json"
    )
    assert done.status == 200


async def refused(rig: Rig, name: str, model: str = "m") -> tuple[list[float], Any]:
    """When the SDK's tries came, and the status it raised."""
    before = len(rig.calls())
    with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as raised:
        await SDKS[name](rig, model)
    return [call.at for call in rig.calls()[before:]], raised.value


@pytest.mark.parametrize("name", SDKS)
@virtual
async def test_an_sdk_waits_as_long_as_it_is_told(name: str) -> None:
    """Ten seconds and up to a quarter more, where by itself it would wait one at most."""
    async with running(1, models=models(0.0)) as rig:
        await close(rig, "drain")
        tries, raised = await refused(rig, name)
        assert len(tries) == TRIES
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        assert all(9.9 <= gap <= 12.6 for gap in gaps), gaps
        assert raised.status_code == 503
        assert "No backend can serve 'm' now (a: draining)" in str(raised)


@pytest.mark.parametrize("name", SDKS)
@virtual
async def test_an_sdk_believes_the_longest_wait(name: str) -> None:
    """Sixty seconds: above that both would fall back to waits of their own."""
    async with running(1, models=models(0.0)) as rig:
        error = BalancerError("later", retry_after_s=3600.0)

        def refuse(*_: Any, **__: Any) -> Any:
            raise error

        rig.balancer.dispatcher.submit = refuse  # type: ignore[method-assign]
        tries, _ = await refused(rig, name)
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        assert all(44.9 <= gap <= 60.1 for gap in gaps), gaps


@pytest.mark.parametrize("name", SDKS)
@virtual
async def test_an_sdk_comes_back_in_time_to_be_served(name: str) -> None:
    """The user sees no error at all if the backend is there again by then."""
    async with running(1, models=models(0.0)) as rig:
        await close(rig, "drain")
        rig.balancer.bus.subscribe(lambda event: reopen(rig, event))
        await SDKS[name](rig, "m")
        assert [call.status for call in rig.calls() if call.inference] == [503, 200]


def reopen(rig: Rig, event: Event) -> None:
    """After the first refusal the backend is there again."""
    if isinstance(event, CallEnded) and event.status == 503:
        rig.balancer.pool.turn("a", Switch.SERVING)


@pytest.mark.parametrize("name", SDKS)
@virtual
async def test_an_sdk_does_not_repeat_what_cannot_help(name: str) -> None:
    """A 404 and a loop are asked once, although a 5xx is otherwise tried again."""
    async with running(1, models=models(0.0)) as rig:
        tries, raised = await refused(rig, name, "none")
        assert (len(tries), raised.status_code) == (1, 404)
        assert "not found" in str(raised)

        def loop(exchange: Any, _: Any) -> None:
            raise Loop("it has been here")

        rig.balancer.front._enter = loop  # type: ignore[assignment, method-assign]
        tries, raised = await refused(rig, name)
        assert (len(tries), raised.status_code) == (1, 508)
