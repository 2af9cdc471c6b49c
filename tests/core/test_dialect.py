"""Our own errors, in the tongue of whoever asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core import errors
from balancer.core.dialect import Rendered, compact, relayed, render, retry_headers, trailer
from balancer.core.domain import Dialect, Framing
from balancer.core.errors import (
    AttemptsExhausted,
    BadRequest,
    BalancerError,
    CutStream,
    Forbidden,
    NoBackend,
    OptionError,
    QueueFull,
    UnknownModel,
)

OLLAMA, OPENAI, ANTHROPIC = Dialect.OLLAMA, Dialect.OPENAI, Dialect.ANTHROPIC
ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BalancerError)
]


def told(rendered: Rendered) -> Any:
    return json.loads(rendered.body)


# -- bodies ------------------------------------------------------------------------------------


def test_ollama_errors_are_one_text() -> None:
    """Ollama's clients read the string under `error` and nothing else."""
    rendered = render(UnknownModel("model 'x' not found"), OLLAMA, "r1")
    assert rendered.body == b"""{"error":"model 'x' not found"}"""
    assert rendered.status == 404


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (BadRequest("no"), "invalid_request_error", None),
        (UnknownModel("no"), "not_found_error", None),
        (OptionError("no"), "api_error", None),
        (errors.Unauthorized("no"), "authentication_error", "unauthorized"),
        (Forbidden("no"), "api_error", "forbidden"),
        (NoBackend("no"), "api_error", "no_backend"),
    ],
)
def test_openai_errors_are_an_object(error: BalancerError, kind: str, code: str | None) -> None:
    """As OpenAI's clients parse them; a code only where the error is ours and not Ollama's."""
    body = told(render(error, OPENAI))
    assert body == {"error": {"message": "no", "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("no"), "invalid_request_error"),
        (NoBackend("no"), "overloaded_error"),
        (CutStream("no"), "api_error"),
    ],
)
def test_anthropic_errors_are_theirs(error: BalancerError, kind: str) -> None:
    """Type, message and request id where Anthropic's clients look for them."""
    body = told(render(error, ANTHROPIC, "r1"))
    assert body["type"] == "error"
    assert body["error"]["type"] == kind
    assert body["request_id"] == "req_r1"


def test_the_request_id_stands_where_an_operator_is_asked() -> None:
    """A failure of ours names the request; a mistake of the caller's does not."""
    assert told(render(NoBackend("away"), OLLAMA, "r1"))["error"] == "away [req r1]"
    assert told(render(NoBackend("away"), OLLAMA))["error"] == "away"
    assert told(render(BadRequest("wrong"), OLLAMA, "r1"))["error"] == "wrong"


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_backends_text_is_told_in_the_callers_dialect(dialect: Dialect) -> None:
    """Of the shape our own errors have, with Ollama's final newline, and with no word of ours."""
    body = relayed(404, "the text", dialect)
    assert body.endswith(b"}\n")
    ours = told(render(UnknownModel("the text"), dialect, ""))
    ours.pop("request_id", None)
    assert json.loads(body) == ours


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_every_error_can_be_told_in_every_dialect(
    kind: type[BalancerError], dialect: Dialect
) -> None:
    """Status, type and text stand for each; the text is in the body for people to read."""
    rendered = render(kind("the text"), dialect, "")
    assert rendered.status == kind.status
    assert dict(rendered.headers)["Content-Type"] == "application/json; charset=utf-8"
    assert b"the text" in rendered.body


@given(st.text())
def test_any_text_survives(text: str) -> None:
    """Whatever a text holds, the body is JSON on one line that says the same."""
    body = render(BadRequest(text), OLLAMA).body
    assert b"\n" not in body
    wanted = text.encode("utf-8", "replace").decode()
    assert json.loads(body)["error"] == wanted


def test_json_looks_as_go_writes_it() -> None:
    """No spaces, no escaped UTF-8, but the signs that Go escapes for HTML's sake."""
    assert compact({"a": ["<&>", "ü", "\u2028"]}) == (
        '{"a":["\\u003c\\u0026\\u003e","ü","\\u2028"]}'.encode()
    )


# -- when to try again -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "seconds", "ms"),
    [
        (NoBackend("away", retry_after_s=12.3), "13", "12300"),
        (NoBackend("away"), "1", "1000"),
        (QueueFull("full", retry_after_s=0.0), "1", "1000"),
        (AttemptsExhausted("all", retry_after_s=600.0), "60", "60000"),
        (errors.DeadlineExceeded("late", retry_after_s=2.0), "2", "2000"),
    ],
)
def test_retry_after_is_whole_seconds_within_bounds(
    error: BalancerError, seconds: str, ms: str
) -> None:
    """1 to 60, rounded up; 503 always has it; the SDKs' own header in milliseconds besides."""
    assert dict(retry_headers(error)) == {"Retry-After": seconds, "retry-after-ms": ms}


def test_clients_are_kept_from_retrying_what_cannot_help() -> None:
    """SDKs retry 409, 429 and 5xx unless told not to; where they would not, nothing is said."""
    assert retry_headers(errors.NotServed("later")) == (("x-should-retry", "false"),)
    assert retry_headers(OptionError("wrong")) == (("x-should-retry", "false"),)
    assert retry_headers(BadRequest("wrong")) == ()
    assert retry_headers(CutStream("cut")) == ()


# -- in a stream -------------------------------------------------------------------------------


def test_a_cut_ollama_stream_ends_in_an_error_line() -> None:
    """What Ollama itself writes when a stream fails."""
    assert trailer(CutStream("cut"), OLLAMA, Framing.NDJSON, "r1") == b'{"error":"cut [req r1]"}\n'


def test_a_cut_openai_stream_ends_in_an_error_event() -> None:
    """An event whose data the SDK raises."""
    record = trailer(CutStream("cut"), OPENAI, Framing.SSE)
    assert record is not None
    assert record.startswith(b'data: {"error":{"message":"cut"')
    assert record.endswith(b"}}\n\n")


def test_a_cut_anthropic_stream_ends_in_a_named_event() -> None:
    """Anthropic's SDK looks at the event's name."""
    record = trailer(CutStream("cut"), ANTHROPIC, Framing.SSE)
    assert record is not None
    assert record.startswith(b'event: error\ndata: {"type":"error"')


def test_a_whole_answer_has_no_room_for_a_record() -> None:
    """One JSON document cannot be followed by another: the body must break instead."""
    assert trailer(CutStream("cut"), OLLAMA, Framing.JSON) is None


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("framing", [Framing.NDJSON, Framing.SSE])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_no_error_looks_like_an_end(
    kind: type[BalancerError], dialect: Dialect, framing: Framing
) -> None:
    """Never a terminal record: a client must not take half an answer for a whole one."""
    record = trailer(kind("text"), dialect, framing, "r1") or b""
    assert b"[DONE]" not in record
    assert b'"done"' not in record
    assert b"message_stop" not in record
