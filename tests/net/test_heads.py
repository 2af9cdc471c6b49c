"""The head of a request to a backend: what stands in it, and what can never get in."""

from __future__ import annotations

import sys
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core import routes
from balancer.net.connecting import Target
from balancer.net.heads import OURS, REMEMBERED_BYTES, Heads
from tests.net.parts import a_call


def head(target: Target | None = None, *, keep: bool = True, **call: Any) -> bytes:
    """The head of a call."""
    return Heads(target or Target("http://gpu:11434")).of(a_call(**call), keep=keep)


class Read:
    """What a server makes of a request's head."""

    def __init__(self, data: bytes) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.messages = 0
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.messages += 1


def test_the_whole_head() -> None:
    """The route's line, the backend's authority and headers, the caller's, one length."""
    target = Target("http://gpu:11434/deep/er", headers=(("Authorization", "Bearer x"),))
    told = head(target, headers=(("Accept", "*/*"), ("X-Mine", "ü")), query="a=%2f&b", body=b"{}")
    assert told.decode() == (
        "POST /deep/er/api/chat?a=%2f&b HTTP/1.1\r\n"
        "Host: gpu:11434\r\n"
        "Authorization: Bearer x\r\n"
        "Accept: */*\r\n"
        "X-Mine: ü\r\n"
        "X-Request-Id: r1\r\n"
        "Content-Length: 2\r\n\r\n"
    )
    assert b"Connection: close\r\n" in head(keep=False)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://gpu1:80", b"gpu1"),
        ("https://gpu1:443/x", b"gpu1"),
        ("https://gpu1:80", b"gpu1:80"),
        ("http://[::1]:11434", b"[::1]:11434"),
        ("http://127.0.0.1:11434", b"127.0.0.1:11434"),
    ],
)
def test_the_host_is_the_backends_authority(url: str, host: bytes) -> None:
    """Without the port that goes without saying."""
    assert dict(Read(head(Target(url))).headers)[b"Host"] == host


def test_what_frames_a_message_is_ours() -> None:
    """A caller's own is left out, however it is spelled; so is what the backend's stands for."""
    theirs = (("x-KEY", "theirs"), *((name.title(), "theirs") for name in OURS))
    told = Read(head(Target("http://gpu:1", headers=(("X-Key", "ours"),)), headers=theirs))
    assert dict(told.headers) == {
        b"Content-Length": b"2",
        b"Host": b"gpu:1",
        b"X-Key": b"ours",
        b"X-Request-Id": b"r1",
    }
    assert len(told.headers) == 4


def test_a_call_has_one_id() -> None:
    """Its own, or what the operator wrote for the backend; never a caller's, never two."""
    told = Read(head(headers=(("x-request-ID", "theirs"),)))
    assert [value for name, value in told.headers if name == b"X-Request-Id"] == [b"r1"]
    written = Target("http://gpu:1", headers=(("X-REQUEST-ID", "fixed"),))
    names = [name for name, _ in Read(head(written)).headers if name.lower() == b"x-request-id"]
    assert names == [b"X-REQUEST-ID"]
    with pytest.raises(ValueError, match="control character"):
        head(id="r1\r\nX: y")


def test_the_same_headers_again_are_the_same_bytes() -> None:
    """Known by being the very same object: equal ones of another caller are made anew."""
    heads = Heads(Target("http://gpu:1"))
    mine, other = (("X", "a"),), (("X", "b"),)
    for headers, value in ((mine, b"a"), (other, b"b"), (mine, b"a")):
        assert b"\r\nX: " + value in heads.of(a_call(headers=headers), keep=True)
    for n in range(200):  # however many callers there are, and however soon their tuples die
        assert f"X: {n}\r\n".encode() in heads.of(a_call(headers=(("X", str(n)),)), keep=True)


def test_large_headers_are_not_kept() -> None:
    """A backend's heads must not hold what is long gone."""
    heads, large = Heads(Target("http://gpu:1")), (("X", "a" * REMEMBERED_BYTES),)
    before = sys.getrefcount(large)
    assert b"X: aa" in heads.of(a_call(headers=large), keep=True)
    assert sys.getrefcount(large) == before


@pytest.mark.parametrize("wrong", ["\r", "\n", "\r\n", "\0", "\x7f", "\x1f", "a\r\nX: y"])
def test_a_control_character_is_refused(wrong: str) -> None:
    """In a value, a name, the query, a header of the backend's."""
    for call in ({"headers": (("X", wrong),)}, {"headers": ((wrong, "x"),)}, {"query": wrong}):
        with pytest.raises(ValueError, match="control character"):
            head(**call)
    with pytest.raises(ValueError, match="control character"):
        head(Target("http://gpu:1", headers=(("X", wrong),)))


def test_a_request_line_has_three_parts() -> None:
    """A blank in the query would make a fourth."""
    with pytest.raises(ValueError, match="head of a request"):
        head(query="a HTTP/1.1")
    assert b"\t" in head(headers=(("X", "a\tb"),))  # in a value a tab is a blank


def test_bytes_that_are_no_text_arrive_as_they_were() -> None:
    """As a parser of requests hands them over."""
    told = head(headers=(("X", b"\xff\xfe".decode("utf-8", "surrogateescape")),))
    assert b"X: \xff\xfe\r\n" in told


def test_a_get_has_a_length_too() -> None:
    """Of nothing: exactly one length, whatever the method."""
    call = a_call(body=b"", headers=())
    object.__setattr__(call, "route", routes.find("GET", "/api/tags"))
    told = Heads(Target("http://gpu:1")).of(call, keep=True)
    assert (
        told
        == b"GET /api/tags HTTP/1.1\r\nHost: gpu:1\r\nX-Request-Id: r1\r\nContent-Length: 0\r\n\r\n"
    )


@given(
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=20)), max_size=4), st.text(max_size=9)
)
def test_nothing_gets_a_second_request_out(headers: list[tuple[str, str]], query: str) -> None:
    """Whatever the texts: refused, or at most as many lines as there are headers."""
    try:
        told = head(headers=tuple(headers), query=query)
    except ValueError:
        return
    lines = told.split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    assert len(lines) <= 1 + 1 + len(headers) + 2 + 2
    assert told.count(b"\r") == told.count(b"\n") == len(lines) - 1
    assert b"\0" not in told
