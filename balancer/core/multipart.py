"""
One field of a `multipart/form-data` body, found without taking the body apart.

What is routed by must be what the backend reads, so that only forms are taken that every reader
understands alike: whatever leaves room for two readings (bare line ends, folded headers, text
before the first boundary, escaped names) is refused, where Go's reader might be more lenient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from balancer.core.errors import BadRequest

MOST_PARTS: Final = 1000  # as many as Go takes
MOST_HEAD_BYTES: Final = 16 << 10
MOST_VALUE_BYTES: Final = 4 << 10
MOST_LOOKALIKES: Final = 100  # in a part, of the delimiter; clients choose one that is not in it

_WORD = r"[A-Za-z0-9!#$&+.^_`|~-]{1,80}"
_QUOTED = r'"(?:[^"\\\x00-\x1f\x7f]|\\[^\x00-\x1f\x7f]){0,4096}+"'
_PARAMETER = re.compile(rf"[ \t]*;[ \t]*({_WORD}\*?)=({_WORD}|{_QUOTED})")
_EXTENDED = re.compile(rf"[ \t]*;[ \t]*({_WORD}\*)=([A-Za-z0-9!#$&+.^_`|~%'-]{{1,4096}}+)")
_BOUNDARY = re.compile(r"[A-Za-z0-9'()+_,./:=? -]{0,69}[A-Za-z0-9'()+_,./:=?-]")
_FIELD = re.compile(rf"({_WORD}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


def field(body: bytes | bytearray, content_type: str, wanted: str) -> str:
    """
    The value of the first field of that name; empty if there is none.

    Raises:
        BadRequest: Not a form, or not one that all readers would read alike.
    """
    start, end = _place(body, content_type, wanted)
    try:
        return str(body[start:end], "utf-8")
    except UnicodeDecodeError:
        raise _unclear(f"the field {wanted!r} is not UTF-8") from None


def replaced(body: bytes | bytearray, content_type: str, wanted: str, value: str) -> bytes:
    """The form with another value of that field, which is there; raises as `field` does."""
    start, end = _place(body, content_type, wanted)
    view = memoryview(body)
    return b"".join((view[:start], value.encode(), view[end:]))


def _place(body: bytes | bytearray, content_type: str, wanted: str) -> tuple[int, int]:
    for head, start, end in _parts(body, _boundary(content_type)):
        disposition = _fields(head).get("content-disposition", "")
        kind, parameters = _parsed(disposition)
        if kind != "form-data" or parameters.get("name") != wanted:
            continue
        is_file = any(name.startswith("filename") for name in parameters)
        if is_file or "content-transfer-encoding" in _fields(head):
            raise _unclear(f"the field {wanted!r} is no plain text")
        if end - start > MOST_VALUE_BYTES:
            raise _unclear(f"the field {wanted!r} is too long")
        return start, end
    return 0, 0


def _unclear(why: str) -> BadRequest:
    return BadRequest(f"failed to parse multipart form: {why}")


def _boundary(content_type: str) -> bytes:
    kind, parameters = _parsed(content_type)
    if kind != "multipart/form-data":
        raise _unclear("request Content-Type isn't multipart/form-data")
    boundary = parameters.get("boundary", "")
    if _BOUNDARY.fullmatch(boundary) is None:
        raise _unclear("no multipart boundary param in Content-Type")
    return b"--" + boundary.encode()


def _parts(body: bytes | bytearray, boundary: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each part's head, and where its value begins and ends."""
    opening = boundary + b"\r\n"
    if not body.startswith(opening):
        raise _unclear("it does not begin with the boundary")
    delimiter = b"\r\n" + boundary
    start = len(opening)
    for _ in range(MOST_PARTS):
        # A head without a line, and a value without a byte, end in the line end before them.
        head_end = body.find(b"\r\n\r\n", start - 2, start + MOST_HEAD_BYTES)
        if head_end < 0:
            raise _unclear("a part's head does not end")
        value_start = head_end + 4
        value_end = _next(body, delimiter, head_end + 2)
        yield bytes(body[start:head_end]), value_start, max(value_start, value_end)
        after = value_end + len(delimiter)
        if body.startswith(b"--", after):
            return
        start = after + 2
    raise _unclear("too many parts")


def _next(body: bytes | bytearray, delimiter: bytes, start: int) -> int:
    """Where the next delimiter line begins; a longer text that begins like one is none."""
    for _ in range(MOST_LOOKALIKES):
        found = body.find(delimiter, start)
        if found < 0:
            break
        after = body[found + len(delimiter) : found + len(delimiter) + 2]
        if after in (b"\r\n", b"--"):
            return found
        if after[:1] in (b" ", b"\t", b"\r", b"\n", b"-", b""):
            break
        start = found + len(delimiter)
    raise _unclear("a part does not end")


def _fields(head: bytes) -> dict[str, str]:
    """A part's header fields by lower-case name."""
    fields: dict[str, str] = {}
    if not head:
        return fields
    for line in head.decode("latin-1").split("\r\n"):
        match = _FIELD.fullmatch(line)
        if match is None or match[1].lower() in fields:
            raise _unclear("a part's head is malformed")
        fields[match[1].lower()] = match[2].rstrip(" \t")
    return fields


def _parsed(value: str) -> tuple[str, dict[str, str]]:
    """A header's value, ``kind; name=value…``: the kind and the parameters by lower-case name."""
    kind, semicolon, _ = value.partition(";")
    position = len(kind)
    parameters: dict[str, str] = {}
    while semicolon and position < len(value):
        match = _EXTENDED.match(value, position) or _PARAMETER.match(value, position)
        if match is None or match[1].lower() in parameters:
            raise _unclear("a header is malformed")
        name = match[1].lower()
        if "*" in name and not name.startswith("filename"):
            raise _unclear("a header is encoded")
        parameters[name] = _unquoted(name, match[2])
        position = match.end()
    return kind.strip(" \t").lower(), parameters


def _unquoted(name: str, value: str) -> str:
    if not value.startswith('"'):
        return value
    if "\\" in value and name != "filename":
        raise _unclear("a header is escaped")
    return value[1:-1]
