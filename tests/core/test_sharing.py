"""Whose share a call uses up, in which class, in which session."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.core.domain import Principal, Role
from balancer.core.sharing import FairBy, Share, Sharing

KEY = Principal("web", Role.USER)
NOBODY = Principal("anonymous", Role.USER)
PLACES = ("header:X-Session-Id", "body:prompt_cache_key", "header:X-Chat", "prefix")
LONG = "x" * 60_000


def share(
    principal: Principal = KEY,
    client: str = "192.0.2.7",
    user: str = "",
    headers: dict[str, str] | None = None,
    **rules: Any,
) -> Share:
    """What is read of such a head."""
    rules.setdefault("sessions", PLACES)
    return Sharing(**rules).share(principal, client, user, (headers or {}).get)


@pytest.mark.parametrize(
    ("fair_by", "principal", "user", "whose"),
    [
        ("key", KEY, "", "key:web"),
        ("key", KEY, "ann", "key:web"),
        ("key", NOBODY, "", "ip:192.0.2.7"),
        ("user", KEY, "ann", "user:ann"),
        ("user", KEY, "", "key:web"),
        ("user", NOBODY, "", "ip:192.0.2.7"),
        ("client_ip", KEY, "ann", "ip:192.0.2.7"),
        ("session", KEY, "", "key:web"),
        ("none", KEY, "ann", ""),
    ],
)
def test_everybody_has_a_share_by_the_rules(
    fair_by: FairBy, principal: Principal, user: str, whose: str
) -> None:
    """By key, user or address; who has none of it counts by the next best."""
    assert share(principal, user=user, fair_by=fair_by).fair_key == whose


def test_a_key_named_like_an_address_is_somebody_else() -> None:
    """Kinds of callers are never mixed up."""
    odd = Principal("192.0.2.7", Role.USER)
    assert share(odd).owner != share(NOBODY).owner


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::1", False),
        ("no:address", "no:address", True),
    ],
)
def test_an_ipv6_network_is_one_caller(one: str, other: str, *, same: bool) -> None:
    """Else anybody would be as many as he likes."""
    assert (share(NOBODY, one).owner == share(NOBODY, other).owner) is same


@pytest.mark.parametrize(
    ("asked", "own", "batch"),
    [
        ("", 100, False),
        ("batch", 100, True),
        ("Batch ", 100, True),
        ("49", 100, True),
        ("50", 100, False),
        ("interactive", 10, True),
        ("100", 10, True),
        ("999999999", 10, True),
        ("interactive", 60, False),
        ("0", 100, True),
    ],
)
def test_nobody_raises_himself(asked: str, own: int, *, batch: bool) -> None:
    """A header may lower the priority of a key, and never goes beyond it."""
    principal = Principal("web", Role.USER, priority=own)
    assert share(principal, headers={"X-Balancer-Priority": asked}).batch is batch


@pytest.mark.parametrize(
    "absurd", ["-1", "1e9", "NaN", "١٢", "9" * 5000, "batch,batch", "urgent", "\ud800"]
)
@pytest.mark.parametrize("own", [10, 100])
def test_an_absurd_priority_changes_nothing(absurd: str, own: int) -> None:
    """It is as good as not sent."""
    principal = Principal("web", Role.USER, priority=own)
    assert share(principal, headers={"X-Balancer-Priority": absurd}).batch is (own < 50)


def test_the_words_mean_what_the_operator_says() -> None:
    """By `queue.priorities`."""
    told = Sharing(batch=55, interactive=90)
    assert told.priority(KEY, "batch") == 55
    assert told.priority(KEY, "interactive") == 90


def test_the_first_that_is_there_names_the_session() -> None:
    """In the order of the rules, whether it stands in a header or in the body."""
    both = share(headers={"X-Session-Id": "a", "X-Chat": "b"})
    later = share(headers={"X-Chat": "b"})
    assert both.before == ()
    assert both.session_for("") == share(headers={"X-Chat": "a"}).session
    assert later.before == ("prompt_cache_key",)
    assert later.session_for("a") == both.session
    assert later.session_for("") == later.session != both.session
    assert share().session_for("") == ""


def test_a_strangers_session_is_another() -> None:
    """Whatever he calls it; and a user behind a proxy is a stranger to the next."""
    headers = {"X-Session-Id": "a"}
    sessions = {
        share(headers=headers).session,
        share(NOBODY, headers=headers).session,
        share(user="ann", headers=headers).session,
        share(user="bob", headers=headers).session,
    }
    assert len(sessions) == 4


def test_sessions_may_have_shares() -> None:
    """Only where the operator says so."""
    by_session = share(fair_by="session", headers={"X-Session-Id": "a"})
    assert by_session.key_for(by_session.session) == by_session.session
    assert by_session.key_for("") == "key:web"
    by_key = share(headers={"X-Session-Id": "a"})
    assert by_key.key_for(by_key.session) == "key:web"


def test_whatever_is_kept_is_short() -> None:
    """Words of clients of any length, and halves of characters, do no harm."""
    told = share(user=LONG, fair_by="user", headers={"X-Session-Id": LONG + "\ud800"})
    assert len(told.fair_key) < 140
    assert len(told.session) < 160
    assert told.fair_key != share(user=LONG + "y", fair_by="user").fair_key
