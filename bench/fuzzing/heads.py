"""
Heads of requests to a backend: refused, or what another reader finds in them is what went in.
"""

from __future__ import annotations

import random
from dataclasses import replace

from balancer.core.domain import Call
from balancer.net.connecting import Target
from balancer.net.heads import OURS, Heads
from bench.fuzzing import chance
from tests.net.parts import a_call

TARGETS = (
    Target("http://host:11434"),
    Target("http://[::1]:8080/base/"),
    Target("https://h", headers=(("Authorization", "Bearer k"), ("X-Own", "1"))),
    Target("http://h/%2e", headers=(("X-Request-Id", "own"),)),
)
NAMES = (
    "Accept",
    "X-A",
    "content-LENGTH",
    "Transfer-Encoding",
    "Host",
    "Connection",
    "TE",
    "X-Own",
)
WORDS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b": ", b"\xff", b"\xc3\xa9", b"\x7f", b"\x1b"),
    *(b"Content-Length: 5\r\n", b"?", b"#", b"%0d%0a", b" HTTP/1.1\r\n", b"Host", b"\xe2\x80\xa8"),
)


def make(rng: random.Random) -> bytes:
    """Lines: an id, a query, then headers."""
    lines = [b"r1", rng.choice((b"", b"a=b", b"model=x%20y"))]
    lines += [f"{rng.choice(NAMES)}: v".encode() for _ in range(rng.randint(0, 4))]
    return b"\x1e".join(chance.mutated(rng, line, WORDS, 1) for line in lines)


def check(data: bytes, rng: random.Random) -> None:
    """What is written is one head, of our framing, with the caller's other headers as they were."""
    target = rng.choice(TARGETS)
    heads, call = Heads(target), _call(data)
    try:
        written = heads.of(call, keep=True)
    except ValueError:
        return
    assert heads.of(call, keep=True) == written, "the second time it is another"
    assert written.endswith(b"\r\n\r\n")
    assert written.count(b"\r\n\r\n") == 1
    first, *lines = written[:-4].split(b"\r\n")
    assert not any(char in b"\r\n\0" for line in lines for char in line)
    method, path, version = first.split(b" ")
    assert (method, version) == (b"POST", b"HTTP/1.1")
    assert path.endswith(
        f"{call.route.path}{'?' if call.query else ''}{call.query}".encode(
            "utf-8", "surrogateescape"
        )
    )
    split = [line.decode("utf-8", "surrogateescape").partition(": ") for line in lines]
    told = [(name.lower(), value) for name, _, value in split]
    assert [v for n, v in told if n == "content-length"] == [str(len(call.body))]
    assert len([n for n, _ in told if n == "host"]) == 1
    own = {name.lower() for name, _ in target.headers}
    wanted = [(n.lower(), v) for n, v in call.headers if n.lower() not in OURS | own]
    ours = [n for n, _ in told if n in OURS]
    assert set(ours) <= {"host", "content-length", "x-request-id"}
    assert [n for n, _ in told if n not in OURS | own] == [n for n, _ in wanted]


def _call(data: bytes) -> Call:
    told, query, *lines = [*data.decode("utf-8", "surrogateescape").split("\x1e"), ""]
    pairs = [line.partition(": ") for line in lines if line]
    headers = tuple((name, value) for name, mark, value in pairs if mark)
    return replace(a_call(), id=told, query=query, headers=headers)
