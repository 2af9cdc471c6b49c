"""The official `openai` package cannot tell the balancer from an Ollama host."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.compat import talk
from tests.compat.talk import (
    ASKED,
    CALLS_TOOL,
    LISTED,
    SAID,
    TEXT,
    TOOL,
    TOOL_ARGUMENTS,
    TOOL_NAME,
    VECTOR,
    Call,
    Caller,
    Operation,
    models,
)
from tests.conftest import Start
from tests.rig import LIMIT_S, Rig

pytestmark = pytest.mark.compat

TOKENS = len(SAID) + 1  # the last one ends the answer
RESPONSES_TOOL = {"type": "function", **TOOL["function"]}
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("chat.completions.create", {"messages": ASKED}),
    ("completions.create", {"prompt": "who?"}),
    ("responses.create", {"input": "who?"}),
]


@pytest.fixture(params=["sync", "async"])
async def call(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Call]:
    """Makes a client of either kind for a rig; one that never tries again by itself."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    blocks = request.param == "sync"
    kind = openai.OpenAI if blocks else openai.AsyncOpenAI

    def make(rig: Rig) -> Any:
        at = f"{rig.url}/v1"
        return kind(base_url=at, api_key="made up", max_retries=0, timeout=LIMIT_S)

    async with talk.calling(make, blocks=blocks) as call:
        yield call


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


async def responses(caller: Caller) -> None:
    """The whole text, the name as it was asked, and what it cost."""
    answer = await caller.ask("responses.create", model="llama3.2", input="who sleeps?")
    assert (answer.output_text, answer.status, answer.model) == (TEXT, "completed", "llama3.2")
    assert answer.usage.output_tokens == TOKENS


async def responses_stream(caller: Caller) -> None:
    """Announced, the words in order, and the whole text again at the end."""
    events = await caller.ask("responses.create", model="llama3.2", input="who?", stream=True)
    assert events[0].type == "response.created"
    words = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert words == list(SAID)
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == TEXT
    assert events[-1].response.usage.output_tokens == TOKENS


async def responses_tools(caller: Caller) -> None:
    """The tool is called with arguments, and its result taken back."""
    given: dict[str, Any] = {"model": "tooled", "tools": [RESPONSES_TOOL]}
    answer = await caller.ask("responses.create", input=CALLS_TOOL, **given)
    (called,) = answer.output
    assert (called.type, called.name) == ("function_call", TOOL_NAME)
    assert json.loads(called.arguments) == TOOL_ARGUMENTS
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "rain"}
    history = [*CALLS_TOOL, called.model_dump(exclude_none=True), result]
    answer = await caller.ask("responses.create", input=history, **given)
    assert answer.output_text


async def responses_tools_stream(caller: Caller) -> None:
    """The same in a stream, where the arguments come in pieces."""
    events = await caller.ask(
        "responses.create", model="tooled", input=CALLS_TOOL, tools=[RESPONSES_TOOL], stream=True
    )
    kind = "response.function_call_arguments.delta"
    told = "".join(event.delta for event in events if event.type == kind)
    assert json.loads(told) == TOOL_ARGUMENTS
    (called,) = events[-1].response.output
    assert (called.name, json.loads(called.arguments)) == (TOOL_NAME, TOOL_ARGUMENTS)


async def listed(caller: Caller) -> None:
    """Every model once."""
    answer = await caller.ask("models.list")
    assert sorted(each.id for each in answer.data) == LISTED


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
    "responses": ("llama3.2", responses),
    "responses-stream": ("llama3.2", responses_stream),
    "responses-tools": ("tooled", responses_tools),
    "responses-tools-stream": ("tooled", responses_tools_stream),
}
READS = (listed, retrieved)
EVERYTHING = (*(operation for _, operation in RUNS.values()), *READS)


async def test_answers_like_a_host(start: Start, call: Call) -> None:
    """Each call of the package gives what a single host would give."""
    await talk.answers(start, call, EVERYTHING)


async def test_a_dead_first_backend_is_not_noticed(start: Start, call: Call) -> None:
    """With a backend first in the list that refuses connections, nothing changes."""
    await talk.first_is_dead(start, call, EVERYTHING)


BETWEEN = ("chat", "chat-stream", "completions-stream", "embeddings", "responses-stream")


@pytest.mark.parametrize("name", BETWEEN)
async def test_a_host_that_dies_between_calls_is_not_noticed(
    start: Start, call: Call, name: str
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    await talk.dies_between(start, call, *RUNS[name])


@pytest.mark.parametrize("operation", [responses, responses_stream])
async def test_the_log_has_the_tokens(start: Start, call: Call, operation: Operation) -> None:
    """Whole and streamed, they are read off the answer."""
    rig = await start(1, models=models())
    await operation(call(rig))
    assert [one.usage.tokens_out for one in await rig.ended()] == [TOKENS]


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("chat.completions.create", {"messages": ASKED}),
        ("chat.completions.create", {"messages": ASKED, "stream": True}),
        ("completions.create", {"prompt": "who?"}),
        ("embeddings.create", {"input": "a"}),
        ("responses.create", {"input": "a"}),
        ("responses.create", {"input": "a", "stream": True}),
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


@pytest.mark.parametrize(("name", "given"), STREAMS)
async def test_no_host_left_is_told(
    start: Start, call: Call, name: str, given: dict[str, Any]
) -> None:
    """When every host that has the model is gone: a 503 that says when to come back."""
    rig = await talk.all_gone(start)
    with pytest.raises(openai.InternalServerError) as told:
        await call(rig).ask(name, model="llama3.2", **given)
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


@pytest.mark.parametrize("fault", ["cut", "reset", "error_line", "no_done"])
@pytest.mark.parametrize(("name", "given"), STREAMS)
async def test_a_host_that_dies_in_a_stream_is_told(
    start: Start, call: Call, name: str, given: dict[str, Any], fault: str
) -> None:
    """
    What came before stays, and the end is an error, never a silent stop.

    Of a runner that dies Ollama itself tells nothing on these routes.
    """
    rig = await talk.dying(start, fault)
    chunks: list[Any] = []
    with pytest.raises(openai.APIError) as told:
        await call(rig).into(chunks, name, model="llama3.2", stream=True, **given)
    assert told.type is openai.APIError, "an error told in the stream, not a broken connection"
    assert len(chunks) >= 2
    assert "backend" in told.value.message
    assert len(rig.forwarded()) == 1, "a call that has begun is never repeated"


@pytest.mark.parametrize("operation", [chat_stream, responses_stream])
async def test_a_host_that_dies_before_the_first_word_is_not_noticed(
    start: Start, call: Call, operation: Operation
) -> None:
    """A stream without a record yet is taken up by another host."""
    await talk.dies_before_a_word(start, call, operation)


# -- names of ours ------------------------------------------------------------------------------


async def test_a_program_made_for_another_model(start: Start, call: Call) -> None:
    """It finds the name it was written for, and is answered by what the operator put there."""
    aliases = {"gpt-4o-mini": ["not-here", "llama3.2"]}
    rig = await start(1, models=models(), config={"models.aliases": aliases})
    caller = call(rig)
    assert (await caller.ask("models.retrieve", "gpt-4o-mini")).id == "gpt-4o-mini"
    given: dict[str, Any] = {"model": "gpt-4o-mini", "messages": ASKED}
    answer = await caller.ask("chat.completions.create", **given)
    assert (answer.choices[0].message.content, answer.model) == (TEXT, "llama3.2")
    parts = await caller.ask("chat.completions.create", **given, stream=True)
    assert {part.model for part in parts} == {"llama3.2"}
