"""The rules of `auth`, applied to aiohttp's requests: who comes in, and what they may reach."""

from __future__ import annotations

import socket
from typing import Final

from aiohttp import web

from balancer.core.domain import Admitted, Principal, Role
from balancer.ops.auth import ANONYMOUS, Access, Caller, check_origin, preflight, require

METRICS: Final = "/metrics"
NOBODY: Final = Principal(ANONYMOUS, Role.USER)
UNIX_PEER: Final = "127.0.0.1"  # whoever may open the socket's file is on this machine


class Door:
    """The front's doorkeeper. `access` is exchanged on a reload."""

    def __init__(self, access: Access) -> None:
        self.access = access

    def preflight(self, request: web.BaseRequest, allow: str) -> tuple[tuple[str, str], ...] | None:
        """The headers of the 204 that answers a preflight; None: it is none."""
        return preflight(request.headers.get("Origin"), request.headers.get("Host", ""), allow)

    def admit(self, request: web.BaseRequest, now: float) -> Admitted:
        """
        Check Origin, key and Host, in this order; raises what the client is told.

        Of who asks for the metrics no key is wanted; `guard` looks at where they come from.
        """
        headers = request.headers
        host = headers.get("Host", "")
        cors = check_origin(headers.get("Origin"), host)
        caller = self._caller(request)
        if request.path == METRICS:
            return Admitted(NOBODY, caller.address, cors)
        principal = self.access.authenticate(headers, caller, now)
        self.access.check_host(host, principal)
        return Admitted(principal, caller.address, cors)

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
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return UNIX_PEER
    return request.remote or ""
