"""Names that stand for models: found however they are spelled, resolved, never in a circle."""

from __future__ import annotations

import pytest

from balancer.core.aliases import MOST_STEPS, Aliases
from tests.core.bench import canon


def models(aliases: Aliases, name: str) -> tuple[str, ...]:
    """What a name stands for."""
    alias = aliases.find(canon(name))
    assert alias is not None
    return alias.models


def test_an_alias_is_found_however_it_is_spelled() -> None:
    """As Ollama compares names; it is listed as its writer spelled it."""
    aliases = Aliases([("GPT-4o-mini", ["llama3.2"])])
    for spelling in ("gpt-4o-mini", "GPT-4O-MINI:latest", "library/gpt-4o-mini"):
        assert models(aliases, spelling) == ("llama3.2",)
    assert [(alias.name, alias.canonical) for alias in aliases] == [
        ("GPT-4o-mini", canon("gpt-4o-mini"))
    ]
    assert aliases.find(canon("gpt-4o-mini:1")) is None
    assert aliases.find(canon("llama3.2")) is None


def test_an_alias_of_aliases_is_the_models_behind_them() -> None:
    """In order, each once; written in any order."""
    aliases = Aliases([("best", ["big", "fast"]), ("fast", ["b", "c"]), ("big", ["a", "B:latest"])])
    assert models(aliases, "best") == ("a", "B:latest", "c")
    assert models(aliases, "fast") == ("b", "c")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ([("a", ["a"])], "a → a is a circle"),
        ([("a", ["A:latest"])], "a → a is a circle"),
        ([("a", ["m", "b"]), ("b", ["c"]), ("c", ["b"])], "b → c → b is a circle"),
        ([("a", [])], "a stands for nothing"),
        ([("a", ["m"]), ("A:latest", ["n"])], "a and A:latest are one name"),
        ([("a b", ["m"])], '"a b" is not the name of a model: invalid model name'),
        ([("a", ["m@x"])], '"m@x" is not the name of a model'),
        ([("a", [""])], "model is required"),
        ([("a:cloud", ["m"])], "cannot end in :cloud"),
        ([("a:local", ["m"])], "cannot end in :cloud or :local"),
    ],
)
def test_what_could_not_serve_is_refused(written: list[tuple[str, list[str]]], text: str) -> None:
    """Circles, two of one name, none at all, and what is no name."""
    with pytest.raises(ValueError, match=text):
        Aliases(written)


def test_a_long_way_round_is_refused() -> None:
    """It must end, and soon."""
    steps = [(f"a{n}", [f"a{n + 1}"]) for n in range(MOST_STEPS + 1)]
    assert models(Aliases(steps), "a0") == (f"a{MOST_STEPS + 1}",)
    with pytest.raises(ValueError, match="more than 8 other aliases"):
        Aliases([*steps, (f"a{MOST_STEPS + 1}", ["m"]), (f"a{MOST_STEPS + 2}", ["m"])])


def test_hidden_are_the_names_that_a_glob_covers() -> None:
    """Aliases too; without globs nothing is."""
    aliases = Aliases([("fast", ["m"])], hide=["secret/*", "fast", "*:70b"])
    assert all(
        aliases.hides(canon(name)) for name in ("secret/m:1", "fast", "Fast:latest", "m:70b")
    )
    assert not any(aliases.hides(canon(name)) for name in ("m", "fast:1", "other"))
    assert not Aliases().hides(canon("m"))
