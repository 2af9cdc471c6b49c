"""Which model is where."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.cli import shelf


def model(name: str, **more: Any) -> dict[str, Any]:
    """A model as the status document has it."""
    told = {"name": name, "digest": "a" * 64, "size_bytes": 2_000_000_000, "state": "on disk"}
    return told | {"cloud": False} | more


def backend(name: str, *models: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A backend as the status document has it."""
    rules = {"allow": ["*"], "deny": []}
    return {"name": name, "rules": rules, "provider": False, "models": list(models)} | more


DOC = {
    "backends": [
        backend("a", model("m:latest", state="loaded"), model("only-a:latest")),
        backend("b", model("m:latest")),
        backend("c", rules={"allow": ["*"], "deny": ["only-a"]}),
        backend("far", model("m:latest"), provider=True),
    ]
}


def test_what_is_where() -> None:
    """Who may have a model and lacks it is told by the rules; ollama.com itself is no host."""
    both, only = shelf.shelves(DOC)
    assert (list(both.on), both.lacking, both.loaded) == (["a", "b"], ["c"], ["a"])
    assert (list(only.on), only.lacking) == (["a"], ["b"])
    told = both.told()
    assert told["backends"]["b"] == {
        "digest": "a" * 64,
        "size_bytes": 2_000_000_000,
        "state": "on disk",
    }
    assert (told["name"], told["versions"], told["lacking"]) == ("m:latest", 1, ["c"])


def test_models_that_run_elsewhere_are_not_installed() -> None:
    """A cloud model is a stub of a few bytes, that nobody can copy."""
    assert shelf.shelves({"backends": [backend("a", model("x:cloud", cloud=True))]}) == []


def test_the_listing() -> None:
    """A line for each model; names only where it is not on all."""
    lines = shelf.listing(shelf.shelves(DOC), 3)
    assert [line.split() for line in lines] == [
        ["MODEL", "SIZE", "ON", "LOADED"],
        ["m:latest", "2.0", "GB", "a,", "b", "a"],
        ["only-a:latest", "2.0", "GB", "a", "–"],
    ]
    everywhere = {"backends": [backend("a", model("m")), backend("b", model("m"))]}
    assert "all 2" in shelf.listing(shelf.shelves(everywhere), 2)[1]


def test_the_matrix() -> None:
    """A cell for each backend."""
    lines = shelf.matrix(shelf.shelves(DOC), ["a", "b", "c"])
    assert [line.split("  ")[0] for line in lines] == ["MODEL", "m:latest", "only-a:latest"]
    assert lines[1].split()[-4:] == ["loaded", "on", "disk", "–"]
    assert lines[2].endswith("not allowed")


def test_two_models_by_one_name_are_seen() -> None:
    """With their digests, and what makes them one."""
    doc = {"backends": [backend("a", model("m")), backend("b", model("m", digest="b" * 64))]}
    _, cells, note = shelf.matrix(shelf.shelves(doc), ["a", "b"])
    assert "aaaaaaaaaaaa" in cells
    assert "bbbbbbbbbbbb" in cells
    assert "m: 2 different models by this name" in note
    assert "models pull m --update" in note


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (53_000, "53 kB"), (4.6e6, "5 MB"), (2.1e9, "2.1 GB"),
     (3.2e12, "3.2 TB")],
)  # fmt: skip
def test_sizes(count: float, told: str) -> None:
    """As Ollama's command line shows them, by thousands."""
    assert shelf.size(count) == told
