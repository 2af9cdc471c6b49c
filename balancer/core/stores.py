"""
Which backends keep their models in one place.

Several Ollama of one machine usually share a directory of models: then a pull on one is a pull on
all. Nothing in Ollama's API says so. A name given by the operator decides; without one, backends
of the same host whose lists are equal are taken for one store, and whoever relies on it looks
again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keeper:
    """
    A backend with its models.

    Args:
        store: The name the operator gave; empty: none.
        host: The host part of its url, in lower case.
        models: What it lists: (canonical name, digest).
    """

    backend: str
    store: str
    host: str
    models: frozenset[tuple[str, str | None]]


def groups(keepers: Iterable[Keeper]) -> list[list[str]]:
    """The backends by store, in the order given."""
    found: dict[object, list[str]] = {}
    for keeper in keepers:
        key: object = keeper.store or (keeper.host, keeper.models)
        found.setdefault(key, []).append(keeper.backend)
    return list(found.values())
