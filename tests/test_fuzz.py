"""A fixed slice of what `python -m bench.fuzz` tries, and that it would find something."""

from __future__ import annotations

import random

import pytest

from bench import fuzz
from bench.fuzzing import chance
from bench.fuzzing.requests import Found, reference

# Inputs of each target: all in all they take a few seconds.
COUNTS = {
    "body": 600,
    "framing": 400,
    "multipart": 2000,
    "heads": 2000,
    "answers": 600,
    "requests": 60,
}


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_a_slice_of_the_fuzzing(name: str) -> None:
    """Whatever bytes come: what is promised of them holds."""
    count, finding = fuzz.find(name, fuzz.TARGETS[name], "tests", lambda n: n < COUNTS[name])
    assert finding is None, f"{finding.told}\n{finding.data!r}"
    assert count == COUNTS[name]


class Planted:
    """A parser with a bug: it takes no two zeros behind an `x`."""

    def make(self, rng: random.Random) -> bytes:
        """Hardly ever what it does not take."""
        data = bytes(rng.choice(b"abcdefgh") for _ in range(100))
        return chance.mutated(rng, data, (b"x", b"x00", b"0"))

    def check(self, data: bytes, rng: random.Random) -> None:
        """Raise where the bug is."""
        assert b"x00" not in data


def test_a_planted_bug_is_found_and_made_small() -> None:
    """The same one for the same seed, and found again from its case."""
    findings = [fuzz.find("planted", Planted(), "1", lambda n: n < 1000)[1] for _ in range(2)]
    assert findings[0] is not None
    assert findings[0] == findings[1]
    assert findings[0].data == b"x00"
    assert findings[0].size > 50
    assert "AssertionError" in findings[0].told


class Greedy(Planted):
    """Takes far more memory than its input."""

    def check(self, data: bytes, rng: random.Random) -> None:
        """Raise nothing."""
        assert bytes(fuzz.MOST_MEMORY + fuzz.MOST_PER_BYTE * len(data) + 1)


def test_memory_is_measured() -> None:
    """Of one input among many; nothing else would tell."""
    count, finding = fuzz.find("greedy", Greedy(), "1", lambda n: n < fuzz.TRACED)
    assert count == fuzz.TRACED
    assert finding is not None
    assert "TooMuchError" in finding.told


@pytest.mark.parametrize("seed", range(50))
def test_pieces_are_the_whole(seed: int) -> None:
    """None is empty, none is lost, whatever the way of cutting."""
    rng = random.Random(seed)
    data = rng.randbytes(rng.choice((0, 1, 50, 5000)))
    parts = chance.pieces(rng, data)
    assert b"".join(parts) == data
    assert all(parts)


GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "count", "state"),
    [
        (b"", 0, "none"),
        (GET, 1, "none"),
        (GET * 2, 2, "none"),
        (GET + GET[:-1], 1, "head"),
        (GET + b"G", 1, "head"),
        (GET + b"?", 1, "unclear"),
        (GET[:-2] + b"Content-Length: 2\r\n\r\nx", 0, "body"),
        (GET[:-2] + b"Content-Length: 2\r\n\r\nxy", 1, "none"),
        (GET[:-2] + b"Content-Length: +2\r\n\r\nxy", 0, "unclear"),
        (GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n2\r\nxy\r\n0\r\n\r\n", 1, "none"),
        (GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n2\r\nxyz\r\n0\r\n\r\n", 0, "unclear"),
        (GET[:-2] + b"Connection: close\r\n\r\n", 1, "closed"),
    ],
)
def test_the_strict_reader_of_requests(data: bytes, count: int, state: str) -> None:
    """What the front is held against."""
    found: Found = reference(data)
    assert (len(found.asked), found.state) == (count, state)
