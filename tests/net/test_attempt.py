"""What an attempt holds until it can be judged, and how it hands on the rest."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from balancer.core.domain import Framing, Verdict
from balancer.core.verdicts import Failure, FailureKind, Judgement
from balancer.net.attempt import HIGH_WATER, HOLD_ERROR, HOLD_WHOLE, Attempt
from balancer.net.connection import Chunks
from balancer.net.upstream import Sink
from tests.core.clocks import ManualClock
from tests.net.parts import FakeLease, Tape, a_call

NDJSON = (("content-type", "application/x-ndjson"),)
SSE = (("Content-Type", "text/event-stream; charset=utf-8"),)
JSON = (("Content-Type", "application/json; charset=utf-8"),)
LINE = b'{"message":{"content":"x"},"done":false}\n'
BROKEN = Failure(FailureKind.CUT, accepted=True)


class FakeHandle:
    """A handle that only remembers."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.sink: Sink | None = None

    def turn(self, sink: Sink) -> None:
        """Tell another from now on."""
        self.sink = sink

    def pass_chunks(self, chunks: Chunks) -> None:
        """Never asked here."""
        raise AssertionError

    def moved_at(self) -> float:
        """Never asked here."""
        raise AssertionError

    def pause(self) -> None:
        """Stop."""
        self.done.append("pause")

    def resume(self) -> None:
        """Go on."""
        self.done.append("resume")

    def abort(self) -> None:
        """End."""
        self.done.append("abort")


class Stage:
    """An attempt with what surrounds it."""

    def __init__(self, **call: Any) -> None:
        self.lease, self.clock, self.handle = FakeLease(), ManualClock(), FakeHandle()
        self.attempt = Attempt(a_call(**call), self.lease.as_lease, self.clock)
        self.attempt.handle = self.handle

    def is_decided(self) -> bool:
        """Whether the attempt can be judged."""
        return self.attempt._decided


@pytest.mark.parametrize(
    ("headers", "framing"),
    [
        (NDJSON, Framing.NDJSON),
        (SSE, Framing.SSE),
        (JSON, Framing.JSON),
        ((("Content-Type", "text/plain"),), Framing.JSON),
        ((), Framing.JSON),
    ],
)
async def test_the_content_type_tells_the_framing(headers: Any, framing: Framing) -> None:
    """Not what was asked for: a load answers with a document, an old host with anything."""
    stage = Stage()
    stage.attempt.head(200, headers)
    assert stage.attempt.framing is framing


async def test_a_stream_begins_with_its_first_record() -> None:
    """Not before it is whole; all that came so far is then to be taken."""
    stage = Stage()
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE[:10])
    assert not stage.is_decided()
    stage.attempt.data(LINE[10:] + b'{"mess')
    await stage.attempt.first()
    assert stage.attempt.begun
    assert stage.attempt.take() == LINE + b'{"mess'
    assert stage.attempt.take() == b""
    assert not stage.attempt.is_over


@pytest.mark.parametrize(
    ("headers", "path", "data"),
    [
        (NDJSON, "/api/chat", b'{"error":"runner died"}\n'),
        (SSE, "/v1/chat/completions", b'data: {"error":{"message":"runner died"}}\n\n'),
    ],
)
async def test_an_error_does_not_begin_a_stream(headers: Any, path: str, data: bytes) -> None:
    """It can still be answered by another backend."""
    stage = Stage(path=path)
    stage.attempt.head(200, headers)
    stage.attempt.data(data)
    await stage.attempt.first()
    assert not stage.attempt.begun
    assert stage.attempt.opened is not None
    assert (stage.attempt.opened.kind, stage.attempt.opened.error_text) == ("error", "runner died")


async def test_the_empty_chunk_of_v1_does_not_begin_a_stream() -> None:
    """That is all Ollama tells of a runner that died."""
    stage = Stage(path="/v1/chat/completions")
    stage.attempt.head(200, SSE)
    stage.attempt.data(b'data: {"model":"","choices":[{"delta":{"content":""}}]}\n\n')
    assert not stage.is_decided()
    stage.attempt.end()
    await stage.attempt.first()
    assert not stage.attempt.begun
    assert stage.attempt.opened is not None
    assert (stage.attempt.opened.kind, stage.attempt.opened.blank_model) == ("empty", True)


async def test_a_stream_without_a_line_end_begins_at_its_end() -> None:
    """A last record may lack its end."""
    stage = Stage()
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE.rstrip())
    stage.attempt.end()
    await stage.attempt.first()
    assert stage.attempt.begun
    assert stage.attempt.is_over
    assert stage.attempt.take() == LINE.rstrip()


async def test_a_document_is_collected_whole() -> None:
    """Up to 8 MiB it can be repeated elsewhere until its last byte."""
    stage = Stage()
    stage.attempt.head(200, JSON)
    stage.attempt.data(b"x" * HOLD_WHOLE)
    assert not stage.is_decided()
    stage.attempt.end()
    await stage.attempt.first()
    assert not stage.attempt.begun, "it is judged whole, not passed on as it comes"
    assert stage.attempt.complete
    assert stage.handle.done == [], "nobody relays yet, so nothing is held back"


async def test_a_document_too_large_to_hold_begins() -> None:
    """Beyond that it is passed on as it comes."""
    stage = Stage()
    stage.attempt.head(200, JSON)
    stage.attempt.data(b"x" * HOLD_WHOLE)
    stage.attempt.data(b"y")
    await stage.attempt.first()
    assert stage.attempt.begun


async def test_a_long_error_is_judged_by_its_beginning() -> None:
    """Nobody waits for the rest of an error page."""
    stage = Stage()
    stage.attempt.head(500, JSON)
    stage.attempt.data(b"x" * (HOLD_ERROR + 1))
    await stage.attempt.first()
    assert not stage.attempt.begun
    assert not stage.attempt.is_over


async def test_a_failure_before_the_first_record_decides() -> None:
    """With what had come until then."""
    stage = Stage()
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE[:5])
    stage.attempt.fail(BROKEN)
    await stage.attempt.first()
    assert not stage.attempt.begun
    assert (stage.attempt.failure, stage.attempt.received) == (BROKEN, 5)


async def test_a_failure_behind_whole_records_leaves_them_to_be_taken() -> None:
    """What was sent before the end is the client's."""
    stage = Stage()
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE)
    stage.attempt.fail(BROKEN)
    await stage.attempt.first()
    assert stage.attempt.begun
    assert stage.attempt.is_over
    assert stage.attempt.take() == LINE


@pytest.mark.parametrize("ends", [False, True])
async def test_what_comes_after_the_turn_goes_to_another(*, ends: bool) -> None:
    """The backend's connection is told so; what came before is handed over, once."""
    stage, tape = Stage(), Tape()
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE)
    stage.attempt.data(b"more")
    if ends:
        stage.attempt.end()
    assert stage.attempt.turn(tape) == LINE + b"more"
    assert (stage.handle.sink, stage.handle.done) == (tape, [])
    assert stage.attempt.take() == b""
    assert stage.attempt.is_over == ends
    assert tape.ends == []


async def test_who_asks_is_told_once_in_the_turn_in_which_it_is_decided() -> None:
    """Not before, and not again at the end; who asks too late is told at once."""
    stage, told = Stage(), list[str]()
    stage.attempt.then(lambda: told.append("first"))
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE[:-1])
    assert told == []
    stage.attempt.data(LINE[-1:])
    assert told == ["first"]
    stage.attempt.data(LINE)
    stage.attempt.end()
    assert told == ["first"]
    stage.attempt.then(lambda: told.append("late"))
    assert told == ["first", "late"]
    await stage.attempt.first()


@pytest.mark.parametrize("happens", ["data", "fail"])
async def test_waiting_for_the_first_record_ends_with_it(happens: str) -> None:
    """Whoever waits is never left waiting; who was cancelled meanwhile does no harm."""
    stage = Stage()
    loop = asyncio.get_running_loop()
    stage.attempt.head(200, NDJSON)
    waiting = loop.create_task(stage.attempt.first())
    await asyncio.sleep(0)
    assert not waiting.done()
    if happens == "data":
        stage.attempt.data(LINE)
    else:
        waiting.cancel()
        stage.attempt.fail(BROKEN)
    await asyncio.wait([waiting], timeout=1)
    assert waiting.cancelled() == (happens == "fail")
    assert waiting.done()


async def test_a_failure_inside_open_is_told_to_who_asks_after_it() -> None:
    """A door that fails at once does so before anybody could ask."""
    stage, told = Stage(), list[str]()
    stage.attempt.fail(BROKEN)
    stage.attempt.then(lambda: told.append("over"))
    assert told == ["over"]
    assert not stage.attempt.begun


async def test_a_backend_is_held_back_while_nobody_takes() -> None:
    """Above 64 KiB not taken it is paused, once; who takes over lets it go on, once."""
    stage = Stage()
    stage.attempt.head(200, NDJSON)
    stage.attempt.data(LINE)
    stage.attempt.data(b"x" * (HIGH_WATER - len(LINE)))
    assert stage.handle.done == []
    stage.attempt.data(b"y")
    stage.attempt.data(b"z")
    assert stage.handle.done == ["pause"]
    assert len(stage.attempt.turn(Tape())) == HIGH_WATER + 2
    assert stage.handle.done == ["pause", "resume"]
    stage.attempt.turn(Tape())
    assert stage.handle.done == ["pause", "resume"]


async def test_a_backend_taken_away_is_aborted() -> None:
    """The pool has found it dead or hung: the attempt is over, whatever had come."""
    stage = Stage()
    assert stage.lease.on_revoke is not None
    judgement = Judgement(Verdict.SLOW, text="silent")
    stage.lease.on_revoke(judgement)
    await stage.attempt.first()
    assert stage.attempt.revoked is judgement
    assert not stage.attempt.begun
    assert stage.attempt.is_over
    assert stage.handle.done == ["abort"]


async def test_times_and_bytes_are_kept() -> None:
    """For the log and for what is learned from them; each piece tells the pool that it moves."""
    stage = Stage()
    sent_at = stage.clock.now
    stage.clock.advance(2)
    stage.attempt.head(200, NDJSON)
    stage.clock.advance(3)
    stage.attempt.data(LINE)
    stage.clock.advance(4)
    stage.attempt.data(LINE)
    attempt = stage.attempt
    assert (attempt.sent_at, attempt.head_at) == (sent_at, sent_at + 2)
    assert attempt.first_byte_at == sent_at + 5
    assert (attempt.received, stage.lease.moves) == (2 * len(LINE), 2)
