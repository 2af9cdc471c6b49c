"""
Who is asking, and may they: keys, addresses, Host, the admin guard.

Plain functions over header text; nothing here knows aiohttp, logs, or keeps a key. A refusal with
an empty text is answered with an empty body, as Ollama does.

The order for one request: `Access.caller`, `Access.authenticate`, `Access.check_host`, `require`;
under ``/_balancer/`` also `Access.guard_admin`, for ``/metrics`` `Access.guard_reach`. Pages of
other origins are the matter of `cors`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import TYPE_CHECKING, Final, Literal, Protocol

from multidict import istr

from balancer.core.domain import INTERACTIVE, Allowance, Principal, Role
from balancer.core.errors import BadRequest, Forbidden, Unauthorized
from balancer.ops.cors import is_foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from multidict import MultiMapping

    Headers = MultiMapping[str]
    Address = IPv4Address | IPv6Address
    Networks = Sequence[IPv4Network | IPv6Network]
    Anonymous = Literal["never", "loopback", "always"] | Sequence[str]

ANONYMOUS: Final = "anonymous"
NO_LIMITS: Final = Allowance()
# Looked up with every request: as `istr` they need not be made lower case each time.
AUTHORIZATION, X_API_KEY = istr("Authorization"), istr("x-api-key")
FORWARDED_FOR, FORWARDED, REAL_IP = istr("X-Forwarded-For"), istr("Forwarded"), istr("X-Real-IP")


class Key(Protocol):
    """A configured API key: SHA-256 of its UTF-8 bytes, never the key itself."""

    @property
    def name(self) -> str:
        """What logs and metrics call it."""

    @property
    def sha256(self) -> bytes:
        """32 bytes."""

    @property
    def role(self) -> Role:
        """What it allows."""

    @property
    def models(self) -> tuple[str, ...]:
        """Globs over the models it is for."""

    @property
    def expires_at(self) -> float | None:
        """Unix time from which it is no key any more; None: never."""

    @property
    def priority(self) -> int:
        """The most that its calls may have."""

    @property
    def allowance(self) -> Allowance:
        """How much it may use."""


# -- addresses ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """
    Where a request comes from.

    Args:
        address: For logs and limits.
        ip: The same, parsed; None: not an IP address.
        hidden: It came through a proxy we do not believe, so that *address* is not the caller's.
    """

    address: str
    ip: Address | None
    hidden: bool

    @property
    def is_loopback(self) -> bool:
        """Whether the caller itself sits on this machine."""
        return self.ip is not None and self.ip.is_loopback and not self.hidden

    def is_within(self, networks: Networks) -> bool:
        """Whether the caller is known to sit in one of *networks*."""
        return not self.hidden and _is_within(self.ip, networks)


@lru_cache(maxsize=4096)
def _direct(peer: str) -> Caller:
    """Who comes through no proxy, and *peer* is an address of the kernel's: none is long."""
    return Caller(peer, _ip(peer), hidden=False)


def client_address(peer: str, forwarded_for: Iterable[str], trusted: Networks) -> str:
    """
    The address of the client behind the proxies we trust.

    Read from the right: every hop up to the first untrusted one was written by a proxy of ours;
    what stands left of it is the client's own claim.

    Args:
        peer: The other end of the connection.
        forwarded_for: All X-Forwarded-For lines, in order.
        trusted: Where our proxies are.
    """
    return _walk(peer, forwarded_for, trusted)[0]


def _walk(peer: str, forwarded_for: Iterable[str], trusted: Networks) -> tuple[str, bool]:
    """The client's address, and whether every hop we had to believe could be read."""
    hops = [hop for line in forwarded_for for hop in line.split(",")]
    address = peer
    while hops and _is_within(_ip(address), trusted):
        hop = _ip(_without_port(hops.pop()))
        if hop is None:
            return address, False
        address = str(hop)
    return address, True


def _ip(text: str) -> Address | None:
    """Parse an address; IPv4 in IPv6 clothes counts as IPv4."""
    return _parsed(text) if len(text) <= 64 else None  # the cache must not keep long strings


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Address | None:
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    return (isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip


def _is_within(ip: Address | None, networks: Networks) -> bool:
    return ip is not None and any(ip in network for network in networks)


def _networks(cidrs: Iterable[str]) -> Networks:
    return tuple(ip_network(cidr, strict=False) for cidr in cidrs)


def _without_port(text: str) -> str:
    """The host of ``host``, ``host:port``, ``[v6]``, ``[v6]:port`` or a bare IPv6 address."""
    text = text.strip().strip('"')
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


# -- failures -------------------------------------------------------------------------------


@dataclass(slots=True)
class Failures:
    """
    Wrong keys by address: after *limit* within *window_s* the address rests for *window_s*.

    The oldest addresses are forgotten beyond *size*. An IPv6 address stands for its /64.
    """

    limit: int = 10
    window_s: float = 60.0
    size: int = 4096
    _table: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)

    def rest_s(self, caller: Caller, now: float) -> float:
        """Seconds for which this caller is not even looked up; 0: none."""
        count, since = self._table.get(_bucket(caller), (0, 0.0))
        return max(0.0, since + self.window_s - now) if count >= self.limit else 0.0

    def note(self, caller: Caller, now: float) -> None:
        """One more wrong key."""
        who = _bucket(caller)
        count, since = self._table.pop(who, (0, now))
        if now - since >= self.window_s:
            count, since = 0, now
        self._table[who] = (count + 1, now if count + 1 >= self.limit else since)
        if len(self._table) > self.size:
            self._table.popitem(last=False)


def _bucket(caller: Caller) -> str:
    if isinstance(caller.ip, IPv6Address):
        return str(IPv6Network((int(caller.ip), 64), strict=False))
    return caller.address


# -- Host -----------------------------------------------------------------------------------

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_OLLAMA_SUFFIXES = (".localhost", ".local", ".internal")
_PRIVATE_SUFFIXES = (*_OLLAMA_SUFFIXES, ".lan", ".home.arpa")
_LOCAL_V4 = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "0.0.0.0")
_LOCAL_NETWORKS = _networks((*_LOCAL_V4, "::1", "fc00::/7", "::"))


def check_host(
    host: str,
    *,
    listener_loopback: bool,
    local_names: Collection[str] = (),
    allowed_hosts: Collection[str] = (),
) -> None:
    """
    Refuse names that a foreign page could have rebound to us.

    On a loopback listener this is Ollama's rule: an address of a private network, a name of this
    machine, or one under .localhost, .local, .internal. Elsewhere any IP literal and any single
    label will do too, and .lan and .home.arpa.

    Args:
        host: The Host header; may hold a port.
        listener_loopback: We listen on loopback only.
        local_names: This machine's names and addresses, lower case.
        allowed_hosts: What the operator added, lower case.

    Raises:
        Forbidden: With an empty text on a loopback listener, as Ollama answers.
    """
    name = _hostname(host)
    if name in allowed_hosts or name in local_names:
        return
    if not (_is_ours if listener_loopback else _is_private)(name):
        text = (
            f'The Host "{name[:64]}" is not allowed here without an API key: a web page could have '
            "chosen it. Add it to server.allowed_hosts, or use the address."
        )
        raise Forbidden("" if listener_loopback else text)


def _hostname(host: str) -> str:
    return _without_port(host).lower().removesuffix(".")


def _is_ours(name: str) -> bool:
    ip = _ip(name)
    if ip is not None:
        return _is_within(ip, _LOCAL_NETWORKS)
    known = name in ("", "localhost") or name.endswith(_OLLAMA_SUFFIXES)
    return known and (not name or _NAME.fullmatch(name) is not None)


def _is_private(name: str) -> bool:
    if _ip(name) is not None or not name:
        return True
    return _NAME.fullmatch(name) is not None and (
        "." not in name or name.endswith(_PRIVATE_SUFFIXES)
    )


# -- keys and roles -------------------------------------------------------------------------


def require(principal: Principal, role: Role) -> None:
    """
    Let only those pass who have *role*; an admin has every role.

    Raises:
        Forbidden: Not this one.
    """
    if principal.role is not Role.ADMIN and role is Role.ADMIN:
        raise Forbidden(
            f"{principal.name} may not do this: it needs a key with the role admin."
            if principal.name != ANONYMOUS
            else "This needs an API key with the role admin."
        )


class Access:
    """
    The rules of one configuration.

    An unknown key is refused, but where anonymous callers are welcome it counts as none: client
    libraries that insist on a key are given made-up ones. ``Authorization`` of another scheme,
    such as the signature of Ollama's own command line, is no key either.

    Args:
        anonymous: Who needs no key: nobody, this machine, everybody, or exactly these CIDRs. A
            caller behind a proxy that is not in *trusted_proxies* has no address, so that only
            ``always`` admits it: else a web server in front would make the world local.
        wall: Unix time, by which keys expire.
        accept: Where a key may stand: ``bearer``, ``x-api-key``, ``path``.
        trusted_proxies: CIDRs whose X-Forwarded-For we believe.
        allowed_hosts: Further Host names for anonymous callers.
        admin_cidrs: Who may reach the admin API and the metrics at all.
        admin_hosts: Host names allowed there beside IP literals.
        listener_loopback: We listen on loopback only.
        local_names: This machine's names and addresses.
        user_header: In which trusted proxies name who asks; empty: nowhere.
        priority, allowance: Of anonymous callers.

    Raises:
        ValueError: A bad CIDR, or a key named like the anonymous caller.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], float],
        keys: Sequence[Key] = (),
        anonymous: Anonymous = "loopback",
        accept: Collection[str] = ("bearer", "x-api-key"),
        trusted_proxies: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
        admin_cidrs: Sequence[str] = ("127.0.0.0/8", "::1/128"),
        admin_hosts: Sequence[str] = ("localhost",),
        listener_loopback: bool = True,
        local_names: Sequence[str] = (),
        user_header: str = "",
        priority: int = INTERACTIVE,
        allowance: Allowance = NO_LIMITS,
    ) -> None:
        if any(key.name == ANONYMOUS for key in keys):
            raise ValueError(f'a key may not be named "{ANONYMOUS}"')
        self._wall = wall
        self._keys = {key.sha256: key for key in keys}
        self._owners = {
            key.sha256: Principal(key.name, key.role, key.models, key.priority, key.allowance)
            for key in keys
        }
        self._nobody = {
            role: Principal(ANONYMOUS, role, priority=priority, allowance=allowance)
            for role in Role
        }
        self._user_header = istr(user_header)
        self._anonymous = anonymous if isinstance(anonymous, str) else _networks(anonymous)
        self._accept = frozenset(accept)
        self._trusted = _networks(trusted_proxies)
        self._local_names = frozenset(name.lower() for name in local_names)
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self._admin_networks = _networks(admin_cidrs)
        self._admin_hosts = self._local_names.union(name.lower() for name in admin_hosts)
        self._listener_loopback = listener_loopback
        self._failures = Failures()

    def caller(self, peer: str, headers: Headers) -> Caller:
        """
        Where a request comes from.

        Args:
            peer: The other end of the connection, an IP literal; 127.0.0.1 for one on a unix
                socket. Anything else is nobody's address.
            headers: Of the request.
        """
        if not (FORWARDED_FOR in headers or FORWARDED in headers or REAL_IP in headers):
            return _direct(peer)
        ip = _ip(peer)
        lines = headers.getall(FORWARDED_FOR, ())
        address, clear = _walk(peer, lines, self._trusted)
        client = _ip(address)
        believed = clear and bool(lines) and _is_within(ip, self._trusted)
        if ip is None or client is None or (client.is_loopback and not ip.is_loopback):
            believed = False  # a proxy on another machine that saw "loopback" saw its own, not ours
        return Caller(address, client, hidden=not believed)

    def user(self, peer: str, headers: Headers) -> str:
        """Whom a proxy that we trust says that it asks for; empty: nobody in particular."""
        if not self._user_header or not _is_within(_ip(peer), self._trusted):
            return ""
        lines = headers.getall(self._user_header, ())
        return lines[0].strip() if len(lines) == 1 else ""  # of two the client sent one

    @property
    def takes_path(self) -> bool:
        """Whether a key may stand in front of the path."""
        return "path" in self._accept

    def authenticate(
        self, headers: Headers, caller: Caller, now: float, in_path: str = ""
    ) -> Principal:
        """
        The key's owner, or the anonymous caller: admin on this machine, user elsewhere.

        Args:
            headers: Of the request.
            caller: Of the request, see `caller`.
            now: Monotonic seconds.
            in_path: What stood in the path as a key.

        Raises:
            Unauthorized: No key, an unknown or an expired one where one is needed, or too many
                wrong ones.
        """
        tokens = self._tokens(headers, in_path)
        expired: Key | None = None
        for key in map(self._key, tokens):
            if key is not None and not self._is_expired(key):
                return self._owners[key.sha256]
            expired = key or expired
        if self._is_welcome(caller):
            return self._nobody[Role.ADMIN if caller.is_loopback else Role.USER]
        if expired is not None:
            raise Unauthorized(f"The API key {expired.name!r} has expired. {_GET_ONE}")
        if tokens:
            # A known key is let in even then: one guesser must not lock out a whole network.
            self._refuse_guesser(caller, now)
            self._failures.note(caller, now)
            raise Unauthorized(f"This API key is not known here. {_GET_ONE}")
        raise Unauthorized(self._how_to_send() + (_HIDDEN if caller.hidden else ""))

    def principal(self, name: str) -> Principal | None:
        """The owner of the key of that name; None: there is none."""
        return next((owner for owner in self._owners.values() if owner.name == name), None)

    def check_host(self, host: str, principal: Principal) -> None:
        """
        Refuse rebound names to anonymous callers; a foreign page has no key to send.

        Raises:
            Forbidden: See `check_host`.
        """
        if principal.name == ANONYMOUS:
            check_host(
                host,
                listener_loopback=self._listener_loopback,
                local_names=self._local_names,
                allowed_hosts=self._allowed_hosts,
            )

    def guard_reach(self, caller: Caller, headers: Headers) -> None:
        """
        Who may come near ``/_balancer/`` and ``/metrics`` at all, key or no key.

        Raises:
            Forbidden: From there, or under that name, nobody may.
        """
        if not caller.is_within(self._admin_networks):
            raise Forbidden(
                f"{caller.address} may not reach this: it is not in admin.allowed_cidrs"
                + (", as the proxy before it is not in server.trusted_proxies." * caller.hidden)
            )
        name = _hostname(headers.get("Host", ""))
        if _ip(name) is None and name not in self._admin_hosts:
            raise Forbidden(
                f'The Host "{name[:64]}" is not allowed here. Use the address, or add the name to '
                "admin.allowed_hosts."
            )

    def guard_admin(
        self, principal: Principal, caller: Caller, method: str, headers: Headers
    ) -> None:
        """
        Who may use ``/_balancer/``: admins within reach; changes only as a POST that no foreign
        page can make a browser send, and nothing for a foreign page that has no key.

        Raises:
            Forbidden: Not from there, not with that role, not with that method or Origin.
            BadRequest: A change that is not declared as JSON.
        """
        self.guard_reach(caller, headers)
        require(principal, Role.ADMIN)
        if principal.name == ANONYMOUS and is_foreign(headers):
            raise Forbidden("Only a page of this balancer may look at this without an API key.")
        if method in ("GET", "HEAD"):
            return
        if method != "POST":
            raise Forbidden("Changes are made with POST.")
        if is_foreign(headers):
            raise Forbidden("Only a page of this balancer may do this.")
        # Browsers say so themselves; a page on another port of this machine is "same-site".
        if headers.get("Sec-Fetch-Site", "same-origin").strip().lower() != "same-origin":
            raise Forbidden("Only a page of this balancer may do this.")
        content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise BadRequest("Send this with Content-Type: application/json.")

    def _is_welcome(self, caller: Caller) -> bool:
        """Whether a caller needs no key."""
        match self._anonymous:
            case "always":
                return True
            case "never":
                return False
            case str():
                return caller.is_loopback
            case networks:
                return caller.is_within(networks)

    def _tokens(self, headers: Headers, in_path: str) -> list[str]:
        """What may be a key; some clients send two."""
        scheme, _, token = headers.get(AUTHORIZATION, "").strip().partition(" ")
        bearer = token.strip() if "bearer" in self._accept and scheme.lower() == "bearer" else ""
        other = headers.get(X_API_KEY, "").strip() if "x-api-key" in self._accept else ""
        path = in_path if self.takes_path else ""
        return [token for token in (path, bearer, other) if token]

    def _is_expired(self, key: Key) -> bool:
        return key.expires_at is not None and self._wall() >= key.expires_at

    def _how_to_send(self) -> str:
        """What somebody without a key should do."""
        known = (way for name, way in _WAYS if name in self._accept)
        return f"An API key is needed: send it {', or '.join(known)}. {_GET_ONE}"

    def _key(self, token: str) -> Key | None:
        """Look a key up by its hash; the same steps whether it is known or not."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        key = self._keys.get(digest)
        same = hmac.compare_digest(digest, bytes(32) if key is None else key.sha256)
        return key if same else None

    def _refuse_guesser(self, caller: Caller, now: float) -> None:
        rest_s = self._failures.rest_s(caller, now)
        if rest_s > 0:
            raise Unauthorized(
                f"Too many wrong API keys from {caller.address}. Wait a minute.",
                retry_after_s=rest_s,
            )


_WAYS = (
    ("bearer", 'as "Authorization: Bearer KEY"'),
    ("x-api-key", 'as "x-api-key: KEY"'),
    ("path", "in the address, as http://HOST/k/KEY (OLLAMA_HOST) or http://HOST/k/KEY/v1"),
)
_GET_ONE = "Who runs this balancer makes one with: ollama-balancer key new NAME"
_HIDDEN = (
    " (This request came through a proxy that is not in server.trusted_proxies, so who sent it is"
    " not known.)"
)
