"""Answers in bytes, where the recordings are not at hand to compare."""

import json
from random import Random
from typing import Any

import pytest

from balancer.sim.anthropic import Messages
from balancer.sim.dialects import Chat, Dialect, Echo, Generate, Outcome, V1Chat, V1Completions
from balancer.sim.responses import Responses
from balancer.sim.text import Piece

PIECES = (Piece("Hm", "thinking"), Piece("One"), Piece(" <two>"))
CALL = Piece("get", "tool", {"city": "Paris"})
SECOND_NS = 1_795_263_840 * 10**9


def echo(jinja: bool = False, **request: Any) -> Echo:
    """A request for `M`, at one moment for ever."""
    return Echo("M", lambda: SECOND_NS, Random(1), request, jinja)


def streamed(dialect: Dialect, pieces: tuple[Piece, ...], reason: str = "stop") -> list[bytes]:
    """All chunks of a stream."""
    chunks = dialect.opening()
    for piece in pieces:
        chunks += dialect.piece(piece)
    return chunks + dialect.closing(Outcome(pieces, reason, 7, {"eval_count": 4, "x": 0}))


def events(chunks: list[bytes]) -> list[Any]:
    """The data of server-sent events, `[DONE]` as text."""
    data = [part.partition("data: ")[2] for part in b"".join(chunks).decode().split("\n\n")[:-1]]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def test_native_chat() -> None:
    """Thinking and text by the line, metrics that are not zero in the last."""
    lines = streamed(Chat(echo()), PIECES)
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first["message"] == {"role": "assistant", "content": "", "thinking": "Hm"}
    assert b"\\u003ctwo\\u003e" in lines[2]
    assert list(last) == ["model", "created_at", "message", "done", "done_reason", "eval_count"]
    assert all(line.count(b"\n") == 1 for line in lines)


def test_tool_calls_come_at_once_or_last() -> None:
    """In a line of their own, on the Jinja path in the last."""
    own = [
        json.loads(line)["message"].get("tool_calls") for line in streamed(Chat(echo()), (CALL,))
    ]
    last = [
        json.loads(line)["message"].get("tool_calls")
        for line in streamed(Chat(echo(jinja=True)), (CALL,))
    ]
    assert [bool(calls) for calls in own] == [True, False]
    assert own[0][0]["id"].startswith("call_")
    assert len(last) == 1
    assert len(last[0][0]["id"]) == 32


def test_logprobs_on_request() -> None:
    """One entry a line, with its bytes and alternatives."""
    line = json.loads(Chat(echo(logprobs=True, top_logprobs=1)).piece(Piece("é"))[0])
    entry = {"token": "é", "logprob": 0, "bytes": [195, 169]}
    assert line["logprobs"] == [entry | {"top_logprobs": [entry]}]


def test_generate() -> None:
    """`response` instead of a message, and the context in the last line."""
    dialect = Generate(echo())
    body = json.loads(dialect.whole(Outcome(PIECES, "stop", context=[1, 2])))
    assert (body["response"], body["thinking"], body["context"]) == ("One <two>", "Hm", [1, 2])


@pytest.mark.parametrize("usage", [False, True])
def test_openai_chat_ends_in_one_chunk(usage: bool) -> None:
    """Finish, usage if asked for, and `[DONE]`; one id and one time for all."""
    chunks = streamed(V1Chat(echo(stream_options={"include_usage": usage})), PIECES)
    assert len(chunks) == len(PIECES) + 1
    found = events(chunks)
    assert found[0]["choices"][0]["delta"]["reasoning"] == "Hm"
    assert [("usage" in event) for event in found[:-1]].count(True) == usage
    assert found[-1] == "[DONE]"
    assert len({(event["id"], event["created"]) for event in found[:-1]}) == 1
    roles = [choice["delta"].get("role") for event in found[:-1] for choice in event["choices"]]
    assert roles == ["assistant", None, None, None]


def test_openai_completions_count_on_every_chunk() -> None:
    """Zeros, and the real numbers at the end."""
    found = events(streamed(V1Completions(echo(stream_options={"include_usage": True})), PIECES))
    totals = [event["usage"]["total_tokens"] for event in found[:-1]]
    assert totals == [0, 0, 0, 0, 11]


@pytest.mark.parametrize("dialect", [V1Chat, V1Completions])
def test_openai_loses_the_error(dialect: type[Dialect]) -> None:
    """An empty chunk of no model is all there is of it."""
    (event,) = events(dialect(echo()).broken("out of memory"))
    assert event["model"] == ""
    assert b"memory" not in b"".join(dialect(echo()).broken("out of memory"))


@pytest.mark.parametrize("dialect", [V1Chat, V1Completions, Messages, Responses])
def test_a_silent_end_has_no_terminator(dialect: type[Dialect]) -> None:
    """Nothing tells of the end when the runner gave up, and nothing of an error for two of them."""
    if issubclass(dialect, V1Chat | V1Completions):
        assert dialect(echo()).closing(Outcome(PIECES, "")) == []
    else:
        assert dialect(echo()).broken("x") == []


def test_anthropic_blocks_open_and_close() -> None:
    """Thinking, text and tool use follow each other, numbered, and stop for a tool."""
    found = events(streamed(Messages(echo(messages=[])), (*PIECES, CALL)))
    kinds = [event["type"] for event in found]
    assert kinds[0] == "message_start"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2]
    assert [event["content_block"]["type"] for event in starts] == ["thinking", "text", "tool_use"]


def test_anthropic_whole() -> None:
    """The same blocks in one body."""
    body = json.loads(Messages(echo()).whole(Outcome((*PIECES, CALL), "stop", 7)))
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]
    assert body["usage"] == {"input_tokens": 7, "output_tokens": 5}


def test_anthropic_errors() -> None:
    """A type for each status and an id for each request."""
    headers, body = Messages(echo()).error(503, "busy")
    assert json.loads(body)["error"] == {"type": "overloaded_error", "message": "busy"}
    assert headers == [("Content-Type", "application/json")]


def test_responses_are_numbered() -> None:
    """From created to completed without a gap, keys in alphabetical order."""
    found = events(streamed(Responses(echo()), PIECES))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[-1]["type"] == "response.completed"
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "One <two>"
    assert all(list(event) == sorted(event) for event in found)


def test_responses_call_tools() -> None:
    """Arguments as a string, the call before the message."""
    body = json.loads(Responses(echo()).whole(Outcome((*PIECES, CALL), "stop")))
    assert [item["type"] for item in body["output"]] == ["function_call", "message"]
    assert body["output"][0]["arguments"] == '{"city":"Paris"}'
