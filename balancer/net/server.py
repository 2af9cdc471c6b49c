"""
The front: one listener, one way in, one log event per request.

Laws:
- Every request ends in exactly one `CallEnded`, whatever became of it.
- Paths are matched against the route table, decoded once; what is not in the table is answered
  here, as Ollama answers it, and reaches no backend.
- A refusal is a `BalancerError`; it is turned into the caller's dialect here and nowhere else.
- A client that hangs up cancels its handler (aiohttp does so only when told to).
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol
from urllib.parse import unquote

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong, PayloadEncodingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from balancer.core import names
from balancer.core.dialect import Rendered, render
from balancer.core.domain import Admitted, Dialect, Kind, Principal, Role, Route, Usage
from balancer.core.errors import (
    BadRequest,
    BalancerError,
    BodyTooLarge,
    CutStream,
    Draining,
    Forbidden,
    Loop,
    RequestTimeout,
    Unavailable,
    UnknownRoute,
    UnsupportedEncoding,
)
from balancer.core.events import CallEnded, Emit, Mishap
from balancer.core.routes import TABLE, ZSTD, dialect_of, other, split_key, without_key
from balancer.net import writing
from balancer.net.inflate import unzstd

BACKLOG: Final = 4096
HEAD_LINES: Final = 4  # how many lines of the longest kind may make up a head
MAX_FRAMING: Final = 64 * 1024  # bytes that frame a body in chunks,
FRAMING_RATIO: Final = 16  # and so many for each byte of it; one chunk per byte takes six
MAX_HEADERS: Final = 128
MAX_UNPACKED: Final = 20 << 20  # of a compressed body, as Ollama has it
BODY_STALL_S: Final = 30.0
# After so many seconds a body must have come at so many bytes a second; not so uploads of files.
SLOWEST: Final = ((10.0, 1024), (300.0, 100 * 1024))
SAFE_ID: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")
TEXT: Final = "text/plain"
MALFORMED: Final = "malformed"
PLAIN: Final = "text/plain; charset=utf-8"
_TOO_LONG: Final = b"431 Request Header Fields Too Large"
CONTINUE: Final = "100-continue"
LOOPBACK: Final = ("127.0.0.1", "::1")
# What tells clients of backends, and stays away where `server.headers` is minimal.
TELLING: Final = ("Backend", "Attempts", "Route", "Queue-Ms", "Skipped", "Version")


NOBODY: Final = Principal("anonymous", Role.USER)


@dataclass(slots=True, eq=False)
class Exchange:
    """
    One request on its way through, with what its `CallEnded` will tell.

    Args:
        path: By which it is routed, a key in front of it taken off.
        shown: The path for people, a key in it made unreadable.
        discreet: The caller is not told which backends there are.
    """

    request: web.BaseRequest
    id: str
    path: str
    started_at: float
    dialect: Dialect
    route: Route | None = None
    argument: str = ""  # what stood in the route's {name}
    shown: str = ""
    principal: Principal = NOBODY
    discreet: bool = False
    client: str = ""
    cors: tuple[tuple[str, str], ...] = ()
    endpoint: str = "other"
    status: int = 0
    outcome: str = ""
    model: str = ""
    alias: str = ""  # under which it was asked for
    backend: str = ""
    attempts: int = 0
    why: str = ""
    queue_s: float = 0.0
    first_byte_s: float | None = None
    upstream_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    usage: Usage = field(default_factory=Usage)
    phase: str = ""
    error: str = ""
    streaming: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)
    watching: bool = False  # a page that only looks on: a stop does not wait for it

    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""
        model = {"X-Balancer-Model": self.model} if self.alias else {}
        return {"X-Request-Id": self.id, **model, **self.extra, **dict(self.cors)}

    def use(self, model: str, canonical: str) -> None:
        """
        Note which model the call is for.

        Raises:
            Forbidden: The caller's key is not for it.
        """
        self.model = model
        if not names.covered(self.principal.models, canonical):
            globs = ", ".join(self.principal.models)
            raise Forbidden(
                f"The key {self.principal.name!r} is not for the model {model[:128]!r}, only for: "
                f"{globs}. Ask for one of these, or ask the operator."
            )

    def told(self, error: BalancerError) -> BalancerError:
        """The error as its caller may read it; the log has all of it."""
        if not self.discreet or not isinstance(error, (Unavailable, CutStream, Loop)):
            return error
        said = (type(error).__doc__ or "").strip().splitlines()[0]
        return type(error)(said, retry_after_s=error.retry_after_s)


class Doorkeeper(Protocol):
    """Decides who comes in; raises a BalancerError for those who do not."""

    @property
    def takes_path(self) -> bool:
        """Whether a key may stand in front of the path."""

    def preflight(self, request: web.BaseRequest, allow: str) -> tuple[tuple[str, str], ...] | None:
        """The headers of the 204 that answers a preflight; None: it is none."""

    def cors(self, request: web.BaseRequest) -> tuple[tuple[str, str], ...]:
        """Check the Origin; the headers that every answer then needs."""

    def admit(self, request: web.BaseRequest, now: float, path: str, key: str) -> Admitted:
        """Check key and Host; *key* stood in front of the path."""

    def require(self, principal: Principal, role: Role) -> None:
        """Check the role."""

    def guard(self, request: web.BaseRequest, principal: Principal, *, metrics: bool) -> None:
        """Check what our own pages need."""


Handler = Callable[[Exchange], Awaitable[web.StreamResponse]]
Refusal = Callable[[Rendered, BalancerError], Rendered]


def check_parser() -> None:
    """
    Refuse to run on aiohttp's pure-Python parser, which accepts what a proxy must not.

    Raises:
        RuntimeError: The C parser is not there.
    """
    if "_http_parser" not in HttpRequestParser.__module__:
        raise RuntimeError(
            "aiohttp was installed without its C parser; install a binary wheel of aiohttp"
        )


class Front:
    """
    Everything between the socket and a handler.

    Args:
        handlers: By `Kind` or by a route's operation; the operation is looked up first.
        pages: Our own, by (method, path): ``/_balancer/…`` and ``/metrics``. A path that ends in
            ``/{rest}`` has all that lie below it; what stood there is the exchange's argument.
        open_pages: Paths of those that answer anybody.
        is_draining: New calls are refused when this says so.
        token: Ours in ``Via``, by which a loop is seen.
        extra_headers: On every answer.
        refusals: By path: how a refusal looks to people, where a browser asks.
        chance: 0..1, by which refused clients are told to come back at different times.
        led_here: Told the Host of a request that came back to us: what leads here, for people.
    """

    def __init__(
        self,
        handlers: Mapping[str | Kind, Handler],
        pages: Mapping[tuple[str, str], Handler],
        open_pages: frozenset[str],
        door: Doorkeeper,
        emit: Emit,
        clock: Callable[[], float],
        is_draining: Callable[[], bool],
        token: str,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        extra_headers: Mapping[str, str] = MappingProxyType({}),
        refusals: Mapping[str, Refusal] = MappingProxyType({}),
        chance: Callable[[], float] = lambda: 0.0,
        led_here: Callable[[str], str] = lambda _: "one of its backends is its own address",
    ) -> None:
        self._led_here = led_here
        self._refusals = refusals
        self._chance = chance
        self._handlers = dict(handlers)
        self._pages = dict(pages)
        self._open_pages = open_pages
        self.door = door
        self._emit = emit
        self._clock = clock
        self._is_draining = is_draining
        self._token = token
        self._new_id = new_id
        self._extra_headers = extra_headers
        self._exact: dict[str, dict[str, Route]] = {}
        self._prefixed: list[tuple[str, dict[str, Route]]] = []
        self._fill()
        self.running: set[Exchange] = set()

    def _fill(self) -> None:
        prefixes: dict[str, dict[str, Route]] = {}
        for route in TABLE:
            stem, brace, _ = route.path.partition("{")
            table = prefixes if brace else self._exact
            table.setdefault(stem, {})[route.method] = route
        self._prefixed = list(prefixes.items())

    def busy(self) -> int:
        """How many requests a stop waits for."""
        return sum(not exchange.watching for exchange in self.running)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        path = request.raw_path.partition("?")[0]
        exchange = Exchange(
            request,
            self._request_id(request),
            path,
            self._clock(),
            dialect_of(split_key(path)[1]),
            shown=without_key(path),
            extra=self._extra_headers,
        )
        self.running.add(exchange)
        try:
            response = await self._answer(exchange)
        except asyncio.CancelledError:
            exchange.outcome = exchange.outcome or "client_abort"
            exchange.status = exchange.status or 499
            raise
        except BalancerError as error:
            _check_begun(request)
            response = self._refused(exchange, error)
        except ConnectionResetError:
            exchange.outcome, exchange.status = "client_abort", exchange.status or 499
            raise asyncio.CancelledError from None
        except Exception as error:  # noqa: BLE001 - a bug of ours must not take the client's answer
            self._emit(Mishap(self._clock(), "request", f"{type(error).__name__}: {error}"))
            exchange.outcome = "upstream_error"
            _check_begun(request)
            response = self._refused(exchange, BalancerError("internal error of the balancer"))
        finally:
            self.running.discard(exchange)
            self._tell(exchange)
        return response

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        _check_framing(request)
        if _expected(request) not in ("", CONTINUE):
            return self._unexpected(exchange)
        path, key = self._find_path(exchange)
        page = self._page(exchange, path)
        if page is not None and path in self._open_pages:
            exchange.endpoint = "balancer"
            return await self._run(page, exchange)
        methods, argument = self._match(path)
        allow = ", ".join(sorted(methods))
        preflight = self.door.preflight(request, allow) if request.method == "OPTIONS" else None
        if preflight is not None:
            exchange.endpoint = "preflight"
            return self._plain(exchange, 204, b"", preflight)
        exchange.client = request.remote or ""  # until the door knows better, or refuses
        exchange.cors = self.door.cors(request)
        admitted = self.door.admit(request, exchange.started_at, path, key)
        exchange.principal, exchange.client = admitted.principal, admitted.client
        exchange.discreet = admitted.discreet
        if isinstance(request, _Request):
            request.discreet = admitted.discreet
        if page is not None:
            exchange.endpoint = "metrics" if path == "/metrics" else "balancer"
            self.door.guard(request, admitted.principal, metrics=path == "/metrics")
            return await self._run(page, exchange)
        if path.startswith("/_balancer"):
            exchange.endpoint = "balancer"
            self.door.guard(request, admitted.principal, metrics=False)
        route = methods.get(request.method)
        if route is None and not methods:
            route = other(request.method, path.removesuffix("/"))
        if route is None:
            return self._unrouted(exchange, allow)
        exchange.route, exchange.argument = route, argument
        exchange.endpoint, exchange.dialect = route.operation, route.dialect
        self._check_route(exchange, route)
        handler = self._handlers.get(route.operation) or self._handlers[route.kind]
        return await self._run(handler, exchange)

    async def _run(self, handler: Handler, exchange: Exchange) -> web.StreamResponse:
        response = await handler(exchange)
        exchange.status = response.status
        if isinstance(response, web.Response):
            exchange.bytes_out = exchange.bytes_out or response.content_length or 0
            return await writing.whole(exchange.request, response)
        return response

    def _check_route(self, exchange: Exchange, route: Route) -> None:
        if any(self._token in via for via in exchange.request.headers.getall("Via", [])):
            why = self._led_here(exchange.request.headers.get("Host", ""))
            raise Loop(f"This balancer forwarded the request to itself: {why}. Take it out there.")
        if self._is_draining():
            raise Draining("The balancer is stopping.", retry_after_s=5.0)
        self.door.require(exchange.principal, route.role)

    def _page(self, exchange: Exchange, path: str) -> Handler | None:
        method = exchange.request.method
        found = self._pages.get((method, path))
        if found is not None:
            return found
        for (known, pattern), page in self._pages.items():
            stem, mark, _ = pattern.partition("{rest}")
            if mark and method == known and path.startswith(stem) and path != stem:
                exchange.argument = path.removeprefix(stem)
                return page
        return None

    def _match(self, path: str) -> tuple[Mapping[str, Route], str]:
        """The methods of a path; one trailing slash is forgiven, as Ollama forgives it."""
        for spelling in (path, path[:-1] if path.endswith("/") and path != "/" else path):
            exact = self._exact.get(spelling)
            if exact is not None:
                return exact, ""
            for stem, methods in self._prefixed:
                rest = spelling[len(stem) :]
                whole = "/" not in rest or stem == "/v1/models/"
                if spelling.startswith(stem) and rest and whole and rest == rest.strip("/"):
                    return methods, rest
        return {}, ""

    def _find_path(self, exchange: Exchange) -> tuple[str, str]:
        """By which path to route, and the key that stood in front of it."""
        whole, key, path = self._clean_path(exchange.request)
        if key and not self.door.takes_path:
            exchange.error = "a key in the path is not accepted (auth.accept)"
            key, path = "", without_key(whole)
        exchange.path, exchange.shown = path, without_key(whole)
        exchange.dialect = dialect_of(path)
        return path, key

    @staticmethod
    def _clean_path(request: web.BaseRequest) -> tuple[str, str, str]:
        """
        The path, decoded once, and split into a key in front and the rest.

        Refused where two readers could understand two things by it.
        """
        target = request.raw_path
        if not target.startswith("/"):
            target = _origin_form(target, request.headers.get("Host", ""))
        raw = target.partition("?")[0]
        try:
            path = unquote(raw, errors="strict")
        except UnicodeDecodeError:
            raise BadRequest("the path is not UTF-8") from None
        key, rest = (part.lower() for part in split_key(raw))
        escaped = "%2f" in rest and not rest.startswith("/v1/models/")
        escaped_slash = escaped or "%2f" in key
        dotted = "/../" in f"{path}/" or "/./" in f"{path}/"
        printed = not any(char < " " or char == "\x7f" for char in path)
        plain = target.isascii() and printed and "#" not in target and "//" not in path
        if escaped_slash or dotted or not plain:
            raise BadRequest("the path is not in its plain form")
        return path, *split_key(path)

    def _request_id(self, request: web.BaseRequest) -> str:
        given = request.headers.get("X-Request-Id", "")
        if given and len(given) <= 128 and SAFE_ID.issuperset(given):
            return given
        return self._new_id()

    def _unexpected(self, exchange: Exchange) -> web.Response:
        """417 as Go's server says it."""
        exchange.outcome, exchange.error = "rejected", "unsupported expectation"
        response = self._plain(exchange, 417, b"", ())
        response.force_close()
        return response

    def _unrouted(self, exchange: Exchange, allow: str) -> web.Response:
        """404 and 405 as gin says them; to OPTIONS on loopback, by name, only what is allowed."""
        if allow and exchange.request.method == "OPTIONS" and _is_local_name(exchange.request):
            return self._plain(exchange, 204, b"", (("Allow", allow),))
        exchange.outcome = "rejected"
        if allow:
            body, status = b"405 method not allowed", 405
            return self._plain(exchange, status, body, (("Allow", allow), ("Content-Type", TEXT)))
        return self._plain(exchange, 404, b"404 page not found", (("Content-Type", TEXT),))

    def _plain(
        self,
        exchange: Exchange,
        status: int,
        body: bytes,
        headers: Sequence[tuple[str, str]],
    ) -> web.Response:
        exchange.status = status
        exchange.bytes_out = len(body)
        response = web.Response(status=status, body=body, headers=exchange.headers())
        for name, value in headers:
            response.headers.add(name, value)
        return response

    def _refused(self, exchange: Exchange, error: BalancerError) -> web.Response:
        """The error in the caller's dialect; an empty text is an empty body, as Ollama's 403."""
        if not exchange.outcome:
            exchange.outcome = outcome_of(error)
        exchange.error = exchange.error or error.text or _foreign(exchange.request)
        if isinstance(error, UnknownRoute):
            return self._unrouted(exchange, "")
        told: Rendered = render(exchange.told(error), exchange.dialect, exchange.id, self._chance())
        if exchange.path in self._refusals:
            told = self._refusals[exchange.path](told, error)
        if not error.text:
            response = self._plain(exchange, error.status, b"", ())
        else:
            response = self._plain(exchange, told.status, told.body, told.headers)
        unclear = error.status == 400 and exchange.route is None  # what follows may be anything
        last = isinstance(error, (Draining, RequestTimeout, BodyTooLarge))
        if unclear or last or _is_unread(exchange):
            response.force_close()
        return response

    def malformed(self, client: str, status: int) -> None:
        """What could not be parsed was answered so; nothing of what was sent is told."""
        self._emit(
            CallEnded(
                at=self._clock(),
                request_id=self._new_id(),
                method="",
                path="",
                endpoint=MALFORMED,
                status=status,
                outcome="rejected",
                duration_s=0.0,
                client=client,
            )
        )

    def _tell(self, exchange: Exchange) -> None:
        now = self._clock()
        route = exchange.route
        outcome = exchange.outcome or ("ok" if exchange.status < 400 else "rejected")
        self._emit(
            CallEnded(
                at=now,
                request_id=exchange.id,
                method=exchange.request.method,
                path=exchange.shown,
                endpoint=exchange.endpoint,
                status=exchange.status,
                outcome=outcome,
                duration_s=now - exchange.started_at,
                client=exchange.client,
                user_agent=exchange.request.headers.get("User-Agent", ""),
                key=exchange.principal.name,
                model=exchange.model,
                alias=exchange.alias,
                backend=exchange.backend,
                attempts=exchange.attempts,
                why=exchange.why,
                queue_s=exchange.queue_s,
                first_byte_s=exchange.first_byte_s,
                upstream_s=exchange.upstream_s,
                bytes_in=exchange.bytes_in,
                bytes_out=exchange.bytes_out,
                usage=exchange.usage,
                phase=exchange.phase if exchange.outcome == "client_abort" else "",
                error=exchange.error,
                inference=route is not None and route.kind is Kind.ONE,
                streaming=exchange.streaming,
            )
        )


def _origin_form(target: str, host: str) -> str:
    """What follows the authority in ``http://authority/path``, which must be the Host."""
    scheme, mark, rest = target.partition("://")
    authority, slash, path = rest.partition("/")
    if not mark or scheme.lower() not in ("http", "https"):
        raise BadRequest("unsupported request target")
    if authority.lower() != host.lower():
        raise BadRequest("the request target names another host than the Host header")
    return f"{slash or '/'}{path}"


def _check_begun(request: web.BaseRequest) -> None:
    """Another head inside an answer would pass for a part of it: then only breaking off is left."""
    if isinstance(request, _Request) and request.begun:
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError


def _foreign(request: web.BaseRequest) -> str:
    """For the log, why a refusal had no text: Ollama gives none, an operator needs one."""
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    told = f"the Host {host!r}" if origin is None else f"the Origin {origin!r} or the Host {host!r}"
    return f"{told} is not allowed without a key (server.allowed_hosts)"


def outcome_of(error: BalancerError) -> str:
    """What a call that ends in *error* is counted as."""
    if error.status in (503, 429):
        return "shed"
    if error.status in (408, 504):
        return "timeout"
    return "upstream_error" if error.status == 502 else "rejected"


def _is_unread(exchange: Exchange) -> bool:
    """An unread body would have to be drained before the connection could be used again."""
    return not exchange.request.content.is_eof() if exchange.request.can_read_body else False


def _check_framing(request: web.BaseRequest) -> None:
    """Refuse what two HTTP parsers could read in two ways."""
    headers = request.headers
    encodings = headers.getall("Transfer-Encoding", [])
    if encodings and (
        [e.strip().lower() for e in encodings] != ["chunked"]
        or "Content-Length" in headers
        or request.version < (1, 1)
    ):
        raise BadRequest("unsupported transfer encoding")
    if any(asked.lower() != "h2c" for asked in headers.getall("Upgrade", [])):
        raise BadRequest("this server does not upgrade connections")
    if isinstance(request, _Request) and not request.known_version:
        raise BadRequest("unsupported protocol version")


def _expected(request: web.BaseRequest) -> str:
    return ",".join(request.headers.getall("Expect", [])).strip().lower()


def _is_local_name(request: web.BaseRequest) -> bool:
    """Whether we are addressed on loopback, and by a name instead of an address."""
    reached = () if request.transport is None else request.transport.get_extra_info("sockname")
    name = re.sub(r":\d*$", "", request.headers.get("Host", ""))
    is_address = name.replace(".", "").isdecimal() or name.startswith("[")
    return isinstance(reached, tuple) and str(reached[0]) in LOOPBACK and not is_address


def ask_for_body(request: web.BaseRequest) -> None:
    """Tell a client that waits for it that its body is wanted."""
    if _expected(request) and request.version >= (1, 1) and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def read_body(exchange: Exchange, max_bytes: int, clock: Callable[[], float]) -> bytes:
    """
    The whole body, so that it can be sent again; a compressed one as it was before.

    Raises:
        BadRequest: It is damaged.
        BodyTooLarge: Above *max_bytes*; told before it is read where the length is declared.
        RequestTimeout: Nothing came for 30 s, or it trickles (below 1 KiB/s after 10 s).
        UnsupportedEncoding: It is compressed where, or how, Ollama does not take it.
    """
    request, route = exchange.request, exchange.route
    encoding = ",".join(request.headers.getall("Content-Encoding", [])).strip().lower()
    is_zstd = encoding == "zstd" and route is not None and route.operation in ZSTD
    if encoding not in ("", "identity") and not is_zstd:
        raise UnsupportedEncoding(f"Content-Encoding {encoding[:32]!r} is not supported here.")
    declared = request.content_length
    if declared is not None and declared > max_bytes:
        raise _too_large(max_bytes)
    ask_for_body(request)
    parts: list[bytes] = []
    size = 0
    began = clock()
    while True:
        try:
            async with asyncio.timeout(BODY_STALL_S):
                part = await request.content.readany()
        except TimeoutError:
            raise RequestTimeout("The request's body stopped coming.") from None
        except PayloadEncodingError:
            raise BadRequest("the request's body is not framed as HTTP has it") from None
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        spent_s = clock() - began
        if any(spent_s > after_s and size < rate * spent_s for after_s, rate in SLOWEST):
            raise RequestTimeout("The request's body comes too slowly.")
    exchange.bytes_in = size
    body: bytes | None = parts[0] if len(parts) == 1 else b"".join(parts)
    if is_zstd:
        most = min(max_bytes, MAX_UNPACKED)
        body = await unzstd(body or b"", most)
        if body is None and most < max_bytes:
            raise BodyTooLarge(f"Unpacked, the request's body is larger than {most} bytes.")
    if body is None:
        raise _too_large(max_bytes)
    return body


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request's body is larger than {max_bytes} bytes (server.max_body of the balancer)."
    )


class _Connection(RequestHandler):
    """
    One client connection, with an absolute time limit for a request's head.

    aiohttp uses one time limit both for idle keep-alive and for a head that does not come; a
    short one races the clients' pools, a long one lets half-sent heads sit. It also bounds a
    head's lines and their number but not their sum, and not what frames a body in chunks.

    Args:
        max_head: Bytes of a whole head.
        refused: Told of a request that could not be parsed: the client, the answer's status.
    """

    __slots__ = (
        "_body",
        "_framing_bytes",
        "_head_bytes",
        "_head_timer",
        "_last_body",
        "_max_head",
        "_refused",
        "head_timeout_s",
    )

    def __init__(
        self,
        *args: Any,
        head_timeout_s: float,
        max_head: int,
        refused: Callable[[str, int], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_timeout_s = head_timeout_s
        self._refused = refused
        self._head_timer: asyncio.TimerHandle | None = None
        self._max_head = max_head
        self._head_bytes = 0
        self._body: StreamReader | None = None
        self._last_body: Any = None
        self._framing_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._arm()

    def data_received(self, data: bytes) -> None:
        request, queued = self._current_request, len(self._messages)
        # The rest of a body that was answered early is no head.
        drains = self._last_body is not None and not self._last_body.is_eof()
        waiting = not queued and request is None and not drains
        super().data_received(data)
        if self._messages:
            self._last_body = self._messages[-1][1]
        if request is not None and not request.content.is_eof():
            self._check_body(request.content, len(data), broken=len(self._messages) > queued)
        if self._messages or self._current_request is not None:
            self._disarm()
            self._head_bytes = 0
        elif waiting:
            self._head_bytes += len(data)
            if self._head_bytes > self._max_head:
                self._refuse_head()
            elif self._head_timer is None:
                self._arm()

    def _check_body(self, body: StreamReader, more: int, *, broken: bool) -> None:
        """
        End a body that is damaged, or whose chunks are mostly extensions.

        Args:
            broken: What came could not be parsed; aiohttp tells whoever reads next, not the
                reader of this body, who would wait for the rest of it.
        """
        self._framing_bytes = more + (self._framing_bytes if body is self._body else 0)
        self._body = body
        if broken or self._framing_bytes > MAX_FRAMING + FRAMING_RATIO * body.total_bytes:
            body.set_exception(PayloadEncodingError("bad chunks"))
            self._messages.clear()
            self._lingering_time = 0.0  # there is no telling where it would end

    def _refuse_head(self) -> None:
        """Answer a head that is too long before all of it has come."""
        if self.transport is not None and not self.transport.is_closing():
            peer = self.transport.get_extra_info("peername")
            self._refused(str(peer[0]) if isinstance(peer, tuple) else "", 431)
            head = f"HTTP/1.0 431 {_TOO_LONG.decode()[4:]}\r\nContent-Type: {PLAIN}\r\n"
            head += f"Content-Length: {len(_TOO_LONG)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + _TOO_LONG)
        self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._head_timer = self._loop.call_later(self.head_timeout_s, self._expired)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expired(self) -> None:
        self._head_timer = None
        if not self._messages and self._current_request is None:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - may hold a line of the client's input
    ) -> web.StreamResponse:
        """What cannot be parsed is answered with a fixed text, without what was sent."""
        self.log_exception("Error handling request from %s", request.remote, exc_info=exc)
        if isinstance(exc, LineTooLong):
            status = 431
        if isinstance(exc, HttpProcessingError):
            self._refused(request.remote or "", status)
        texts = {400: b"400 Bad Request", 431: _TOO_LONG}
        response = web.Response(status=status, body=texts.get(status, b"error"))
        response.headers["Content-Type"] = PLAIN
        response.force_close()
        return response


class _Request(web.BaseRequest):
    """
    A request whose answer goes out without the headers that aiohttp adds by itself.

    Attributes:
        begun: The answer's head has gone out.
        discreet: Without the headers that tell of backends.
        known_version: It is HTTP/1.0 or 1.1; anything else is answered as 1.0.
    """

    ATTRS = web.BaseRequest.ATTRS | {"begun", "discreet", "known_version"}
    begun = False
    discreet = False
    known_version = True

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        self.begun = True
        response.headers.popall("Server", None)
        for name in TELLING if self.discreet else ():
            response.headers.popall(f"X-Balancer-{name}", None)


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> _Request:
    """What the server makes of a parsed head."""
    known = message.version in (HttpVersion10, HttpVersion11)
    if not known:
        message = message._replace(version=HttpVersion10, should_close=True)
    request = _Request(message, payload, protocol, writer, task, asyncio.get_running_loop())
    request.known_version = known
    return request


class _Server(web.Server):
    """aiohttp's server with our connections."""

    def __init__(self, front: Front, *, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(front.handle, request_factory=_request, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._refused = front.malformed

    def __call__(self) -> RequestHandler:
        return _Connection(
            self,
            loop=self._loop,
            head_timeout_s=self._head_timeout_s,
            max_head=HEAD_LINES * self._kwargs["max_field_size"],
            refused=self._refused,
            **self._kwargs,
        )


def make_server(
    front: Front, *, keepalive_s: float, head_timeout_s: float, max_header: int
) -> _Server:
    """aiohttp's low-level server over *front*, set up for a proxy."""
    return _Server(
        front,
        head_timeout_s=head_timeout_s,
        handler_cancellation=True,
        keepalive_timeout=keepalive_s,
        max_line_size=max_header,
        max_field_size=max_header,
        max_headers=MAX_HEADERS,
        auto_decompress=False,
        lingering_time=2.0,
        access_log=None,
        tcp_keepalive=True,
        logger=logging.getLogger("aiohttp.server"),
    )


async def listen(server: _Server, sock: socket.socket) -> asyncio.Server:
    """Serve on a bound socket."""
    sock.listen(BACKLOG)  # uvloop keeps it to itself if somebody else was first
    loop = asyncio.get_running_loop()
    return await loop.create_server(server, sock=sock, backlog=BACKLOG)
