"""
Streams as records, beside a naive splitter, in whatever pieces they come; and single documents.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from balancer.core.domain import Dialect, Framing
from balancer.core.framing import (
    LONG,
    TAIL_MAX,
    Ending,
    Opening,
    Splitter,
    first_record,
    json_terminal,
    splitter,
)
from balancer.core.routes import TABLE
from bench.fuzzing import chance, corpus

NDJSON, SSE = Framing.NDJSON, Framing.SSE
CHAT = next(route for route in TABLE if route.operation == "chat")
END = {NDJSON: re.compile(rb"\n"), SSE: re.compile(rb"(?<=\n)\r?\n")}
RECENT = 4  # records that an ending is told by
WORDS = (
    *(b"\n", b"\r\n", b"\r", b"\n\n", b"\n\r\n", b"data: ", b"event: error\n", b":", b": c\n\n"),
    *(b'"done":true', b'"done":false', b'"error":"x"', b"}", b"{", b'"', b"\\", b"\xff", b"\0"),
    *(b"data: [DONE]\n\n", b'{"done":true}\n', b"event: message_stop\n", b'"eval_count":7,'),
    *(b"x" * 70_000, b"[" * 2000, b"1," * 40_000, b'{"error":' + b"[" * 1500, b"NaN"),
)


def make(rng: random.Random) -> bytes:
    """Records, whole and damaged, behind a byte that says of which kind."""
    kind = rng.choice((b"n", b"s", b"d"))
    words = corpus.events() if kind == b"s" else corpus.lines()
    data = b"".join(rng.choice(words) for _ in range(rng.choice((1, 2, 4, 9))))
    if kind == b"d":
        data = rng.choice(corpus.bodies())
    return kind + chance.mutated(rng, data, WORDS)


def check(data: bytes, rng: random.Random) -> None:
    """Hold what is told of it against a plain reading."""
    kind, data = data[:1], data[1:]
    if kind == b"d":
        _check_document(data)
        return
    how = SSE if kind == b"s" else NDJSON
    whole = _run(splitter(how), [data])
    assert whole[0] == data
    for _ in range(2):
        parts = chance.pieces(rng, data)
        assert _run(splitter(how), parts) == whole, "it depends on the pieces"
        _check_passing(how, parts, TAIL_MAX)
        _check_passing(how, parts, rng.choice((0, 1, 30, 5000)))
        _check_opening(how, data, parts, rng)
    _check_records(how, data, whole)


def _run(split: Splitter, parts: list[bytes]) -> tuple[bytes, Ending, bool, int]:
    out = b"".join([split.feed(part) for part in parts])
    finished, records = split.finished, split.records
    out += split.flush()
    return out, split.ending(), finished, records


def _ends(data: bytes, how: Framing) -> list[int]:
    """Every offset behind a record's end; the stream begins at one."""
    return [0, *(found.end() - 1 for found in END[how].finditer(b"\n" + data))]


def _check_passing(how: Framing, parts: list[bytes], tail_max: int) -> None:
    """Whole records pass at once, and no more than the limit is held."""
    split, fed, passed = splitter(how, tail_max=tail_max), 0, 0
    ends = _ends(b"".join(parts), how)
    known, last = set(ends), 0
    for part in parts:
        fed += len(part)
        passed += len(split.feed(part))
        while ends[1:] and ends[1] <= fed:
            ends.pop(0)
        last = ends[0]
        assert last <= passed <= fed
        assert fed - passed <= tail_max
        assert split.mid_record == (passed not in known)
        assert split.mid_record or passed == last
        held = split._held  # noqa: SLF001 - memory is bounded by it
        assert len(held) <= max(tail_max, 8 * LONG)


def _check_records(how: Framing, data: bytes, whole: tuple[bytes, Ending, bool, int]) -> None:
    """As many records as a plain reader finds, and the last of them tell the ending."""
    _, ending, _, count = whole
    text = re.sub(rb"\r(?!\n)", b"", data)  # a lone CR ends no line here
    if text != data:
        return
    found = _lines(data) if how is NDJSON else _events(data)
    ended = (
        _lines(data[: _ends(data, how)[-1]])
        if how is NDJSON
        else _events(data[: _ends(data, how)[-1]])
    )
    assert len(ended) == count
    last = found[-RECENT:]
    if max(map(len, last), default=0) > LONG // 2:
        return  # of a long one only its ends are looked at
    assert ending.complete == any(_is_last(how, record) for record in last)
    if how is NDJSON:
        errors = [doc["error"] for doc in map(_doc, last) if doc.get("error") is not None]
        assert (ending.error_record is not None) is bool(errors)
        assert ending.blank_model == any(doc.get("model") == "" for doc in map(_doc, last))


def _lines(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\n") if line not in (b"", b"\r")]


def _events(data: bytes) -> list[bytes]:
    """Events that are more than comments, each with its lines."""
    found, event = list[bytes](), list[bytes]()
    for line in data.replace(b"\r\n", b"\n").split(b"\n"):
        if line:
            event.append(line)
        elif event:
            found.append(b"\n".join(event))
            event = []
    found += [b"\n".join(event)] if event else []
    return [each for each in found if not all(li.startswith(b":") for li in each.split(b"\n"))]


def _is_last(how: Framing, record: bytes) -> bool:
    if how is NDJSON:
        return _doc(record).get("done") is True
    named = re.match(rb"event: ?([\w.]+)", record)
    last = (b"message_stop", b"response.completed", b"response.incomplete", b"response.failed")
    return record.startswith((b"data: [DONE]", b"data:[DONE]")) or (
        named is not None and named[1] in last
    )


def _doc(record: bytes) -> dict[str, Any]:
    try:
        value = json.loads(record)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _check_opening(how: Framing, data: bytes, parts: list[bytes], rng: random.Random) -> None:
    """How it begins does not depend on the pieces, and what is held is all that came."""
    dialect = Dialect.OLLAMA if how is NDJSON else rng.choice(list(Dialect))
    told = []
    for each in ([data], parts):
        opening, fed = Opening(how, dialect), b""
        for part in each:
            fed += part
            opened = opening.feed(part)
            if opened is not None:
                assert opened.held == fed
                break
        opened = opening.end()
        told.append((opened.kind, opened.error_text, opened.blank_model))
    assert told[0] == told[1], "how it begins depends on the pieces"
    first = first_record(data, how)
    assert first is None or first in data


def _check_document(data: bytes) -> None:
    """It is whole if it can be parsed, and no beginning of it is, however long it is."""
    ending = json_terminal(CHAT, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        if len(data) <= LONG:
            assert not ending.whole
            assert not ending.complete
        return
    assert ending.whole, "a whole document is not seen to be"
    if not isinstance(value, dict) or len(data) <= LONG:
        return
    for end in (1, len(data) // 2, len(data.rstrip()) - 1):
        assert not json_terminal(CHAT, data[:end]).whole, "a part is taken for the whole"
