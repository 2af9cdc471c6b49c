"""How an answer is framed for a client, byte by byte."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from aiohttp import HttpVersion10

from balancer.net.outlet import Dates, Outlet, Written
from tests.core.clocks import ManualClock
from tests.net.parts import FakeRequest, FakeTransport, read_off

DATE = "Sat, 21 Nov 2026 00:00:00 GMT"
HEADERS = {"Content-Type": "text/plain", "X-Request-Id": "r1"}


def an_outlet(request: FakeRequest) -> tuple[Outlet, FakeTransport]:
    """An outlet and the socket that it writes to."""
    assert request.connection.transport is not None
    return Outlet(cast("Any", request), lambda: DATE), request.connection.transport


class Note:
    """A reader that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def held_up(self) -> None:
        """It is behind."""
        self.told.append("held up")

    def caught_up(self) -> None:
        """It is not."""
        self.told.append("caught up")

    def lost(self) -> None:
        """It has gone."""
        self.told.append("lost")


# -- framing --------------------------------------------------------------------------------------


def test_an_answer_of_known_length_is_one_write() -> None:
    """Head and body together, the head in its own words."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(404, HEADERS, 4)
    assert transport.writes == [], "the head waits for what follows it"
    outlet.end(b"body")
    assert transport.writes == [
        b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nX-Request-Id: r1\r\n"
        b"Date: " + DATE.encode() + b"\r\nContent-Length: 4\r\n\r\nbody"
    ]
    assert (outlet.bytes_out, outlet.keep_alive) == (4, True)


def test_an_empty_answer_is_sent_too() -> None:
    """Its head would wait for ever for a body."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(200, {}, 0)
    outlet.end()
    assert transport.sent.endswith(b"\r\nContent-Length: 0\r\n\r\n")


def test_an_answer_without_content_has_no_length() -> None:
    """HTTP forbids it for this status alone; its head is all there is."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(204, {"X-Request-Id": "r1"}, 0)
    outlet.end()
    assert b"Content-Length" not in transport.sent
    assert b"Transfer-Encoding" not in transport.sent
    assert transport.sent.endswith(b"\r\n\r\n")


async def test_a_stream_is_chunked_and_each_part_is_one_write() -> None:
    """The head goes with the first part, the end with the last."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(200, HEADERS, None)
    outlet.write(b"one")
    outlet.write(b"x" * 17)
    outlet.end(b"last")
    assert len(transport.writes) == 3
    assert transport.writes[0].endswith(b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
    assert transport.writes[1:] == [b"11\r\n" + b"x" * 17 + b"\r\n", b"4\r\nlast\r\n0\r\n\r\n"]
    got = await read_off(transport.sent)
    assert (got.segments, got.ended) == ([b"one", b"x" * 17, b"last"], "clean")
    assert outlet.bytes_out == 24


@pytest.mark.parametrize("parts", [0, 1])
async def test_a_stream_may_end_with_nothing(parts: int) -> None:
    """An empty chunk is written as the end and as nothing else."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(200, {}, None)
    for _ in range(parts):
        outlet.write(b"one")
    outlet.end()
    assert transport.sent.count(b"\r\n0\r\n\r\n") == 1
    assert (await read_off(transport.sent)).body == b"one" * parts


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    """The end of the connection is the end of its stream; so it cannot be kept."""
    outlet, transport = an_outlet(FakeRequest((1, 0)))
    outlet.begin(200, {}, None)
    outlet.write(b"one")
    outlet.end(b"two")
    got = await read_off(transport.sent)
    assert (got.framing, got.body, got.get("connection")) == ("close", b"onetwo", "close")
    assert not outlet.keep_alive


@pytest.mark.parametrize(
    ("version", "keep_alive", "told"),
    [
        ((1, 1), True, None),
        ((1, 1), False, "close"),
        ((1, 0), True, "keep-alive"),
        ((1, 0), False, "close"),
    ],
)
async def test_what_becomes_of_the_connection_is_told(
    version: tuple[int, int], keep_alive: bool, told: str | None
) -> None:
    """Where it is not what the version says by itself."""
    outlet, transport = an_outlet(FakeRequest(version, keep_alive=keep_alive))
    outlet.begin(200, {}, 2)
    outlet.end(b"ok")
    assert (await read_off(transport.sent)).get("connection") == told
    assert outlet.keep_alive is keep_alive


# -- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rX-Evil: 1", "\r\n", "a\n"])
@pytest.mark.parametrize("where", ["name", "value"])
def test_a_line_end_in_a_header_never_gets_out(bad: str, where: str) -> None:
    """Whoever could put one there would write the rest of our answer; another can still be told."""
    request = FakeRequest()
    outlet, transport = an_outlet(request)
    headers = {bad: "x"} if where == "name" else {"X-Name": bad}
    with pytest.raises(ValueError, match="line end"):
        outlet.begin(200, headers, 2)
    assert transport.writes == []
    assert not request.begun
    outlet.end()
    assert transport.writes == []


def test_headers_that_a_client_is_not_to_see_are_left_out() -> None:
    """By their name, whatever brought them."""
    request = FakeRequest()
    request.hidden = ("X-Balancer-Backend",)
    outlet, transport = an_outlet(request)
    outlet.begin(200, {**HEADERS, "X-Balancer-Backend": "gpu1"}, 0)
    outlet.end()
    assert b"gpu1" not in transport.sent
    assert b"X-Request-Id: r1" in transport.sent
    assert request.begun


def test_odd_bytes_of_a_header_pass_as_they_came() -> None:
    """What a backend says of its content need not be UTF-8."""
    outlet, transport = an_outlet(FakeRequest())
    value = b"text/plain; name=\xff\xfe".decode("utf-8", "surrogateescape")
    outlet.begin(200, {"Content-Type": value}, 0)
    outlet.end()
    assert b"name=\xff\xfe\r\n" in transport.sent


@pytest.mark.parametrize("status", [200, 299, 418, 529, 599])
def test_every_status_has_a_line(status: int) -> None:
    """Also one that nobody has given a name."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(status, {}, 0)
    outlet.end()
    assert transport.sent.startswith(f"HTTP/1.1 {status} ".encode())


def test_the_date_is_made_once_a_second() -> None:
    """And changes when the second does, not a second after it was first asked for."""
    clock, asked = ManualClock(5.0), list[float]()

    def wall() -> float:
        asked.append(clock())
        return 1_795_219_199.75 + clock() - 5.0

    dates = Dates(clock, wall)
    assert (dates(), dates()) == ("Fri, 20 Nov 2026 23:59:59 GMT",) * 2
    clock.advance(0.24)
    assert dates() == "Fri, 20 Nov 2026 23:59:59 GMT"
    clock.advance(0.02)
    assert (dates(), dates()) == (DATE, DATE)
    assert asked == pytest.approx([5.0, 5.26])


# -- the client -----------------------------------------------------------------------------------


def test_what_is_written_to_who_has_left_goes_nowhere() -> None:
    """No error comes of it: whoever answers hears of it in another way."""
    for leaves in ("closing", "gone"):
        request = FakeRequest()
        outlet, transport = an_outlet(request)
        outlet.begin(200, {}, None)
        outlet.write(b"one")
        if leaves == "gone":
            request.connection.transport = None
        else:
            transport.done.append("closed by the client")
        outlet.write(b"two")
        outlet.end(b"three")
        outlet.abort()
        assert len(transport.writes) == 1


def test_an_answer_that_failed_is_broken_off() -> None:
    """Also if its head has not gone out; nothing follows on that connection."""
    request = FakeRequest()
    outlet, transport = an_outlet(request)
    outlet.read_by(Note())
    outlet.begin(200, {}, None)
    outlet.abort()
    assert (transport.writes, transport.done) == ([], ["abort"])
    assert request.connection.reader is None
    assert not outlet.keep_alive


def test_a_reader_hears_at_once_that_its_client_is_behind() -> None:
    """It may have been so before; behind the end it hears nothing more."""
    request, note = FakeRequest(), Note()
    outlet, _ = an_outlet(request)
    outlet.read_by(note)
    assert (request.connection.reader, note.told) == (note, [])
    request.connection.writing_paused = True
    outlet.read_by(note)
    assert note.told == ["held up"]
    outlet.end()
    assert request.connection.reader is None


async def test_waiting_until_the_client_has_taken_all() -> None:
    """It ends when the client has caught up; for one that is not behind, or gone, at once."""
    request = FakeRequest()
    outlet, _ = an_outlet(request)
    await outlet.taken()
    request.connection.writing_paused = True
    assert outlet.is_held_up
    waiting = asyncio.get_running_loop().create_task(outlet.taken())
    await asyncio.sleep(0)
    assert not waiting.done()
    request.connection.reader.held_up()
    request.connection.reader.caught_up()
    request.connection.reader.caught_up()
    request.connection.reader.lost()
    async with asyncio.timeout(1):
        await waiting
    request.connection.transport = None
    assert not outlet.is_held_up
    await outlet.taken()


async def test_aiohttp_is_told_what_became_of_the_connection() -> None:
    """Whether it may be kept is known only at the end."""
    outlet, transport = an_outlet(FakeRequest())
    written = Written(503, outlet)
    request: Any = None
    await written.prepare(request)
    await written.write_eof(b"never")
    assert (written.status, written.keep_alive, transport.writes) == (503, True, [])
    outlet.abort()
    assert not written.keep_alive


# -- chunks as they came ---------------------------------------------------------------------------


def test_chunks_may_go_past_it_between_the_head_and_the_end() -> None:
    """What stands framed already is written to the socket; it counts where it is told."""
    outlet, transport = an_outlet(FakeRequest())
    outlet.begin(200, HEADERS, None)
    assert outlet.chunks is None, "the head has not gone out"
    outlet.write(b"one")
    assert outlet.chunks is transport
    outlet.passed_bytes += 3
    assert outlet.bytes_out == 6
    outlet.end()
    assert outlet.chunks is None


def test_no_chunks_for_who_is_sent_none() -> None:
    """A client of HTTP/1.0, an answer of known length, and one that was broken off."""
    old, _ = an_outlet(FakeRequest(version=HttpVersion10))
    old.begin(200, HEADERS, None)
    old.write(b"one")
    known, _ = an_outlet(FakeRequest())
    known.begin(200, HEADERS, 6)
    known.write(b"one")
    broken, _ = an_outlet(FakeRequest())
    broken.begin(200, HEADERS, None)
    broken.write(b"one")
    broken.abort()
    assert (old.chunks, known.chunks, broken.chunks) == (None, None, None)
