"""A simulated Ollama on a loopback socket.

    async with SimOllama([SimModel("llama3.2", load_s=2.0)], name="a") as sim:
        sim.url                        # http://127.0.0.1:port
        sim.host.counts["loads_started"], sim.host.running
        sim.requests[-1].ending        # "ok", "client-gone", or the fault that ended it
        sim.faults.cut(after=3)        # see Faults for the others; sim.faults.heal() ends them
        sim.script("/api/chat", status=502, segments=[b"bad gateway"])
        sim.segmenter = lambda chunk: [chunk[:1], chunk[1:]]
        sim.tap = lambda seen, chunk: ...   # each body byte as it is written

Every delay comes from the running loop's `time()`, so under `sim.loop.run` it costs nothing.
Made-up answers follow from model, prompt and seed alone; `prefix` is said before each of them. A
tool is called when the last user message holds its name and the model has the capability "tools".
A turn ended by an open assistant message is continued where it stops.

Cloud models are disabled, as with OLLAMA_NO_CLOUD, unless it is given a `Cloud`.

Left out: images; a sound is not listened to.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Literal, Self

from balancer.sim import catalogue, dialects, gojson, inference, names
from balancer.sim.cloud import FOUND, ME, RECOMMENDED, Cloud
from balancer.sim.delivery import Delivery, Seen, Site
from balancer.sim.dialects import Headers
from balancer.sim.gate import Gate, is_named
from balancer.sim.host import Host, Settings, SimModel
from balancer.sim.http import Exchange, Framing, Server
from balancer.sim.inference import Inference, decoded, ns_of, resolve
from balancer.sim.management import Management, Registry, Store
from balancer.sim.reading import RefusedError
from balancer.sim.script import Script, Scripts

VERSION = "0.33.0"
COUNT_TOKENS = "/v1/messages/count_tokens"
_BLOBS = "/api/blobs/"
_KEYS = "/api/user/keys/"
_TEXT: Headers = [("Content-Type", "text/plain")]


class SimOllama(Site):
    """A host behind a loopback port. Start it with `async with`, or `start` and `stop`."""

    def __init__(
        self,
        models: Iterable[SimModel] = (),
        *,
        name: str = "sim",
        settings: Settings | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
        seed: int = 0,
        prefix: str = "",
        version: str = VERSION,
        checks_origin: bool = True,
        origins: Sequence[str] = (),
        keeps_bodies: bool = False,
        counts_tokens: bool = False,
        registry: Registry | None = None,
        store: Store | None = None,
        cloud: Cloud | None = None,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - read once, so that clients see today
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.name = name
        self.address = address
        self.port = port
        self.version = version
        self.counts_tokens = counts_tokens
        """Has `/v1/messages/count_tokens`, which today's Ollama has not."""
        host = Host(models, clock=self.now, rng=Random(seed), settings=settings)
        super().__init__(host, Random(seed), prefix=prefix, keeps_bodies=keeps_bodies)
        self.cloud = cloud
        self.management = Management(self, store or Store(), registry or Registry())
        self.host.on_schedule = self._rearm
        self.faults = self.host.faults
        self.faults.on_change = self._on_fault
        self.requests: deque[Seen] = deque(maxlen=100_000)
        self._wall = wall
        self._epoch_ns = 0
        self._server: Server | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._scripts = Scripts()
        self._gate = Gate(self._methods, origins=origins, is_open=not checks_origin)
        self._routes: Mapping[str, Mapping[str, Callable[[Delivery], None]]] = {
            "/": {"GET": self._root, "HEAD": self._root},
            "/api/version": {"GET": self._version, "HEAD": self._version},
            "/api/tags": {"GET": self._tags, "HEAD": self._tags},
            "/api/ps": {"GET": self._ps},
            "/api/status": {"GET": self._status},
            "/api/show": {"POST": self._show},
            "/api/pull": {"POST": self.management.pull},
            "/api/push": {"POST": self.management.push},
            "/api/create": {"POST": self.management.create},
            "/api/copy": {"POST": self.management.copy},
            "/api/delete": {"DELETE": self.management.delete},
            "/api/me": {"POST": self._me},
            "/api/signout": {"POST": self._sign_out},
            "/api/experimental/web_search": {"POST": self._web_search},
            "/api/experimental/web_fetch": {"POST": self._web_search},
            "/api/experimental/model-recommendations": {"GET": self._recommendations},
            "/v1/models": {"GET": self._v1_models},
            COUNT_TOKENS: {"POST": self._count_tokens},
            **{path: {"POST": self._infer} for path in inference.ROUTES},
        }

    def __repr__(self) -> str:
        return f"<SimOllama {self.name} {self.url}>"

    # -- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Binds the port, a free one if it is 0."""
        self._loop = asyncio.get_running_loop()
        self._epoch_ns = round(self._wall() * 1e6) * 1000 - ns_of(self._loop.time())
        self._server = Server(
            self._serve,
            date=self._date,
            loop=self._loop,
            streams=lambda request: request.method == "POST" and request.path.startswith(_BLOBS),
        )
        self.port = self._server.listen(self.address, self.port)
        self._on_fault("start")
        self._rearm()

    async def stop(self) -> None:
        """Closes everything."""
        if self._server is not None:
            self._server.close()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._server = None

    @property
    def url(self) -> str:
        """Where it listens."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{address}:{self.port}"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop it was started in."""
        if self._loop is None:
            raise RuntimeError("not started")
        return self._loop

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._server.connections) if self._server else 0

    @property
    def accepted(self) -> int:
        """Connections accepted so far."""
        return self._server.accepted if self._server else 0

    def now(self) -> float:
        """The loop's time; 0 before the start."""
        return self._loop.time() if self._loop is not None else 0.0

    def wall_ns(self) -> int:
        """The time of day, moved on by the loop's time alone."""
        return self._epoch_ns + ns_of(self.now())

    def _date(self) -> str:
        return gojson.http_date(self.wall_ns())

    def _rearm(self) -> None:
        """Keeps one loop timer on the host's next event."""
        if self._loop is None:
            return
        at = self.host.next_at()
        if self._handle is not None:
            if at is not None and self._due_at <= at:
                return
            self._handle.cancel()
            self._handle = None
        if at is not None:
            self._due_at = at  # uvloop's handles do not tell when
            self._handle = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._handle = None
        self.host.advance()
        self._rearm()

    # -- steering -------------------------------------------------------------------------------

    def script(
        self,
        path: str,
        *,
        status: int = 200,
        headers: Sequence[tuple[str, str]] = (("Content-Type", "application/json"),),
        segments: Sequence[bytes | tuple[float, bytes]] = (),
        framing: Framing = "length",
        ending: Literal["clean", "cut", "reset", "stall"] = "clean",
        length: int | None = None,
        method: str | None = None,
        times: int | None = 1,
    ) -> None:
        """Answers the next `times` requests on a path word for word.

        A segment is one chunk, or `(delay_s, chunk)`. `length` declares another Content-Length
        than the segments have. `times=None` holds for ever.
        """
        script = Script(status, headers, segments, framing, ending, length, method, times)
        self._scripts.add(path, script)

    def _on_fault(self, what: str) -> None:
        server, faults = self._server, self.faults
        if server is None:
            return
        if self.host.frozen and not server.frozen:
            server.freeze()
        elif not self.host.frozen and server.frozen:
            server.thaw()
        is_closed = faults.refusing or faults.down
        if is_closed and server.listening:
            server.refuse()
        elif not is_closed and not server.listening:
            server.listen(self.address, self.port)
        if what == "restart":
            server.drop_all()
        self._rearm()

    # -- requests -------------------------------------------------------------------------------

    def _serve(self, exchange: Exchange) -> None:
        request = exchange.request
        seen = Seen(request.method, request.path, request.headers, request.body, self.now())
        self.requests.append(seen)
        delivery = Delivery(self, exchange, seen)
        if self.faults.hanging:
            return
        head = self.faults.take_head()
        if head is not None:
            self._spoil_head(delivery, head)
        elif self._is_a_question(seen):
            delivery.reply(405, [("Allow", "POST"), *_TEXT], b"405 method not allowed")
        elif (script := self._scripts.take(seen)) is not None:
            script.play(self.loop, delivery)
        elif self._gate.passes(delivery):
            self._route(delivery)

    def _is_a_question(self, seen: Seen) -> bool:
        """Whether somebody asks for a route that there is only in a script: it takes POST."""
        is_made_up = seen.path in self._scripts.paths and not self._methods(seen.path)
        return is_made_up and seen.method == "GET"

    @staticmethod
    def _spoil_head(delivery: Delivery, head: bytes) -> None:
        if head:
            delivery.exchange.raw(head)
            delivery.cut("garbage")
        else:
            delivery.reset("reset")

    # -- routes ---------------------------------------------------------------------------------

    def _methods(self, path: str) -> tuple[str, ...]:
        """The methods of a path, none if there is no such path."""
        if path in self.faults.missing_paths or (path == COUNT_TOKENS and not self.counts_tokens):
            return ()
        if path.startswith("/v1/models/") and "/" not in path.removeprefix("/v1/models/"):
            return ("GET",)
        if path.startswith(_BLOBS) and "/" not in path.removeprefix(_BLOBS):
            return ("HEAD", "POST")
        if path.startswith(_KEYS) and "/" not in path.removeprefix(_KEYS):
            return ("DELETE",)
        return tuple(self._routes.get(path, ()))

    def _route(self, delivery: Delivery) -> None:
        seen = delivery.seen
        methods = self._methods(seen.path)
        if not methods:
            delivery.reply(404, _TEXT, b"404 page not found")
        elif seen.method == "OPTIONS" and is_named(delivery.exchange.request.get("host") or ""):
            delivery.reply(204, [("Allow", ", ".join(methods))])
        elif seen.method not in methods:
            allow = ("Allow", ", ".join(methods))
            delivery.reply(405, [allow, *_TEXT], b"405 method not allowed")
        elif seen.path.startswith("/v1/models/"):
            self._v1_model(delivery, seen.path.removeprefix("/v1/models/"))
        elif seen.path.startswith(_BLOBS):
            heads = seen.method == "HEAD"
            (self.management.has_blob if heads else self.management.take_blob)(delivery)
        elif seen.path.startswith(_KEYS):
            self._sign_out(delivery)
        else:
            self._routes[seen.path][seen.method](delivery)

    def _root(self, delivery: Delivery) -> None:
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        delivery.reply(200, headers, b"Ollama is running")

    def _version(self, delivery: Delivery) -> None:
        _reply_json(delivery, {"version": self.faults.version_text or self.version})

    def _tags(self, delivery: Delivery) -> None:
        _reply_json(delivery, catalogue.tags(self.host))

    def _ps(self, delivery: Delivery) -> None:
        self.loop.call_later(self.faults.ps_delay_s, self._ps_now, delivery)

    def _ps_now(self, delivery: Delivery) -> None:
        self.host.advance()
        if not delivery.exchange.ended:
            _reply_json(delivery, catalogue.ps(self.host, self.wall_ns()))

    def _status(self, delivery: Delivery) -> None:
        is_off = self.cloud is None
        source = "env" if is_off else "none"
        _reply_json(delivery, {"cloud": {"disabled": is_off, "source": source}})

    def _me(self, delivery: Delivery) -> None:
        if self.cloud is None:
            _reply_json(delivery, {"error": "account unavailable"}, 503)
        else:
            self._reply_far(delivery, self.cloud, ME)

    def _sign_out(self, delivery: Delivery) -> None:
        if self.cloud is None:
            _reply_json(delivery, {"error": "there was an error signing out"}, 500)
        else:
            self.cloud.signed_in = False
            _reply_json(delivery, None)

    def _recommendations(self, delivery: Delivery) -> None:
        _reply_json(delivery, RECOMMENDED)

    def _web_search(self, delivery: Delivery) -> None:
        if self.cloud is None:
            told = "ollama cloud is disabled: web search is unavailable"
            _reply_json(delivery, {"error": told}, 403)
        else:
            self._reply_far(delivery, self.cloud, FOUND)

    @staticmethod
    def _reply_far(delivery: Delivery, cloud: Cloud, value: object) -> None:
        """What ollama.com says if it has nothing against it."""
        if cloud.against is None:
            _reply_json(delivery, value)
        else:
            delivery.reply(cloud.against[0], dialects.JSON, cloud.against[1].encode())

    def _show(self, delivery: Delivery) -> None:
        try:
            body = decoded(delivery.seen.body, inference.NO_BODY)
            name = str(body.get("model") or body.get("name") or "")
            delivery.seen.model = name
            model = self._described(name)
        except RefusedError as error:
            _reply_json(delivery, {"error": error.text}, error.status)
            return
        _reply_json(delivery, catalogue.show(model))

    def _described(self, name: str) -> SimModel:
        if self.cloud is not None and names.is_cloud(name):
            return self.cloud.model
        try:
            return resolve(self, name, RefusedError(400, "model is required"), _not_found)
        except RefusedError as error:
            if error.is_native:
                cloud = "ollama cloud is disabled: remote model details are unavailable"
                raise RefusedError(error.status, cloud, is_native=True) from None
            raise

    def _v1_models(self, delivery: Delivery) -> None:
        body = gojson.encode(catalogue.v1_models(self.host)) + "\n"
        delivery.reply(200, dialects.PLAIN_JSON, body.encode())

    def _v1_model(self, delivery: Delivery, name: str) -> None:
        try:
            model = self._described(name)
        except RefusedError as error:
            if error.is_native:
                _reply_json(delivery, {"error": error.text}, error.status)
            else:
                delivery.reply(error.status, *dialects.openai_error(error.status, error.text))
            return
        entry = gojson.encode(catalogue.v1_model(model, name)) + "\n"
        delivery.reply(200, dialects.PLAIN_JSON, entry.encode())

    def _count_tokens(self, delivery: Delivery) -> None:
        tokens = len(delivery.seen.body) // 4
        answer = gojson.encode({"input_tokens": tokens}) + "\n"
        delivery.reply(200, dialects.PLAIN_JSON, answer.encode())

    def _infer(self, delivery: Delivery) -> None:
        Inference(self, delivery).begin()


def _not_found(name: str) -> RefusedError:
    return RefusedError(404, f"model '{names.parse(name).shortest}' not found")


def _reply_json(delivery: Delivery, value: object, status: int = 200) -> None:
    delivery.reply(status, dialects.JSON, gojson.encode(value).encode())
