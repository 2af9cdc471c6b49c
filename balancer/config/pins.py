"""Models that are kept in memory: that their pins contradict neither one another nor the rest."""

from collections.abc import Iterator, Sequence

from balancer.core import names
from balancer.core.aliases import Aliases

from .blocks import ModelsBlock, PinBlock
from .problems import Path, dotted
from .settings import BackendSpec, PinSpec
from .sources import Sources


def build_pins(
    block: ModelsBlock, backends: Sequence[BackendSpec], sources: Sources
) -> tuple[PinSpec, ...]:
    """
    Build the pins of ``models.pin``.

    Args:
        backends: Those written; further ones may be found, so that an unknown name is no fault.
        sources: Hears complaints and warnings.
    """
    items = list(zip(sources.items("models", "pin"), block.pin, strict=False))
    aliases = Aliases(block.aliases)
    written = {spec.name: spec for spec in backends}
    for at, (path, pin) in enumerate(items):
        alias = aliases.find(names.parse(pin.model).canonical)
        if alias is not None:
            stands = " or ".join(alias.models)
            message = f"{pin.model} is an alias. Pin the model: {stands}."
            sources.complain_at((*path, "model"), message)
        for first, other in items[:at]:
            if _collide(pin, other):
                sources.complain_at(path, _twice(pin, first, sources))
                break
        for message in (*_doubts(pin, written), *_contradicted(pin, block)):
            sources.warn(message, path)
    return tuple(PinSpec(pin.model, pin.backends, pin.copies or 1, pin.num_ctx) for _, pin in items)


def _collide(one: PinBlock, other: PinBlock) -> bool:
    """One model, and perhaps one backend: a backend keeps one copy of a model."""
    if names.parse(one.model).canonical != names.parse(other.model).canonical:
        return False
    return not (one.backends and other.backends) or bool({*one.backends} & {*other.backends})


def _twice(pin: PinBlock, first: Path, sources: Sources) -> str:
    line = sources.place(first).line
    where = f"at line {line}" if line else dotted(first)
    return (
        f"{pin.model} is pinned already (first {where}). Write one item for it, "
        "or name other backends in each."
    )


def _contradicted(pin: PinBlock, block: ModelsBlock) -> Iterator[str]:
    """A context that the rules give to no call."""
    name = names.parse(pin.model)
    rules = (each.num_ctx for glob, each in block.overrides.items() if names.matches(glob, name))
    rule = next(rules, None) or block.num_ctx
    if pin.num_ctx is not None and rule.policy == "pin" and rule.default != pin.num_ctx:
        yield (
            f"num_ctx: {pin.num_ctx} of {pin.model} serves no call that has options: by policy pin "
            f"these get {rule.default}."
        )


def _doubts(pin: PinBlock, written: dict[str, BackendSpec]) -> Iterator[str]:
    """What is allowed and probably not meant."""
    unknown = [name for name in pin.backends if name not in written]
    if unknown:
        yield (
            f"no backend written here is named {', '.join(unknown)}: "
            f"{pin.model} waits for one to be found."
        )
    name = names.parse(pin.model)
    for spec in (written[name] for name in pin.backends if name in written):
        is_allowed = any(names.matches(glob, name) for glob in spec.allow)
        if not is_allowed or any(names.matches(glob, name) for glob in spec.deny):
            yield f"the rules of {spec.name} rule {pin.model} out: it is not kept there."
