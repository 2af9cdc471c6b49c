"""
Whose share of the pool a call uses up, in which class, and in which session.

Laws:
- Nothing that a client sends gives it more than it has: it may lower its priority, and raise it
  again up to that of its key. What makes no sense is as good as not sent.
- What a client names is its own: the same session id of another caller is another session.
- Whatever is kept of a client's words is short, however long they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Final, Literal

from balancer.core.domain import INTERACTIVE, Principal

FairBy = Literal["key", "user", "client_ip", "session", "none"]

ANONYMOUS: Final = "anonymous"
BATCH: Final = 10
BATCH_BELOW: Final = 50  # of a priority
MANY_INPUTS: Final = 16  # to embed in one call; more than a person waits for
LONGEST: Final = 128  # characters of a name that is kept as it is

_NUMBER: Final = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Share:
    """
    What the head of a request says of its place among others.

    Args:
        owner: Whose limits it counts against.
        session: The session that a header names; empty: none does.
        before: Fields of the body that would count more than that, the most important first.
        scope: Where its sessions' names count.
        is_by_session: Each session has a share of its own.
    """

    owner: str
    fair_key: str
    batch: bool
    session: str = ""
    before: tuple[str, ...] = ()
    scope: str = ""
    is_by_session: bool = False

    def session_for(self, told: str) -> str:
        """The session of a call whose body names it so; empty: it does not."""
        return _scoped(self.scope, told) if told else self.session

    def key_for(self, session: str) -> str:
        """Whose share a call of that session uses up."""
        return session if session and self.is_by_session else self.fair_key


@dataclass(frozen=True, slots=True)
class Sharing:
    """
    The rules.

    Args:
        fair_by: What has a share of its own.
        interactive, batch: The priorities that go by these names.
        sessions: Where a session's name may stand, in order: ``header:NAME``, ``body:FIELD``.
    """

    fair_by: FairBy = "key"
    interactive: int = INTERACTIVE
    batch: int = BATCH
    sessions: tuple[str, ...] = ()

    def share(
        self, principal: Principal, client: str, user: str, header: Callable[[str], str | None]
    ) -> Share:
        """
        Read one request's head.

        Args:
            client: The address it comes from.
            user: Whom a proxy that we believe names; empty: nobody.
            header: A header of that name, if there is one.
        """
        owner, address = owner_of(principal, client), f"ip:{_network(client)}"
        scope = f"user:{_short(user)}" if user else owner
        session, before = "", []
        for place in self.sessions:
            where, _, name = place.partition(":")
            if where == "body":
                before.append(name)
            elif where == "header" and (told := (header(name) or "").strip()):
                session = _scoped(scope, told)
                break
        fair_key = {"client_ip": address, "user": scope, "none": ""}.get(self.fair_by, owner)
        batch = self.priority(principal, header("X-Balancer-Priority")) < BATCH_BELOW
        by_session = self.fair_by == "session"
        return Share(owner, fair_key, batch, session, tuple(before), scope, by_session)

    def priority(self, principal: Principal, asked: str | None) -> int:
        """What a call's priority is whose header asks for *asked*."""
        word = (asked or "").strip().lower()
        wanted = {"interactive": self.interactive, "batch": self.batch}.get(word)
        if wanted is None:
            wanted = int(word) if _NUMBER.fullmatch(word) else principal.priority
        return min(wanted, principal.priority)


def owner_of(principal: Principal, client: str) -> str:
    """Who answers for what a caller at that address uses up: its key, or else the address."""
    named = principal.name != ANONYMOUS
    return f"key:{principal.name}" if named else f"ip:{_network(client)}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else _digest(name)


def _scoped(scope: str, told: str) -> str:
    return f"{scope}#{_digest(told)}"


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _network(address: str) -> str:
    """Who has an address: of IPv6 everybody has 2**64. IPv4 in IPv6 clothes is IPv4."""
    if ":" not in address:
        return address
    try:
        ip = ip_address(address)
    except ValueError:
        return _short(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(IPv6Network((int(ip), 64), strict=False))
