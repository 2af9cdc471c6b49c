"""From a valid file to one `Config`, and the checks that concern several blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from . import blocks, settings
from .addresses import LOOPBACK, Network
from .backends import build_backends, without_nulls, written_backend
from .discovery import build_discovery
from .keys import build_keys
from .pins import build_pins
from .sources import Sources

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_UNITS = ("_s", "_bytes", "_ratio")


def build(file: blocks.File, sources: Sources, env: Mapping[str, str]) -> settings.Config:
    """Build the configuration; it counts only if *sources* heard no complaint."""
    timeouts = freeze(settings.Timeouts, file.timeouts)
    listen = () if sources.was_refused("server", "listen") else file.server.listen
    backends = build_backends(file.backends, timeouts, listen, sources)
    priorities = freeze(settings.Priorities, file.queue.priorities)
    keys = build_keys(file.auth, sources, priorities)
    _check_strategy(file, sources)
    _check_access(file, keys, sources)
    _check_admin(keys, file.auth.anonymous, sources)
    return settings.Config(
        server=freeze(settings.Server, file.server),
        admin=freeze(settings.Admin, file.admin),
        auth=settings.Auth(
            keys,
            file.auth.keys_file,
            file.auth.accept,
            file.auth.anonymous,
            file.auth.user_header,
        ),
        cors=freeze(settings.Cors, file.cors),
        backends=backends,
        discovery=_discovery(file, sources, env),
        health=freeze(settings.Health, file.health),
        breaker=settings.Breaker(
            host=freeze(settings.BreakerLimits, file.breaker.host),
            model=freeze(settings.BreakerLimits, file.breaker.model),
        ),
        retry=freeze(settings.Retry, file.retry),
        queue=replace(freeze(settings.Queue, file.queue), priorities=priorities),
        routing=replace(
            freeze(settings.Routing, file.routing),
            affinity=freeze(settings.Affinity, file.routing.affinity),
        ),
        models=_models(file.models, build_pins(file.models, backends, sources)),
        manage=settings.Manage(
            pull=freeze(settings.SpreadRight, file.manage.pull),
            create=freeze(settings.SpreadRight, file.manage.create),
            push=freeze(settings.Right, file.manage.push),
            copy=freeze(settings.Right, file.manage.copy),
            delete=freeze(settings.Right, file.manage.delete),
            parallel=file.manage.parallel,
            auto_pull=file.manage.auto_pull,
            spool=file.manage.spool,
            spool_max_bytes=file.manage.spool_max,
        ),
        timeouts=timeouts,
        streaming=freeze(settings.Streaming, file.streaming),
        limits=freeze(settings.Limits, file.limits),
        logging=freeze(settings.Logging, file.logging),
        metrics=freeze(settings.Metrics, file.metrics),
        systemd=freeze(settings.Systemd, file.systemd),
        state=freeze(settings.State, file.state),
        dashboard=freeze(settings.Dashboard, file.dashboard),
        demo=freeze(settings.Demo, file.demo),
        written=_written(file, backends),
    )


def freeze(kind: type[S], block: blocks.Block) -> S:
    """Fill *kind* from the keys of the same names; units stand only in our names."""
    values = {}
    for field in fields(kind):
        unit = next((unit for unit in _UNITS if field.name.endswith(unit)), "")
        values[field.name] = getattr(block, field.name.removesuffix(unit))
    return kind(**values)


def _models(block: blocks.ModelsBlock, pins: tuple[settings.PinSpec, ...]) -> settings.Models:
    return settings.Models(
        version=block.version,
        remember_s=block.remember,
        aliases=block.aliases,
        hide=block.hide,
        num_ctx=freeze(settings.NumCtx, block.num_ctx),
        keep_alive=freeze(settings.KeepAlive, block.keep_alive),
        overrides=tuple((glob, _override(other)) for glob, other in block.overrides.items()),
        pin=pins,
    )


def _override(block: blocks.ModelOverrideBlock) -> settings.ModelOverride:
    num_ctx, keep_alive = block.num_ctx, block.keep_alive
    return settings.ModelOverride(
        None if num_ctx is None else freeze(settings.NumCtx, num_ctx),
        None if keep_alive is None else freeze(settings.KeepAlive, keep_alive),
    )


def _discovery(file: blocks.File, sources: Sources, env: Mapping[str, str]) -> settings.Discovery:
    """Not for the demo, whose hosts are all that it may have."""
    block = file.discovery
    if file.demo.enabled:
        block = block.model_copy(update={"sources": ()})
    return build_discovery(block, env, file.server.listen, sources.warn, wanted=not file.backends)


def _check_strategy(file: blocks.File, sources: Sources) -> None:
    """Warn of what only the plan heeds, or heeds in full."""
    strategy = file.routing.strategy
    if strategy == "plan":
        return
    with_it = f"with routing.strategy: {strategy}, "
    if file.models.pin:
        sources.warn(f"has no effect {with_it}only with plan.", ("models", "pin"))
    if file.queue.fair_by != "key":
        told = f"counts only where the queue is full {with_it}for slots only with plan."
        sources.warn(told, ("queue", "fair_by"))


def _check_access(file: blocks.File, keys: Sequence[settings.Key], sources: Sources) -> None:
    """Refuse to open a listener that anyone on the network could use unnoticed."""
    auth = file.auth
    if auth.keys or any(not net.is_loopback for net in auth.anonymous):
        return
    if sources.was_refused("auth") or sources.was_refused("server", "listen"):
        return  # what was refused may have been the key
    away = [listen for listen in file.server.listen if not listen.is_local]
    if auth.keys_file:
        if away and not keys:
            sources.warn(
                "holds no key yet, so nobody may call from elsewhere. "
                "Make one: ollama-balancer key new NAME",
                ("auth", "keys_file"),
            )
        return
    for listen in away:
        sources.complain_at(
            ("server", "listen"),
            f"Refusing to listen on {listen} without an API key: anyone on the network could "
            "use your models. Set BALANCER_API_KEY, or open it to your network: "
            "auth.anonymous: [192.168.1.0/24] — or accept the risk: "
            "--insecure-no-auth (= auth.anonymous: always).",
        )


def _check_admin(
    keys: Sequence[settings.Key], anonymous: Sequence[Network], sources: Sources
) -> None:
    local = any(
        net.version == own.version and net.overlaps(own) for net in anonymous for own in LOOPBACK
    )
    if not local and all(key.role != "admin" for key in keys):
        sources.warn(
            "nobody has the role admin: add a key with role: admin, "
            "or 127.0.0.0/8 to auth.anonymous."
        )


def _written(file: blocks.File, backends: Sequence[settings.BackendSpec]) -> dict[str, Any]:
    """Return the file's words with names filled in and without what says nothing."""
    written = file.model_dump(mode="json")
    pairs = zip(file.backends, backends, strict=True)
    written["backends"] = [written_backend(block, spec) for block, spec in pairs]
    written["auth"]["keys"] = [without_nulls(item) for item in written["auth"]["keys"]]
    return written
