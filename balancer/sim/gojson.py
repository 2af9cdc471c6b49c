"""JSON, durations and times as Go reads and writes them."""

import json
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

_ESCAPED = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")
_DURATION = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+")
_UNIT = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_CONTEXTS = (
    ("Expecting property name", "looking for beginning of object key string"),
    ("Expecting ':'", "after object key"),
    ("Expecting ','", "after object key:value pair"),
    ("Invalid control", "in string literal"),
    ("Invalid \\", "in string escape code"),
)
_KINDS = {dict: "object", list: "array", str: "string", bool: "bool"}


class DecodeError(ValueError):
    """Go would not decode this; the text is its complaint."""


def encode(value: Any, *, sort: bool = False) -> str:
    """Compact JSON in UTF-8 with `<`, `>`, `&` and the two separators escaped.

    Go prints structs in their own order, and maps with `sort`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort)
    return text if text.isascii() and not _has_html(text) else text.translate(_ESCAPED)


def _has_html(text: str) -> bool:
    return "<" in text or ">" in text or "&" in text


def decode(body: bytes) -> dict[str, Any]:
    """The first value of a body, which must be an object or null, its keys in lower case."""
    text = body.decode("utf-8", "replace")
    blank = _BLANK.match(text)
    start = blank.end() if blank else 0
    if start == len(text):
        raise DecodeError("EOF")
    try:
        value, _ = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise DecodeError(_complaint(text, error)) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DecodeError(f"json: cannot unmarshal {kind(value)} into Go value of type api.Request")
    return lower_keys(value)


def lower_keys(value: dict[str, Any]) -> dict[str, Any]:
    """Go matches field names in any case; the last one wins."""
    return {key.lower(): inner for key, inner in value.items()}


def kind(value: Any) -> str:
    """Go's word for the JSON type of a value."""
    return _KINDS.get(type(value), "number")


def _complaint(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated"):
        return "unexpected EOF"
    where = next((w for prefix, w in _CONTEXTS if error.msg.startswith(prefix)), None)
    first_byte = chr(text[error.pos].encode()[0])
    return f"invalid character {_quoted(first_byte)} {where or 'looking for beginning of value'}"


def _quoted(sign: str) -> str:
    if sign == "'":
        return r"'\''"
    plain = sign.isprintable() or not sign.isascii()
    return f"'{sign}'" if plain else f"'{sign.encode('unicode_escape').decode()}'"


def duration_s(text: str) -> float:
    """Reads a Go duration; raises DecodeError with Go's words."""
    if text in {"0", "+0", "-0"}:
        return 0.0
    if _DURATION.fullmatch(text):
        total = sum(float(number) * _SECONDS[unit] for number, unit in _UNIT.findall(text))
        return -total if text.startswith("-") else total
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
        raise DecodeError(f'time: missing unit in duration "{text}"')
    raise DecodeError(f'time: invalid duration "{text}"')


def timestamp(ns: int) -> str:
    """RFC 3339 in UTC with up to nine decimals, none of them trailing zeros."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{_to_the_second(seconds)}.{fraction:09d}".rstrip("0").rstrip(".") + "Z"


@lru_cache(maxsize=16)
def _to_the_second(seconds: int) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def http_date(ns: int) -> str:
    """The time as the Date header has it."""
    moment = datetime.fromtimestamp(ns // 1_000_000_000, UTC)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.weekday()]
    months = "JanFebMarAprMayJunJulAugSepOctNovDec"
    month = months[3 * moment.month - 3 : 3 * moment.month]
    return f"{day}, {moment:%d} {month} {moment:%Y %H:%M:%S} GMT"
