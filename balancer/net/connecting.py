"""
Getting to a backend: its name resolved, a tuned socket connected, TLS over it.

Laws:
- Every step is bounded: RESOLVE_S for a name, then the target's `connect_s`, then TLS_S.
- A name's last good answer outlives a resolver that fails.
- A failure is told in a few words for people, without addresses.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, TypeVar

from aiohappyeyeballs import start_connection
from yarl import URL

from balancer.core.verdicts import Failure, FailureKind

RESOLVE_S: Final = 3.0  # for a name, on top of the time to connect
TLS_S: Final = 5.0
REMEMBERED_S: Final = 30.0
MAX_NAMES: Final = 1024
NEXT_FAMILY_S: Final = 0.25  # until the other family of addresses is tried, too
# What OpenSSL makes of an answer in plain text, by its version.
_NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"})

AddrInfo = tuple[int, int, int, str, Any]
P = TypeVar("P", bound=asyncio.Protocol)


@dataclass(frozen=True, slots=True)
class Target:
    """
    How a backend is reached: what of its configuration `core` has no use for.

    Args:
        url: Scheme, authority and perhaps a path prefix, without a final slash.
        headers: Sent with every request; credentials among them, so never shown.
        tls: True: the default context for https; False: nothing is verified.
        connect_s, idle_s, load_s: Seconds to connect, between chunks, for a detached load; None:
            no limit.
        reuse: Connections are kept for further calls.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: ssl.SSLContext | bool = True
    server_name: str | None = None
    connect_s: float | None = 2.0
    idle_s: float | None = 300.0
    load_s: float | None = 600.0
    reuse: bool = True


def tuned(sock: socket.socket) -> None:
    """Keep-alive and user timeout, so that a peer that vanished without a word is noticed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 30_000),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def tuned_socket(info: Any) -> socket.socket:
    """A new socket for an address as `getaddrinfo` gives it."""
    family, kind, proto, _, _ = info
    sock = socket.socket(family, kind, proto)
    tuned(sock)
    return sock


class Resolver:
    """Addresses of names, remembered for a while."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._known: dict[tuple[str, int], tuple[float, Sequence[AddrInfo]]] = {}

    async def find(self, host: str, port: int) -> Sequence[AddrInfo]:
        """
        Where *host* is.

        Raises:
            OSError: The name has no address, or (TimeoutError) nobody says so.
        """
        until, known = self._known.get((host, port), (0.0, ()))
        if known and self._loop.time() < until:
            return known
        try:
            async with asyncio.timeout(RESOLVE_S):
                known = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            if not known:
                raise
        self._known.pop((host, port), None)
        while len(self._known) >= MAX_NAMES:
            del self._known[next(iter(self._known))]
        self._known[host, port] = self._loop.time() + REMEMBERED_S, known
        return known


class Way:
    """
    The way to one target.

    Raises:
        ValueError: Its url is none.
    """

    def __init__(self, target: Target, resolver: Resolver) -> None:
        url = URL(target.url, encoded=True)
        if url.host is None or url.port is None:
            raise ValueError("a backend's url needs a host")
        self._resolver = resolver
        self._host, self._port = url.host, url.port
        self._connect_s = target.connect_s
        self._tls = _context(target.tls) if url.scheme == "https" else None
        self._server_name = target.server_name or self._host
        self._literal = _literal(self._host, self._port)

    async def connect(self, made: Callable[[], P]) -> P:
        """
        A new connection, its protocol *made*.

        Raises:
            OSError: It does not come about; what `failure_of` tells.
            ValueError: The name can be none.
        """
        loop = asyncio.get_running_loop()
        infos = self._literal or await self._resolver.find(self._host, self._port)
        async with asyncio.timeout(self._connect_s):
            sock = await start_connection(
                infos, happy_eyeballs_delay=NEXT_FAMILY_S, socket_factory=tuned_socket
            )
        async with asyncio.timeout(TLS_S):
            _, protocol = await loop.create_connection(
                made,
                sock=sock,
                ssl=self._tls,
                server_hostname=None if self._tls is None else self._server_name,
            )
        return protocol


def _literal(host: str, port: int) -> Sequence[AddrInfo]:
    """The address that *host* is already; empty: it is a name."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError):
        return ()


def _context(tls: ssl.SSLContext | bool) -> ssl.SSLContext:  # noqa: FBT001 - as `Target` has it
    return tls if isinstance(tls, ssl.SSLContext) else _common_context(verify=tls)


@cache
def _common_context(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


def failure_of(error: Exception) -> Failure:
    """What is told of a connection that did not come about."""
    if isinstance(error, TimeoutError):
        return Failure(FailureKind.CONNECT_TIMEOUT)
    return Failure(FailureKind.CONNECT, told(error))


def told(error: Exception) -> str:
    """An error's cause in a few words."""
    if isinstance(error, ssl.SSLError):
        return of_tls(error)
    if isinstance(error, OSError):
        number = error.errno or 0  # the texts of asyncio are longer; those of DNS have none
        text = os.strerror(number) if number > 0 else error.strerror or str(error)
        return (text or type(error).__name__).lower()
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def of_tls(error: ssl.SSLError) -> str:
    """Its number is none of the system's, and would read as "operation not permitted"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message.rstrip('.')} (see tls)"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    hint = "; does it speak TLS?" if error.reason in _NOT_TLS else ""
    return f"TLS: {reason}{hint}"
