"""
When the lines of a log go out: at once as long as they are few, else a quarter of a second's
together, as writing each by itself costs more than making it. Most are not even made before: to
make one between other work takes twice as long as to make it after another.

Laws:
- Warnings and worse go out at once, and with them all that was held before them: the order stays.
- No more than `HELD_CHARS` is held, and nothing after `close`. What is held is lost only with the
  process itself, killed or crashed.
- A stream that is not ready makes us wait, as for single lines. What it fails to take is not tried
  again: whoever wrote, or the shell that calls back, hears of it.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, Final, TextIO

HELD_CHARS: Final = 64 * 1024
UNMADE_CHARS: Final = 256  # what a line that is not made yet counts for

Later = Callable[[Callable[[], None]], None]
Unmade = tuple[Callable[..., str], *tuple[Any, ...]]  # what makes a line, and of what


class Lines:
    """
    What structlog takes for a logger: a method for each level, given the finished line.

    Args:
        later: Asks the shell to call back in a quarter of a second; None: nothing is ever held.
    """

    def __init__(self, stream: TextIO, later: Later | None = None) -> None:
        self._stream = stream
        self._later = later
        self._held: list[str | Unmade] = []
        self._chars = 0
        self._is_due = False  # the shell will call back
        self._lock = Lock()  # libraries log from threads of theirs
        # A pipe takes so many bytes in one piece, whoever else writes into it.
        self._most = select.PIPE_BUF if _is_pipe(stream) else 4 * HELD_CHARS

    def info(self, line: str) -> None:
        """A line that may be held."""
        self._held.append(line)
        self._added(len(line))

    def hold(self, line: Unmade, *, at_once: bool) -> None:
        """A line to be made when it goes out; *at_once*: as a warning does."""
        self._held.append(line)
        if at_once:
            self.flush()
        else:
            self._added(UNMADE_CHARS)

    def _added(self, chars: int) -> None:
        self._chars += chars
        if self._later is None or self._chars >= HELD_CHARS:
            self.flush()
        elif not self._is_due:
            self._is_due = True
            self._later(self._due)
            self.flush()

    def warning(self, line: str) -> None:
        """A line that may not."""
        self._held.append(line)
        self.flush()

    debug = info
    error = critical = warning

    def flush(self) -> None:
        """Write what is held."""
        with self._lock:
            held, self._held, self._chars = self._held, [], 0
            lines = [each if isinstance(each, str) else each[0](*each[1:]) for each in held]
            for text in self._pieces(lines):
                self._stream.write(text)
                self._stream.flush()

    def close(self) -> None:
        """Hold nothing any more."""
        self._later = None
        self.flush()

    def _due(self) -> None:
        self._is_due = bool(self._held) and self._later is not None
        if self._is_due and self._later is not None:
            self._later(self._due)
        self.flush()

    def _pieces(self, lines: Sequence[str]) -> Iterator[str]:
        """All of it, in whole lines; a piece is longer than may be only if a line is."""
        piece: list[str] = []
        size = 0
        for line in lines:
            most = len(line) * (1 if line.isascii() else 4) + 1
            if piece and size + most > self._most:
                yield "\n".join([*piece, ""])
                piece, size = [], 0
            piece.append(line)
            size += most
        if piece:
            yield "\n".join([*piece, ""])


def _is_pipe(stream: TextIO) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # not a file at all
        return False
