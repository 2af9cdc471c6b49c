"""The official `anthropic` package cannot tell the balancer from an Ollama host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest

from balancer.core.events import BreakerMoved
from tests.compat import talk
from tests.compat.talk import (
    ASKED,
    CALLS_TOOL,
    SAID,
    TEXT,
    TOOL_ARGUMENTS,
    TOOL_NAME,
    TOOL_SCHEMA,
    Call,
    Caller,
    Operation,
    models,
)
from tests.conftest import Start
from tests.rig import LIMIT_S, Rig

pytestmark = pytest.mark.compat

TOKENS = len(SAID) + 1  # the last one ends the answer
TOOL = {"name": TOOL_NAME, "description": "The weather", "input_schema": TOOL_SCHEMA}
GIVEN: dict[str, Any] = {"model": "llama3.2", "max_tokens": 100, "messages": ASKED}
TOOLED: dict[str, Any] = GIVEN | {"model": "tooled", "messages": CALLS_TOOL, "tools": [TOOL]}


def client_of(rig: Rig, *, blocks: bool = False) -> Any:
    """A client that never tries again by itself."""
    kind = anthropic.Anthropic if blocks else anthropic.AsyncAnthropic
    return kind(base_url=rig.url, api_key="made up", max_retries=0, timeout=LIMIT_S)


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the machine's stands between."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=["sync", "async"])
async def call(request: pytest.FixtureRequest) -> AsyncIterator[Call]:
    """Makes a client of either kind for a rig."""
    blocks = request.param == "sync"
    async with talk.calling(lambda rig: client_of(rig, blocks=blocks), blocks=blocks) as call:
        yield call


# -- what a user does ---------------------------------------------------------------------------


async def messages(caller: Caller) -> None:
    """The whole text, the name as it was asked, and what it cost."""
    answer = await caller.ask("messages.create", **GIVEN)
    assert [(block.type, block.text) for block in answer.content] == [("text", TEXT)]
    assert (answer.role, answer.model, answer.stop_reason) == ("assistant", "llama3.2", "end_turn")
    assert answer.usage.output_tokens == TOKENS


async def messages_stream(caller: Caller) -> None:
    """One block with the words in order, then why it ended and what it cost."""
    events = await caller.ask("messages.create", **GIVEN, stream=True)
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * len(SAID),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert words(events) == list(SAID)
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == TOKENS


def words(events: list[Any]) -> list[str]:
    """The text that came."""
    return [event.delta.text for event in events if event.type == "content_block_delta"]


async def tools(caller: Caller) -> None:
    """The tool is used with its input, and its result taken back."""
    answer = await caller.ask("messages.create", **TOOLED)
    (called,) = answer.content
    assert (called.type, called.name, called.input) == ("tool_use", TOOL_NAME, TOOL_ARGUMENTS)
    assert answer.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": called.id, "content": "rain"}
    history = [
        *CALLS_TOOL,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    answer = await caller.ask("messages.create", **(TOOLED | {"messages": history}))
    assert (answer.content[0].type, answer.stop_reason) == ("text", "end_turn")


async def tools_stream(caller: Caller) -> None:
    """The same in a stream, where the input comes as JSON in pieces."""
    events = await caller.ask("messages.create", **TOOLED, stream=True)
    (begun,) = [event for event in events if event.type == "content_block_start"]
    assert (begun.content_block.type, begun.content_block.name) == ("tool_use", TOOL_NAME)
    pieces = [event.delta for event in events if event.type == "content_block_delta"]
    assert {piece.type for piece in pieces} == {"input_json_delta"}
    assert "".join(piece.partial_json for piece in pieces) == '{"city":"Paris"}'


async def listed(caller: Caller) -> None:
    """`/v1/models` is OpenAI's list; of it this package takes the names."""
    page = await caller.ask("models.list")
    assert sorted(each.id for each in page.data) == talk.LISTED


RUNS: dict[str, tuple[str, Operation]] = {
    "messages": ("llama3.2", messages),
    "messages-stream": ("llama3.2", messages_stream),
    "tools": ("tooled", tools),
    "tools-stream": ("tooled", tools_stream),
}
EVERYTHING = (*(operation for _, operation in RUNS.values()), listed)


async def test_answers_like_a_host(start: Start, call: Call) -> None:
    """Each call of the package gives what a single host would give."""
    await talk.answers(start, call, EVERYTHING)


async def test_a_dead_first_backend_is_not_noticed(start: Start, call: Call) -> None:
    """With a backend first in the list that refuses connections, nothing changes."""
    await talk.first_is_dead(start, call, EVERYTHING)


@pytest.mark.parametrize("name", ["messages", "messages-stream", "tools-stream"])
async def test_a_host_that_dies_between_calls_is_not_noticed(
    start: Start, call: Call, name: str
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    await talk.dies_between(start, call, *RUNS[name])


async def test_the_stream_is_put_together(start: Start) -> None:
    """The package's own accumulator finds a whole message, and the call's log has its tokens."""
    rig = await start(2, models=models())
    async with client_of(rig) as client:
        async with client.messages.stream(**GIVEN) as stream:
            assert [text async for text in stream.text_stream] == list(SAID)
            whole = await stream.get_final_message()
        assert (whole.content[0].text, whole.usage.output_tokens) == (TEXT, TOKENS)
        async with client.messages.stream(**TOOLED) as stream:
            (called,) = (await stream.get_final_message()).content
        assert (called.name, called.input) == (TOOL_NAME, TOOL_ARGUMENTS)
    first, _ = await rig.ended(2)
    assert first.usage.tokens_out == TOKENS


async def test_what_goes_up(start: Start) -> None:
    """The version and beta headers and the query reach the host as they are, the key does not."""
    rig = await start(1, models=models())
    beta = {"anthropic-beta": "tools-2024-04-04", "x-claude-code-session-id": "s1"}
    async with client_of(rig) as client:
        await client.messages.create(**GIVEN, extra_headers=beta, extra_query={"beta": "true"})
    (seen,) = rig.forwarded()
    headers = {name.lower(): value for name, value in seen.headers}
    assert headers["anthropic-version"]
    assert {name: headers[name] for name in beta} == beta
    assert "x-api-key" not in headers


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"stream": True}])
async def test_an_unknown_model_is_told(start: Start, call: Call, given: dict[str, Any]) -> None:
    """`NotFoundError` names the model in its message, and nothing was asked of a host."""
    rig = await start(2, models=models())
    with pytest.raises(anthropic.NotFoundError, match="model 'nope' not found") as told:
        await call(rig).ask("messages.create", **(GIVEN | {"model": "nope"} | given))
    assert told.value.response.headers["x-should-retry"] == "false"
    assert not rig.inference()


async def test_a_bad_request_is_told(start: Start, call: Call) -> None:
    """`BadRequestError` has Ollama's text, and the id to ask the operator with."""
    rig = await start(1, models=models())
    with pytest.raises(anthropic.BadRequestError, match="messages is required") as told:
        await call(rig).ask("messages.create", **(GIVEN | {"messages": []}))
    assert told.value.type == "invalid_request_error"


@pytest.mark.parametrize("given", [{}, {"stream": True}])
async def test_no_host_left_is_told(start: Start, call: Call, given: dict[str, Any]) -> None:
    """When every host that has the model is gone: a 503 that says when to come back."""
    rig = await talk.all_gone(start)
    with pytest.raises(anthropic.InternalServerError) as told:
        await call(rig).ask("messages.create", **GIVEN, **given)
    assert told.value.status_code == 503
    assert told.value.type == "overloaded_error"
    assert "llama3.2" in told.value.message
    assert "a: " in told.value.message
    assert 1 <= int(told.value.response.headers["retry-after"]) <= 60


async def test_tokens_are_not_counted(start: Start, call: Call) -> None:
    """Ollama has no such route: `NotFoundError`, as from Ollama, and no host is blamed for it."""
    rig = await start(1, models=models())
    caller = call(rig)
    for _ in range(10):
        with pytest.raises(anthropic.NotFoundError):
            await caller.ask("messages.count_tokens", model="llama3.2", messages=ASKED)
    assert len(rig.forwarded()) <= 10, "not tried again"
    await messages(caller)
    assert not rig.events.of(BreakerMoved)


@pytest.mark.parametrize("fault", ["cut", "reset", "error_line", "no_done"])
async def test_a_host_that_dies_in_a_stream_is_told(start: Start, call: Call, fault: str) -> None:
    """
    What came before stays, and the end is an error, never a silent stop.

    Of a runner that dies Ollama itself tells nothing on this route.
    """
    rig = await talk.dying(start, fault)
    events: list[Any] = []
    with pytest.raises(anthropic.APIStatusError) as told:
        await call(rig).into(events, "messages.create", **GIVEN, stream=True)
    assert "backend" in told.value.message
    assert words(events) == list(SAID[:2])
    assert events[-1].type != "message_stop"
    assert len(rig.forwarded()) == 1, "a call that has begun is never repeated"


async def test_a_host_that_dies_before_the_first_word_is_not_noticed(
    start: Start, call: Call
) -> None:
    """An answer that was only announced is taken up by another host, and announced once."""
    await talk.dies_before_a_word(start, call, messages_stream)


async def test_a_host_that_dies_in_a_whole_answer_is_not_noticed(start: Start, call: Call) -> None:
    """An answer that is no stream is repeated elsewhere however far it had come."""
    await talk.dies_before_a_word(start, call, messages, after=3)
