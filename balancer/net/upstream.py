"""
The door to backends: ``open(lease, call, sink)``.

Laws:
- Bytes are pushed: ``sink.head``, then ``sink.data`` as it comes, then exactly one of ``sink.end``
  and ``sink.fail``; nothing after that, and nothing at all after ``abort``.
- One connection per call, closed behind it: nothing is shared, so nothing can be desynchronised,
  and closing it is what tells Ollama to stop generating.
- No total time limit. Connecting, sending, and silence between chunks are bounded; silence before
  the first byte is not a matter for a timer (a model may be loading).
- Only this module opens connections to backends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import aiohttp
from aiohttp import ClientTimeout, DummyCookieJar, TCPConnector
from yarl import URL

from balancer.core import cloud
from balancer.core.domain import Call
from balancer.core.pool import Lease
from balancer.core.verdicts import Failure, FailureKind
from balancer.net.tasks import Tasks

READ_BYTES: Final = 64 * 1024
RESOLVE_S: Final = 3.0  # for a name, on top of the time to connect
SEND_STALL_S: Final = 30.0
SEND_BYTES_PER_S: Final = 1e6  # slower than any network that a model is served over
MAX_INTERIM_FIELD: Final = 16 * 1024
# What OpenSSL makes of an answer in plain text, by its version.
_NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"})
SKIPPED_DEFAULTS: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")


@dataclass(frozen=True, slots=True)
class Target:
    """
    How a backend is reached: what of its configuration `core` has no use for.

    Args:
        url: Scheme, authority and perhaps a path prefix, without a final slash.
        headers: Sent with every request; credentials among them, so never shown.
        tls: None: the default context for https.
        connect_s, idle_s, load_s: Seconds to connect, between chunks, for a detached load; None:
            no limit.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: ssl.SSLContext | bool = True
    server_name: str | None = None
    connect_s: float | None = 2.0
    idle_s: float | None = 300.0
    load_s: float | None = 600.0


class Sink(Protocol):
    """Who receives what a backend answers. Methods are synchronous and do not raise."""

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """The answer's head."""

    def data(self, data: bytes) -> None:
        """Bytes of its body, de-chunked, as they came."""

    def end(self) -> None:
        """It is complete."""

    def fail(self, failure: Failure) -> None:
        """It is not, and will not be."""


class Handle(Protocol):
    """One exchange under way."""

    def pause(self) -> None:
        """Stop reading from the backend."""

    def resume(self) -> None:
        """Go on reading."""

    def abort(self) -> None:
        """Close the connection at once; the sink hears nothing more. Idempotent."""


class Upstream(Protocol):
    """The door."""

    def open(self, lease: Lease, call: Call, sink: Sink) -> Handle:
        """Send *call* to the lease's backend and push the answer into *sink*."""


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


def _socket(info: Any) -> socket.socket:
    family, kind, proto, _, _ = info
    sock = socket.socket(family, kind, proto)
    tuned(sock)
    return sock


class ClientUpstream:
    """
    The door over an aiohttp ClientSession: one task per exchange reads and pushes.

    Args:
        targets: By backend name; replaced as a whole on a reload.
        tasks: Owns the exchanges.
    """

    def __init__(self, targets: Mapping[str, Target], tasks: Tasks) -> None:
        self.targets = dict(targets)
        self._tasks = tasks
        # Only the backends' own addresses are resolved; a literal IP costs nothing.
        connector = TCPConnector(
            limit=0,
            force_close=True,
            ttl_dns_cache=30,
            enable_cleanup_closed=False,
            socket_factory=_socket,
        )
        self._session = session(connector)

    async def close(self) -> None:
        """Close the session; exchanges are ended by their tasks' owner."""
        await self._session.close()

    def open(self, lease: Lease, call: Call, sink: Sink) -> Handle:
        """Send *call* and push the answer; see the protocol."""
        target = self.targets.get(lease.backend.name) or Target(lease.backend.url)
        if lease.backend.provider:
            call = cloud.at_provider(call)
        return self.send(target, call, sink, patient=not lease.remote)

    def send(self, target: Target, call: Call, sink: Sink, *, patient: bool = True) -> Handle:
        """
        The same without a lease, for work that takes no slot: pulling, creating.

        Args:
            patient: Silence before the answer's head has no limit; else that of any other.
        """
        exchange = _Exchange(self._session, target, call, sink, patient=patient)
        exchange.task = self._tasks.spawn(exchange.run(), f"exchange {call.id}")
        return exchange

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
            raise UpstreamError(_failure(error, headed=False, sent=True)) from error

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
            raise UpstreamError(_failure(error, headed=False, sent=True)) from error


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


class _Exchange:
    """One call on one connection: the task that reads, and the handle that steers it."""

    def __init__(
        self,
        client: aiohttp.ClientSession,
        target: Target,
        call: Call,
        sink: Sink,
        *,
        patient: bool,
    ) -> None:
        self._client = client
        self._target = target
        self._call = call
        self._sink: Sink | None = sink
        self._patient = patient
        self._flow = asyncio.Event()
        self._flow.set()
        self._sent = False
        self._headed = False
        self._last = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stopped_for: FailureKind | None = None
        self.task: asyncio.Task[Any] | None = None

    def pause(self) -> None:
        self._flow.clear()

    def resume(self) -> None:
        self._last = asyncio.get_running_loop().time()
        self._flow.set()

    def abort(self) -> None:
        self._sink = None
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """Carry the exchange out and tell the sink how it ended."""
        try:
            await self._exchange()
        except asyncio.CancelledError:
            if self._stopped_for is not None:
                self._fail(Failure(self._stopped_for, accepted=self._sent))
                return
            self._fail(Failure(FailureKind.CUT, "the balancer stopped"))
            raise
        except aiohttp.ClientPayloadError as error:
            self._fail(_payload_failure(error))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._fail(_failure(error, headed=self._headed, sent=self._sent))
        except Exception:  # a bug of ours; whoever waits must not wait for ever
            self._fail(Failure(FailureKind.CUT, "the balancer failed"))
            raise
        finally:
            if self._idle_timer is not None:
                self._idle_timer.cancel()

    async def _exchange(self) -> None:
        call, target = self._call, self._target
        url = URL(
            f"{target.url}{call.route.path}{'?' if call.query else ''}{call.query}", encoded=True
        )
        async with self._client.request(
            call.route.method,
            url,
            data=self._body(),
            headers=_joined([*call.headers, ("Content-Length", str(len(call.body)))], target),
            timeout=_timeout(target),
            ssl=target.tls,
            server_hostname=target.server_name,
            allow_redirects=False,
        ) as response:
            self._headed = True
            status = response.status
            if not 200 <= status <= 599:
                self._fail(Failure(FailureKind.MALFORMED, f"status {status}", accepted=True))
                return
            headers = [(k, v) for k, v in response.headers.items()]
            self._push_head(status, headers)
            if self._idle_timer is None:
                self._watch_idle()
            self._last = asyncio.get_running_loop().time()
            async for data in response.content.iter_any():
                self._last = asyncio.get_running_loop().time()
                if self._sink is None:
                    return
                self._sink.data(data)
                if not self._flow.is_set():
                    await self._flow.wait()
            sink, self._sink = self._sink, None
            if sink is not None:
                sink.end()

    async def _body(self) -> AsyncIterator[bytes]:
        """The body in one piece; asked for only once the connection stands."""
        loop = asyncio.get_running_loop()
        limit_s = SEND_STALL_S + len(self._call.body) / SEND_BYTES_PER_S
        stall = loop.call_later(limit_s, self._stop_for, FailureKind.SEND_STALL)
        try:
            yield self._call.body
            self._sent = True
            if not self._patient:
                self._watch_idle()
        finally:
            stall.cancel()

    def _push_head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        if self._sink is not None:
            self._sink.head(status, headers)

    def _fail(self, failure: Failure) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.fail(failure)

    def _watch_idle(self) -> None:
        """One timer per exchange that moves on by itself, instead of one per chunk."""
        if self._target.idle_s is None:
            return
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        self._idle_timer = loop.call_later(self._target.idle_s, self._check_idle)

    def _check_idle(self) -> None:
        loop = asyncio.get_running_loop()
        limit_s = self._target.idle_s or 0.0
        if not self._flow.is_set():  # the client is slow, not the backend
            self._last = loop.time()
        left_s = self._last + limit_s - loop.time()
        if left_s > 0:
            self._idle_timer = loop.call_later(left_s, self._check_idle)
        else:
            self._stop_for(FailureKind.IDLE)

    def _stop_for(self, kind: FailureKind) -> None:
        """Our own limit was passed."""
        if self.task is not None and self._stopped_for is None:
            self._stopped_for = kind
            self.task.cancel()


def _failure(error: Exception, *, headed: bool, sent: bool) -> Failure:
    """Ours for aiohttp's. A malformed answer carries status 400 there: go by the type."""
    detail = _told(error)
    match error:
        case aiohttp.ConnectionTimeoutError():
            return Failure(FailureKind.CONNECT_TIMEOUT)
        case aiohttp.ClientConnectorError():
            return Failure(FailureKind.CONNECT, detail)
        case aiohttp.ClientResponseError() | ValueError():
            return Failure(FailureKind.MALFORMED, detail, accepted=sent)
        case _:
            kind = FailureKind.CUT if headed else FailureKind.RESET
            return Failure(kind, detail, accepted=sent)


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
        inner = error.os_error
        if isinstance(inner, ssl.SSLError):
            return _of_tls(inner)
        number = inner.errno or 0  # the texts of asyncio are longer; those of DNS have none
        told = os.strerror(number) if number > 0 else inner.strerror or str(inner)
        return (told or type(inner).__name__).lower()
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return ""
    if isinstance(error, ssl.SSLError):
        return _of_tls(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _of_tls(error: ssl.SSLError) -> str:
    """Its number is none of the system's, and would read as "operation not permitted"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message.rstrip('.')} (see tls)"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    hint = "; does it speak TLS?" if error.reason in _NOT_TLS else ""
    return f"TLS: {reason}{hint}"
