"""
Errors of ours as the bytes a client understands: per dialect, before and inside a stream.

Laws:
- `/api/*` errors are ``{"error": text}``; `/v1/*` errors are OpenAI's object; `/v1/messages`
  errors are Anthropic's. With the wrong shape the SDKs hide the text from their users.
- Never ``[DONE]`` and never ``"done":true`` after an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from balancer.core.domain import Dialect, Framing
from balancer.core.errors import BalancerError, Unavailable

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
_OLLAMAS_OWN = frozenset({"invalid_request", "invalid_option", "model_not_found"})


@dataclass(frozen=True, slots=True)
class Rendered:
    """An answer of ours: status, header pairs, body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def compact(value: object) -> bytes:
    """JSON as Ollama prints it: no spaces; ``<``, ``>``, ``&`` and the line separators escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        if sign in text:
            text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "replace")


def _told(error: BalancerError, request_id: str) -> str:
    """The text with the request id where an operator will be asked about it."""
    return f"{error.text} [req {request_id}]" if error.status >= 500 and request_id else error.text


def _value(error: BalancerError, dialect: Dialect, request_id: str) -> dict[str, object]:
    code = None if error.code in _OLLAMAS_OWN else error.code
    value = _shaped(error.status, _told(error, request_id), code, dialect)
    return value | {"request_id": f"req_{request_id}"} if dialect is Dialect.ANTHROPIC else value


def _shaped(status: int, text: str, code: str | None, dialect: Dialect) -> dict[str, object]:
    if dialect is Dialect.OPENAI:
        kind = _OPENAI_TYPES.get(status, "api_error")
        return {"error": {"message": text, "type": kind, "param": None, "code": code}}
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": text}}
    return {"error": text}


def relayed(status: int, text: str, dialect: Dialect) -> bytes:
    """The body of a backend's error whose text came in another dialect than the caller's."""
    return compact(_shaped(status, text, None, dialect)) + b"\n"


def retry_headers(error: BalancerError) -> tuple[tuple[str, str], ...]:
    """What tells a client how, when, or whether to try again."""
    headers: list[tuple[str, str]] = []
    if error.status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    if error.retry_after_s is not None or isinstance(error, Unavailable):
        wait_s = min(60.0, max(1.0, error.retry_after_s or 1.0))
        headers.append(("Retry-After", str(math.ceil(wait_s))))
        headers.append(("retry-after-ms", str(int(wait_s * 1000))))
    elif not error.retryable and error.status in (404, 408, 409, 413, 429, 500, 501, 508):
        headers.append(("x-should-retry", "false"))
    return tuple(headers)


def render(error: BalancerError, dialect: Dialect, request_id: str = "") -> Rendered:
    """The whole answer for an error before the first byte."""
    body = compact(_value(error, dialect, request_id))
    return Rendered(error.status, (("Content-Type", JSON), *retry_headers(error)), body)


def trailer(
    error: BalancerError, dialect: Dialect, framing: Framing, request_id: str = ""
) -> bytes | None:
    """The last record of a stream that failed; None where no record fits (abort instead)."""
    if framing is Framing.JSON:
        return None
    value = _value(error, dialect, request_id)
    if framing is Framing.NDJSON:
        return compact(value) + b"\n"
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: " + compact(value) + b"\n\n"
    return b"data: " + compact(value) + b"\n\n"
