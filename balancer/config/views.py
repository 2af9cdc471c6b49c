"""A configuration shown, written out, and compared with another."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from .problems import Path, dotted
from .settings import Config

_NEEDS_RESTART = (
    "manage.spool",
    "manage.spool_max",
    "server.listen",
    "server.max_header",
    "server.head_timeout",
    "server.keepalive_timeout",
    "admin.listen",
    "metrics.enabled",
    "metrics.model_label_limit",
    "systemd.notify",
    "systemd.watchdog",
    "state.path",
    "dashboard.enabled",
    "demo.enabled",
)


class Setting(NamedTuple):
    """One value in force, as text, and where it came from."""

    path: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Dotted paths of what changed; backends are named, not numbered."""

    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def effective(config: Config) -> list[Setting]:
    """List every value in force, secrets masked; origins as in `Config`, else ``default``."""
    return [
        Setting(
            dotted(path),
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
            config.origins.get(dotted(path), "default"),
        )
        for path, value in leaves(config.written)
    ]


def places(config: Config) -> dict[str, str]:
    """Tell where each backend was written, by name; nothing where that is not known."""
    if config.demo.enabled:
        return {spec.name: "simulated" for spec in config.backends}
    told = {}
    for index, spec in enumerate(config.backends):
        origin = config.origins.get(f"backends[{index}].url", "")
        where, _, what = origin.partition(":")
        words = {"file": f"line {what}", "env": what, "flag": "--backend", "found": what}
        told[spec.name] = words.get(where, "")
    return told


def to_yaml(config: Config) -> str:
    """Write the whole configuration as a file, secrets masked."""
    return yaml.safe_dump(dict(config.written), sort_keys=False, allow_unicode=True)


def diff(old: Config, new: Config) -> Difference:
    """Name what differs, changed secrets included."""
    before, after = _comparable(old), _comparable(new)
    changed = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    whole = tuple(f"{path}." for path in changed if path.endswith("]"))  # came or went
    told = tuple(sorted(path for path in changed if not path.startswith(whole)))
    return Difference(told, tuple(path for path in told if path in _NEEDS_RESTART))


def leaves(written: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield path and value of every plain value; lists of plain values and ``{}`` are one."""
    if isinstance(written, Mapping) and written:
        for key, value in written.items():
            yield from leaves(value, (*path, key))
    elif isinstance(written, list) and written and isinstance(written[0], dict):
        for index, item in enumerate(written):
            yield from leaves(item, (*path, index))
    else:
        yield path, written


def _comparable(config: Config) -> dict[str, tuple[object]]:
    """Map dotted paths to values, with what `written` masks as it is; absent is None."""
    values: dict[str, object] = {
        dotted(path): value
        for path, value in leaves(config.written)
        if path[0] != "backends" and path[:2] != ("auth", "keys")
    }
    values["auth.keys"] = config.auth.keys
    for spec, item in zip(config.backends, config.written["backends"], strict=True):
        name = f"backends[{spec.name}]"
        values |= {name: True, f"{name}.headers": spec.headers, f"{name}.auth": spec.auth_headers}
        plain = {key: value for key, value in item.items() if key not in ("headers", "auth")}
        values |= {f"{name}.{dotted(path)}": value for path, value in leaves(plain)}
    return {path: (value,) for path, value in values.items()}
