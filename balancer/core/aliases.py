"""Names that stand for other models, and models that are not listed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from balancer.core import names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MOST_STEPS: Final = 8  # from an alias over others to a model


@dataclass(frozen=True, slots=True)
class Alias:
    """
    A name that stands for models.

    Args:
        name: As the operator wrote it; so it is listed.
        canonical: What calls for it are known by, however they spell it.
        models: In the order in which they are to serve, as written; none of them is an alias.
    """

    name: str
    canonical: str
    models: tuple[str, ...]

    def absent(self, text: str) -> str:
        """What is told where none of the models is there, with what is told of one of them."""
        return f"{self.name!r} stands for {', '.join(self.models)}: {text}"


class Aliases:
    """
    All aliases, and which names are not listed.

    Args:
        written: Each alias with the names it stands for; these may be aliases too.
        hide: Globs over names, aliases included.

    Raises:
        ValueError: A name is none, two aliases are one, one stands for nothing or leads to itself.
    """

    def __init__(
        self, written: Iterable[tuple[str, Sequence[str]]] = (), hide: Sequence[str] = ()
    ) -> None:
        self._hide = tuple(hide)
        self._written: dict[str, tuple[str, Sequence[str]]] = {}
        for name, targets in written:
            canonical = _canonical(name)
            if names.parse(name).cloud or names.parse(name).local:
                raise ValueError(f"{name}: an alias cannot end in :cloud or :local.")
            if canonical in self._written:
                raise ValueError(f"{self._written[canonical][0]} and {name} are one name.")
            if not targets:
                raise ValueError(f"{name} stands for nothing. Name a model.")
            self._written[canonical] = name, targets
        self._found: dict[str, Alias] = {}
        for canonical in self._written:
            self._resolve(canonical, ())

    def _resolve(self, canonical: str, above: tuple[str, ...]) -> tuple[str, ...]:
        """The models of an alias, with those of the aliases that it names."""
        if canonical in self._found:
            return self._found[canonical].models
        name, targets = self._written[canonical]
        if canonical in above:
            path = " → ".join(self._written[step][0] for step in (*above, canonical))
            raise ValueError(f"{path} is a circle; an alias must lead to a model.")
        if len(above) > MOST_STEPS:
            raise ValueError(f"{name} is reached over more than {MOST_STEPS} other aliases.")
        models: dict[str, str] = {}
        for target in targets:
            known = _canonical(target)
            nested = known in self._written
            for model in self._resolve(known, (*above, canonical)) if nested else (target,):
                models.setdefault(_canonical(model), model)
        self._found[canonical] = Alias(name, canonical, tuple(models.values()))
        return self._found[canonical].models

    def __iter__(self) -> Iterator[Alias]:
        return iter(self._found.values())

    def find(self, canonical: str) -> Alias | None:
        """The alias of that canonical name; None: it is a model's own."""
        return self._found.get(canonical)

    def hides(self, canonical: str) -> bool:
        """Whether the name is not listed."""
        if not self._hide:
            return False
        name = names.parse(canonical)
        return any(names.matches(glob, name) for glob in self._hide)


def _canonical(text: str) -> str:
    try:
        return names.parse(text).canonical
    except names.InvalidName as error:
        shown = names.quoted(text[:80])
        raise ValueError(f"{shown} is not the name of a model: {error}.") from None
