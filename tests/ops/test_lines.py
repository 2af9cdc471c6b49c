"""Lines of a log: which go out at once, which together, and that none is lost or torn."""

from __future__ import annotations

import io
import os
import select
from collections.abc import Callable

import pytest

from balancer.ops.lines import HELD_CHARS, UNMADE_CHARS, Lines


class Stream(io.StringIO):
    """Keeps what was written by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.flushed = 0
        self.full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError("full")
        self.pieces.append(text)
        return len(text)

    def flush(self) -> None:
        self.flushed = len(self.pieces)


class Shell:
    """Calls back when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self.stream = Stream()
        self.lines = Lines(self.stream, self.asked.append)

    def ring(self) -> None:
        self.asked.pop()()


def test_without_a_shell_each_line_goes_out_at_once() -> None:
    """On a terminal, and in whatever has no loop."""
    stream = Stream()
    lines = Lines(stream)
    for text in "abc":
        lines.info(text)
    assert stream.pieces == ["a\n", "b\n", "c\n"]
    assert stream.flushed == 3


def test_the_first_line_goes_out_at_once_and_the_next_together() -> None:
    """Who reads along sees single lines as they come, of many at most four pieces a second."""
    shell = Shell()
    for text in "abc":
        shell.lines.info(text)
    assert shell.stream.pieces == ["a\n"]
    assert len(shell.asked) == 1
    shell.ring()
    assert shell.stream.pieces == ["a\n", "b\nc\n"]
    assert shell.stream.flushed == 2
    shell.lines.info("d")
    assert len(shell.stream.pieces) == 2
    shell.ring()
    assert shell.stream.pieces[2:] == ["d\n"]
    shell.ring()
    assert shell.asked == [], "when nothing comes nobody is woken"
    shell.lines.info("e")
    assert shell.stream.pieces[3:] == ["e\n"]


def test_a_line_is_made_when_it_goes_out() -> None:
    """In its place among the others; a warning's at once."""
    shell, made = Shell(), []

    def line(*words: str) -> str:
        made.append(words[0])
        return " ".join(words)

    shell.lines.info("first")
    shell.lines.hold((line, "a", "b"), at_once=False)
    shell.lines.info("c")
    assert made == []
    shell.lines.hold((line, "w"), at_once=True)
    assert shell.stream.pieces == ["first\n", "a b\nc\nw\n"]
    shell.lines.hold((line, "d"), at_once=False)
    assert made == ["a", "w"]
    shell.lines.close()
    shell.lines.hold((line, "e"), at_once=False)
    assert shell.stream.pieces[2:] == ["d\n", "e\n"]


def test_no_more_than_so_many_are_held_unmade() -> None:
    """Whatever the shell is doing."""
    shell, made, most = Shell(), 0, 0

    def line(text: str) -> str:
        nonlocal made
        made += 1
        return text

    for number in range(1, 1000):
        shell.lines.hold((line, "x"), at_once=False)
        most = max(most, number - made)
    assert 1 < most <= HELD_CHARS // UNMADE_CHARS


@pytest.mark.parametrize("level", ["warning", "error", "critical"])
def test_a_warning_waits_for_nobody_and_overtakes_nobody(level: str) -> None:
    """What was held goes out before it, at the same moment."""
    shell = Shell()
    for text in "abc":
        shell.lines.debug(text)
    getattr(shell.lines, level)("w")
    assert shell.stream.pieces == ["a\n", "b\nc\nw\n"]


def test_no_more_than_so_much_is_held() -> None:
    """Whatever the shell is doing."""
    shell = Shell()
    shell.lines.info("first")
    line = "x" * 999
    for _ in range(200):
        shell.lines.info(line)
    written = sum(map(len, shell.stream.pieces))
    assert written + HELD_CHARS > 200_000
    assert max(map(len, shell.stream.pieces)) <= HELD_CHARS + 1000


def test_after_the_end_nothing_is_held() -> None:
    """What was goes out, what comes goes out at once, and a late call back does no harm."""
    shell = Shell()
    for text in "abc":
        shell.lines.info(text)
    shell.lines.close()
    shell.lines.info("d")
    assert shell.stream.pieces == ["a\n", "b\nc\n", "d\n"]
    shell.ring()
    assert shell.asked == []


def test_what_cannot_be_written_is_told_and_not_kept() -> None:
    """A full disk must not fill our memory, too."""
    shell = Shell()
    shell.lines.info("a")
    shell.lines.info("b")
    shell.stream.full = True
    with pytest.raises(OSError, match="full"):
        shell.ring()
    assert len(shell.asked) == 1, "the shell calls back all the same"
    shell.stream.full = False
    shell.lines.info("c")
    shell.ring()
    assert shell.stream.pieces == ["a\n", "c\n"]


def test_lines_into_a_pipe_stay_whole() -> None:
    """Each piece is no longer than what a pipe takes in one, even of the widest characters."""
    reader, writer = os.pipe()
    pieces: list[bytes] = []
    with os.fdopen(reader, "rb", buffering=0) as source, os.fdopen(writer, "w") as stream:
        asked: list[Callable[[], None]] = []
        lines = Lines(stream, asked.append)
        flush = stream.flush

        def flushed() -> None:
            flush()
            pieces.append(source.read(65536) or b"")

        stream.flush = flushed  # type: ignore[method-assign]
        for number in range(40):
            lines.info(f"{number:03}" + "\U0001f600" * 100 * (number % 3))
        asked.pop()()
        stream.flush = flush  # type: ignore[method-assign]
    assert all(len(piece) <= select.PIPE_BUF and piece.endswith(b"\n") for piece in pieces)
    assert len(b"".join(pieces).splitlines()) == 40
