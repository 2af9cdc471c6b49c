"""
Errors of ours as the bytes a client understands: per dialect, before and inside a stream.

Laws:
- `/api/*` errors are ``{"error": text}``; `/v1/*` errors are OpenAI's object; `/v1/messages`
  errors are Anthropic's. With the wrong shape the SDKs hide the text from their users.
- In a stream of `/v1/responses` an error is an event that says what an ``error`` event of that API
  says, and has OpenAI's object besides, which is what makes the SDKs raise.
- Never ``[DONE]`` and never ``"done":true`` after an error.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from balancer.core.domain import Call, Dialect, Framing
from balancer.core.errors import (
    BalancerError,
    CutStream,
    NoBackend,
    QueueFull,
    RateLimited,
    Unavailable,
    catalogue,
)
from balancer.core.verdicts import error_text, line

JSON = "application/json; charset=utf-8"
_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error", 401: "authentication_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ESCAPED = re.compile(r"[<>&\u2028\u2029\ud800-\udfff]")
_COMMENT = b": heartbeat\n\n"
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_EMPTY: dict[str, dict[str, object]] = {
    "chat": {"message": {"role": "assistant", "content": ""}},
    "generate": {"response": ""},
}
_OLLAMAS_OWN = frozenset({"invalid_request", "invalid_option", "model_not_found"})
_CLIENTS_RETRY = frozenset({404, 408, 409, 413, 429})  # some do; what cannot help must say so
MAX_RETRY_S = 60.0
SPREAD = 0.25


@dataclass(frozen=True, slots=True)
class Rendered:
    """An answer of ours: status, header pairs, body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def compact(value: object, *, strict: bool = False) -> bytes:
    """
    JSON as Go's encoder writes it: no spaces, UTF-8, ``<>&`` and line separators escaped.

    Args:
        strict: An infinite number, or none, has no JSON form; else it passes as Python writes it.

    Raises:
        ValueError, TypeError, RecursionError: The value has no JSON form.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=not strict, separators=(",", ":"))
    return _ESCAPED.sub(_escape, text).encode()


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return "\ufffd" if "\ud800" <= char <= "\udfff" else f"\\u{ord(char):04x}"


def _told(error: BalancerError, request_id: str) -> str:
    """The text with the request id where an operator will be asked about it."""
    return f"{error.text} [req {request_id}]" if error.status >= 500 and request_id else error.text


def _value(error: BalancerError, dialect: Dialect, request_id: str) -> dict[str, object]:
    code = None if error.code in _OLLAMAS_OWN else error.code
    value = _shaped(error.status, _told(error, request_id), code, dialect)
    return value | {"request_id": f"req_{request_id}"} if dialect is Dialect.ANTHROPIC else value


def _shaped(status: int, text: str, code: str | None, dialect: Dialect) -> dict[str, object]:
    if dialect in (Dialect.OPENAI, Dialect.RESPONSES):
        kind = _OPENAI_TYPES.get(status, "api_error")
        return {"error": {"message": text, "type": kind, "param": None, "code": code}}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": text}}
    return {"error": text}


def relayed(status: int, text: str, dialect: Dialect) -> bytes:
    """The body of a backend's error whose text came in another dialect than the caller's."""
    return compact(_shaped(status, text, None, dialect)) + b"\n"


def retry_headers(error: BalancerError, late: float = 0.0) -> tuple[tuple[str, str], ...]:
    """
    What tells a client how, when, or whether to try again.

    Args:
        late: 0..1: how much later than need be, up to a quarter, so that not all come back at
            once. Never more than 60 s: beyond that the SDKs no longer do as they are told.
    """
    headers: list[tuple[str, str]] = []
    if error.status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    if error.retry_after_s is not None or isinstance(error, Unavailable | RateLimited):
        need_s = min(MAX_RETRY_S, max(1.0, error.retry_after_s or 1.0))
        wait_s = need_s * (1 + SPREAD * late)
        if wait_s > MAX_RETRY_S:
            wait_s = 2 * MAX_RETRY_S - wait_s  # spread to the other side
        headers.append(("Retry-After", str(math.ceil(wait_s))))
        headers.append(("retry-after-ms", str(int(wait_s * 1000))))
        headers += _wait_header(error)
    elif not error.retryable and (error.status >= 500 or error.status in _CLIENTS_RETRY):
        headers.append(("x-should-retry", "false"))
    return tuple(headers)


def _wait_header(error: BalancerError) -> list[tuple[str, str]]:
    """How long the call would have waited, whole seconds."""
    wait_s = error.wait_s if isinstance(error, QueueFull) else None
    if wait_s is None or math.isinf(wait_s):
        return []
    return [("X-Balancer-Queue-Wait", str(math.ceil(wait_s)))]


def render(
    error: BalancerError, dialect: Dialect, request_id: str = "", late: float = 0.0
) -> Rendered:
    """The whole answer for an error before the first byte; *late* as in `retry_headers`."""
    body = compact(_value(error, dialect, request_id))
    return Rendered(error.status, (("Content-Type", JSON), *retry_headers(error, late)), body)


def trailer(
    error: BalancerError,
    dialect: Dialect,
    framing: Framing,
    request_id: str = "",
    number: int = 0,
) -> bytes | None:
    """
    The last record of a stream that failed; None where no record fits (abort instead).

    Args:
        number: How many records came before; `/v1/responses` numbers its events.
    """
    if framing is Framing.JSON:
        return None
    value = _value(error, dialect, request_id)
    if dialect is Dialect.RESPONSES:
        value = _event(error.code, _told(error, request_id), number) | value
    return _record(value, dialect, framing)


def retold(status: int, body: bytes, dialect: Dialect, framing: Framing, number: int = 0) -> bytes:
    """
    A backend's whole error answer as the last record of a stream that had begun.

    Of an answer in the caller's dialect every field is kept, of any other only the text.
    """
    text = error_text(body)
    own: dict[str, object] = {} if text is None else json.loads(body)
    text = line(body.decode(errors="replace")) if text is None else text
    value = _shaped(status, text or f"HTTP {status}", None, dialect)
    if type(own.get("error")) is type(value["error"]) and own.get("type") == value.get("type"):
        value = own
    if dialect is Dialect.RESPONSES:
        value = _event(None, text, number) | value
    return _record(value, dialect, framing)


def _event(code: str | None, text: str, number: int) -> dict[str, object]:
    """What an ``error`` event of `/v1/responses` says."""
    told = {"code": code, "message": text, "param": None}
    return {"type": "error", **told, "sequence_number": number}


def _record(value: dict[str, object], dialect: Dialect, framing: Framing) -> bytes:
    if framing is Framing.NDJSON:
        return compact(value) + b"\n"
    if dialect in (Dialect.ANTHROPIC, Dialect.RESPONSES):
        return b"event: error\ndata: " + compact(value) + b"\n\n"
    return b"data: " + compact(value) + b"\n\n"


def heartbeat(call: Call, stamp: str) -> bytes | None:
    """
    A record that says nothing, for a stream of *call*; None: it has none.

    Of Ollama's routes only these two have one: an empty line breaks its clients, an empty chunk
    none. Anthropic's may send a ``ping`` anywhere, also before ``message_start``.

    Args:
        stamp: The wall time as Ollama writes it.
    """
    dialect = call.route.dialect
    if call.framing is Framing.SSE:
        return _PING if dialect is Dialect.ANTHROPIC else _COMMENT
    empty = _EMPTY.get(call.route.operation)
    if call.framing is Framing.JSON or empty is None:
        return None
    return compact({"model": call.model, "created_at": stamp, **empty, "done": False}) + b"\n"


_EXAMPLE_ID = "4f0c"
_NAMES = {
    Dialect.OLLAMA: ("Ollama (`/api/…`)", Framing.NDJSON),
    Dialect.OPENAI: ("OpenAI (`/v1/…`)", Framing.SSE),
    Dialect.RESPONSES: ("OpenAI's Responses (`/v1/responses`)", Framing.SSE),
    Dialect.ANTHROPIC: ("Anthropic (`/v1/messages`)", Framing.SSE),
}


def document() -> str:
    """The catalogue of errors and the shapes they take as Markdown, for the documentation."""
    head = "| status | code | OpenAI type | Anthropic type | when | what to do | again? |\n"
    rows = "".join(map(_row, sorted(catalogue(), key=lambda kind: kind.status)))
    return f"{head}| --- | --- | --- | --- | --- | --- | --- |\n{rows}\n{_shapes()}"


def _row(kind: type[BalancerError]) -> str:
    when = (kind.__doc__ or "").strip().splitlines()[0]
    openai = _OPENAI_TYPES.get(kind.status, "api_error")
    anthropic = _ANTHROPIC_TYPES.get(kind.status, "api_error")
    named = "" if kind.code in _OLLAMAS_OWN else f"`{kind.code}`"
    told = dict(retry_headers(kind("")))
    if "Retry-After" in told:
        again = "yes, after `Retry-After`"
    else:
        again = "may help" if kind.retryable else "no"
    again += ": `x-should-retry: false`" if "x-should-retry" in told else ""
    return (
        f"| {kind.status} | {named or f'({kind.code})'} | `{openai}` | `{anthropic}` | {when} "
        f"| {kind.remedy} | {again} |\n"
    )


def _shapes() -> str:
    early, late = NoBackend("TEXT", retry_after_s=12.0), CutStream("TEXT")
    told = []
    for dialect, (name, framing) in _NAMES.items():
        rendered = render(early, dialect, _EXAMPLE_ID)
        head = "".join(f"{key}: {value}\n" for key, value in rendered.headers)
        record = trailer(late, dialect, framing, _EXAMPLE_ID) or b""
        told.append(
            f"### {name}\n\nBefore the answer:\n\n```\nHTTP/1.1 {rendered.status}\n{head}\n"
            f"{rendered.body.decode()}\n```\n\nInside a stream:\n\n```\n"
            f"{record.decode().strip()}\n```\n"
        )
    return "## Shapes\n\n" + "\n".join(told)
