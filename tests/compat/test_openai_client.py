"""The official `openai` package cannot tell the balancer from an Ollama host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import openai
import pytest

from tests.compat.talk import SAID, TEXT, TOOL, TOOL_NAME, VECTOR, models
from tests.conftest import Start
from tests.rig import LIMIT_S, Rig

pytestmark = pytest.mark.compat

ASKED = [{"role": "user", "content": "who sleeps?"}]
CALLS_TOOL = [{"role": "user", "content": f"call {TOOL_NAME}"}]


@dataclass(frozen=True, slots=True)
class Caller:
    """One interface to both clients of the package; methods by dotted name."""

    client: openai.OpenAI | openai.AsyncOpenAI

    async def ask(self, name: str, *path: str, **given: Any) -> Any:
        """What a method answers; of a stream, its chunks."""
        chunks: list[Any] = []
        answer = await self.into(chunks, name, *path, **given)
        return chunks if given.get("stream") else answer

    async def into(self, chunks: list[Any], name: str, *path: str, **given: Any) -> Any:
        """The same, and the chunks of a stream go into *chunks* as they come."""
        method = attrgetter(name)(self.client)
        if isinstance(self.client, openai.OpenAI):
            return await asyncio.to_thread(_collect, method, path, given, chunks)
        answer = await method(*path, **given)
        if given.get("stream"):
            async for chunk in answer:
                chunks.append(chunk)  # noqa: PERF401 - what came before an error must be kept
        return answer


def _collect(
    method: Callable[..., Any], path: tuple[str, ...], given: dict[str, Any], chunks: list[Any]
) -> Any:
    answer = method(*path, **given)
    if given.get("stream"):
        chunks.extend(answer)
    return answer


@pytest.fixture(params=["sync", "async"])
async def call(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[Rig], Caller]]:
    """Makes a client of either kind for a rig; one that never tries again by itself."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made: list[Caller] = []

    def make(rig: Rig) -> Caller:
        kind = openai.OpenAI if request.param == "sync" else openai.AsyncOpenAI
        at = f"{rig.url}/v1"
        client = kind(base_url=at, api_key="made up", max_retries=0, timeout=LIMIT_S)
        made.append(Caller(client))
        return made[-1]

    yield make
    for caller in made:
        closing = caller.client.close()
        if closing is not None:
            await closing


Call = Callable[[Rig], Caller]
Operation = Callable[[Caller], Awaitable[None]]


# -- what a user does ---------------------------------------------------------------------------


async def chat(caller: Caller) -> None:
    """The whole text, the name as it was asked, and what it cost."""
    answer = await caller.ask("chat.completions.create", model="llama3.2", messages=ASKED)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
    assert (answer.model, answer.object) == ("llama3.2", "chat.completion")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def chat_stream(caller: Caller) -> None:
    """The words in order, then the reason for the end."""
    chunks = await caller.ask(
        "chat.completions.create", model="llama3.2", messages=ASKED, stream=True
    )
    words = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert words == list(SAID)
    assert chunks[-1].choices[0].finish_reason == "stop"


async def chat_usage(caller: Caller) -> None:
    """`include_usage` brings a last chunk without choices."""
    chunks = await caller.ask(
        "chat.completions.create",
        model="llama3.2",
        messages=ASKED,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens >= len(SAID)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT


async def completions(caller: Caller) -> None:
    """The whole text."""
    answer = await caller.ask("completions.create", model="llama3.2", prompt="who?")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")


async def completions_stream(caller: Caller) -> None:
    """The words in order."""
    chunks = await caller.ask("completions.create", model="llama3.2", prompt="who?", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT


async def completions_usage(caller: Caller) -> None:
    """`include_usage` brings a last chunk without choices."""
    chunks = await caller.ask(
        "completions.create",
        model="llama3.2",
        prompt="who?",
        stream=True,
        stream_options={"include_usage": True},
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens >= len(SAID)


async def embeddings(caller: Caller) -> None:
    """A vector for each text, which this package asks for in base64."""
    answer = await caller.ask("embeddings.create", model="embed", input=["a", "b"])
    assert [each.embedding for each in answer.data] == [list(VECTOR)] * 2


async def tools(caller: Caller) -> None:
    """The tool is called with arguments."""
    answer = await caller.ask(
        "chat.completions.create", model="tooled", messages=CALLS_TOOL, tools=[TOOL]
    )
    (called,) = answer.choices[0].message.tool_calls
    assert (called.function.name, called.function.arguments) == (TOOL_NAME, '{"city":"Paris"}')
    assert answer.choices[0].finish_reason == "tool_calls"


async def listed(caller: Caller) -> None:
    """Every model once."""
    answer = await caller.ask("models.list")
    assert sorted(each.id for each in answer.data) == [
        "embed:latest",
        "llama3.2:latest",
        "tooled:latest",
    ]


async def retrieved(caller: Caller) -> None:
    """One model, its name as it was asked."""
    answer = await caller.ask("models.retrieve", "llama3.2")
    assert (answer.id, answer.object, answer.owned_by) == ("llama3.2", "model", "library")


RUNS: dict[str, tuple[str, Operation]] = {
    "chat": ("llama3.2", chat),
    "chat-stream": ("llama3.2", chat_stream),
    "chat-usage": ("llama3.2", chat_usage),
    "completions": ("llama3.2", completions),
    "completions-stream": ("llama3.2", completions_stream),
    "completions-usage": ("llama3.2", completions_usage),
    "embeddings": ("embed", embeddings),
    "tools": ("tooled", tools),
}
READS = (listed, retrieved)


async def do_everything(caller: Caller) -> None:
    """Each thing a user does, once."""
    for _, operation in RUNS.values():
        await operation(caller)
    for read in READS:
        await read(caller)


async def test_answers_like_a_host(start: Start, call: Call) -> None:
    """Each call of the package gives what a single host would give."""
    rig = await start(2, models=models())
    await do_everything(call(rig))


async def test_a_dead_first_backend_is_not_noticed(start: Start, call: Call) -> None:
    """With a backend first in the list that refuses connections, nothing changes."""
    rig = await start(1, dead=["gone"], models=models())
    await do_everything(call(rig))
    assert not rig.balancer.pool.members["gone"].health.up


@pytest.mark.parametrize("name", ["chat", "chat-stream", "completions-stream", "embeddings"])
async def test_a_host_that_dies_between_calls_is_not_noticed(
    start: Start, call: Call, name: str
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    rig = await start(2, models=models())
    model, operation = RUNS[name]
    await rig.warm("a", model)
    caller = call(rig)
    await operation(caller)
    rig.fleet["a"].faults.refuse()
    await operation(caller)
    first, second = await rig.ended(2)
    assert (first.backend, first.attempts) == ("a", 1)
    assert (second.backend, second.attempts, second.outcome) == ("b", 2, "ok")


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("chat.completions.create", {"messages": ASKED}),
        ("chat.completions.create", {"messages": ASKED, "stream": True}),
        ("completions.create", {"prompt": "who?"}),
        ("embeddings.create", {"input": "a"}),
        ("models.retrieve", {}),
    ],
)
async def test_an_unknown_model_is_told(
    start: Start, call: Call, name: str, given: dict[str, Any]
) -> None:
    """`NotFoundError` names the model in its message, and nothing was asked of a host."""
    rig = await start(2, models=models())
    with pytest.raises(openai.NotFoundError) as told:
        await call(rig).ask(name, model="nope", **given)
    assert "'nope" in told.value.message
    assert "not found" in told.value.message
    assert told.value.type == "not_found_error"
    assert told.value.response.headers["x-should-retry"] == "false"
    assert not rig.inference()


async def test_no_host_left_is_told(start: Start, call: Call) -> None:
    """When every host that has the model is gone: a 503 that says when to come back."""
    rig = await start(2, models=models(), config={"queue.max_wait": "0.2s"})
    for host in rig.fleet:
        host.faults.refuse()
    with pytest.raises(openai.InternalServerError) as told:
        await call(rig).ask("chat.completions.create", model="llama3.2", messages=ASKED)
    assert told.value.status_code == 503
    assert "llama3.2" in told.value.message
    assert "a: " in told.value.message
    assert "not found" not in told.value.message
    assert 1 <= int(told.value.response.headers["retry-after"]) <= 60


async def test_a_bad_request_is_told(start: Start, call: Call) -> None:
    """`BadRequestError` has Ollama's text."""
    rig = await start(1, models=models())
    with pytest.raises(openai.BadRequestError) as told:
        await call(rig).ask("chat.completions.create", model="llama3.2", messages=[])
    assert "[] is too short - 'messages'" in told.value.message
    assert told.value.type == "invalid_request_error"


@pytest.mark.parametrize("fault", ["cut", "reset", "error_line"])
@pytest.mark.parametrize(
    ("name", "given"),
    [("chat.completions.create", {"messages": ASKED}), ("completions.create", {"prompt": "who?"})],
)
async def test_a_host_that_dies_in_a_stream_is_told(
    start: Start, call: Call, name: str, given: dict[str, Any], fault: str
) -> None:
    """
    What came before stays, and the end is an error, never a silent stop.

    Of a runner that dies Ollama itself tells nothing on these routes.
    """
    rig = await start(2, models=models())
    for host in rig.fleet:
        host.faults.apply(fault, 2)
    chunks: list[Any] = []
    with pytest.raises(openai.APIError) as told:
        await call(rig).into(chunks, name, model="llama3.2", stream=True, **given)
    assert told.type is openai.APIError, "an error told in the stream, not a broken connection"
    assert len(chunks) >= 2
    assert "backend" in told.value.message
    assert len(rig.forwarded()) == 1, "a call that has begun is never repeated"


async def test_a_host_that_dies_before_the_first_word_is_not_noticed(
    start: Start, call: Call
) -> None:
    """A stream without a record yet is taken up by another host."""
    rig = await start(2, models=models())
    await rig.warm("a", "llama3.2")
    rig.fleet["a"].faults.cut(0)
    await chat_stream(call(rig))
    assert [one.attempts for one in await rig.ended()] == [2]
