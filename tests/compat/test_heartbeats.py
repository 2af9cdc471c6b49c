"""The official clients read streams that were silent for a minute, and errors behind that."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import ollama
import openai
import pytest

from balancer.sim.host import SimModel
from tests.e2e.stage import CHAT, HELLO, virtual
from tests.rig import Rig, running

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("quiet")]

WORDS = (" one", " two", " three")
TEXT = "".join(WORDS)
HOUR = 3600.0  # no client may be the first to lose patience here
CLAUDE: dict[str, Any] = CHAT | {"max_tokens": 100}


@asynccontextmanager
async def pausing(*, fails: bool = False) -> AsyncIterator[Rig]:
    """A host that loads for a minute, and takes twenty seconds from word to word."""
    slow = SimModel("m", words=WORDS, load_s=60.0, decode_tps=0.05)
    async with running(1, models=[slow]) as rig:
        if fails:
            rig.fleet["a"].faults.fail("m", "llama-server startup failed: no luck", after_s=50.0)
        yield rig
        assert len(rig.calls()) == 1, "the client asked again by itself"
        told = rig.calls()[-1]
        assert (told.status, told.outcome) == (200, "upstream_error" if fails else "ok")
        if not fails:
            assert told.bytes_out > len(rig.forwarded()[-1].written), "there were heartbeats"


def ollama_of(rig: Rig) -> ollama.AsyncClient:
    """Ollama's client."""
    return ollama.AsyncClient(rig.url)


def openai_of(rig: Rig) -> openai.AsyncOpenAI:
    """OpenAI's client."""
    return openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="any", timeout=HOUR)


def anthropic_of(rig: Rig) -> anthropic.AsyncAnthropic:
    """Anthropic's client."""
    return anthropic.AsyncAnthropic(base_url=rig.url, api_key="any", timeout=HOUR)


async def into(pieces: list[Any], stream: AsyncIterable[Any]) -> None:
    """All that comes, kept also where an error follows."""
    async for piece in stream:
        pieces.append(piece)  # noqa: PERF401 - what came before an error must be kept


@virtual
async def test_ollama() -> None:
    """Heartbeats are chunks without text; the last record is the host's."""
    async with pausing() as rig, ollama_of(rig) as client:
        stream: Any = await client.chat("m", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.message.content for chunk in chunks) == TEXT
        assert [chunk.message.content for chunk in chunks[:3]] == ["", "", ""]
        assert not any(chunk.done for chunk in chunks[:-1])
        assert chunks[-1].done_reason == "stop"
        assert {chunk.model for chunk in chunks} == {"m"}
    async with pausing() as rig, ollama_of(rig) as client:
        stream = await client.generate("m", prompt="hi", stream=True)
        assert "".join([chunk.response async for chunk in stream]) == TEXT


@virtual
async def test_ollama_fails() -> None:
    """The error is raised with its text."""
    async with pausing(fails=True) as rig, ollama_of(rig) as client:
        chunks: list[Any] = []
        stream: Any = await client.chat("m", messages=HELLO, stream=True)
        with pytest.raises(ollama.ResponseError, match="no luck"):
            await into(chunks, stream)
        assert [chunk.message.content for chunk in chunks] == [""] * len(chunks)
        assert len(chunks) >= 2


@virtual
async def test_openai() -> None:
    """Of comments the package hears nothing, on any of the three routes."""
    async with pausing() as rig, openai_of(rig) as client:
        stream: Any = await client.chat.completions.create(**CHAT, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    async with pausing() as rig, openai_of(rig) as client:
        stream = await client.completions.create(model="m", prompt="hi", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
    async with pausing() as rig, openai_of(rig) as client:
        async with client.responses.stream(model="m", input="hi") as events:
            told = [event async for event in events]
            assert (await events.get_final_response()).output_text == TEXT
        assert told[0].type == "response.created"


@pytest.mark.parametrize("route", ["chat", "responses"])
@virtual
async def test_openai_fails(route: str) -> None:
    """The error is raised with its text, and the package does not try again."""
    async with pausing(fails=True) as rig, openai_of(rig) as client:
        if route == "chat":
            stream: Any = await client.chat.completions.create(**CHAT, stream=True)
        else:
            stream = await client.responses.create(model="m", input="hi", stream=True)
        with pytest.raises(openai.APIError, match="no luck"):
            await into([], stream)


@virtual
async def test_anthropic() -> None:
    """A ping may come before `message_start` too, and the package hears nothing of it."""
    async with pausing() as rig, anthropic_of(rig) as client:
        async with client.messages.stream(**CLAUDE) as stream:
            told = [event async for event in stream]
            assert await stream.get_final_text() == TEXT
        assert told[0].type == "message_start"


@virtual
async def test_anthropic_fails() -> None:
    """The error is raised with its text, and the package does not try again."""
    async with pausing(fails=True) as rig, anthropic_of(rig) as client:
        with pytest.raises(anthropic.APIStatusError, match="no luck"):
            async with client.messages.stream(**CLAUDE) as stream:
                await into([], stream)
