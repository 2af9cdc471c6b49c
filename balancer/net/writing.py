"""
Writing to clients that may not read.

The law: a client that takes nothing for a minute is given up, and its connection cut, whatever
it is being told; one that reads slowly is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

from aiohttp import web

WRITE_STALL_S: Final = 60.0
PIECE: Final = 64 * 1024  # what a transport takes without making anybody wait


async def write(request: web.BaseRequest, response: web.StreamResponse, data: bytes) -> None:
    """
    Write a part of an answer whose head was prepared.

    Raises:
        ConnectionError: The client left, or stopped reading.
    """
    await _in_time(request, response.write(data))


async def end(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Write the end of an answer. Raises as `write` does."""
    await _in_time(request, response.write_eof())


async def whole(request: web.BaseRequest, response: web.Response) -> web.StreamResponse:
    """
    What to return to aiohttp for *response*.

    A small one is left to aiohttp, for it never waits; a large one is written here, in pieces.
    Raises as `write` does.
    """
    body = response.body
    if request.method == "HEAD" or not isinstance(body, bytes) or len(body) <= PIECE:
        return response
    pieces = web.StreamResponse(status=response.status, headers=response.headers)
    pieces.content_length = len(body)
    if response.keep_alive is False:
        pieces.force_close()
    await pieces.prepare(request)
    for at in range(0, len(body), PIECE):
        await write(request, pieces, body[at : at + PIECE])
    await end(request, pieces)
    return pieces


async def _in_time(request: web.BaseRequest, writing: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(WRITE_STALL_S):
            await writing
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()  # closing would wait for it to read
        raise ConnectionResetError("the client stopped reading") from None
