"""
Uploads kept on disk for a while, because Ollama gives no blob back.

Laws:
- A file has its name only once a backend has taken it: then its digest is right.
- What is kept is bounded, in bytes and in time; the oldest goes first. Losing one costs nothing but
  another upload.
- The disk is written and read off the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
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
        self._kept: dict[str, tuple[float, int]] = {}  # digest: since when, bytes; oldest first
        self._number = 0

    def begin(self, digest: str) -> Copy | None:
        """A copy of an upload, to be written as it comes; None: the directory cannot be used."""
        self._number += 1
        if self._number == 1:
            try:
                self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                for left in self._directory.glob("sha256-*"):
                    left.unlink()
            except OSError:
                self._number = 0
                return None
        path = self._path(digest).with_suffix(f".{self._number}")
        return Copy(path, self._max_bytes, lambda size: self._keep(digest, path, size))

    def find(self, digest: str) -> Path | None:
        """The file of a blob, if it is kept."""
        self._forget()
        return self._path(digest) if digest in self._kept else None

    def _path(self, digest: str) -> Path:
        return self._directory / digest.replace(":", "-")

    def _keep(self, digest: str, path: Path, size: int) -> None:
        path.replace(self._path(digest))
        self._kept.pop(digest, None)
        self._kept[digest] = (self._clock(), size)
        self._forget()

    def _forget(self) -> None:
        """What is too old, and the oldest of what is too much."""
        now, total = self._clock(), sum(size for _, size in self._kept.values())
        for digest, (since, size) in list(self._kept.items()):
            if now - since < KEPT_S and total <= self._max_bytes:
                break
            total -= size
            del self._kept[digest]
            self._path(digest).unlink(missing_ok=True)


class Copy:
    """One upload on its way to the disk. Trouble with the disk ends the copy, not the upload."""

    def __init__(self, path: Path, max_bytes: int, keep: Callable[[int], None]) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file: BinaryIO | None = None
        self._batch = bytearray()
        self._size = 0
        self._given_up = False

    async def put(self, piece: bytes) -> None:
        """Take a piece."""
        if self._given_up:
            return
        self._batch += piece
        self._size += len(piece)
        if self._size > self._max_bytes:
            await self.end(keep=False)
        elif len(self._batch) >= BATCH:
            await self._write()

    async def end(self, *, keep: bool) -> None:
        """The upload is over; *keep* if a backend has taken it. Idempotent."""
        if self._given_up:
            return
        if keep:
            await self._write()
        if self._given_up:  # the disk is full
            return
        self._given_up = True
        if self._file is not None:
            self._file.close()
            with suppress(OSError):
                if keep:
                    self._keep(self._size)
        self._path.unlink(missing_ok=True)

    async def _write(self) -> None:
        batch, self._batch = bytes(self._batch), bytearray()
        try:
            await asyncio.to_thread(self._append, batch)
        except OSError:
            await self.end(keep=False)

    def _append(self, batch: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("wb")
        self._file.write(batch)


async def pieces(path: Path) -> AsyncIterator[bytes]:
    """A kept file, from its beginning to its end."""
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.read, BATCH):
            yield piece
    finally:
        file.close()
