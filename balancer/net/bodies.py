"""
Request bodies: read whole, so that they can be sent again.

Laws:
- What is there is taken at once, without a timer and without waiting.
- A large body is read only when there is room for it in memory: until then nothing is taken from
  its socket, so that the client waits, too; the body's own time limits rest meanwhile.
- It is in memory once: the parts are put behind one another as they come.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from aiohttp.http_exceptions import PayloadEncodingError

from balancer.core.errors import (
    BadRequest,
    BodyTooLarge,
    MemoryFull,
    RequestTimeout,
    UnsupportedEncoding,
)
from balancer.core.memory import SMALL
from balancer.core.routes import ZSTD
from balancer.net.inflate import unzstd

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import StreamReader, web

    from balancer.core.domain import Route
    from balancer.core.memory import Hold

MAX_UNPACKED: Final = 20 << 20  # of a compressed body, as Ollama has it
STEP: Final = 1 << 20  # by which a body of unknown length takes memory
ROOM_WAIT_S: Final = 10.0  # many clients give up on a server that does not read for longer
RETRY_S: Final = 5.0
BODY_STALL_S: Final = 30.0
# After so many seconds a body must have come at so many bytes a second; not so uploads of files.
SLOWEST: Final = ((10.0, 1024), (300.0, 100 * 1024))
CONTINUE: Final = "100-continue"


class Caller(Protocol):
    """Whose body is read; how many bytes it had is noted there."""

    route: Route | None
    bytes_in: int

    @property
    def request(self) -> web.BaseRequest:
        """Whose body it is."""


def expected(request: web.BaseRequest) -> str:
    """What the client waits for before it sends its body; empty: nothing."""
    return ",".join(request.headers.getall("Expect", [])).strip().lower()


def ask_for_body(request: web.BaseRequest) -> None:
    """Tell a client that waits for it that its body is wanted."""
    if expected(request) and request.version >= (1, 1) and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def body_at_hand(request: web.BaseRequest, max_bytes: int) -> bytes | None:
    """
    The body, if all of it is there, it is small and nothing is special about it.

    None: it is for `read_body`. Whoever takes it notes the `Caller.bytes_in`.
    """
    content, headers = request.content, request.headers
    if (
        not content.is_eof()
        or content.total_bytes > min(max_bytes, SMALL)
        or content.exception() is not None
        or "Content-Encoding" in headers
        or "Expect" in headers
    ):
        return None
    return content.read_nowait()


async def read_body(
    caller: Caller, max_bytes: int, clock: Callable[[], float], hold: Hold | None = None
) -> bytes | bytearray:
    """
    The whole body; a compressed one as it was before.

    Args:
        hold: Takes what the body needs of the memory; the caller gives it back, whatever comes.
            None: it is so small that nobody counts.

    Raises:
        BadRequest: It is damaged.
        BodyTooLarge: Above *max_bytes*; told before it is read where the length is declared.
        MemoryFull: There was no room for it for 10 s.
        RequestTimeout: Nothing came for 30 s, or it trickles (below 1 KiB/s after 10 s).
        UnsupportedEncoding: It is compressed where, or how, Ollama does not take it.
    """
    request, route = caller.request, caller.route
    encoding = ",".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    is_zstd = encoding == "zstd" and route is not None and route.operation in ZSTD
    if encoding not in ("", "identity") and not is_zstd:
        raise UnsupportedEncoding(f"Content-Encoding {encoding[:32]!r} is not supported here.")
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise too_large(max_bytes)
    await _make_room(hold, declared or 0)
    ask_for_body(request)
    body = await _whole(request.content, max_bytes, clock, hold)
    caller.bytes_in = len(body)
    if is_zstd:
        body = await _unpacked(body, max_bytes, hold)
    if hold is not None:
        hold.arrived(len(body))
    return body


async def _whole(
    content: StreamReader, max_bytes: int, clock: Callable[[], float], hold: Hold | None
) -> bytes | bytearray:
    body: bytes | bytearray = b""
    began = clock()
    while part := await _part(content):
        if not body:
            body = part
        elif isinstance(body, bytes):
            body = bytearray(body)
            body += part
        else:
            body += part
        size = len(body)
        if size > max_bytes:
            raise too_large(max_bytes)
        spent_s = clock() - began
        if any(spent_s > after_s and size < rate * spent_s for after_s, rate in SLOWEST):
            raise RequestTimeout("The request's body comes too slowly.")
        if size > SMALL and hold is not None and size > hold.size:
            asked = clock()
            await _make_room(hold, size + STEP)
            began += clock() - asked
    return body


async def _part(content: StreamReader) -> bytes:
    """What has come of a body, or what comes next; empty: it is at its end."""
    try:
        part = content.read_nowait()
        if part or content.is_eof():
            return part
        async with asyncio.timeout(BODY_STALL_S):
            return await content.readany()
    except TimeoutError:
        raise RequestTimeout("The request's body stopped coming.") from None
    except PayloadEncodingError:
        raise BadRequest("the request's body is not framed as HTTP has it") from None


async def _unpacked(body: bytes | bytearray, max_bytes: int, hold: Hold | None) -> bytes:
    most = min(max_bytes, MAX_UNPACKED)
    await _make_room(hold, len(body) + most)
    unpacked = await unzstd(body, most)
    if unpacked is not None:
        return unpacked
    if most < max_bytes:
        raise BodyTooLarge(f"Unpacked, the request's body is larger than {most} bytes.")
    raise too_large(max_bytes)


async def _make_room(hold: Hold | None, size: int) -> None:
    if hold is None or size <= hold.size:
        return
    room = asyncio.Event()
    if hold.take(size, room.set):
        return
    try:
        async with asyncio.timeout(ROOM_WAIT_S):
            await room.wait()
    except TimeoutError:
        raise MemoryFull(
            "The balancer's memory for large requests is full (server.replay_memory).",
            retry_after_s=RETRY_S,
        ) from None


def too_large(max_bytes: int) -> BodyTooLarge:
    """What a body larger than *max_bytes* is refused with."""
    return BodyTooLarge(
        f"The request's body is larger than {max_bytes} bytes (server.max_body of the balancer)."
    )
