"""Small files that survive a restart."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace(path: Path, text: bytes) -> None:
    """
    Write all of it or nothing: whoever reads sees the old file or the new one.

    Raises:
        OSError: It cannot be written; the old one is as it was.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def reason(error: Exception) -> str:
    """What an error says to people."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
