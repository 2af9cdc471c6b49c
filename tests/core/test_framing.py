"""Streams as records: what passes when, how answers begin and end, whatever the segmentation."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from balancer.core import framing
from balancer.core.domain import Dialect, Framing, Route, Usage
from balancer.core.framing import (
    LONG,
    Ending,
    Opened,
    Opening,
    Splitter,
    first_record,
    json_terminal,
    splitter,
)
from balancer.core.routes import TABLE

NDJSON, SSE = Framing.NDJSON, Framing.SSE
ROUTES: dict[str, Route] = {route.operation: route for route in TABLE}
WIRE = Path(__file__).resolve().parents[3] / "shared" / "wire"

TOKEN = (
    b'{"model":"m","created_at":"2026-08-21T10:00:00Z","message":{"role":"assistant",'
    b'"content":" \xe2\x98\x80"},"done":false}\n'
)
DONE = (
    b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop",'
    b'"total_duration":24394892,"load_duration":987758,"prompt_eval_count":7,'
    b'"prompt_eval_duration":14199000,"eval_count":20,"eval_duration":6603000}\n'
)
DONE_USAGE = Usage(7, 20, load_s=0.000987758, prompt_s=0.014199, decode_s=0.006603,
                   total_s=0.024394892)  # fmt: skip
ERROR = b'{"error":"an error was encountered while running the model: unexpected EOF"}\n'
ERROR_TEXT = "an error was encountered while running the model: unexpected EOF"
NESTED = (
    b'{"model":"m","message":{"role":"assistant","content":"","tool_calls":[{"function":'
    b'{"name":"f","arguments":{"done":true,"error":"x","total_duration":1}}}]},"done":false}\n'
)
LOGPROBS = b'{"model":"m","response":" true","done":false,"logprobs":[{"token":"true"}]}\n'
SPACED_DONE = b'{"model": "m", "done": true}\n'

CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":'
    b'[{"index":0,"delta":{"content":" \xe2\x98\x80"},"finish_reason":null}]}\n\n'
)
BLANK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"","choices":'
    b'[{"index":0,"delta":{"content":""},"finish_reason":null}]}\n\n'
)
ZERO_USAGE = (
    b'data: {"choices":[{"text":" a"}],"model":"m",'
    b'"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}\n\n'
)
V1_USAGE = (
    b'data: {"choices":[],"model":"m",'
    b'"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
)
V1_DONE = b"data: [DONE]\n\n"
V1_ERROR = b'data: {"error":{"message":"boom","type":"api_error","param":null,"code":null}}\n\n'
MESSAGE_START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"m",'
    b'"usage":{"input_tokens":2,"output_tokens":0}}}\n\n'
)
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
BLOCK = b'event: content_block_start\ndata: {"type":"content_block_start","index":0}\n\n'
MESSAGE_DELTA = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"input_tokens":7,"output_tokens":20}}\n\n'
)
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
EVENT_ERROR = (
    b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"boom"}}\n\n'
)
CREATED = b'event: response.created\ndata: {"response":{"model":"m","usage":null}}\n\n'
IN_PROGRESS = b'event: response.in_progress\ndata: {"response":{"model":"m"}}\n\n'
ITEM_ADDED = b'event: response.output_item.added\ndata: {"output_index":0}\n\n'
COMPLETED = (
    b'event: response.completed\ndata: {"response":{"error":null,"status":"completed",'
    b'"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":0},"output_tokens":3}},'
    b'"type":"response.completed"}\n\n'
)
COMMENT = b": keep-alive\n\n"

LINES = [TOKEN, DONE, ERROR, NESTED, LOGPROBS, SPACED_DONE, b"\n", b"\r\n", b"{}\r\n", b"  \n",
         b'{"done":tr', b"\r", b'"done":true}\n', b"x\n"]  # fmt: skip
EVENTS = [CHUNK, BLANK, V1_USAGE, V1_DONE, V1_ERROR, PING, MESSAGE_DELTA, MESSAGE_STOP,
          EVENT_ERROR, COMPLETED, COMMENT, b"\n", b"\r\n", b"\r", b"data: [DO", b"data: a\r\n\r\n",
          b"data: a\n\r\n", b"data: a\r\n\n", b": c\ndata: [DONE]\n\n", b"event: error\n",
          b"id: 1\n", b":\n"]  # fmt: skip
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
END = {NDJSON: re.compile(rb"\n"), SSE: re.compile(rb"(?<=\n)\r?\n")}


def context_line(ints: int, tail: bytes = b',"total_duration":2000000000,"eval_count":5}') -> bytes:
    """A last line of generate as Ollama sends it, with a context."""
    context = b",".join(b"%d" % (1000 + i % 30000) for i in range(ints))
    head = b'{"model":"m","response":"","done":true,"done_reason":"stop","context":['
    return head + context + b"]" + tail + b"\n"


def ends_of(data: bytes, how: Framing) -> list[int]:
    """Every offset behind an end of a record, by plain search; the stream begins at one."""
    return [0, *(found.end() - 1 for found in END[how].finditer(b"\n" + data))]


def run(split: Splitter, pieces: list[bytes]) -> tuple[bytes, Ending, bool, int]:
    """Everything passed on, and all facts, after a clean end."""
    out = b"".join([split.feed(piece) for piece in pieces])
    finished, records = split.finished, split.records
    out += split.flush()
    return out, split.ending(), finished, records


def ending_of(data: bytes, how: Framing) -> Ending:
    return run(splitter(how), [data])[1]


@st.composite
def segmented(draw: st.DrawFn) -> tuple[Framing, list[bytes]]:
    """A stream of plausible and damaged records, cut anywhere."""
    how = draw(st.sampled_from([NDJSON, SSE]))
    words = st.sampled_from(LINES if how is NDJSON else EVENTS)
    noise = st.text(alphabet='\r\n:{}"da☀', max_size=6).map(str.encode)
    data = b"".join(draw(st.lists(words | noise, max_size=12)))
    return how, cut(data, draw(st.lists(st.integers(0, len(data)), max_size=20)))


def cut(data: bytes, at: list[int]) -> list[bytes]:
    marks = [0, *sorted(at), len(data)]
    return [data[a:b] for a, b in pairwise(marks)]


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# -- segmentation ----------------------------------------------------------------------------------


@UNTIMED
@given(segmented())
@example((SSE, [b"a\n", b"\n", b"\n", b"\r", b"\n", b"b\n\r", b"\n"]))
@example((NDJSON, [b"a", b"\n\n", b"\r", b"\n"]))
def test_any_segmentation_passes_the_same_bytes_and_tells_the_same(
    stream: tuple[Framing, list[bytes]],
) -> None:
    """Cut anywhere, also byte by byte, output, records and all facts equal those of one piece."""
    how, pieces = stream
    data = b"".join(pieces)
    expected = run(splitter(how), [data])
    assert expected[0] == data
    assert run(splitter(how), pieces) == expected
    assert run(splitter(how), bytewise(data)) == expected


@UNTIMED
@given(segmented())
def test_what_passes_is_all_whole_records_and_nothing_else(
    stream: tuple[Framing, list[bytes]],
) -> None:
    """After every read exactly the bytes up to the last end of a record have been passed on."""
    how, pieces = stream
    split, fed, passed = splitter(how), b"", b""
    for piece in pieces:
        fed += piece
        passed += split.feed(piece)
        assert passed == fed[: ends_of(fed, how)[-1]]
        assert not split.mid_record


@UNTIMED
@given(segmented(), st.integers(0, 40))
def test_a_long_tail_passes_and_is_marked(
    stream: tuple[Framing, list[bytes]], tail_max: int
) -> None:
    """A small limit changes only how early bytes pass: never more is held, mid_record is exact."""
    how, pieces = stream
    split, fed, passed = splitter(how, tail_max=tail_max), b"", b""
    for piece in pieces:
        fed += piece
        passed += split.feed(piece)
        assert fed.startswith(passed)
        assert len(fed) - len(passed) <= tail_max
        assert split.mid_record == (len(passed) not in ends_of(fed, how))
        if not split.mid_record:
            assert len(passed) == ends_of(fed, how)[-1]
    rest = split.flush()
    assert passed + rest == fed
    assert split.ending() == ending_of(fed, how)


def lines_of(part: bytes) -> list[bytes]:
    """Of an HTTP chunk."""
    return (b"%x\r\n%b\r\n" % (len(part), part)).split(b"\n")


@UNTIMED
@given(segmented())
@example((NDJSON, [TOKEN, ERROR, DONE]))
@example((SSE, [CHUNK, PING, MESSAGE_STOP, b"data: a\r\n\n"]))
def test_a_record_may_pass_inside_its_chunk(stream: tuple[Framing, list[bytes]]) -> None:
    """What is passed, held, counted and told is what it would be by itself."""
    how, pieces = stream
    plain, split = splitter(how), splitter(how)
    for piece in pieces:
        is_line = piece.endswith(b"\n")
        passed = piece if is_line and split.passes(lines_of(piece)) else split.feed(piece)
        assert passed == plain.feed(piece)
        assert (split.records, split.finished) == (plain.records, plain.finished)
    assert split.flush() == plain.flush()
    assert split.ending() == plain.ending()


@pytest.mark.parametrize(
    ("how", "part", "passes"),
    [
        (NDJSON, TOKEN, True),
        (NDJSON, DONE, True),
        (NDJSON, TOKEN + DONE, False),
        (NDJSON, b"\n", False),
        (NDJSON, b"\r\n", False),
        (SSE, CHUNK, True),
        (SSE, MESSAGE_STOP, True),
        (SSE, CHUNK + CHUNK, False),
        (SSE, CHUNK[:-1], False),
        (SSE, COMMENT, False),
        (SSE, b"\n\n", False),
        (SSE, b"data: a\r\n\r\n", False),
        (SSE, b"data: a\r\n\n", False),
    ],
)
def test_what_may_pass_inside_its_chunk(how: Framing, part: bytes, *, passes: bool) -> None:
    """One whole record as servers send them, and nothing while half a one is held."""
    split = splitter(how)
    assert split.passes(lines_of(part)) is passes
    assert split.records == passes
    split.feed(b"data: half")
    assert not split.passes(lines_of(part))


@UNTIMED
@given(segmented())
def test_records_are_those_a_plain_parser_finds(stream: tuple[Framing, list[bytes]]) -> None:
    """The count leaves out empty lines and comments, as a line-by-line reading does."""
    how, pieces = stream
    data = re.sub(rb"\r(?!\n)", b"", b"".join(pieces))  # a lone CR ends no line here
    split = splitter(how)
    split.feed(data)
    expected, open_event = 0, False
    for line in data.replace(b"\r\n", b"\n").split(b"\n")[:-1]:
        if how is NDJSON:
            expected += line != b""
        elif line:
            open_event |= not line.startswith(b":")
        else:
            expected += open_event
            open_event = False
    assert split.records == expected


@UNTIMED
@given(segmented())
def test_finished_is_told_of_what_was_passed_on(stream: tuple[Framing, list[bytes]]) -> None:
    """Finished never says yes of a stream whose end would not be complete, at any read."""
    how, pieces = stream
    split, fed = splitter(how), b""
    for piece in pieces:
        fed += piece
        split.feed(piece)
        if split.finished:
            assert ending_of(fed[: ends_of(fed, how)[-1]], how).complete


@pytest.mark.parametrize(
    ("how", "data", "records"),
    [
        (NDJSON, b"{}\n", 1),
        (NDJSON, b"x\n", 1),
        (NDJSON, b"\n\r\n", 0),
        (NDJSON, TOKEN + DONE, 2),
        (NDJSON, TOKEN[:-1], 0),
        (SSE, CHUNK, 1),
        (SSE, MESSAGE_STOP, 1),
        (SSE, MESSAGE_STOP + CHUNK, 2),
        (SSE, COMMENT, 0),
        (SSE, COMMENT + CHUNK, 1),
        (SSE, b"\n" + COMMENT + b"\n", 0),
        (SSE, b": c\ndata: x\n\n", 1),
        (SSE, b"data: a\r\n\r\ndata: b\n\n", 2),
        (SSE, b"data: a\n\n\n\ndata: b\n\n", 2),
    ],
)
def test_what_counts_as_a_record(how: Framing, data: bytes, records: int) -> None:
    """One read's records are counted exactly, also where several or none end in it."""
    split = splitter(how)
    split.feed(data)
    assert split.records == records


@pytest.mark.parametrize("how", [NDJSON, SSE])
def test_a_record_over_the_limit_passes_until_its_end(how: Framing) -> None:
    """Past the limit all of that record passes at once, then holding begins anew."""
    end = b"\n" if how is NDJSON else b"\n\n"
    split = splitter(how, tail_max=4)
    assert split.feed(b"abcd") == b""
    assert not split.mid_record
    assert split.feed(b"e") == b"abcde"
    assert split.mid_record
    assert split.feed(b"f") == b"f"
    assert split.feed(b"g" + end + b"hi") == b"g" + end
    assert not split.mid_record
    assert split.records == 1
    assert split.feed(b"jkl") == b"hijkl"
    assert split.flush() == b""
    assert split.mid_record


def test_flushed_tail_counts_as_passed() -> None:
    """After half a record was flushed no record of ours may follow; after a whole one it may."""
    split = splitter(NDJSON)
    split.feed(TOKEN)
    assert (split.flush(), split.mid_record) == (b"", False)
    split.feed(b'{"mod')
    assert (split.flush(), split.mid_record) == (b'{"mod', True)


def test_json_has_no_splitter() -> None:
    """A document is not a stream: asking for its splitter is a mistake of the caller."""
    with pytest.raises(KeyError):
        splitter(Framing.JSON)


# -- how streams end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "data", "expected"),
    [
        (NDJSON, TOKEN + DONE, Ending(True, usage=DONE_USAGE)),
        (NDJSON, TOKEN + SPACED_DONE, Ending(True)),
        (NDJSON, TOKEN + DONE[:-1], Ending(True, usage=DONE_USAGE)),  # no last line end
        (NDJSON, TOKEN, Ending(False)),
        (NDJSON, TOKEN + DONE[:-2], Ending(False)),
        (NDJSON, b"", Ending(False)),
        (NDJSON, b"[1]\n", Ending(False)),
        (NDJSON, b"[" * 60000 + b"\n", Ending(False)),
        (NDJSON, NESTED, Ending(False)),
        (NDJSON, LOGPROBS, Ending(False)),
        (NDJSON, TOKEN + ERROR, Ending(False, True, ERROR[:-1], ERROR_TEXT)),
        (SSE, CHUNK + V1_USAGE + V1_DONE, Ending(True, usage=Usage(7, 2))),
        (SSE, ZERO_USAGE + V1_DONE, Ending(True)),
        (SSE, V1_DONE + V1_USAGE, Ending(True, usage=Usage(7, 2))),
        (SSE, MESSAGE_DELTA + V1_USAGE, Ending(False, usage=Usage(7, 2))),
        (SSE, CHUNK + V1_DONE + COMMENT, Ending(True)),
        (SSE, CHUNK + b"data:[DONE]\r\n\r\n", Ending(True)),
        (SSE, CHUNK, Ending(False)),
        (SSE, CHUNK + BLANK, Ending(False, blank_model=True)),
        (SSE, CHUNK + V1_ERROR, Ending(False, True, V1_ERROR[:-2], "boom")),
        (SSE, CHUNK + V1_ERROR + V1_DONE, Ending(True, True, V1_ERROR[:-2], "boom")),
        (SSE, MESSAGE_START + BLOCK, Ending(False)),
        (SSE, BLOCK + MESSAGE_DELTA + MESSAGE_STOP, Ending(True, usage=Usage(7, 20))),
        (SSE, BLOCK + EVENT_ERROR, Ending(False, True, EVENT_ERROR[:-2], "boom")),
        (SSE, b"event: error\ndata: oh\ndata: no\n\n",
         Ending(False, True, b"event: error\ndata: oh\ndata: no", "oh\nno")),
        (SSE, CREATED + COMPLETED, Ending(True, usage=Usage(7, 3))),
        (SSE, b"event: response.incomplete\ndata: {}\n\n", Ending(True)),
        (SSE, b"event: response.failed\ndata: {}\n\n", Ending(True)),
        (SSE, CREATED + IN_PROGRESS, Ending(False)),
    ],
)  # fmt: skip
def test_ending_of_a_stream(how: Framing, data: bytes, expected: Ending) -> None:
    """Every dialect's terminator, error and usage is read from the last records alone."""
    assert ending_of(data, how) == expected


@pytest.mark.parametrize("number", [b"-1", b"1.5", b"true", b"9223372036854775808", b"9" * 400])
def test_numbers_that_no_host_counts_are_none(number: bytes) -> None:
    """Not even those that are too large for a float."""
    line = DONE.replace(b"24394892", number).replace(b":7,", b":%b," % number)
    whole, short = ending_of(line, NDJSON), ending_of(DONE, NDJSON)
    assert whole == replace(short, usage=replace(DONE_USAGE, tokens_in=None, total_s=None))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (b'{"error":""}', ""),
        (b'{"error":{"message":null}}', ""),
        (b'{"error":{"code":1}}', '{"code": 1}'),
        (b'{"StatusCode":404,"Status":"404 Not Found","error":"gone"}', "gone"),
    ],
)
def test_error_text_of_odd_errors(error: bytes, text: str) -> None:
    """Whatever stands under `error`, the record is an error and its text is a text."""
    assert ending_of(error + b"\n", NDJSON) == Ending(False, True, error, text)


@pytest.mark.parametrize(
    ("how", "data", "finished"),
    [
        (NDJSON, TOKEN, False),
        (NDJSON, DONE, True),
        (NDJSON, TOKEN + DONE, True),
        (NDJSON, SPACED_DONE, True),
        (NDJSON, DONE[:-1], False),  # held: the client has not got it
        (NDJSON, NESTED, False),
        (NDJSON, LOGPROBS, False),
        (NDJSON, b"", False),
        (SSE, CHUNK, False),
        (SSE, V1_DONE, True),
        (SSE, CHUNK + V1_USAGE + V1_DONE, True),
        (SSE, V1_DONE[:-1], False),
        (SSE, BLOCK, False),
        (SSE, MESSAGE_STOP + COMMENT, True),
        (SSE, COMPLETED, True),
        (SSE, b"", False),
    ],
)
def test_finished(how: Framing, data: bytes, finished: bool) -> None:
    """A client that hangs up after the terminator has everything, one before it has not."""
    split = splitter(how)
    split.feed(data)
    assert split.finished is finished


@pytest.mark.parametrize("step", [1000, 65536, 10**9])
@pytest.mark.parametrize("ints", [20_000, 400_000])
def test_a_last_line_with_a_long_context(ints: int, step: int) -> None:
    """`done` before a context of up to 2 MB and counters after it are found in any segmentation."""
    data = TOKEN + context_line(ints)
    split = splitter(NDJSON)
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    out = b"".join(split.feed(piece) for piece in pieces)
    assert split.finished
    assert out + split.flush() == data
    assert split.ending() == Ending(True, usage=Usage(tokens_out=5, total_s=2.0))
    assert sum(map(len, split._recent)) < 2 * LONG  # of megabytes only the ends are kept


@pytest.mark.parametrize("how", [NDJSON, SSE])
def test_of_an_endless_record_only_the_ends_are_kept(how: Framing) -> None:
    """A record that never ends is passed on and does not grow in memory."""
    split = splitter(how, tail_max=1000)
    for _ in range(100):
        assert len(split.feed(b"x" * LONG)) == LONG
        assert len(split._held) <= 9 * LONG
    assert split.flush() == b""


@pytest.mark.parametrize("how", [NDJSON, SSE])
def test_of_a_long_record_in_one_read_only_the_ends_are_kept(how: Framing) -> None:
    """A read of one long record passes whole and is not kept whole; so is its error's text."""
    record = b"event: error\ndata: " if how is SSE else b""
    record += b"x" * (4 * LONG) + (b"\n\n" if how is SSE else b"\n")
    split = splitter(how)
    assert split.feed(record) == record
    assert sum(map(len, split._recent)) < 2 * LONG
    assert len(split.ending().error_text) < LONG


def test_a_long_line_that_is_cut_is_not_complete() -> None:
    """A stream that ends inside a long last line is not taken for complete."""
    assert ending_of(TOKEN + context_line(20_000)[:-400], NDJSON) == Ending(False)


def test_a_long_line_of_nested_looks_is_not_complete() -> None:
    """In a long record the last `done` counts, not one in a tool call's arguments."""
    line = NESTED.replace(b'"name":"f"', b'"name":"' + b"f" * LONG + b'"')
    assert ending_of(line, NDJSON) == Ending(False)


def test_a_long_event_tells_its_usage() -> None:
    """The last event of a long response is known by its name, its usage stands at its end."""
    event = COMPLETED.replace(b'"status"', b'"output":"' + b"y" * (3 * LONG) + b'","status"')
    assert ending_of(CREATED + event, SSE) == Ending(True, usage=Usage(7, 3))


# -- how answers begin -----------------------------------------------------------------------------


OPENINGS: list[tuple[Framing, Dialect, bytes, Opened]] = [
    (NDJSON, Dialect.OLLAMA, TOKEN, Opened("commit", TOKEN)),
    (NDJSON, Dialect.OLLAMA, DONE, Opened("commit", DONE)),
    (NDJSON, Dialect.OLLAMA, DONE[:-1], Opened("commit", DONE[:-1])),
    (NDJSON, Dialect.OLLAMA, ERROR, Opened("error", ERROR, ERROR_TEXT)),
    (NDJSON, Dialect.OLLAMA, ERROR[:-1], Opened("error", ERROR[:-1], ERROR_TEXT)),
    (NDJSON, Dialect.OLLAMA, b'{"error":""}\n', Opened("error", b'{"error":""}\n')),
    (NDJSON, Dialect.OLLAMA, b"no json\n", Opened("commit", b"no json\n")),
    (NDJSON, Dialect.OLLAMA, b"", Opened("empty", b"")),
    (NDJSON, Dialect.OLLAMA, b"\n", Opened("empty", b"\n")),
    (SSE, Dialect.OPENAI, CHUNK, Opened("commit", CHUNK)),
    (SSE, Dialect.OPENAI, V1_DONE, Opened("commit", V1_DONE)),
    (SSE, Dialect.OPENAI, BLANK, Opened("empty", BLANK, "", blank_model=True)),
    (SSE, Dialect.OPENAI, V1_ERROR, Opened("error", V1_ERROR, "boom")),
    (SSE, Dialect.OPENAI, COMMENT, Opened("empty", COMMENT)),
    (SSE, Dialect.OPENAI, COMMENT + V1_ERROR, Opened("error", COMMENT + V1_ERROR, "boom")),
    (SSE, Dialect.RESPONSES, CREATED + IN_PROGRESS,
     Opened("empty", CREATED + IN_PROGRESS, "", blank_model=True)),
    (SSE, Dialect.RESPONSES, CREATED + ITEM_ADDED, Opened("commit", CREATED + ITEM_ADDED)),
    (SSE, Dialect.RESPONSES, CREATED + EVENT_ERROR,
     Opened("error", CREATED + EVENT_ERROR, "boom")),
    (SSE, Dialect.ANTHROPIC, MESSAGE_START + PING,
     Opened("empty", MESSAGE_START + PING, "", blank_model=True)),
    (SSE, Dialect.ANTHROPIC, MESSAGE_START + BLOCK, Opened("commit", MESSAGE_START + BLOCK)),
    (SSE, Dialect.ANTHROPIC, MESSAGE_START + EVENT_ERROR,
     Opened("error", MESSAGE_START + EVENT_ERROR, "boom")),
]  # fmt: skip


@pytest.mark.parametrize(("how", "dialect", "data", "expected"), OPENINGS)
def test_opening(how: Framing, dialect: Dialect, data: bytes, expected: Opened) -> None:
    """What commits, what is an error and what is nothing, in one piece and byte by byte."""
    for pieces in ([data], bytewise(data)):
        opening = Opening(how, dialect)
        told = [opened for piece in pieces if (opened := opening.feed(piece))]
        assert (told[0] if told else opening.end()) == expected


@UNTIMED
@given(segmented(), st.sampled_from(Dialect))
def test_opening_does_not_depend_on_segmentation(
    stream: tuple[Framing, list[bytes]], dialect: Dialect
) -> None:
    """How an answer begins is the same however its bytes arrive; what is held is a prefix."""
    how, pieces = stream
    data = b"".join(pieces)
    told = []
    for each in ([data], pieces, bytewise(data)):
        opening = Opening(how, dialect)
        opened = next(filter(None, map(opening.feed, each)), None) or opening.end()
        assert data.startswith(opened.held)
        told.append((opened.kind, opened.error_text, opened.blank_model))
    assert told[0] == told[1] == told[2]


def test_opening_stays_told() -> None:
    """Nothing that follows an error turns it into an answer."""
    opening = Opening(NDJSON, Dialect.OLLAMA)
    first = opening.feed(ERROR)
    assert first is not None
    assert first.kind == "error"
    assert opening.feed(TOKEN) is first
    assert opening.end() is first


def test_opening_holds_no_more_than_it_may() -> None:
    """A first record over the limit commits, and so does a flood of what does not commit."""
    opening = Opening(NDJSON, Dialect.OLLAMA, hold_max=10)
    assert opening.feed(b"0123456789") is None
    assert opening.feed(b"a") == Opened("commit", b"0123456789a")
    opening = Opening(SSE, Dialect.OPENAI, hold_max=20)
    assert opening.feed(COMMENT) is None
    assert opening.feed(COMMENT) == Opened("commit", COMMENT * 2)


@pytest.mark.parametrize(
    ("how", "data", "record"),
    [
        (NDJSON, b'{"a":1}\n{"b"', b'{"a":1}'),
        (NDJSON, b"\n{}\n", b"{}"),
        (NDJSON, b'{"a":1}', None),
        (SSE, b"\n: c\n\nevent: x\ndata: 1\n\ndata: 2\n\n", b"event: x\ndata: 1"),
        (SSE, b"data: 1\n", None),
        (SSE, b"", None),
    ],
)
def test_first_record(how: Framing, data: bytes, record: bytes | None) -> None:
    """The first whole record is found behind empty lines and comments, half a one is not."""
    assert first_record(data, how) == record


# -- documents -------------------------------------------------------------------------------------


def embedding(floats: int) -> bytes:
    vector = [((i * 7919) % 1000) / 997 for i in range(floats)]
    doc = {"model": "m", "embeddings": [vector, vector], "total_duration": 3_000_000_000,
           "load_duration": 1_000_000_000, "prompt_eval_count": 6}  # fmt: skip
    return json.dumps(doc, separators=(",", ":")).encode()


def v1_embedding(floats: int) -> bytes:
    data = [{"object": "embedding", "embedding": [0.25] * floats, "index": i} for i in range(2)]
    usage = {"prompt_tokens": 6, "total_tokens": 6}
    doc = {"object": "list", "data": data, "model": "m", "usage": usage}
    return json.dumps(doc, separators=(",", ":")).encode() + b"\n"


def chat(text: str) -> bytes:
    return json.dumps({**json.loads(DONE), "message": {"content": text}}).encode()


def logprobs(count: int) -> bytes:
    doc = {"model": "m", "response": "x" * count, "done": True, "context": [1] * count,
           "total_duration": 2_000_000_000, "eval_count": 5,
           "logprobs": [{"token": '"done":false,{'}] * count}  # fmt: skip
    return json.dumps(doc, separators=(",", ":")).encode()


@pytest.mark.parametrize("size", [3, 50_000])
@pytest.mark.parametrize(
    ("operation", "make", "usage"),
    [
        ("embed", embedding, Usage(6, load_s=1.0, total_s=3.0)),
        ("v1_embeddings", v1_embedding, Usage(6)),
        ("embeddings", lambda n: b'{"embedding":[' + b"1.5," * n + b"0]}", Usage()),
        ("generate", lambda n: context_line(n)[:-1], Usage(tokens_out=5, total_s=2.0)),
        ("generate", logprobs, Usage(tokens_out=5, total_s=2.0)),
        ("chat", lambda n: chat('a {"done": false} \\ \n' * n), DONE_USAGE),
    ],
)
def test_a_document_short_or_long(operation: str, make: Any, usage: Usage, size: int) -> None:
    """Whole and cut answers of all shapes are told apart, with their usage, parsed or searched."""
    body = make(size)
    assert (len(body) > LONG) == (size == 50_000)
    assert json_terminal(ROUTES[operation], body) == Ending(True, usage=usage)
    inner = max(body.rstrip()[:-1].rfind(b"}"), body.rfind(b"]")) + 1
    for end in (len(body.rstrip()) - 1, inner, len(body) // 2, LONG + 1, 1):
        cut_short = json_terminal(ROUTES[operation], body[: min(end, len(body.rstrip()) - 1)])
        assert not cut_short.whole
        assert not cut_short.complete


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='{}[]"\\a☀\n', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(alphabet='{["\\}', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@UNTIMED
@given(st.dictionaries(st.text(alphabet='{["\\}', max_size=4), JSONS, max_size=4))
def test_any_document_cut_short_is_seen_without_parsing(doc: dict[str, Any]) -> None:
    """Counting brackets outside strings tells every proper prefix of an object from the whole."""
    body = json.dumps(doc).encode()
    assert framing._is_closed(body)
    assert not any(framing._is_closed(body[:end]) for end in range(len(body)))


@pytest.mark.parametrize(
    ("operation", "body", "expected"),
    [
        ("chat", b'{"model":"m","done":true,"done_reason":"load"}', Ending(True)),
        ("chat", b'{"model":"m","done":false}', Ending(False)),  # the repeat guard ends so
        ("chat", b'{"model":"m"', Ending(False, whole=False)),
        ("chat", b"", Ending(False, whole=False)),
        ("embed", b'{"model":"m","embeddings":[]}', Ending(True)),
        ("embed", b'{"error":"no"}', Ending(True, True, b'{"error":"no"}', "no")),
        ("v1_chat", b'{"usage":{"prompt_tokens":7,"completion_tokens":20}}\n',
         Ending(True, usage=Usage(7, 20))),
        ("v1_responses", b'{"error":null,"usage":{"input_tokens":7,"output_tokens":3}}',
         Ending(True, usage=Usage(7, 3))),
        ("v1_chat", b'{"usage":{"prompt_tokens":true,"completion_tokens":-1}}', Ending(True)),
    ],
)  # fmt: skip
def test_json_terminal(operation: str, body: bytes, expected: Ending) -> None:
    """Only native generate and chat must say done; what is no sane number is not told."""
    assert json_terminal(ROUTES[operation], body) == expected


# -- recorded exchanges ----------------------------------------------------------------------------


def recorded(name: str) -> tuple[Framing, list[bytes]]:
    """The framing and the body's chunks of a recorded exchange."""
    response = json.loads((WIRE / f"{name}.json").read_text())["response"]
    types = [value for key, value in response["headers"] if key == "Content-Type"]
    how = {"application/x-ndjson": NDJSON, "text/event-stream": SSE}.get(types[0], Framing.JSON)
    return how, [text.encode() for _, text in response["segments"]]


RECORDED = pytest.mark.skipif(
    not WIRE.is_dir(),
    reason="RECORDED EXCHANGES ARE MISSING: framing is tested on made-up streams only",
)

STREAMS: dict[str, tuple[bool, bool, tuple[int | None, int | None]]] = {
    # name: complete, blank model, tokens in and out
    "chat-stream": (True, False, (7, 20)),
    "chat-think": (True, False, (13, 12)),
    "chat-logprobs": (True, False, (7, 2)),
    "chat-tool-call": (True, False, (175, 6)),
    "chat-jinja-tool-call": (True, False, (171, 8)),
    "chat-same-token": (False, False, (None, None)),
    "generate-stream": (True, False, (7, 20)),
    "generate-raw": (True, False, (6, 20)),
    "kill-chat": (False, False, (None, None)),
    "kill-generate": (False, False, (None, None)),
    "kill-v1-chat": (False, True, (None, None)),
    "kill-v1-completions": (False, True, (None, None)),
    "kill-v1-messages": (False, False, (None, None)),
    "kill-v1-responses": (False, False, (None, None)),
    "v1-chat-stream": (True, False, (None, None)),
    "v1-chat-stream-usage": (True, False, (7, 20)),
    "v1-chat-tool-call-stream": (True, False, (None, None)),
    "v1-chat-same-token": (False, False, (None, None)),
    "v1-completions-stream": (True, False, (None, None)),
    "v1-completions-stream-usage": (True, False, (7, 2)),
    "v1-messages-stream": (True, False, (7, 20)),
    "v1-messages-tool-call-stream": (True, False, (174, 6)),
    "v1-responses-stream": (True, False, (7, 3)),
    "v1-responses-tool-call-stream": (True, False, (174, 6)),
}


@RECORDED
@pytest.mark.parametrize("name", STREAMS)
def test_recorded_streams(name: str) -> None:
    """A real server's streams pass chunk by chunk as they came, and their ends are understood."""
    how, chunks = recorded(name)
    data = b"".join(chunks)
    split = splitter(how)
    assert [split.feed(chunk) for chunk in chunks] == chunks
    complete, blank_model, tokens = STREAMS[name]
    ending = split.ending()
    assert (ending.complete, ending.blank_model) == (complete, blank_model)
    assert (ending.usage.tokens_in, ending.usage.tokens_out) == tokens
    assert ending.error_text == (ERROR_TEXT if name in ("kill-chat", "kill-generate") else "")
    assert (split.finished, split.flush()) == (complete, b"")
    assert run(splitter(how), bytewise(data))[:2] == (data, ending)


@RECORDED
@pytest.mark.parametrize("name", STREAMS)
def test_recorded_openings(name: str) -> None:
    """Every recorded stream commits, at its first record unless that only announces an answer."""
    how, chunks = recorded(name)
    newer = {"messages": Dialect.ANTHROPIC, "responses": Dialect.RESPONSES}
    dialect = next((newer[part] for part in newer if part in name), Dialect.OPENAI)
    opening = Opening(how, dialect)
    verdicts = [opening.feed(chunk) for chunk in chunks]
    waits = 2 if "responses" in name else 1 if "messages" in name else 0
    assert verdicts[:waits] == [None] * waits
    assert verdicts[waits] == Opened("commit", b"".join(chunks[: waits + 1]))


@RECORDED
@pytest.mark.parametrize(
    ("name", "operation", "complete", "tokens"),
    [
        ("chat-load", "chat", True, (None, None)),
        ("chat-plain", "chat", True, (7, 20)),
        ("kill-idle-chat", "chat", True, (7, 1)),
        ("generate-plain", "generate", True, (7, 20)),
        ("generate-debug-render", "generate", False, (None, None)),
        ("embed", "embed", True, (6, None)),
        ("embeddings", "embeddings", True, (None, None)),
        ("v1-chat-plain", "v1_chat", True, (7, 20)),
        ("v1-completions-plain", "v1_completions", True, (7, 20)),
        ("v1-embeddings-float", "v1_embeddings", True, (6, None)),
        ("v1-messages-plain", "v1_messages", True, (7, 20)),
    ],
)
def test_recorded_documents(
    name: str, operation: str, complete: bool, tokens: tuple[int | None, int | None]
) -> None:
    """A real server's whole answers are understood, and every cut of them is seen."""
    how, chunks = recorded(name)
    body = b"".join(chunks)
    assert how is Framing.JSON
    ending = json_terminal(ROUTES[operation], body)
    assert (ending.whole, ending.complete, ending.error_record) == (True, complete, None)
    assert (ending.usage.tokens_in, ending.usage.tokens_out) == tokens
    for end in range(len(body.rstrip())):
        assert not json_terminal(ROUTES[operation], body[:end]).whole


@pytest.mark.parametrize("depth", [100, 500, 900, 940, 1_000, 5_000])
def test_an_error_too_deep_to_be_written_is_an_error_all_the_same(depth: int) -> None:
    """What can be read is not always what can be written: nobody must hang for that."""
    deep = b'{"error":' + b"[" * depth + b"]" * depth + b"}\n"
    split = splitter(Framing.NDJSON)
    split.feed(deep)
    assert split.ending().complete is False
