"""
The door to backends: ``open(lease, call, sink)``.

Laws:
- Bytes are pushed: ``sink.head``, then ``sink.data`` as it comes, then exactly one of ``sink.end``
  and ``sink.fail``; nothing after that, nothing at all after ``abort``, and nothing before ``open``
  has returned.
- Aborting a call closes its connection, which is what tells Ollama to stop generating.
- No total time limit. Connecting, sending, and silence between chunks are bounded; silence before
  the first byte is not a matter for a timer (a model may be loading).
- Questions of ours go over connections of their own, so that a check never waits for inference.
- Only what this module opens reaches backends.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol, cast

import aiohttp
from aiohttp import ClientTimeout, DummyCookieJar, TCPConnector
from yarl import URL

from balancer.core import cloud
from balancer.core.domain import Call
from balancer.core.pool import Lease
from balancer.core.verdicts import Failure, FailureKind
from balancer.net import connecting
from balancer.net.connecting import RESOLVE_S, Resolver, Target, tuned, tuned_socket
from balancer.net.connection import STOPPED, Handle, Sink, Transaction
from balancer.net.connections import Connections, Ground
from balancer.net.tasks import Tasks
from balancer.net.wheel import Wheel

__all__ = [
    "ClientUpstream",
    "Handle",
    "Sink",
    "Target",
    "Upstream",
    "UpstreamError",
    "session",
    "tuned",
]

READ_BYTES: Final = 64 * 1024
MAX_INTERIM_FIELD: Final = 16 * 1024
SKIPPED_DEFAULTS: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")


class Upstream(Protocol):
    """The door."""

    def open(self, lease: Lease, call: Call, sink: Sink) -> Handle:
        """Send *call* to the lease's backend and push the answer into *sink*."""


class ClientUpstream:
    """
    The door: kept connections of our own for calls, a session for questions of ours.

    Args:
        targets: By backend name; replaced as a whole on a reload.
        tasks: Owns the connections being made.
    """

    def __init__(self, targets: Mapping[str, Target], tasks: Tasks) -> None:
        loop = asyncio.get_running_loop()
        self._targets = dict(targets)
        self._loop = loop
        self._ground = Ground(loop, tasks, Wheel(loop), Resolver(loop))
        self._connections: dict[str, Connections] = {}
        self._is_stopped = False
        # Only the backends' own addresses are resolved; a literal IP costs nothing.
        connector = TCPConnector(
            limit=0,
            force_close=True,
            ttl_dns_cache=30,
            enable_cleanup_closed=False,
            socket_factory=tuned_socket,
        )
        self._session = session(connector)

    @property
    def targets(self) -> dict[str, Target]:
        """How each backend is reached, by its name."""
        return self._targets

    @targets.setter
    def targets(self, targets: dict[str, Target]) -> None:
        self._targets = targets
        for name, connections in list(self._connections.items()):
            if targets.get(name) != connections.target:
                connections.close()
                del self._connections[name]

    def stop(self) -> None:
        """End every transaction as a failure of ours, now; those to come fail, too."""
        self._is_stopped = True
        for transaction in self._ground.wheel:
            cast("Transaction", transaction).fail(STOPPED)
        self._ground.wheel.close()
        for connections in self._connections.values():
            connections.close()
        self._connections.clear()

    async def close(self) -> None:
        """Stop, and close the session."""
        self.stop()
        await self._session.close()
        await asyncio.sleep(0)  # the transports close their sockets in the next turn

    def flush(self, name: str) -> None:
        """Trust no connection to that backend any longer; calls that run go on."""
        connections = self._connections.get(name)
        if connections is not None:
            connections.flush()

    def idle(self) -> dict[str, int]:
        """Kept connections at rest, by backend."""
        return {name: one.idle for name, one in self._connections.items()}

    @property
    def stale(self) -> Counter[str]:
        """Requests that met a connection the backend had closed, by backend."""
        return self._ground.stale

    def open(self, lease: Lease, call: Call, sink: Sink) -> Handle:
        """Send *call* and push the answer; see the protocol."""
        name = lease.backend.name
        target = self._targets.get(name) or Target(lease.backend.url)
        connections = self._connections.get(name)
        if connections is None or connections.target is not target:
            connections = self._reach(name, target)
        if lease.backend.provider:
            call = cloud.at_provider(call)
        return self._send(connections, call, sink, patient=not lease.remote)

    def send(self, target: Target, call: Call, sink: Sink, *, patient: bool = True) -> Handle:
        """
        The same without a lease, for work that takes no slot: pulling, creating. It goes over a
        connection of its own.

        Args:
            patient: Silence before the answer's head has no limit; else that of any other.
        """
        connections = Connections(target.url, replace(target, reuse=False), self._ground)
        return self._send(connections, call, sink, patient=patient)

    def _reach(self, name: str, target: Target) -> Connections:
        """The connections to a target that may have changed."""
        known = self._connections.get(name)
        if known is not None and known.target == target:
            known.target = target
            return known
        if known is not None:
            known.close()
        made = self._connections[name] = Connections(name, target, self._ground)
        return made

    def _send(self, to: Connections, call: Call, sink: Sink, *, patient: bool) -> Handle:
        if not self._is_stopped:
            return to.send(call, sink, patient=patient)
        refused = Transaction(
            sink, b"", b"", self._ground.wheel, bare=False, patient=True, idle_s=None
        )
        self._loop.call_soon(refused.fail, STOPPED)
        return refused

    async def upload(
        self,
        target: Target,
        path: str,
        pieces: AsyncIterator[bytes],
        headers: Sequence[tuple[str, str]],
    ) -> tuple[int, bytes]:
        """
        Send a body of any size as it comes: status, and the answer's body.

        Raises:
            UpstreamError: It was not taken whole, or not answered.
        """
        try:
            async with self._session.post(
                URL(target.url + path, encoded=True),
                data=pieces,
                headers=_joined([("Accept-Encoding", "identity"), *headers], target),
                timeout=_timeout(target),
                ssl=target.tls,
                server_hostname=target.server_name,
                allow_redirects=False,
            ) as response:
                return response.status, await response.content.read(MAX_INTERIM_FIELD)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(_failure(error)) from error

    async def ask(
        self,
        target: Target,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        limit_s: float | None,
        max_bytes: int = 64 * 1024 * 1024,
        headers: Sequence[tuple[str, str]] = (),
    ) -> tuple[int, str, bytes]:
        """
        One small question of ours (check, list, load): status, content type, body.

        Raises:
            UpstreamError: It was not answered, or not in *limit_s* seconds.
        """
        sent = [("Accept-Encoding", "identity"), *headers]
        if body is not None:
            sent.append(("Content-Type", "application/json"))
        try:
            async with (
                asyncio.timeout(limit_s),
                self._session.request(
                    method,
                    URL(target.url + path, encoded=True),
                    data=body,
                    headers=_joined(sent, target),
                    timeout=_timeout(target),
                    ssl=target.tls,
                    server_hostname=target.server_name,
                    allow_redirects=False,
                ) as response,
            ):
                parts, size = [], 0
                async for part in response.content.iter_any():
                    size += len(part)
                    if size > max_bytes:
                        raise UpstreamError(Failure(FailureKind.MALFORMED, "an endless answer"))
                    parts.append(part)
                kind = response.headers.get("Content-Type", "")
                return response.status, kind, b"".join(parts)
        except TimeoutError as error:
            kind_ = FailureKind.CONNECT_TIMEOUT if "onnect" in str(error) else FailureKind.OVERDUE
            raise UpstreamError(Failure(kind_, accepted=True)) from error
        except aiohttp.ClientPayloadError as error:
            raise UpstreamError(_payload_failure(error)) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(_failure(error)) from error


class UpstreamError(Exception):
    """A question of ours that was not answered."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def session(connector: TCPConnector) -> aiohttp.ClientSession:
    """A session without any of the conveniences that would hurt a proxy."""
    made = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        read_bufsize=READ_BYTES,
        skip_auto_headers=SKIPPED_DEFAULTS,
        timeout=ClientTimeout(total=None),
        max_line_size=MAX_INTERIM_FIELD,
        max_field_size=MAX_INTERIM_FIELD,
    )
    # aiohttp repeats idempotent requests by itself on a dropped connection; one layer retries,
    # and that is ours.
    made._retry_connection = False  # noqa: SLF001 - the only switch there is
    return made


def _timeout(target: Target) -> ClientTimeout:
    """Limits on getting a connection; none on what goes over it."""
    connect_s = target.connect_s
    whole_s = None if connect_s is None else connect_s + RESOLVE_S
    return ClientTimeout(total=None, connect=whole_s, sock_connect=connect_s)


def _joined(sent: Sequence[tuple[str, str]], target: Target) -> list[tuple[str, str]]:
    """Headers with the backend's own, which stand instead of a caller's of the same name."""
    own = {name.lower() for name, _ in target.headers}
    return [*((name, value) for name, value in sent if name.lower() not in own), *target.headers]


def _failure(error: Exception) -> Failure:
    """Ours for aiohttp's. A malformed answer carries status 400 there: go by the type."""
    detail = _told(error)
    match error:
        case aiohttp.ConnectionTimeoutError():
            return Failure(FailureKind.CONNECT_TIMEOUT)
        case aiohttp.ClientConnectorError():
            return Failure(FailureKind.CONNECT, detail)
        case aiohttp.ClientResponseError() | ValueError():
            return Failure(FailureKind.MALFORMED, detail, accepted=True)
        case _:
            return Failure(FailureKind.RESET, detail, accepted=True)


def _payload_failure(error: aiohttp.ClientPayloadError) -> Failure:
    cause = error.__cause__
    framing = isinstance(cause, aiohttp.http_exceptions.TransferEncodingError) and (
        "Not enough data" not in str(cause)
    )
    kind = FailureKind.MALFORMED if framing else FailureKind.CUT
    return Failure(kind, "" if kind is FailureKind.CUT else _told(error), accepted=True)


def _told(error: Exception) -> str:
    """The cause in a few words, without addresses that aiohttp repeats."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return connecting.told(error.os_error)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return ""
    return connecting.told(error)
