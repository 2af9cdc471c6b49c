"""The `openai` and `anthropic` packages on `/v1/responses` and `/v1/messages`."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest

from tests.compat.talk import SAID, TEXT, models
from tests.conftest import Start
from tests.rig import Rig

pytestmark = pytest.mark.compat

ASKED: dict[str, Any] = {
    "model": "llama3.2",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "who sleeps?"}],
}
TOKENS = len(SAID) + 1  # the last one ends the answer


@asynccontextmanager
async def openai_of(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, which does not try again by itself."""
    url = f"{rig.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="sk-any", max_retries=0) as client:
        yield client


@asynccontextmanager
async def anthropic_of(rig: Rig) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's client, which does not try again by itself."""
    async with anthropic.AsyncAnthropic(
        base_url=rig.url, api_key="sk-any", max_retries=0
    ) as client:
        yield client


async def test_responses(start: Start) -> None:
    """Whole and streamed, the text is the model's, and the call's log has its tokens."""
    rig = await start(2, models=models())
    async with openai_of(rig) as client:
        whole = await client.responses.create(model="llama3.2", input="who sleeps?")
        assert whole.output_text == TEXT
        events = await client.responses.create(model="llama3.2", input="hi", stream=True)
        told = [event async for event in events]
        deltas = [e.delta for e in told if e.type == "response.output_text.delta"]
        assert tuple(deltas) == SAID
        assert told[-1].type == "response.completed"
    calls = await rig.ended(2)
    assert [call.usage.tokens_out for call in calls] == [TOKENS] * 2


async def test_messages(start: Start) -> None:
    """Whole and streamed, the text is the model's, and the call's log has its tokens."""
    rig = await start(2, models=models())
    async with anthropic_of(rig) as client:
        whole = await client.messages.create(**ASKED)
        assert [getattr(block, "text", None) for block in whole.content] == [TEXT]
        async with client.messages.stream(**ASKED) as stream:
            assert await stream.get_final_text() == TEXT
    calls = await rig.ended(2)
    assert [call.usage.tokens_out for call in calls] == [TOKENS] * 2


async def into(texts: list[str], pieces: AsyncIterable[Any]) -> None:
    """Keep the text of what comes, also where an error follows it."""
    async for piece in pieces:
        if isinstance(piece, str) or piece.type == "response.output_text.delta":
            texts.append(piece if isinstance(piece, str) else piece.delta)  # noqa: PERF401 - kept


async def test_a_cut_stream_raises(start: Start) -> None:
    """Both packages raise what our last record says, behind the text that came."""
    rig = await start(1, models=models())
    rig.fleet["a"].faults.cut(2)
    told = "backend a closed the connection"
    texts: list[str] = []
    async with openai_of(rig) as client:
        events = await client.responses.create(model="llama3.2", input="hi", stream=True)
        with pytest.raises(openai.APIError, match=told):
            await into(texts, events)
        assert tuple(texts) == SAID[:2]
    texts.clear()
    async with anthropic_of(rig) as claude, claude.messages.stream(**ASKED) as stream:
        with pytest.raises(anthropic.APIStatusError, match=told):
            await into(texts, stream.text_stream)
        assert tuple(texts) == SAID[:2]


async def test_refusals_are_typed(start: Start) -> None:
    """An unknown model is the packages' own kind of "not found", with Ollama's text."""
    rig = await start(1, models=models())
    async with openai_of(rig) as client:
        with pytest.raises(openai.NotFoundError, match="model 'none' not found"):
            await client.responses.create(model="none", input="hi")
    async with anthropic_of(rig) as client:
        with pytest.raises(anthropic.NotFoundError, match="model 'none' not found"):
            await client.messages.create(**(ASKED | {"model": "none"}))


async def test_what_goes_up(start: Start) -> None:
    """The version and beta headers and the query reach the host as they are, the key does not."""
    rig = await start(1, models=models())
    beta = {"anthropic-beta": "tools-2024-04-04", "x-claude-code-session-id": "s1"}
    async with anthropic_of(rig) as client:
        await client.messages.create(**ASKED, extra_headers=beta, extra_query={"beta": "true"})
    (seen,) = rig.forwarded()
    headers = {name.lower(): value for name, value in seen.headers}
    assert headers["anthropic-version"]
    assert {name: headers[name] for name in beta} == beta
    assert "x-api-key" not in headers
