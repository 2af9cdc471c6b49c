"""Our own errors, in the tongue of whoever asked."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import balancer
from balancer.core import errors
from balancer.core.dialect import (
    Rendered,
    compact,
    document,
    heartbeat,
    relayed,
    render,
    retold,
    retry_headers,
    trailer,
)
from balancer.core.dispatch import LoadFailed
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
from balancer.core.framing import splitter
from tests.net.parts import a_call

OLLAMA, OPENAI, ANTHROPIC = Dialect.OLLAMA, Dialect.OPENAI, Dialect.ANTHROPIC
RESPONSES = Dialect.RESPONSES
ALL = list(errors.catalogue())


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
    """No spaces, no escaped UTF-8, but the signs that Go escapes for HTML's sake; no surrogates."""
    assert compact({"é<>&": ["\u2028\u2029\ud800\n"]}) == (
        '{"é\\u003c\\u003e\\u0026":["\\u2028\\u2029\ufffd\\n"]}'.encode()
    )
    with pytest.raises(ValueError, match="JSON"):
        compact([float("nan")], strict=True)


# -- when to try again -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "seconds", "ms"),
    [
        (NoBackend("away", retry_after_s=12.3), "13", "12300"),
        (NoBackend("away"), "1", "1000"),
        (QueueFull("full", retry_after_s=0.0), "1", "1000"),
        (AttemptsExhausted("all", retry_after_s=600.0), "60", "60000"),
        (errors.DeadlineExceeded("late", retry_after_s=2.0), "2", "2000"),
        (NoBackend("away", retry_after_s=float("inf")), "60", "60000"),
    ],
)
def test_retry_after_is_whole_seconds_within_bounds(
    error: BalancerError, seconds: str, ms: str
) -> None:
    """1 to 60, rounded up; 503 always has it; the SDKs' own header in milliseconds besides."""
    assert dict(retry_headers(error)) == {"Retry-After": seconds, "retry-after-ms": ms}


@given(st.floats(0, 1000), st.floats(0, 1))
def test_not_all_come_back_at_once(need_s: float, late: float) -> None:
    """Up to a quarter later than need be, and never outside what the SDKs believe: 1 to 60 s."""
    told = dict(retry_headers(NoBackend("away", retry_after_s=need_s), late))
    wait_s = int(told["retry-after-ms"]) / 1000
    assert 1 <= wait_s <= int(told["Retry-After"]) <= 60
    if need_s <= 48:
        assert max(1.0, need_s) - 0.001 <= wait_s <= max(1.0, need_s) * 1.25
    else:
        assert wait_s >= 45


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


def test_a_cut_responses_stream_ends_in_an_error_event() -> None:
    """What an ``error`` event of that API says, and beside it the object that SDKs raise."""
    record = trailer(CutStream("cut"), RESPONSES, Framing.SSE, "r1", 7)
    assert record is not None
    assert record.startswith(b"event: error\ndata: {")
    value = json.loads(record.partition(b"data: ")[2])
    error = value.pop("error")
    assert value == {
        "type": "error",
        "code": "stream_cut",
        "message": "cut [req r1]",
        "param": None,
        "sequence_number": 7,
    }
    assert error["message"] == value["message"]


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


# -- the catalogue -----------------------------------------------------------------------------


def family(kind: type[BalancerError] = BalancerError) -> list[type[BalancerError]]:
    """It and whatever is derived from it in the package."""
    derived = [each for special in kind.__subclasses__() for each in family(special)]
    return [kind, *(each for each in derived if each.__module__.startswith("balancer."))]


def test_the_catalogue_has_every_error() -> None:
    """But those told in another way; each with a code of its own and what to do."""
    for found in pkgutil.walk_packages(balancer.__path__, "balancer."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    assert set(family()) - set(ALL) == {LoadFailed, errors.UnknownRoute}
    assert len({kind.code for kind in ALL}) == len(ALL)
    for kind in ALL:
        assert kind.__doc__, kind
        assert vars(kind).keys() >= {"code", "remedy"}, kind


def test_the_document_has_every_error_and_every_dialect() -> None:
    """A row each, and the records that end a stream as they are."""
    text = document()
    assert all(f"| {kind.status} | " in text and f"{kind.remedy} |" in text for kind in ALL)
    for dialect in Dialect:
        framing = Framing.NDJSON if dialect is OLLAMA else Framing.SSE
        record = trailer(CutStream("TEXT"), dialect, framing, "4f0c") or b""
        assert record.decode().strip() in text


# -- heartbeats ----------------------------------------------------------------------------------

STAMP = "2026-08-21T10:00:00.123456Z"


EMPTY_CHAT = (
    b'{"model":"m","created_at":"2026-08-21T10:00:00.123456Z",'
    b'"message":{"role":"assistant","content":""},"done":false}\n'
)
EMPTY = b'{"model":"m","created_at":"2026-08-21T10:00:00.123456Z","response":"","done":false}\n'


@pytest.mark.parametrize(
    ("path", "record"),
    [
        ("/api/chat", EMPTY_CHAT),
        ("/api/generate", EMPTY),
        ("/v1/chat/completions", b": heartbeat\n\n"),
        ("/v1/completions", b": heartbeat\n\n"),
        ("/v1/responses", b": heartbeat\n\n"),
        ("/v1/messages", b'event: ping\ndata: {"type":"ping"}\n\n'),
    ],
)
def test_a_heartbeat_says_nothing_and_commits_nothing(path: str, record: bytes) -> None:
    """Its bytes per route, in Ollama's order of fields; for a framer it is no end and no error."""
    call = a_call(path)
    assert heartbeat(call, STAMP) == record
    assert heartbeat(replace(call, streaming=False), STAMP) is None
    split = splitter(call.framing)
    assert split.feed(record) == record
    assert not split.finished
    assert split.ending().error_record is None


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
def test_what_never_streams_has_no_heartbeat(path: str) -> None:
    """Whatever the body said of a stream."""
    assert heartbeat(a_call(path), STAMP) is None


# -- a backend's error inside a stream -------------------------------------------------------------


OWN: dict[Dialect, dict[str, Any]] = {
    OLLAMA: {"error": "no", "signin_url": "u"},
    OPENAI: {"error": {"message": "no", "type": "t", "param": "p", "code": "c"}},
    Dialect.RESPONSES: {"error": {"message": "no", "type": "t", "param": None, "code": "c"}},
    ANTHROPIC: {"type": "error", "error": {"type": "t", "message": "no"}, "request_id": "r"},
}


def read_back(record: bytes, dialect: Dialect) -> dict[str, Any]:
    """What a record says, whose end and event must be right."""
    if dialect is OLLAMA:
        assert record.endswith(b"}\n")
        return dict(json.loads(record))
    event, data = record.rsplit(b"data: ")
    assert event == (b"" if dialect is OPENAI else b"event: error\n")
    assert data.endswith(b"}\n\n")
    return dict(json.loads(data))


@pytest.mark.parametrize("dialect", list(Dialect))
def test_an_error_in_the_callers_dialect_keeps_its_fields(dialect: Dialect) -> None:
    """Nothing that a client may read there is lost, however it was laid out."""
    own, framing = OWN[dialect], Framing.NDJSON if dialect is OLLAMA else Framing.SSE
    value = read_back(retold(422, json.dumps(own, indent=2).encode(), dialect, framing, 7), dialect)
    if dialect is Dialect.RESPONSES:
        told = {"code": None, "message": "no", "param": None, "sequence_number": 7}
        own = {"type": "error", **told, **own}
    assert value == own


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":"a native one"}', "a native one"),
        (b'{"error":{"message":"of OpenAI"}}', "of OpenAI"),
        (b'{"type":"error","error":{"message":"of Anthropic"}}', "of Anthropic"),
        (b"404 page not found", "404 page not found"),
        (b"two\nlines", "two lines"),
        (b'{"detail":"odd"}', '{"detail":"odd"}'),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", "HTTP 404"),
    ],
)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_any_other_error_is_told_by_its_text(dialect: Dialect, body: bytes, text: str) -> None:
    """As an error of the caller's dialect, which a framer takes for one."""
    framing = Framing.NDJSON if dialect is OLLAMA else Framing.SSE
    record = retold(404, body, dialect, framing)
    error = read_back(record, dialect)["error"]
    assert (error if dialect is OLLAMA else error["message"]) == text
    assert splitter(framing).read(record.strip()).error_text == text


def test_how_long_the_queue_is_stands_in_a_header() -> None:
    """Of those whom it keeps out, whole seconds; nobody is told what nobody knows."""
    error = QueueFull("full", retry_after_s=3.0)
    assert "X-Balancer-Queue-Wait" not in dict(retry_headers(error))
    error.wait_s = 94.2
    assert dict(retry_headers(error))["X-Balancer-Queue-Wait"] == "95"
    error.wait_s = math.inf
    assert "X-Balancer-Queue-Wait" not in dict(retry_headers(error))


@pytest.mark.parametrize("dialect", Dialect)
def test_a_used_up_minute_is_a_429_in_every_dialect(dialect: Dialect) -> None:
    """With when to come back, which the libraries heed."""
    told = render(errors.RateLimited("used up", retry_after_s=7.2), dialect, "r1")
    assert told.status == 429
    assert dict(told.headers)["Retry-After"] == "8"
    assert "x-should-retry" not in dict(told.headers)
    assert b"used up" in told.body
    if dialect is Dialect.ANTHROPIC:
        assert b'"rate_limit_error"' in told.body
    elif dialect is not Dialect.OLLAMA:
        assert b'"code":"rate_limit_exceeded"' in told.body
