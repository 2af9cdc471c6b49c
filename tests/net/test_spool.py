"""Uploads kept on disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from balancer.net.spool import BATCH, KEPT_S, Spool, pieces
from tests.core.clocks import ManualClock

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def spool(tmp_path: Path, clock: ManualClock, max_bytes: int = 10 * BATCH) -> Spool:
    return Spool(tmp_path / "blobs", max_bytes, clock)


async def kept(shelf: Spool, digest: str, *parts: bytes, keep: bool = True) -> bool:
    """Whether an upload of these parts is there afterwards."""
    copy = shelf.begin()
    assert copy is not None
    for part in parts:
        await copy.put(part)
    if keep and await copy.end():
        shelf.keep(digest, copy)
    else:
        copy.drop()
        copy.drop()
    await settled()
    return shelf.find(digest) is not None


async def settled() -> None:
    """Until what runs in threads has come to its end."""
    await asyncio.get_running_loop().shutdown_default_executor()
    asyncio.get_running_loop()._executor_shutdown_called = False  # type: ignore[attr-defined]
    asyncio.get_running_loop()._default_executor = None  # type: ignore[attr-defined]


def files(tmp_path: Path) -> list[int]:
    """The sizes of what is on the disk."""
    return sorted(path.stat().st_size for path in (tmp_path / "blobs").iterdir())


async def test_what_was_taken_is_kept_whole(tmp_path: Path, clock: ManualClock) -> None:
    """Byte for byte, however it came."""
    shelf = spool(tmp_path, clock)
    parts = [bytes([n]) * 700_000 for n in range(5)]
    assert await kept(shelf, A, *parts)
    path = shelf.find(A)
    assert path is not None
    assert b"".join([piece async for piece in pieces(path)]) == b"".join(parts)


async def test_what_nobody_took_is_gone(tmp_path: Path, clock: ManualClock) -> None:
    """Its digest may be wrong, or it was broken off."""
    shelf = spool(tmp_path, clock)
    assert not await kept(shelf, A, b"x" * (2 * BATCH), keep=False)
    assert files(tmp_path) == []


async def test_it_is_kept_for_an_hour(tmp_path: Path, clock: ManualClock) -> None:
    """As long as Ollama keeps what no model uses."""
    shelf = spool(tmp_path, clock)
    await kept(shelf, A, b"x")
    clock.advance(KEPT_S - 1)
    assert shelf.find(A) is not None
    clock.advance(2)
    assert shelf.find(A) is None
    await settled()
    assert files(tmp_path) == []


async def test_the_oldest_makes_room(tmp_path: Path, clock: ManualClock) -> None:
    """And what is too large for all of it is not kept at all; the upload does not mind."""
    shelf = spool(tmp_path, clock, max_bytes=3 * BATCH)
    assert await kept(shelf, A, b"x" * (2 * BATCH))
    assert await kept(shelf, B, b"x" * (2 * BATCH))
    assert shelf.find(A) is None
    assert not await kept(shelf, A, b"x" * (2 * BATCH), b"x" * (2 * BATCH))
    assert files(tmp_path) == [2 * BATCH]


async def test_what_is_left_from_before_is_removed(tmp_path: Path, clock: ManualClock) -> None:
    """Nobody knows any more whether it is whole."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "upload-7").write_bytes(b"xyz")
    assert await kept(spool(tmp_path, clock), A, b"x")
    assert files(tmp_path) == [1]


async def test_a_directory_that_cannot_be_is_no_trouble(tmp_path: Path, clock: ManualClock) -> None:
    """Then nothing is kept."""
    (tmp_path / "blobs").write_text("a file")
    assert spool(tmp_path, clock).begin() is None


async def test_an_upload_broken_off_in_a_write_leaves_nothing(
    tmp_path: Path, clock: ManualClock
) -> None:
    """The thread that writes cannot be cancelled; whoever comes last clears up."""
    copy = spool(tmp_path, clock).begin()
    assert copy is not None
    with copy._lock:  # the disk is slow
        writing = asyncio.get_running_loop().create_task(copy.put(b"x" * BATCH))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait({writing})
        copy.drop()
    await settled()
    assert files(tmp_path) == []
    assert copy._file is None or copy._file.closed
