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
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, Protocol
from urllib.parse import unquote

from aiohttp import web

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
)
from balancer.core.events import CallEnded, Emit, Mishap
from balancer.core.limits import Charge
from balancer.core.memory import Hold
from balancer.core.routes import TABLE, dialect_of, other, split_key, without_key
from balancer.core.running import Run
from balancer.net.bodies import CONTINUE, body_at_hand, expected
from balancer.net.listener import SMALL, Request
from balancer.net.outlet import Outlet, Written
from balancer.net.visitor import REMEMBERED_S, Visitor

SAFE_ID: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")
TEXT: Final = "text/plain"
MALFORMED: Final = "malformed"
TICK_S: Final = 0.5
TICKED: Final = 100  # answers that are looked at in one turn of the loop
LOOPBACK: Final = ("127.0.0.1", "::1")
# What tells clients of backends, and stays away where `server.headers` is minimal.
TELLING: Final = tuple(
    f"X-Balancer-{name}"
    for name in ("Backend", "Attempts", "Route", "Queue-Ms", "Skipped", "Version")
)
NOBODY: Final = Principal("anonymous", Role.USER)


class Ticked(Protocol):
    """What has to be looked at now and then."""

    def tick(self, now: float) -> None:
        """It is *now*."""


class Exchange:
    """
    One request on its way through, with what its `CallEnded` will tell.

    What most requests never set stands in the class: an instance has only what is its own.

    Args:
        outlet: Where an answer goes that aiohttp does not write.
        path: By which it is routed, a key in front of it taken off.
        shown: The path for people, a key in it made unreadable.
        extra: Headers of every answer.

    Attributes:
        argument: What stood in the route's ``{name}``.
        alias: Under which the model was asked for.
        discreet: The caller is not told which backends there are.
        hold: What its body takes of the memory for bodies.
        visitor: Who asks, where it is known that what is found out of it is good for long.
        user: Whom a proxy of ours says that it asks for; empty: nobody in particular.
        charge: What its caller was charged, to be settled.
        run: The attempt that was made last.
        reply: The answer that is under way, if it is one that wants to be looked after.
        watching: A page that only looks on: a stop does not wait for it.
        num_ctx: The context that was written into its body, None: it is as it came.
        num_ctx_asked: What it asked for before, None: nothing.
    """

    route: Route | None = None
    argument = ""
    principal: Principal = NOBODY
    discreet = False
    client = ""
    user = ""
    cors: tuple[tuple[str, str], ...] = ()
    endpoint = "other"
    status = 0
    outcome = ""
    model = ""
    alias = ""
    backend = ""
    attempts = 0
    why = ""
    queue_s = 0.0
    first_byte_s: float | None = None
    upstream_s = 0.0
    bytes_in = 0
    bytes_out = 0
    usage: Usage = Usage()
    phase = ""
    error = ""
    streaming = False
    visitor: Visitor | None = None
    hold: Hold | None = None
    charge: Charge | None = None
    run: Run | None = None
    reply: Ticked | None = None
    watching = False
    num_ctx: int | None = None
    num_ctx_asked: int | None = None

    def __init__(
        self,
        request: Request,
        outlet: Outlet,
        request_id: str,
        path: str,
        started_at: float,
        dialect: Dialect,
        shown: str = "",
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.request = request
        self.outlet = outlet
        self.id = request_id
        self.path = path
        self.started_at = started_at
        self.dialect = dialect
        self.shown = shown
        self.extra = extra

    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""
        headers = {"X-Request-Id": self.id}
        if self.alias:
            headers["X-Balancer-Model"] = self.model
        if self.num_ctx is not None:
            headers["X-Balancer-Num-Ctx"] = str(self.num_ctx)
        if self.extra:
            headers.update(self.extra)
        if self.cors:
            headers.update(self.cors)
        return headers

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


def _nothing() -> None:
    """Nothing is held that would have to be given back."""


@dataclass(frozen=True, slots=True)
class Handed:
    """
    A request that was begun on the spot and could not be ended there.

    Args:
        go_on: Answers it.
        leave: Gives back what it holds; its client has left.
    """

    exchange: Exchange
    go_on: Callable[[], Awaitable[web.StreamResponse]]
    leave: Callable[[], None] = _nothing


class Doorkeeper(Protocol):
    """Decides who comes in; raises a BalancerError for those who do not."""

    @property
    def takes_path(self) -> bool:
        """Whether a key may stand in front of the path."""

    @property
    def rules(self) -> tuple[object, ...]:
        """What decides; others once anything has changed."""

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
# What is known without asking anybody: the document and its content type.
Known = Callable[[Exchange], tuple[bytes, str]]
# Takes a call with its body; tells the first when it is answered, or leaves it to the second.
Taking = Callable[[Exchange, bytes, Callable[[Exchange], None], Callable[[Handed], None]], None]
Refusal = Callable[[Rendered, BalancerError], Rendered]


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
        date: The time of day as HTTP tells it.
        known: By operation: what can be told at once.
        take: Takes inference calls that need no waiting, if they do not.
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
        date: Callable[[], str],
        known: Mapping[str, Known] = MappingProxyType({}),
        take: Taking | None = None,
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
        self._date = date
        self._known = dict(known)
        self._take = take
        self._ticking: asyncio.TimerHandle | None = None
        self._unseen: list[Exchange] = []  # in this round
        self._at_once: dict[tuple[str, str], tuple[Route, Known | None]] = {}
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
            known = self._known.get(route.operation)
            if not brace and (known is not None or (self._take and route.kind is Kind.ONE)):
                self._at_once[route.method, stem] = route, known
        self._prefixed = list(prefixes.items())

    def busy(self) -> int:
        """How many requests a stop waits for."""
        return sum(not exchange.watching for exchange in self.running)

    # -- on the spot ---------------------------------------------------------------------------

    def at_once(self, request: Request) -> bool:
        """Answer one request on the spot, or begin to; see `listener.Answering`."""
        target = request.raw_path
        found = self._at_once.get((request.method, target.partition("?")[0]))
        if found is None or not target.isascii() or "#" in target or "Expect" in request.headers:
            return False
        route, known = found
        body = b"" if known is not None else body_at_hand(request, SMALL)
        if body is None:
            return False
        exchange = self._begun(request, route.path, route.path, route.dialect)
        try:
            self._recognise(exchange)
            self._enter(exchange, route)
            if known is not None:
                self._tell_known(exchange, *known(exchange))
            elif self._take is not None:
                exchange.bytes_in = len(body)
                self._take(exchange, body, self._done, self._hand_over)
        except Exception as error:  # noqa: BLE001 - it is told where all errors are
            self._hand_over(Handed(exchange, partial(_raise, error)))
        return True

    def _recognise(self, exchange: Exchange) -> None:
        """Find out who asks, if this is not who asked on this connection before."""
        request, now = exchange.request, exchange.started_at
        connection, raw, rules = request.connection, request.raw_headers, self.door.rules
        visitor = connection.visitor
        if visitor is None or not visitor.is_again(raw, request.method, rules, now):
            _check_framing(request)
            self._let_in(exchange, "")
            self._check_circle(request)
            admitted = Admitted(
                exchange.principal, exchange.client, exchange.discreet, exchange.user
            )
            until = now + REMEMBERED_S
            visitor = Visitor(raw, request.method, rules, until, admitted, exchange.cors)
            exchange.visitor, connection.visitor = visitor, visitor if visitor.is_small else None
            return
        exchange.visitor = visitor
        exchange.cors = visitor.cors
        self._admitted(exchange, visitor.admitted)

    def _tell_known(self, exchange: Exchange, body: bytes, content_type: str) -> None:
        exchange.status = 200
        headers = exchange.headers()
        headers["Content-Type"] = content_type
        outlet = exchange.outlet
        outlet.begin(200, headers, len(body))
        outlet.end(b"" if exchange.request.method == "HEAD" else body)
        if outlet.is_held_up:  # whoever asks again and again has to read, too
            self._hand_over(Handed(exchange, partial(_taken, outlet)))
        else:
            self._done(exchange)

    def _done(self, exchange: Exchange) -> None:
        """It has been answered on the spot."""
        self.running.discard(exchange)
        self._tell(exchange)
        exchange.request.connection.answered(keep_alive=exchange.outlet.keep_alive)

    def _hand_over(self, handed: Handed) -> None:
        """A task has to go on with it."""
        request = handed.exchange.request
        request.handed = handed
        request.connection.hand_over(request)

    def dropped(self, request: Request) -> None:
        """Its client has left before `handle` could go on with it."""
        if request.handed is not None:
            exchange = request.handed.exchange
            request.handed.leave()
        else:
            exchange = self._open(request)
        exchange.outcome = exchange.outcome or "client_abort"
        self.running.discard(exchange)
        self._tell(exchange)

    def _open(self, request: Request) -> Exchange:
        path = request.raw_path.partition("?")[0]
        return self._begun(request, path, without_key(path), dialect_of(split_key(path)[1]))

    def _begun(self, request: Request, path: str, shown: str, dialect: Dialect) -> Exchange:
        exchange = Exchange(
            request,
            Outlet(request, self._date),
            self._request_id(request),
            path,
            self._clock(),
            dialect,
            shown,
            self._extra_headers,
        )
        self.running.add(exchange)
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        return exchange

    def _tick(self) -> None:
        """
        One timer for all answers that are under way: each is looked at every `TICK_S`.

        Of many, so many at a time: looking at thousands at once would hold up all of them.
        """
        now = self._clock()
        left = self._unseen or list(self.running)
        self._unseen = left[TICKED:]
        for exchange in left[:TICKED]:
            if exchange.reply is not None and exchange in self.running:
                exchange.reply.tick(now)
        self._ticking = None
        if self.running:
            turns = -(-len(self.running) // TICKED)
            self._ticking = asyncio.get_running_loop().call_later(TICK_S / turns, self._tick)

    # -- in a task -----------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        assert isinstance(request, Request)  # noqa: S101 - the listener makes no others
        request.connection.picked_up()
        handed: Handed | None = request.handed
        exchange = self._open(request) if handed is None else handed.exchange
        answering = self._answer(exchange) if handed is None else handed.go_on()
        del handed  # it may hold a body, and the error that is raised here
        try:
            response = await answering
            exchange.status = response.status
            if isinstance(response, web.Response):
                exchange.bytes_out = exchange.bytes_out or response.content_length or 0
        except asyncio.CancelledError:
            exchange.outcome = exchange.outcome or "client_abort"
            raise
        except BalancerError as error:
            _check_begun(request)
            response = self._refused(exchange, error)
        except ConnectionResetError:
            exchange.outcome = "client_abort"
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
        if expected(request) not in ("", CONTINUE):
            return self._unexpected(exchange)
        path, key = self._find_path(exchange)
        page = self._page(exchange, path)
        if page is not None and path in self._open_pages:
            exchange.endpoint = "balancer"
            return await page(exchange)
        methods, argument = self._match(path)
        allow = ", ".join(sorted(methods))
        preflight = self.door.preflight(request, allow) if request.method == "OPTIONS" else None
        if preflight is not None:
            exchange.endpoint = "preflight"
            return self._plain(exchange, 204, b"", preflight)
        self._let_in(exchange, key)
        if page is not None:
            exchange.endpoint = "metrics" if path == "/metrics" else "balancer"
            self.door.guard(request, exchange.principal, metrics=path == "/metrics")
            return await page(exchange)
        if path.startswith("/_balancer"):
            exchange.endpoint = "balancer"
            self.door.guard(request, exchange.principal, metrics=False)
        route = methods.get(request.method)
        if route is None and not methods:
            route = other(request.method, path.removesuffix("/"))
        if route is None:
            return self._unrouted(exchange, allow)
        exchange.argument = argument
        self._enter(exchange, route)
        handler = self._handlers.get(route.operation) or self._handlers[route.kind]
        return await handler(exchange)

    def _let_in(self, exchange: Exchange, key: str) -> None:
        """Find out who asks; *key* stood in front of the path."""
        request = exchange.request
        exchange.client = request.remote or ""  # until the door knows better, or refuses
        exchange.cors = self.door.cors(request)
        self._admitted(exchange, self.door.admit(request, exchange.started_at, exchange.path, key))

    @staticmethod
    def _admitted(exchange: Exchange, admitted: Admitted) -> None:
        exchange.principal, exchange.client = admitted.principal, admitted.client
        exchange.user = admitted.user
        exchange.discreet = admitted.discreet
        if admitted.discreet:
            exchange.request.hidden = TELLING

    def _enter(self, exchange: Exchange, route: Route) -> None:
        """Go in by a route, if that is allowed."""
        exchange.route = route
        exchange.endpoint, exchange.dialect = route.operation, route.dialect
        if exchange.visitor is None:
            self._check_circle(exchange.request)
        if self._is_draining():
            raise Draining("The balancer is stopping.", retry_after_s=5.0)
        self.door.require(exchange.principal, route.role)

    def _check_circle(self, request: Request) -> None:
        if any(self._token in via for via in request.headers.getall("Via", ())):
            why = self._led_here(request.headers.get("Host", ""))
            raise Loop(f"This balancer forwarded the request to itself: {why}. Take it out there.")

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
        given = request.headers.get("X-Request-Id")
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
        if exchange.hold is not None:
            exchange.hold.give_back()
        if exchange.charge is not None:
            run = exchange.run if exchange.status < 400 else None
            left = exchange.run is not None and exchange.outcome == "client_abort"
            exchange.charge.settle(exchange.usage, 0 if run is None else run.records, left=left)
        exchange.reply = exchange.request.handed = None  # what is over must not stay in a circle
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
                status=exchange.status or (499 if outcome == "client_abort" else 0),
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
                bytes_out=exchange.bytes_out or exchange.outlet.bytes_out,
                usage=exchange.usage,
                phase=exchange.phase if exchange.outcome == "client_abort" else "",
                error=exchange.error,
                inference=route is not None and route.kind is Kind.ONE,
                streaming=exchange.streaming,
                num_ctx=exchange.num_ctx,
                num_ctx_asked=exchange.num_ctx_asked,
                planned=None if exchange.run is None else exchange.run.planned,
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


def _check_begun(request: Request) -> None:
    """Another head inside an answer would pass for a part of it: then only breaking off is left."""
    if request.begun:
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


def _check_framing(request: Request) -> None:
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
    if not request.known_version:
        raise BadRequest("unsupported protocol version")


def _is_local_name(request: web.BaseRequest) -> bool:
    """Whether we are addressed on loopback, and by a name instead of an address."""
    reached = () if request.transport is None else request.transport.get_extra_info("sockname")
    name = re.sub(r":\d*$", "", request.headers.get("Host", ""))
    is_address = name.replace(".", "").isdecimal() or name.startswith("[")
    return isinstance(reached, tuple) and str(reached[0]) in LOOPBACK and not is_address


async def _raise(error: Exception) -> web.StreamResponse:
    try:
        raise error
    finally:
        del error  # whose traceback has this frame


async def _taken(outlet: Outlet) -> web.StreamResponse:
    await outlet.taken()
    return Written(200, outlet)
