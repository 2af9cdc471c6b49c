"""The rules of `auth` and `cors`, applied to aiohttp's requests: who comes in, and what for."""

from __future__ import annotations

import socket
from typing import Final

from aiohttp import web

from balancer.core.domain import Admitted, Principal, Role
from balancer.ops.auth import ANONYMOUS, Access, Caller, require
from balancer.ops.cors import Cors, check_asked

METRICS: Final = "/metrics"
NOBODY: Final = Principal(ANONYMOUS, Role.USER)
UNIX_PEER: Final = "127.0.0.1"  # whoever may open the socket's file is on this machine


class Door:
    """
    The front's doorkeeper. Its attributes are exchanged on a reload.

    Attributes:
        access: Who may do what.
        pages: Which pages of other origins may call.
        discreet: Whether only admins are told which backends there are.
    """

    def __init__(self, access: Access, pages: Cors, *, discreet: bool = False) -> None:
        self.access = access
        self.pages = pages
        self.discreet = discreet

    @property
    def takes_path(self) -> bool:
        """Whether a key may stand in front of the path."""
        return self.access.takes_path

    @property
    def rules(self) -> tuple[object, ...]:
        """What decides; others once anything has changed."""
        return self.access, self.pages, self.discreet

    def preflight(self, request: web.BaseRequest, allow: str) -> tuple[tuple[str, str], ...] | None:
        """The headers of the 204 that answers a preflight; None: it is none."""
        return self.pages.preflight(request.headers, allow)

    def cors(self, request: web.BaseRequest) -> tuple[tuple[str, str], ...]:
        """Check the Origin; the headers that every answer then needs."""
        return self.pages.check(request.headers)

    def admit(self, request: web.BaseRequest, now: float, path: str, key: str) -> Admitted:
        """
        Check key and Host, in this order; raises what the client is told.

        Of who asks for the metrics no key is wanted; `guard` looks at where they come from.

        Args:
            path: By which the request is routed.
            key: What stood in front of it as a key.
        """
        headers = request.headers
        peer = _peer(request)
        caller = self.access.caller(peer, headers)
        if path == METRICS:
            return Admitted(NOBODY, caller.address)
        principal = self.access.authenticate(headers, caller, now, key)
        self.access.check_host(headers.get("Host", ""), principal)
        check_asked(request.method, headers)
        discreet = self.discreet and principal.role is not Role.ADMIN
        user = self.access.user(peer, headers)
        return Admitted(principal, caller.address, discreet, user)

    def require(self, principal: Principal, role: Role) -> None:
        """Check the role."""
        require(principal, role)

    def guard(self, request: web.BaseRequest, principal: Principal, *, metrics: bool) -> None:
        """Check what our own pages need; the metrics need no key from where they may be reached."""
        caller = self._caller(request)
        if metrics:
            self.access.guard_reach(caller, request.headers)
        else:
            self.access.guard_admin(principal, caller, request.method, request.headers)

    def _caller(self, request: web.BaseRequest) -> Caller:
        return self.access.caller(_peer(request), request.headers)


def _peer(request: web.BaseRequest) -> str:
    """
    The other end's address; empty: nobody's.

    A client that has reset its connection has no address any more, and must not pass for one on
    this machine: only a unix socket makes it local.
    """
    transport = request.transport
    peer = None if transport is None else transport.get_extra_info("peername")
    if isinstance(peer, tuple):  # the usual; no unix socket has such a name
        return str(peer[0])
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return UNIX_PEER
    return request.remote or ""
