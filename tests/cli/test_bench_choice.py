"""Which model `bench` takes and where, from status documents."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.cli.bench_choice import busy, choose, loaded_meanwhile, needs_load
from balancer.cli.exits import CommandError, ExitCode


def held(name: str, state: str = "loaded", size: int = 1, context: int | None = 4096) -> Any:
    """What a status document says of a model on a backend."""
    size_bytes, digest = size, f"digest of {name}"
    return {
        "name": name,
        "state": state,
        "size_bytes": size_bytes,
        "digest": digest,
        "cloud": False,
        "context": context,
    }


def backend(name: str, *models: Any, **more: Any) -> Any:
    """A backend that is up and does nothing."""
    told = {"url": f"http://{name}", "provider": False, "state": "up", "loading": None}
    rules = {"allow": ["*"], "deny": []}
    return {"name": name, "models": list(models), "rules": rules, **told, **more}


def status(*backends: Any, running: int = 0, queued: int = 0) -> Any:
    """A status document."""
    return {"backends": list(backends), "running": running, "queue": {"depth": queued}}


def refused(doc: Any, wanted: str | None = None, **more: Any) -> CommandError:
    """Why nothing is chosen."""
    with pytest.raises(CommandError) as told:
        choose(doc, wanted, more.get("generates", lambda _: True))
    assert len(told.value.lines) == 1
    return told.value


def test_the_model_in_memory_in_most_places() -> None:
    """And of those the smallest; one that only embeds is passed over."""
    doc = status(
        backend("a", held("big", size=9), held("small", size=2), held("embeds"), held("once")),
        backend("b", held("big", size=9), held("small", size=2), held("embeds")),
    )
    choice = choose(doc, None, lambda name: name != "embeds")
    assert (choice.model, choice.context, choice.notes) == ("small", 4096, ())
    assert [(copy.backend, copy.url) for copy in choice.copies] == [
        ("a", "http://a"),
        ("b", "http://b"),
    ]
    assert choice.copies[0].digest == "digest of small"


def test_what_is_on_disk_is_not_chosen() -> None:
    """And a backend that is drained or down counts as one that does not have it."""
    doc = status(backend("a", held("m", "on disk")), backend("b", held("m"), state="draining"))
    assert "ollama-balancer bench MODEL --load" in str(refused(doc))
    told = refused(doc, "m")
    assert (told.code, "in memory nowhere" in str(told)) == (ExitCode.FAILURE, True)
    assert "bench m --load" in str(told)
    assert needs_load(doc, "m")


def test_a_model_by_its_usual_name() -> None:
    """With its tag or without; of one that is not there, or has no name, that is said."""
    doc = status(backend("a", held("m:latest")))
    assert choose(doc, "m", lambda _: True).model == "m:latest"
    assert not needs_load(doc, "M")
    assert refused(doc, "x").code == ExitCode.FAILURE
    assert refused(doc, "a b").code == ExitCode.USAGE
    with pytest.raises(CommandError, match="No backend has x"):
        needs_load(doc, "x")


def test_a_model_that_makes_no_text() -> None:
    """Has no tokens to count."""
    told = refused(status(backend("a", held("m"))), "m", generates=lambda _: False)
    assert "makes no text" in str(told)


def test_copies_with_another_context_are_left_out() -> None:
    """A call for theirs would load the model again elsewhere; the usual one is kept."""
    doc = status(
        backend("a", held("m", context=8192)), backend("b", held("m")), backend("c", held("m"))
    )
    choice = choose(doc, None, lambda _: True)
    assert [copy.backend for copy in choice.copies] == ["b", "c"]
    assert choice.notes == (
        "a is left out: it has the model with another context (8192, not 4096)",
    )


@pytest.mark.parametrize(
    ("doc", "told"),
    [
        (status(backend("a")), ""),
        (status(backend("a"), running=2, queued=1), "2 running, 1 queued"),
        (status(backend("a", loading="m\x1b")), "m? being loaded"),
    ],
)
def test_what_makes_a_fleet_busy(doc: Any, told: str) -> None:
    """Calls that run or wait, and loads."""
    assert busy(doc) == told


def test_what_was_loaded_meanwhile() -> None:
    """Only what was not in memory before."""
    before = status(backend("a", held("m"), held("n", "on disk")))
    after = status(backend("a", held("m"), held("n")), backend("b", held("m")))
    assert loaded_meanwhile(before, after) == ["n on a", "m on b"]
    assert loaded_meanwhile(after, before) == []
