"""Which of a client's headers go up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict

from balancer.net.forwarding import WITHHELD, Forwarding

OURS = [
    ("Accept-Encoding", "identity"),
    ("X-Forwarded-For", "192.0.2.1"),
    ("Via", "1.1 token"),
    ("X-Request-Id", "r1"),
]


def sent(*headers: tuple[str, str]) -> list[tuple[str, str]]:
    """What goes up of these."""
    request = SimpleNamespace(headers=CIMultiDict(headers))
    exchange: Any = SimpleNamespace(request=request, client="192.0.2.1", id="r1")
    return list(Forwarding("token")(exchange))


def test_what_nobody_withholds_goes_up_as_it_came() -> None:
    """In its order and spelling, several of one name, and ours behind them."""
    kept = [("content-TYPE", "application/json"), ("X-Team", "a"), ("X-team", "b"), ("Accept", "*")]
    assert sent(*kept) == kept + OURS


@pytest.mark.parametrize("name", sorted(WITHHELD - {"via"}))
@pytest.mark.parametrize("spelled", [str.title, str.upper])
def test_what_is_ours_or_secret_stays_here(name: str, spelled: Any) -> None:
    """Whatever its spelling: hop by hop, credentials, what we set by ourselves."""
    assert sent((spelled(name), "secret")) == OURS


@pytest.mark.parametrize(
    "name",
    ["X-Forwarded-User", "x-forwarded-email", "X-Auth-Request-Access-Token", "X-Forwarded-Port"],
)
def test_identities_of_web_servers_in_front_stay_here(name: str) -> None:
    """They are put there for us, and backends of others may not have them."""
    assert sent((name, "secret")) == OURS


@pytest.mark.parametrize(
    ("lines", "up"),
    [
        (["keep-alive"], ["X-A", "X-B"]),
        (["close"], ["X-A", "X-B"]),
        (["X-A"], ["X-B"]),
        (["keep-alive, x-a"], ["X-B"]),
        (["close", "x-b ,X-A"], []),
        (["Keep-Alive,  X-B"], ["X-A"]),
        ([""], ["X-A", "X-B"]),
    ],
)
def test_what_is_named_hop_by_hop_stays_here(lines: list[str], up: list[str]) -> None:
    """In one line or several, with spaces wherever they are allowed."""
    given = [*(("Connection", line) for line in lines), ("X-A", "1"), ("X-B", "1")]
    assert [name for name, _ in sent(*given)] == [*up, *(name for name, _ in OURS)]


def test_the_way_so_far_is_kept() -> None:
    """Two balancers in a circle must each see that they were there."""
    told = dict(sent(("Via", "1.0 a"), ("via", "1.1 b, 1.1 c")))
    assert told["Via"] == "1.0 a, 1.1 b, 1.1 c, 1.1 token"


def test_what_differs_from_one_request_to_the_next_can_be_left_out() -> None:
    """A caller that sends the same head again has the same headers, but for the id."""
    request = SimpleNamespace(headers=CIMultiDict([("X-Team", "a")]))
    exchange: Any = SimpleNamespace(request=request, client="192.0.2.1", id="r1")
    assert list(Forwarding("token").kept(exchange)) == [("X-Team", "a"), *OURS[:-1]]
