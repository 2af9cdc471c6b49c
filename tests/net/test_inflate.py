"""Compressed bodies: undone in pieces, within bounds."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from balancer.core.errors import BadRequest
from balancer.net.inflate import MOST_FRAMES, PIECE_BYTES, WINDOW_LOG, unzstd

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, compress
else:
    from backports.zstd import CompressionParameter, compress

NOISE = os.urandom(3 * PIECE_BYTES + 1)


@pytest.mark.parametrize("plain", [b"", b"a", bytes(5 * PIECE_BYTES), NOISE])
async def test_it_comes_back_as_it_was(plain: bytes) -> None:
    """Empty, tiny, dense and incompressible."""
    assert await unzstd(compress(plain), len(plain)) == plain


async def test_frames_that_follow_one_another_are_one_body() -> None:
    """As Ollama's reader reads them, a skippable one left out; but not thousands of them."""
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    assert await unzstd(compress(b"a") + skippable + compress(b"b"), 2) == b"ab"
    many = compress(b"a") * MOST_FRAMES
    assert await unzstd(many, 10**6) == b"a" * MOST_FRAMES
    with pytest.raises(BadRequest, match="too many frames"):
        await unzstd(many + compress(b"a"), 10**6)


@pytest.mark.parametrize("over", [1, 10**8])
async def test_a_bomb_is_not_set_off(over: int) -> None:
    """What is longer than allowed is told, and not one piece more than that is inflated."""
    limit = 2 * PIECE_BYTES
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.get_running_loop().create_task(count())
    assert await unzstd(compress(bytes(limit + over)), limit) is None
    counting.cancel()
    assert turns <= 5


async def test_others_run_between_the_pieces() -> None:
    """A long body takes many turns of the loop."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.get_running_loop().create_task(count())
    await unzstd(compress(bytes(40 * PIECE_BYTES)), 10**9)
    counting.cancel()
    assert turns >= 40


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"\x28\xb5\x2f\xfd",
        compress(b"abc" * 1000)[:-1],
        compress(b"abc") + b"junk",
        compress(NOISE, options={CompressionParameter.checksum_flag: 1})[:-4] + b"1234",
    ],
)
async def test_what_is_damaged_is_a_bad_request(data: bytes) -> None:
    """Nothing, no zstd, cut short, with something behind it, with a wrong sum."""
    with pytest.raises(BadRequest):
        await unzstd(data, 10**9)


async def test_a_window_is_memory() -> None:
    """A stream that would have us remember more than Ollama's 8 MB is refused."""
    plain = bytes(1 << (WINDOW_LOG + 2))
    wide: dict[int, int] = {CompressionParameter.window_log: WINDOW_LOG + 1}
    with pytest.raises(BadRequest):
        await unzstd(compress(plain, options=wide), 10**9)
    narrow: dict[int, int] = {CompressionParameter.window_log: WINDOW_LOG}
    assert await unzstd(compress(plain, options=narrow), 10**9) == plain
