"""
Uploads kept on disk for a while, because Ollama gives no blob back.

Laws:
- A file counts only once a backend has taken what is in it: then its digest is right.
- What is kept is bounded, in bytes and in time; the oldest goes first. Losing one costs nothing but
  another upload.
- The disk is written and read off the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

KEPT_S: Final = 3600.0  # Ollama itself forgets what no model uses after an hour
BATCH: Final = 1 << 20


class Spool:
    """
    Blobs in a directory of their own.

    Args:
        directory: Created with the first upload; what is left there from before is removed then.
        max_bytes: Of all that is kept.
        clock: Monotonic seconds.
    """

    def __init__(self, directory: Path, max_bytes: int, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: dict[str, _Kept] = {}  # by digest, oldest first
        self._number = 0

    def begin(self) -> Copy | None:
        """A copy of an upload, to be written as it comes; None: the directory cannot be used."""
        if not self._number and not self._prepare():
            return None
        self._number += 1
        return Copy(self._directory / f"upload-{self._number}", self._max_bytes)

    def keep(self, digest: str, copy: Copy) -> None:
        """A copy that came to its end has this digest: a backend has compared it."""
        old = self._kept.pop(digest, None)
        if old is not None:
            _discard(old.path)
        self._kept[digest] = _Kept(copy.path, self._clock(), copy.size)
        self._forget()

    def find(self, digest: str) -> Path | None:
        """The file of a blob, if it is kept."""
        self._forget()
        kept = self._kept.get(digest)
        return None if kept is None else kept.path

    def _prepare(self) -> bool:
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in self._directory.glob("upload-*"):
                left.unlink()
        except OSError:
            return False
        return True

    def _forget(self) -> None:
        """What is too old, and the oldest of what is too much."""
        now, total = self._clock(), sum(kept.size for kept in self._kept.values())
        for digest, kept in list(self._kept.items()):
            if now - kept.since < KEPT_S and total <= self._max_bytes:
                break
            total -= kept.size
            del self._kept[digest]
            _discard(kept.path)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A file, since when it is kept, and its bytes."""

    path: Path
    since: float
    size: int


class Copy:
    """
    One upload on its way to the disk. Trouble with the disk ends the copy, not the upload.

    A write that is under way when the upload is broken off goes on in its thread; whoever comes
    last, it or `drop`, removes the file.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.size = 0
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._batch = bytearray()
        self._lock = threading.Lock()
        self._dropped = False

    async def put(self, piece: bytes) -> None:
        """Take a piece."""
        if self._dropped:
            return
        self._batch += piece
        self.size += len(piece)
        if self.size > self._max_bytes:
            self.drop()
        elif len(self._batch) >= BATCH:
            await self._write()

    async def end(self) -> bool:
        """Write what is left; whether all of it is on the disk."""
        if not self._dropped:
            await self._write(last=True)
        return not self._dropped

    def drop(self) -> None:
        """It is not wanted. Idempotent."""
        self._dropped = True
        _in_background(self._remove)

    async def _write(self, *, last: bool = False) -> None:
        batch, self._batch = bytes(self._batch), bytearray()
        try:
            await asyncio.to_thread(self._append, batch, last=last)
        except OSError:
            self.drop()

    def _append(self, batch: bytes, *, last: bool) -> None:
        with self._lock:
            if self._dropped:
                return  # `drop` has been here, or is waiting
            if self._file is None:
                self._file = self.path.open("wb")
            self._file.write(batch)
            if last:
                self._file.close()

    def _remove(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


async def pieces(path: Path) -> AsyncIterator[bytes]:
    """A kept file, from its beginning to its end. Raises OSError."""
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, BATCH):
            yield piece


def _discard(path: Path) -> None:
    _in_background(lambda: path.unlink(missing_ok=True))


def _in_background(do: Callable[[], None]) -> None:
    """To remove a large file takes its time; nobody waits for it."""
    asyncio.get_running_loop().run_in_executor(None, do)
