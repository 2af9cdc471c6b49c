"""Whether a head is that of somebody who is known."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.core.domain import Admitted, Principal, Role
from balancer.net.visitor import REMEMBERED_BYTES, Visitor

ADMITTED = Admitted(Principal("somebody", Role.USER), "192.0.2.1")
HEAD = ((b"Host", b"x"), (b"X-Api-Key", b"k"), (b"Content-Length", b"5"), (b"X-Request-Id", b"1"))
ACCESS, PAGES = object(), object()


def is_again(
    raw: Any = HEAD, method: str = "GET", rules: Any = (ACCESS, PAGES, False), now: float = 10.0
) -> bool:
    """Whether a request is by a visitor that was let in until 11.0."""
    visitor = Visitor(HEAD, "GET", (ACCESS, PAGES, False), 11.0, ADMITTED, ())
    return visitor.is_again(raw, method, rules, now)


def test_the_same_head_is_the_same_visitor() -> None:
    """Also if it comes as other objects."""
    assert is_again()
    assert is_again(tuple((bytes(bytearray(n)), bytes(bytearray(v))) for n, v in HEAD))


@pytest.mark.parametrize("name", [b"Content-Length", b"X-Request-Id"])
def test_what_is_of_the_one_request_may_differ(name: bytes) -> None:
    """The length of its body, and its id."""
    assert is_again(tuple((n, b"7" if n == name else v) for n, v in HEAD))


@pytest.mark.parametrize(
    "raw",
    [
        (),
        HEAD[:-1],
        (*HEAD, (b"X-More", b"1")),
        (HEAD[1], HEAD[0], *HEAD[2:]),
        *(tuple((n, v + b"7") if n == name else (n, v) for n, v in HEAD) for name in (b"Host",)),
        tuple((n, b"K") if n == b"X-Api-Key" else (n, v) for n, v in HEAD),
        tuple((n.lower(), v) for n, v in HEAD),
        (*HEAD[:2], (b"Transfer-Encoding", b"chunked"), HEAD[3]),
        (*HEAD[:2], (b"X-Request-Id", b"5"), HEAD[3]),
    ],
)
def test_any_other_word_is_another_visitor(raw: Any) -> None:
    """A header more or less, in another order, of another value, or spelled in another way."""
    assert not is_again(raw)


def test_nobody_is_known_for_long_or_by_other_rules() -> None:
    """Rules are the same only if nobody has exchanged them; a method decides, too."""
    assert is_again(now=10.99)
    assert not is_again(now=11.0)
    assert not is_again(method="HEAD")
    assert not is_again(rules=(ACCESS, PAGES, True))
    assert not is_again(rules=(object(), PAGES, False))
    assert not is_again(rules=(ACCESS, object(), False))


@pytest.mark.parametrize("more", [0, 1])
def test_only_a_small_head_is_kept(more: int) -> None:
    """Of thousands of connections at rest each has one."""
    raw = ((b"X", b"a" * (REMEMBERED_BYTES - 1 + more)),)
    visitor = Visitor(raw, "GET", (), 11.0, ADMITTED, ())
    assert visitor.is_small is (more == 0)
