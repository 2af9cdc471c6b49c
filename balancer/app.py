"""
The composition root: the only place that knows every room. Build, wire, start, reload, drain.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import urlsplit

from balancer import __version__
from balancer.config import (
    EVERYWHERE,
    BackendSpec,
    BreakerLimits,
    Config,
    KeepAlive,
    Listen,
    NumCtx,
    PinSpec,
    join,
    places,
)
from balancer.config import Limits as Configured
from balancer.core import names, strategy
from balancer.core.admission import Admission, QueueLimits
from balancer.core.aliases import Aliases
from balancer.core.bus import Bus
from balancer.core.catalog import Catalog
from balancer.core.contexts import Contexts, Policy, Rule, Rules, sized
from balancer.core.decisions import Decisions
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import Allowance, Backend, BreakerState, Kind, Role
from balancer.core.errors import Draining
from balancer.core.events import (
    BreakerMoved,
    Event,
    HealthFlipped,
    Serving,
    Stopped,
    Stopping,
)
from balancer.core.limits import Limits
from balancer.core.memory import Memory
from balancer.core.pins import Pin, Pins
from balancer.core.pool import GateSettings, Pool, PoolSettings
from balancer.core.retry import Budget
from balancer.core.scheduler import Scheduler
from balancer.core.sharing import Sharing
from balancer.net.account import Account
from balancer.net.direct import Direct
from balancer.net.discovery import Discovery, Look
from balancer.net.listener import check_parser, listen, make_server
from balancer.net.manage import Manage
from balancer.net.outlet import Dates
from balancer.net.prober import Prober, ProberSettings
from balancer.net.proxy import Proxy, ProxySettings
from balancer.net.reach import ManageSettings, Right
from balancer.net.reads import Reads
from balancer.net.server import Front
from balancer.net.spool import Spool
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target
from balancer.ops.admin import OPEN_PAGES, Admin
from balancer.ops.auth import Access
from balancer.ops.cors import Cors
from balancer.ops.dashboard import Dashboard
from balancer.ops.door import Door
from balancer.ops.explain import Explain
from balancer.ops.feed import Feed
from balancer.ops.garbage import Garbage
from balancer.ops.learned import Learned, beside
from balancer.ops.metrics import Metrics, QueueRow, Snapshot
from balancer.ops.recent import Recent
from balancer.ops.reload import Reload, Reloaded
from balancer.ops.status import Status
from balancer.ops.steering import Steering
from balancer.ops.switches import Switches

CUT_GRACE_S: Final = 2.0  # for error records to reach the clients of cut calls
LAG_S: Final = 1.0
WATCHED_S: Final = 60.0  # whoever has not asked for so long whether we are ready asks no more


class Timer:
    """The one timer of the dispatcher, set anew after every pass."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self.fire: Callable[[], None] = lambda: None

    def wake_at(self, at: float) -> None:
        """Fire at *at*, instead of whenever it was set to; inf: never."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if not math.isinf(at):
            self._handle = self._loop.call_at(at, self._fired)

    def _fired(self) -> None:
        self._handle = None
        self.fire()


@dataclass(frozen=True, slots=True)
class Stop:
    """
    How to stop.

    Args:
        reason: For the log.
        lag_s: How long to go on serving after readiness went off, for load balancers before us;
            where nobody is connected, or has asked of late, there is none.
    """

    reason: str
    lag_s: float = 0.0


class Balancer:
    """
    A whole balancer in one event loop. Build it inside the loop; `start`, then `wait`.

    Args:
        read: Loads the configuration anew, for a reload.
        seed: Of all chance, told in the log.
        sockets: Bound sockets to serve on instead of `server.listen`.
        extra_headers: On every answer.
        looked: What discovery has found already; None: it has not looked yet.
    """

    def __init__(
        self,
        config: Config,
        *,
        read: Callable[[], Config] | None = None,
        config_file: str | None = None,
        seed: int | None = None,
        sockets: Sequence[socket.socket] = (),
        subscribers: Sequence[Callable[[Event], None]] = (),
        extra_headers: Mapping[str, str] = MappingProxyType({}),
        looked: Look | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.config = config if looked is None else join(config, looked.found)
        self.seed = seed if seed is not None else int.from_bytes(os.urandom(4))
        self.bus = Bus()
        self._clock = loop.time
        self._sockets = list(sockets)
        self._rng = random.Random(self.seed)  # noqa: S311 - jitter, not secrets
        self._timer = Timer(loop)
        self._servers: list[asyncio.Server] = []
        self._stopping: asyncio.Future[Stop] = loop.create_future()
        self._now = asyncio.Event()
        self._over = asyncio.Event()
        self._leaving = False
        self._refusing = False
        self.addresses: tuple[str, ...] = ()
        self.reload = Reload(config, read or (lambda: config), self.apply, loop.time, self.bus)
        self._wire(config_file, extra_headers)
        self.discovery = Discovery(config, looked, self.upstream, self._found, loop.time, self.bus)
        self.bus.subscribe(self.recent, Recent.KINDS)
        self.bus.subscribe(self._distrust, (BreakerMoved, HealthFlipped))
        for subscriber in subscribers:
            self.bus.subscribe(subscriber)
        if self.switches is not None:
            self.bus.subscribe(self.switches, Switches.KINDS)
        if self.metrics is not None:
            self.bus.subscribe(self.metrics, self.metrics.kinds)

    def _scheduler(self, config: Config) -> Scheduler:
        affinity = config.routing.affinity
        self._cells = strategy.cell_count(self.pool)
        return strategy.build(
            config.routing.strategy,
            self.pool,
            self.limits.may_start,
            session_s=affinity.ttl_s if affinity.enabled else -1.0,
            decisions=self.decisions,
        )

    def _wire(self, config_file: str | None, extra_headers: Mapping[str, str]) -> None:
        config, clock, emit = self.config, self._clock, self.bus
        token = f"ollama-balancer-{self._rng.getrandbits(48):012x}"
        ids = random.Random(int.from_bytes(os.urandom(16)))  # noqa: S311 - names, not secrets
        self.tasks = Tasks(emit, clock)
        self.exchanges = Tasks(emit, clock)
        self.limits = Limits(clock)
        self.catalog = Catalog(clock, config.models.remember_s)
        self.catalog.aliases = aliases(config)
        hears = emit.hears
        self.pool = Pool(pool_settings(config), self.catalog, clock, self._rng, emit, hears)
        self.upstream = ClientUpstream(targets(config), self.exchanges)
        self.prober = Prober(
            prober_settings(config), self.pool, self.upstream, self.tasks, clock, _wall, emit
        )
        self.decisions = Decisions(emit, hears)
        self.dispatcher = Dispatcher(
            self.pool,
            self._scheduler(config),
            Admission(queue_limits(config), clock, self._rng.random),
            clock,
            emit,
            self._timer.wake_at,
            self.prober.load,
            self.prober.unload,
            hears,
            self.limits,
            time.perf_counter,
        )
        self.prober.dispatcher = self.dispatcher
        self.pool.changed = self.dispatcher.kick
        self._timer.fire = self.dispatcher.kick
        self.budget = Budget(clock, config.retry.budget_ratio)
        self.reads = Reads(self.pool, self.upstream, self.prober, clock, config.models.version)
        self.proxy = Proxy(
            proxy_settings(config),
            Memory(config.server.replay_memory_bytes),
            self.dispatcher,
            self.upstream,
            self.budget,
            clock,
            self.reads.unload,
            token,
            self.prober.stamp,
            self.limits,
        )
        self.account = Account(self.pool, self.upstream, clock, self.proxy.forwarded)
        self.manage = Manage(
            manage_settings(config),
            self.pool,
            self.upstream,
            self.prober,
            self.exchanges,
            clock,
            emit,
            self.proxy.forwarded,
            spool(config, clock),
        )
        self.contexts = self.proxy.contexts = Contexts(context_rules(config), self.pool)
        self.pool.usual = self.contexts.usual
        self.pool.pins = pins(config, self.contexts)
        self.proxy.explore = self.prober.explore
        self.proxy.fetch = self.manage.fetch
        self.metrics = self._metrics() if config.metrics.enabled else None
        paused = self.metrics.gc_paused if self.metrics is not None else lambda *_: None
        self.garbage = Garbage(clock, paused)
        self.recent = Recent(_wall_s)
        self.admin = self._admin(config_file)
        self.switches, self.learned = None, None
        if config.state.path is not None:
            self.switches = Switches(config.state.path, self.pool, clock, emit)
            kept = beside(config.state.path)
            self.learned = Learned(kept, self.dispatcher, self._urls, clock, _wall_s, emit)
        self.feed = Feed(self.admin.state, clock)
        board = Dashboard(self.admin.state, self.feed)
        shown = config.dashboard.enabled
        self.door = Door(access(config), cors(config), discreet=config.server.headers == "minimal")
        self.front = Front(
            {
                Kind.ONE: self.proxy.handle,
                **self.reads.handlers(),
                **self.account.handlers(),
                **self.manage.handlers(),
            },
            {**self.admin.pages(), **(board.pages() if shown else {})},
            OPEN_PAGES,
            self.door,
            emit,
            clock,
            lambda: self._refusing,
            token,
            Dates(clock, _wall_s),
            self.reads.known(),
            Direct(self.proxy).take,
            lambda: f"{ids.getrandbits(128):032x}",
            extra_headers=extra_headers,
            refusals=board.refusals() if shown else {},
            chance=self._rng.random,
            led_here=self._led_here,
        )
        self._server = make_server(
            self.front,
            keepalive_s=config.server.keepalive_timeout_s,
            head_timeout_s=config.server.head_timeout_s,
            max_header=config.server.max_header_bytes,
        )

    def _admin(self, config_file: str | None) -> Admin:
        status = Status(
            self.pool,
            self.dispatcher,
            self.reload,
            self.recent,
            self._clock,
            lambda: self._leaving,
            __version__,
            _wall().timestamp(),
            config_file,
            self.limits,
        )
        return Admin(
            status,
            Steering(self.pool, status, self.prober.look, self.prober.warm),
            Explain(
                self.pool,
                self.dispatcher,
                self._clock,
                lambda: self.config.routing.strategy,
                self.contexts,
                self.decisions,
                lambda key: self.door.access.principal(key),  # noqa: PLW0108 - there is none yet
                lambda: sharing(self.config),
            ),
            self.reload,
            self.metrics,
            lambda: self._leaving,
        )

    def _led_here(self, host: str) -> str:
        """Which backend is ourselves, by the Host under which we called it."""
        for member in self.pool.members.values():
            url, source = member.backend.url, member.backend.source
            if host and urlsplit(url).netloc in (host, f"{host}:80", f"{host}:443"):
                return f"its backend {member.name} ({url}, {source}) leads back here"
        return "one of its backends leads back here"

    def _urls(self) -> dict[str, str]:
        """Where each backend is."""
        return {name: member.backend.url for name, member in self.pool.members.items()}

    def _metrics(self) -> Metrics:
        return Metrics(
            snapshot=self._snapshot,
            known_models=self.catalog.names,
            wall=_wall_s,
            version=__version__,
            model_label_limit=self.config.metrics.model_label_limit,
        )

    def _snapshot(self) -> Snapshot:
        now = self._clock()
        waiting: dict[tuple[str, str], list[float]] = {}
        for ticket in self.dispatcher.waiting():
            shown, of = self.catalog.shown(ticket.call.key.model), ticket.call.priority_class
            waiting.setdefault((shown, of), []).append(now - ticket.queued_at)
        return Snapshot(
            backends=self.pool.snapshot(),
            queues=[QueueRow(model, len(s), max(s), of) for (model, of), s in waiting.items()],
            attempts=self.dispatcher.grants,
            retry_refused=self.budget.refused,
            limited=self.limits.refused,
            queue_refused=self.dispatcher.admission.refused,
            idle_connections=self.upstream.idle(),
            stale_connections=self.upstream.stale,
            decisions=self.decisions,
            pass_s=self.dispatcher.pass_s,
            late=self.dispatcher.late,
            believed={
                (name, self.catalog.shown(it.model)): self.pool.slots(name, it.model)
                for name in self.pool.members
                for it in self.pool.memory(name)
            },
        )

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind, begin to watch the backends, and serve."""
        check_parser()
        sockets = self._sockets or [bind(address) for address in self.config.server.listen]
        if self.switches is not None:
            self.switches.read()
        self._reshape()
        if self.learned is not None:
            self.learned.read()
            self.tasks.spawn(self.learned.run(), "learned")
        self.prober.start()
        self.prober.follow()
        self.tasks.spawn(self._watch_lag(), "event loop lag")
        self.tasks.spawn(self.discovery.run(), "discovery")
        for sock in sockets:
            self._servers.append(await listen(self._server, sock))
        self.addresses = tuple(shown_address(sock) for sock in sockets)
        self.garbage.begin()
        self.bus(Serving(self._clock(), self.addresses, len(self.pool.members), self.seed))

    def stop(self, stop: Stop) -> None:
        """Begin to drain; a second time: stop at once."""
        if self._stopping.done():
            self._now.set()
        else:
            self._stopping.set_result(stop)

    async def wait(self) -> None:
        """Until `stop` was called and everything has ended."""
        stop = await self._stopping
        if not self._leaving:
            await self._drain(stop)
        await self._over.wait()

    async def close(self) -> None:
        """Stop at once."""
        self.stop(Stop("closed"))
        self._now.set()
        await self.wait()

    async def _drain(self, stop: Stop) -> None:
        self._leaving = True
        waiting = len(self.dispatcher.waiting())
        self.bus(Stopping(self._clock(), stop.reason, self.pool.running, waiting))
        await self._unless_now(self._now.wait(), stop.lag_s if self._is_watched() else 0.0)
        for server in self._servers:
            server.close()
        self._refusing = True
        await self._unless_now(self._idle(), self.config.server.drain_timeout_s)
        cut = self.front.busy()
        self.feed.close()
        self.proxy.stopping = True
        self.dispatcher.refuse_all(Draining("The balancer is stopping.", retry_after_s=5.0))
        await self.exchanges.close()
        self.upstream.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(CUT_GRACE_S):
                await self._idle()
        await self._server.shutdown(timeout=0.5)
        await self.tasks.close()
        if self.learned is not None:
            await self.learned.save()
        await self.upstream.close()
        self.garbage.end()
        self.bus(Stopped(self._clock(), cut))
        self._over.set()

    def _is_watched(self) -> bool:
        """Whether anybody may notice that we are not ready any more."""
        is_asked = self._clock() - self.admin.asked_at < WATCHED_S
        return is_asked or bool(self._server.connections)

    def _distrust(self, event: Event) -> None:
        """What stood with a backend that went away, or fails, may stand no more."""
        match event:
            case BreakerMoved(backend=name, model=None, new=BreakerState.OPEN):
                self.upstream.flush(name)
            case HealthFlipped(backend=name, up=False):
                self.upstream.flush(name)

    async def _unless_now(self, wanted: object, limit_s: float) -> None:
        """Wait for *wanted* or the limit, whichever is first, or for a second stop."""
        if self._now.is_set() or limit_s <= 0:
            if asyncio.iscoroutine(wanted):
                wanted.close()
            return
        loop = asyncio.get_running_loop()
        waits = {loop.create_task(wanted), loop.create_task(self._now.wait())}  # type: ignore[arg-type]
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.wait(waits)

    async def _idle(self) -> None:
        """Until no request runs."""
        while self.front.busy():
            await asyncio.sleep(0.05)

    async def _watch_lag(self) -> None:
        """How late the loop is, for the metrics."""
        while True:
            due = self._clock() + LAG_S
            await asyncio.sleep(LAG_S)
            if self.metrics is not None:
                self.metrics.loop_lag(max(0.0, self._clock() - due))

    # -- reload --------------------------------------------------------------------------------

    def reload_now(self) -> Reloaded:
        """Read the configuration again; what is bad changes nothing."""
        return self.reload()

    def apply(self, config: Config) -> None:
        """
        Take a new configuration over, in one turn of the loop.

        Calls that run keep the settings they began with.
        """
        written, config = config, join(config, self.discovery.found)
        routing = self.config.routing
        # These may fail, on a bad certificate or key: then nothing has changed.
        reached, rules = targets(config), access(config)
        self.config = config
        self.upstream.targets = reached
        self.pool.configure(pool_settings(config))
        self.catalog.remember_s = config.models.remember_s
        self.catalog.aliases = aliases(config)
        self.contexts.rules = context_rules(config)
        self.pool.pins = pins(config, self.contexts)
        self._reshape(anew=config.routing != routing)
        self.dispatcher.admission.limits = queue_limits(config)
        self.prober.settings = prober_settings(config)
        self.prober.follow()
        self.proxy.settings = proxy_settings(config)
        self.proxy.memory.limit = config.server.replay_memory_bytes
        self.manage.reach.settings = manage_settings(config)
        self.reads.version_policy = config.models.version
        self.budget.ratio = config.retry.budget_ratio
        self.door.access, self.door.pages = rules, cors(config)
        self.door.discreet = config.server.headers == "minimal"
        self.discovery.follow(written)
        self.dispatcher.kick()

    def _reshape(self, *, anew: bool = False) -> None:
        """Take over who the backends are; where that asks for it, or *anew*, another scheduler."""
        self.pool.reshape(backends(self.config))
        if anew or strategy.cell_count(self.pool, self._cells) != self._cells:
            # another has to learn anew what is cached where
            self.dispatcher.exchange(self._scheduler(self.config))

    def _found(self) -> None:
        """Take over what discovery has found since; what is written stays as it was read."""
        config = self.config = join(self.reload.current, self.discovery.found)
        known = self.upstream.targets
        self.upstream.targets = {
            spec.name: old
            if (old := known.get(spec.name)) is not None and old.url == spec.url
            else _target(spec, config)
            for spec in config.backends
        }
        self._reshape()
        self.prober.follow()
        self.dispatcher.kick()


# -- settings for each room --------------------------------------------------------------------


def _wall_s() -> float:
    return time.time()  # noqa: TID251 - the wall clock's one source


def _wall() -> datetime:
    return datetime.fromtimestamp(_wall_s(), UTC)


def _gate(limits: BreakerLimits, like: GateSettings, half_open_max_s: float) -> GateSettings:
    return GateSettings(
        limits.in_a_row,
        limits.backoff_s,
        limits.backoff_max_s,
        like.window_s,
        like.minimum,
        like.ratio,
        half_open_max_s,
    )


def pool_settings(config: Config) -> PoolSettings:
    """What the pool needs."""
    usual = PoolSettings()
    load_s = config.timeouts.load_s or 3600.0
    return PoolSettings(
        host=_gate(config.breaker.host, usual.host, load_s + 60.0),
        model=_gate(config.breaker.model, usual.model, load_s + 60.0),
        interval_s=config.health.interval_s,
        fall=config.health.fall,
        rise=config.health.rise,
        first_byte_s=config.timeouts.first_byte_s or 3600.0,
        load_s=load_s,
    )


def prober_settings(config: Config) -> ProberSettings:
    """What the prober needs."""
    health = config.health
    return ProberSettings(
        health.timeout_s,
        health.models_interval_s,
        health.loaded_interval_s,
    )


def proxy_settings(config: Config) -> ProxySettings:
    """What the proxy needs."""
    streaming = config.streaming
    return ProxySettings(
        config.server.max_body_bytes,
        config.timeouts.total_s,
        streaming.heartbeat_after_s,
        streaming.heartbeat_s,
        aliases(config),
        sharing(config),
        _is_by_prefix(config),
    )


def _is_by_prefix(config: Config) -> bool:
    """Whether anybody wants to know how prompts begin."""
    affinity = config.routing.affinity
    return config.routing.strategy == "plan" and affinity.enabled and "prefix" in affinity.keys


def sharing(config: Config) -> Sharing:
    """Whose share of the pool calls use up, and what makes them one session."""
    queue, affinity = config.queue, config.routing.affinity
    priorities = queue.priorities
    wanted = affinity.enabled or queue.fair_by == "session"
    sessions = affinity.keys if wanted else ()
    return Sharing(queue.fair_by, priorities.interactive, priorities.batch, sessions)


def allowance(usual: Configured, own: Configured) -> Allowance:
    """How much a key may use that has some limits of its own."""

    def of(limit: str) -> int | None:
        most: int | None = getattr(own, limit)
        most = getattr(usual, limit) if most is None else most
        return None if most == -1 else most

    return Allowance(*(of(each.name) for each in fields(Allowance)))


def manage_settings(config: Config) -> ManageSettings:
    """Who may change what is installed, and how much at once."""
    manage = config.manage
    rights = {
        "pull": Right(manage.pull.allow, manage.pull.target),
        "create": Right(manage.create.allow, manage.create.target),
        "push": Right(manage.push.allow),
        "copy": Right(manage.copy.allow),
        "delete": Right(manage.delete.allow),
    }
    return ManageSettings(
        rights,
        manage.parallel,
        config.timeouts.pull_idle_s,
        config.server.max_body_bytes,
        manage.auto_pull,
    )


def aliases(config: Config) -> Aliases:
    """Names that stand for models, and what is not listed."""
    return Aliases(config.models.aliases, config.models.hide)


def context_rules(config: Config) -> Rules:
    """What becomes of the contexts and times in memory that calls ask for."""
    models = config.models

    def rule(num_ctx: NumCtx, keep_alive: KeepAlive) -> Rule:
        policy = Policy(num_ctx.policy)
        return Rule(policy, num_ctx.default, num_ctx.max, keep_alive.max_s)

    others = [
        (glob, rule(its.num_ctx or models.num_ctx, its.keep_alive or models.keep_alive))
        for glob, its in models.overrides
    ]
    return Rules(rule(models.num_ctx, models.keep_alive), others)


def pins(config: Config, contexts: Contexts) -> Pins:
    """The models that are kept in memory; where nothing is said, as calls usually ask for them."""

    def pin(spec: PinSpec) -> Pin:
        model = names.parse(spec.model).canonical
        exact = spec.num_ctx is not None
        key = contexts.usual(model)
        if spec.num_ctx is not None:
            key = sized(key, spec.num_ctx)
        return Pin(model, spec.backends, spec.copies, key, exact)

    return Pins(map(pin, config.models.pin))


def spool(config: Config, clock: Callable[[], float]) -> Spool | None:
    """Where uploads are kept for a while; None: nowhere."""
    manage = config.manage
    if manage.spool is None or not manage.spool_max_bytes:
        return None
    return Spool(Path(manage.spool), manage.spool_max_bytes, clock)


def queue_limits(config: Config) -> QueueLimits:
    """The bounds on waiting."""
    queue = config.queue
    return QueueLimits(queue.max_depth, queue.max_depth_per_model, queue.max_wait_s, queue.adaptive)


def backends(config: Config) -> list[Backend]:
    """The configured backends as the pool knows them."""
    written = places(config)
    return [
        Backend(
            spec.name,
            spec.url,
            spec.slots,
            spec.allow,
            spec.deny,
            spec.enabled,
            written[spec.name],
            spec.store or "",
            spec.cloud,
            spec.provider,
            spec.weight,
            spec.priority,
            spec.prefer,
            spec.vram_bytes,
        )
        for spec in config.backends
    ]


def targets(config: Config) -> dict[str, Target]:
    """How each backend is reached, by name."""
    return {spec.name: _target(spec, config) for spec in config.backends}


def _target(spec: BackendSpec, config: Config) -> Target:
    timeouts = spec.timeouts or config.timeouts
    secrets = tuple((name, secret.reveal()) for name, secret in spec.auth_headers)
    return Target(
        url=spec.url,
        headers=(*spec.headers, *secrets),
        tls=_tls(spec),
        server_name=None if spec.tls is None else spec.tls.server_name,
        connect_s=timeouts.connect_s,
        idle_s=timeouts.idle_s,
        load_s=timeouts.load_s,
        reuse=spec.reuse_connections,
    )


def _tls(spec: BackendSpec) -> ssl.SSLContext | bool:
    tls = spec.tls
    if tls is None:
        return True
    context = ssl.create_default_context(cafile=tls.ca_file)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.client_cert_file:
        context.load_cert_chain(tls.client_cert_file, tls.client_key_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


def access(config: Config) -> Access:
    """The rules of who may do what."""
    interactive = config.queue.priorities.interactive
    return Access(
        wall=_wall_s,
        keys=[
            _Key(
                key.name,
                key.sha256,
                Role(key.role),
                key.models,
                key.expires_at,
                interactive if key.priority is None else key.priority,
                allowance(config.limits, key.limits),
            )
            for key in config.auth.keys
        ],
        user_header=config.auth.user_header or "",
        priority=interactive,
        allowance=allowance(config.limits, Configured()),
        accept=config.auth.accept,
        anonymous="always"
        if config.auth.anonymous == EVERYWHERE
        else [str(network) for network in config.auth.anonymous],
        trusted_proxies=[str(network) for network in config.server.trusted_proxies],
        allowed_hosts=config.server.allowed_hosts,
        admin_cidrs=[str(network) for network in config.admin.allowed_cidrs],
        admin_hosts=config.admin.allowed_hosts,
        listener_loopback=all(address.is_local for address in config.server.listen),
        local_names=(socket.gethostname(),),
    )


def cors(config: Config) -> Cors:
    """Which pages of other origins may call."""
    pages = config.cors
    return Cors(pages.enabled, pages.allow_origins, pages.allow_credentials, pages.max_age_s)


@dataclass(frozen=True, slots=True)
class _Key:
    name: str
    sha256: bytes
    role: Role
    models: tuple[str, ...]
    expires_at: float | None
    priority: int
    allowance: Allowance


def bind(address: Listen) -> socket.socket:
    """
    A bound socket; not yet listening.

    Raises:
        OSError: The address is in use, or is none of this machine's.
    """
    if address.fd is not None:
        raise OSError(
            errno.ENOTSOCK, os.strerror(errno.ENOTSOCK)
        )  # given from outside or not at all
    if address.path is not None:
        return _bind_unix(address.path)
    host = address.host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
    infos = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, proto, _, where = infos[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(path: str) -> socket.socket:
    """A socket's file that nobody serves any more is replaced; one that is served is in use."""
    if Path(path).is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
        Path(path).unlink()
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    return sock


def shown_address(sock: socket.socket) -> str:
    """Where a bound socket is reached, as a URL."""
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"
