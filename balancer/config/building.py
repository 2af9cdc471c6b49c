"""From a valid file to one `Config`, and the checks that concern several blocks."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from . import blocks, settings
from .addresses import LOOPBACK, Network
from .backends import build_backends
from .keys import build_keys
from .sources import Sources

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_UNITS = ("_s", "_bytes", "_ratio")


def build(file: blocks.File, sources: Sources) -> settings.Config:
    """Build the configuration; it counts only if *sources* heard no complaint."""
    timeouts = freeze(settings.Timeouts, file.timeouts)
    listen = () if sources.was_refused("server", "listen") else file.server.listen
    backends = build_backends(file.backends, timeouts, listen, sources)
    keys = build_keys(file.auth, sources)
    _check_access(file, sources)
    _check_admin(keys, file.auth.anonymous, sources)
    return settings.Config(
        server=freeze(settings.Server, file.server),
        admin=freeze(settings.Admin, file.admin),
        auth=settings.Auth(keys, file.auth.keys_file, file.auth.anonymous),
        backends=backends,
        health=freeze(settings.Health, file.health),
        breaker=settings.Breaker(
            host=freeze(settings.BreakerLimits, file.breaker.host),
            model=freeze(settings.BreakerLimits, file.breaker.model),
        ),
        retry=freeze(settings.Retry, file.retry),
        queue=freeze(settings.Queue, file.queue),
        routing=freeze(settings.Routing, file.routing),
        models=freeze(settings.Models, file.models),
        timeouts=timeouts,
        logging=freeze(settings.Logging, file.logging),
        metrics=freeze(settings.Metrics, file.metrics),
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


def _check_access(file: blocks.File, sources: Sources) -> None:
    """Refuse to open a listener that anyone on the network could use unnoticed."""
    auth = file.auth
    if auth.keys or auth.keys_file or any(not net.is_loopback for net in auth.anonymous):
        return
    if sources.was_refused("auth") or sources.was_refused("server", "listen"):
        return  # what was refused may have been the key
    for listen in file.server.listen:
        if not listen.is_local:
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
    for item, block, spec in zip(written["backends"], file.backends, backends, strict=True):
        changed = block.timeouts.model_fields_set
        item["name"] = spec.name
        item["auth"] = _without_nulls(item["auth"])
        item["timeouts"] = {k: v for k, v in item["timeouts"].items() if k in changed}
    written["auth"]["keys"] = [_without_nulls(item) for item in written["auth"]["keys"]]
    return written


def _without_nulls(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value is not None}
