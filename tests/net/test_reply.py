"""What a client hears while its answer does not come, and how it is told what comes late."""

from __future__ import annotations

from typing import Any, cast

import pytest

from balancer.core.dispatch import Answer
from balancer.core.domain import Framing
from balancer.core.errors import CutStream, QueueTimeout
from balancer.net.outlet import Outlet
from balancer.net.reply import Reply
from balancer.net.server import TICK_S, Exchange
from tests.core.clocks import ManualClock
from tests.net.parts import FakeRequest, FakeTransport, a_call, read_off
from tests.sim.wire import Reply as Got

CHAT, V1, CLAUDE = "/api/chat", "/v1/chat/completions", "/v1/messages"
BEAT = (
    b'{"model":"m","created_at":"STAMP","message":{"role":"assistant","content":""},"done":false}\n'
)
COMMENT = b": heartbeat\n\n"
JSON = "application/json"
NATIVE = {"Content-Type": "application/x-ndjson"}


class Stage:
    """A reply, the ticks that the front gives it, and what its client was sent."""

    def __init__(self, path: str = CHAT, *, streaming: bool = True, **times: float | None) -> None:
        call = a_call(path, streaming=streaming)
        self.clock = ManualClock()
        request: Any = FakeRequest()
        self.transport = cast("FakeTransport", request.connection.transport)
        self.outlet = Outlet(request, lambda: "DATE")
        self.exchange = Exchange(request, self.outlet, "r1", path, self.clock(), call.route.dialect)
        limits: Any = {"after_s": 20.0, "every_s": 15.0, **times}
        self.reply = Reply(self.exchange, call, self.clock, lambda: "STAMP", **limits)

    def wait(self, seconds: float) -> None:
        """Let time pass, and tick as the front does."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            self.reply.tick(self.clock())

    async def got(self) -> Got:
        """What the client was sent."""
        return await read_off(self.transport.sent)


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.0, 0), (19.5, 0), (20.0, 1), (34.5, 1), (35.0, 2), (100.0, 6)]
)
async def test_silence_is_counted_from_the_last_word(seconds: float, count: int) -> None:
    """One after `after_s`, then one each `every_s`; the answer goes behind them."""
    stage = Stage()
    stage.wait(seconds)
    assert stage.reply.begun == (count > 0)
    stage.reply.begin(NATIVE)
    stage.reply.end(b"last\n")
    got = await stage.got()
    assert got.body == BEAT * count + b"last\n"
    assert (got.status, got.ended, stage.exchange.status) == (200, "clean", 200)
    assert stage.outlet.bytes_out == len(got.body)


@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.24, 0.26, 0.4])
async def test_a_heartbeat_is_a_quarter_of_a_second_off_at_most(phase_s: float) -> None:
    """However the ticks fall: a proxy that hangs up after half a minute must not see more."""
    stage = Stage()
    stage.clock.advance(phase_s)
    stage.reply.tick(stage.clock())
    began, beats = stage.exchange.started_at, list[float]()
    for _ in range(200):
        known = len(stage.transport.writes)
        stage.wait(TICK_S)
        beats += [stage.clock()] * (len(stage.transport.writes) - known)
    assert len(beats) >= 5
    gaps = [b - a for a, b in zip([began, *beats], beats, strict=False)]
    assert abs(gaps[0] - 20.0) <= 0.2501
    assert all(abs(gap - 15.0) <= 0.2501 for gap in gaps[1:])


async def test_an_error_can_be_told_behind_heartbeats() -> None:
    """As a record, since the status line has gone out; and it is what the log tells."""
    stage = Stage()
    stage.wait(40.0)
    stage.reply.refuse(QueueTimeout("full"))
    got = await stage.got()
    assert got.body == BEAT * 2 + b'{"error":"full [req r1]"}\n'
    assert (stage.exchange.outcome, stage.exchange.error) == ("shed", "full")
    assert got.ended == "clean"


@pytest.mark.parametrize(
    ("path", "streaming", "times"),
    [
        (CHAT, False, {}),
        (V1, False, {}),
        ("/api/embed", True, {}),
        (CHAT, True, {"after_s": None}),
    ],
)
async def test_who_gets_none(path: str, streaming: bool, times: dict[str, None]) -> None:
    """Answers that are one document, and where it is not wanted."""
    stage = Stage(path, streaming=streaming, **times)
    stage.wait(500.0)
    assert not stage.reply.begun
    stage.reply.answer(Answer(201, JSON, b"{}"), {"Content-Type": JSON})
    got = await stage.got()
    assert (got.status, got.body, stage.exchange.status) == (201, b"{}", 201)
    assert (got.framing, got.get("content-length")) == ("length", "2")


NATIVELY = b'{"type":"error","error":{"type":"api_error","message":"native"}}'
ERROR = b'{"error":{"message":"no","type":"x","param":null,"code":null}}'


@pytest.mark.parametrize(
    ("path", "answer", "behind"),
    [
        (CHAT, Answer(404, JSON, b'{"error":"no","more":1}'), b'{"error":"no","more":1}\n'),
        (CHAT, Answer(404, "text/plain", b"no\nthing"), b'{"error":"no thing"}\n'),
        (CHAT, Answer(500, JSON, b""), b'{"error":"HTTP 500"}\n'),
        (CHAT, Answer(200, JSON, b'{\n"done":true}'), b'{ "done":true}\n'),
        (CHAT, Answer(200, NATIVE["Content-Type"], b'{"a":1}\n{"b":2}'), b'{"a":1}\n{"b":2}\n'),
        (V1, Answer(422, JSON, ERROR + b"\n"), b"data: " + ERROR + b"\n\n"),
        (V1, Answer(200, "text/event-stream", b"data: 1\n\n"), b"data: 1\n\n"),
        (
            CLAUDE,
            Answer(529, JSON, b'{"error":"native"}'),
            b"event: error\ndata: " + NATIVELY + b"\n\n",
        ),
    ],
)
async def test_a_whole_answer_behind_heartbeats(path: str, answer: Answer, behind: bytes) -> None:
    """It is told as the record that fits."""
    stage = Stage(path)
    stage.wait(20.0)
    stage.reply.answer(answer, {"Content-Type": answer.content_type})
    got = await stage.got()
    assert got.body.endswith(b"\n" + behind)
    assert got.body.count(b"\n" + behind) == 1
    assert got.ended == "clean"


@pytest.mark.parametrize("kind", [Framing.JSON, Framing.NDJSON])
async def test_what_does_not_fit_is_not_passed_on(kind: Framing) -> None:
    """Before the head is out anything fits."""
    stage = Stage(V1)
    stage.reply.check(kind)
    stage.wait(20.0)
    stage.reply.check(Framing.SSE)
    with pytest.raises(CutStream, match="one document"):
        stage.reply.check(kind)
    stage.reply.end()
    assert (await stage.got()).body == COMMENT


async def test_a_whole_answer_that_does_not_fit_is_not_told() -> None:
    """A document where events were promised; the stream can still be ended with an error."""
    stage = Stage(V1)
    stage.wait(20.0)
    with pytest.raises(CutStream, match="one document"):
        stage.reply.answer(Answer(200, JSON, b'{"choices":[]}'), {"Content-Type": JSON})
    stage.reply.refuse(CutStream("broken"))
    body = (await stage.got()).body
    assert b"choices" not in body
    assert b"broken" in body


async def test_heartbeats_in_a_stream_follow_what_is_written() -> None:
    """Each `every_s` of silence one; a record puts it off; behind the end there is none."""
    stage = Stage()
    stage.reply.begin(NATIVE)
    stage.wait(10.0)
    stage.reply.write(b"one\n")  # puts it off to 25
    stage.wait(14.5)
    assert stage.transport.sent.count(BEAT) == 0
    stage.wait(0.5)
    assert stage.transport.sent.count(BEAT) == 1
    stage.wait(15.0)
    assert stage.transport.sent.count(BEAT) == 2
    stage.reply.end()
    stage.wait(100.0)
    assert (await stage.got()).body == b"one\n" + BEAT * 2


class Writing:
    """Whoever passes a stream on."""

    def __init__(self) -> None:
        self.may = False
        self.at = 0.0

    def may_beat(self) -> bool:
        """Whether a record may stand here."""
        return self.may

    def moved_at(self) -> float:
        """When it last wrote."""
        return self.at

    def held_up(self) -> None:
        """The client is behind."""

    def caught_up(self) -> None:
        """It is not."""

    def lost(self) -> None:
        """It has gone."""


async def test_who_writes_a_stream_says_when_a_heartbeat_may_stand() -> None:
    """Never inside a record; as soon as it may, the next tick brings it."""
    stage, writing = Stage(), Writing()
    stage.reply.take_over(writing)
    assert cast("Any", stage.exchange.request).connection.reader is writing
    stage.reply.begin(NATIVE)
    stage.wait(60.0)
    assert stage.transport.sent.count(BEAT) == 0
    writing.may = True
    stage.wait(TICK_S)
    assert stage.transport.sent.count(BEAT) == 1


async def test_what_is_written_past_the_reply_puts_heartbeats_off_too() -> None:
    """Who writes tells when it last did; a time of long ago takes nothing back."""
    stage, writing = Stage(), Writing()
    writing.may = True
    stage.reply.take_over(writing)
    stage.reply.begin(NATIVE)
    for _ in range(10):
        stage.wait(10.0)
        writing.at = stage.clock()
    stage.reply.tick(stage.clock())
    assert stage.transport.sent.count(BEAT) == 0
    writing.at = 0.0
    stage.wait(14.5)
    assert stage.transport.sent.count(BEAT) == 0
    stage.wait(0.5)
    assert stage.transport.sent.count(BEAT) == 1


async def test_a_stream_of_another_kind_has_no_heartbeats() -> None:
    """What a backend sends may be framed as nobody expects: one of ours would break it."""
    stage = Stage()
    stage.reply.begin({"Content-Type": "text/event-stream"})
    stage.wait(100.0)
    stage.reply.end()
    assert (await stage.got()).body == b""


async def test_the_head_of_a_stream_goes_out_once() -> None:
    """With the first heartbeat; that of the backend comes too late, and may say nothing else."""
    stage = Stage()
    stage.exchange.extra = {"X-Extra": "1"}
    stage.wait(20.0)
    stage.reply.begin({**NATIVE, "X-Balancer-Backend": "a"})
    stage.reply.end(b"last\n")
    got = await stage.got()
    assert (got.get("content-type"), got.get("x-balancer-backend")) == (
        NATIVE["Content-Type"],
        None,
    )
    assert (got.get("x-accel-buffering"), got.get("x-extra")) == ("no", "1")
    assert stage.transport.sent.count(b"HTTP/1.1") == 1


async def test_an_error_in_one_document_breaks_it_off() -> None:
    """No record fits there, and a good end would be a lie."""
    stage = Stage(streaming=False)
    stage.reply.begin({"Content-Type": JSON})
    stage.reply.write(b'{"half')
    stage.reply.refuse(CutStream("gone"))
    assert stage.transport.done == ["abort"]
    assert (await stage.got()).ended == "cut"
    assert stage.exchange.outcome == "upstream_error"
    assert not stage.outlet.keep_alive
    stage.wait(100.0)
    assert stage.transport.done == ["abort"]
