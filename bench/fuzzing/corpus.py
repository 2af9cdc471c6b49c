"""
What inputs are made from: the tests' own examples, and what was recorded of a real Ollama.

The recordings lie outside of the repository and may be absent; see `ABSENT`.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tests.core.test_body import RUNNABLE
from tests.core.test_framing import EVENTS, LINES
from tests.e2e.test_bad_input import MALFORMED
from tests.net.test_connection import EVERY, ODD
from tests.sim.wire import Recording
from tests.sim.wire import recorded as names

ABSENT = "NO RECORDINGS: ../shared/wire is absent, only the tests' own examples are mutated"


@cache
def recordings() -> tuple[Recording, ...]:
    """All recordings; none where they are absent."""
    return tuple(map(Recording.load, names()))


@cache
def bodies() -> tuple[bytes, ...]:
    """Bodies of requests: JSON, for the most part."""
    told = [each.payload() for each in recordings() if "body" in each.request]
    written = [json.dumps(body).encode() for body in RUNNABLE.values()]
    return (*written, *(body for body in told if len(body) < 20_000))


@cache
def requests() -> tuple[bytes, ...]:
    """Whole requests."""
    told = []
    for each in recordings():
        request = each.request
        if "raw" not in request and "hold_body" not in request:
            line = f"{request['method']} {request['path']} {request.get('version', 'HTTP/1.1')}"
            told.append(_message(line, request["headers"]) + each.payload())
    return (*MALFORMED.values(), *(raw for raw in told if len(raw) < 5000))


@cache
def answers() -> tuple[bytes, ...]:
    """Whole answers of backends, well framed and not."""
    told = [_answer(each.response) for each in recordings() if each.response.get("status")]
    return (*EVERY.values(), *ODD.values(), *(raw for raw in told if len(raw) < 8000))


@cache
def lines() -> tuple[bytes, ...]:
    """Records of NDJSON."""
    return (*LINES, *_records("application/x-ndjson"))


@cache
def events() -> tuple[bytes, ...]:
    """Events of SSE."""
    return (*EVENTS, *_records("text/event-stream"))


def _records(kind: str) -> list[bytes]:
    found = dict[bytes, None]()
    for each in recordings():
        if ["Content-Type", kind] in each.response.get("headers", ()):
            found.update((text.encode(), None) for text in each.texts[:3] + each.texts[-3:])
    return list(found)


def _message(line: str, headers: list[list[str]]) -> bytes:
    heads = [f"{name}: {value.replace('{HOST}', 'localhost')}" for name, value in headers]
    return "\r\n".join([line, *heads, "", ""]).encode()


def _answer(response: dict[str, Any]) -> bytes:
    """As it went over the wire, with fewer chunks."""
    line = f"HTTP/1.1 {response['status']} {response.get('reason', '')}"
    wire = "".join(f"{each}\r\n\r\n" for each in response.get("interim", ())).encode()
    wire += _message(line, response["headers"])
    segments = [text.encode() for _, text in response["segments"]]
    if response["framing"] != "chunked":
        return wire + b"".join(segments)
    for segment in segments[:3] + segments[-1:]:
        wire += b"%x\r\n%b\r\n" % (len(segment), segment) if segment else b""
    return wire + b"0\r\n\r\n"
