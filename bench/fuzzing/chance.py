"""Bytes made by chance: changed, cut into pieces, and made smaller again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

MOST_BYTES = 1 << 20
EDGES = (0, 1, 9, 10, 13, 32, 34, 58, 92, 127, 128, 195, 237, 255)
ENDS = (b"\r", b"\n", b'"', b"\\", b":")
BYTEWISE = 600  # bytes that may come one by one


def mutated(rng: random.Random, data: bytes, words: Sequence[bytes], most: int = 4) -> bytes:
    """The data with some bytes or *words* put in, taken out, doubled, moved or cut off."""
    for _ in range(rng.randint(0, most)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.choice((1, 1, 1, 2, 4, 16, 100)))
        data = rng.choice(CHANGES)(rng, data, at, end, words)[:MOST_BYTES]
    return data


def _put_in(rng: random.Random, data: bytes, at: int, _: int, words: Sequence[bytes]) -> bytes:
    return data[:at] + rng.choice(words) + data[at:]


def _put_over(rng: random.Random, data: bytes, at: int, end: int, words: Sequence[bytes]) -> bytes:
    return data[:at] + rng.choice(words) + data[end:]


def _put_byte(rng: random.Random, data: bytes, at: int, _: int, __: Sequence[bytes]) -> bytes:
    byte = rng.choice((rng.choice(EDGES), rng.randrange(256)))
    return data[:at] + bytes((byte,)) + data[at + rng.randint(0, 1) :]


def _take_out(_: random.Random, data: bytes, at: int, end: int, __: Sequence[bytes]) -> bytes:
    return data[:at] + data[end:]


def _double(rng: random.Random, data: bytes, at: int, end: int, _: Sequence[bytes]) -> bytes:
    return data[:at] + data[at:end] * rng.choice((2, 2, 2, 9, 200)) + data[end:]


def _move(rng: random.Random, data: bytes, at: int, end: int, _: Sequence[bytes]) -> bytes:
    rest, to = data[:at] + data[end:], rng.randint(0, len(data))
    return rest[:to] + data[at:end] + rest[to:]


def _cut_off(rng: random.Random, data: bytes, at: int, _: int, __: Sequence[bytes]) -> bytes:
    return data[:at] if rng.random() < 0.3 else data


CHANGES: tuple[Callable[[random.Random, bytes, int, int, Sequence[bytes]], bytes], ...] = (
    *(_put_in, _put_over, _put_byte, _take_out, _double, _move, _cut_off),
)


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """The data as it may arrive; no piece is empty."""
    size = len(data)
    how = rng.randrange(4)
    if how == 0 and size <= BYTEWISE:
        return [data[at : at + 1] for at in range(size)]
    if how == 1:  # where something ends
        cuts = [
            data.find(rng.choice(ENDS), rng.randint(0, size)) + rng.randint(0, 2)
            for _ in range(rng.randint(1, 6))
        ]
    elif how == 2:
        step = rng.choice((1, 2, 3, 7, 100, 4096)) + size // 500
        cuts = list(range(step, size, step))
    else:
        cuts = [rng.randint(0, size) for _ in range(rng.randint(1, 8))]
    bounds = sorted({0, size, *(cut for cut in cuts if 0 < cut < size)})
    return [data[start:end] for start, end in pairwise(bounds)]


def smaller(data: bytes, fails: Callable[[bytes], bool], tries: int = 3000) -> bytes:
    """Data that still fails, from which hardly a byte can be taken; found by halving."""
    step = max(len(data) // 2, 1)
    while tries > 0:
        at, before = 0, len(data)
        while at < len(data) and tries > 0:
            tries -= 1
            shorter = data[:at] + data[at + step :]
            if fails(shorter):
                data = shorter
            else:
                at += step
        if step == 1 and len(data) == before:
            break
        step = max(step // 2, 1)
    return data
