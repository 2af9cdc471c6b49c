"""`status`, `explain` and `version`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.cli import inspect
from balancer.cli.exits import ExitCode

from .conftest import Command
from .stub import serving

CLOSED = {"state": "closed", "reason": "", "retry_in_s": 0.0, "trips": 0}
OPEN = {"state": "open", "reason": "3 failures in a row", "retry_in_s": 12.0, "trips": 1}


def document(**backend: Any) -> dict[str, Any]:
    """A status document with one backend."""
    model = {"name": "m:latest", "state": "loaded", "in_flight": 1, "breaker": CLOSED}
    return {
        "status_version": 1,
        "version": "0.1.0",
        "config": {"file": None, "loaded_s_ago": 3, "rejected": []},
        "ready": True,
        "draining": False,
        "running": 1,
        "queue": {"depth": 2, "oldest_s": 4.0, "per_model": {"m:latest": 2}},
        "backends": [
            {
                "name": "gpu1",
                "url": "http://gpu1:11434",
                "version": "0.34.2",
                "up": True,
                "error": "",
                "state": "up",
                "breaker": CLOSED,
                "in_flight": 1,
                "loading": None,
                "trouble": "",
                "models": [model],
                **backend,
            }
        ],
        "conflicts": {},
    }


@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        ({}, ExitCode.OK, ["gpu1:11434", "m:latest: 2; the oldest for 4 s"]),
        ({"loading": "big"}, ExitCode.OK, ["1 +load big"]),
        ({"trouble": "answers 401"}, ExitCode.OK, ["! gpu1: answers 401"]),
        (
            {"up": False, "state": "down", "error": "cannot connect"},
            ExitCode.NO_BACKEND,
            ["! gpu1: cannot connect"],
        ),
        (
            {"breaker": OPEN, "state": "broken"},
            ExitCode.NO_BACKEND,
            ["open, trial in 12 s", "3 failures in a row"],
        ),
        (
            {"breaker": OPEN | {"trial": "a trial when it is up again"}, "state": "broken"},
            ExitCode.NO_BACKEND,
            ["open, a trial when it is up again: 3 failures in a row"],
        ),
    ],
)
def test_status(
    command: Command, backend: dict[str, Any], code: ExitCode, words: list[str]
) -> None:
    """What a person should know of a backend is told; code 5 if none can be used."""
    with serving({"/_balancer/status": (200, document(**backend))}) as stub:
        told = command("status", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == code
    for word in words:
        assert word in told.stdout


def test_status_for_scripts_is_the_document(command: Command) -> None:
    """Unchanged."""
    with serving({"/_balancer/status": (200, document())}) as stub:
        told = command("status", "--json", "--admin", f"127.0.0.1:{stub.port}")
    assert json.loads(told.stdout) == document()


def test_watch_goes_on_until_the_balancer_is_gone(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks again and again; here the third answer is none."""
    monkeypatch.setattr(inspect, "EVERY_S", 0.0)
    with serving({"/_balancer/status": (200, document())}) as stub:
        stub.limit = 2
        told = command("status", "--watch", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == ExitCode.NO_ADMIN
    assert told.stdout.count(inspect.CLEAR) == 2
    assert told.stdout.count("gpu1:11434") == 2


def explanation(**more: Any) -> dict[str, Any]:
    """A document of two backends: one would do, one is draining."""
    row = {
        "may_serve": True,
        "state": "in memory, a slot is free",
        "code": "",
        "residency": "loaded",
        "in_flight": 1,
        "slots": 2,
    }
    outcome = {"kind": "now", "status": 200, "backend": "a", "wait_s": 0.0, "text": "goes to a now"}
    barred = {"may_serve": False, "order": None, "code": "draining", "in_flight": 0}
    return {
        "explain_version": 1,
        "model": "m:latest",
        "options": {},
        "outcome": outcome,
        "queued": 0,
        "backends": [
            {**row, "name": "a", "order": 1, "reason": "is the only one"},
            {**row, **barred, "name": "b", "reason": "draining"},
        ],
        "conflicts": {},
        **more,
    }


RESIZED = {
    "policy": "reuse",
    "asked": 3000,
    "gets": 4096,
    "rewritten": True,
    "defaults": {"b": 32768},
}
REFUSED = {"kind": "refused", "status": 404, "backend": None, "wait_s": None, "text": "not found"}
QUEUED = {"kind": "queue", "status": 200, "backend": None, "wait_s": 90.0, "text": "waits"}


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({}, ExitCode.OK, ["m:latest: goes to a now\n", "1.  a", "–   b", "1 of 2", "draining\n"]),
        ({"options": {"num_ctx": 8}}, ExitCode.OK, ["m:latest (num_ctx=8): goes to a now"]),
        (
            {"num_ctx": RESIZED},
            ExitCode.OK,
            [
                "num_ctx: 3000 asked for, 4096 written into the call (policy reuse)\n",
                "! b gives 32768 to calls that cannot ask, such as those of /v1\n",
            ],
        ),
        (
            {"num_ctx": RESIZED | {"asked": None, "gets": None, "rewritten": False}},
            ExitCode.OK,
            ["num_ctx: none asked for, left as it is (policy reuse)\n"],
        ),
        (
            {"outcome": QUEUED, "queued": 3},
            ExitCode.OK,
            ["waits (about 2 min)", "3 waiting for it already"],
        ),
        ({"outcome": QUEUED | {"wait_s": 0.4}}, ExitCode.OK, ["m:latest: waits\n"]),
        ({"outcome": REFUSED, "backends": []}, ExitCode.FAILURE, ["m:latest: 404: not found\n"]),
        (
            {"alias": {"name": "fast", "models": ["x", "m"]}},
            ExitCode.OK,
            ["fast, an alias, now of m:latest: goes to a now\n"],
        ),
        (
            {"conflicts": {"f" * 64: ["a", "b"]}},
            ExitCode.OK,
            ["! another model by the same name: ffffffffffff on a, b"],
        ),
    ],
)
def test_explain(command: Command, more: dict[str, Any], code: ExitCode, words: list[str]) -> None:
    """What would happen first, then each backend with its reason; refused is code 1."""
    doc = explanation(**more)
    with serving({"/_balancer/explain?model=m": (200, doc)}) as stub:
        there = ("--admin", f"127.0.0.1:{stub.port}")
        told = command("explain", "m", *there)
        scripts = command("explain", "m", "--json", *there)
    assert (told.exit_code, scripts.exit_code) == (code, code)
    for word in words:
        assert word in told.stdout
    assert json.loads(scripts.stdout) == doc


def test_explain_asks_for_what_was_said(command: Command) -> None:
    """Every option is in the question; a name may hold what a URL may not."""
    path = (
        "/_balancer/explain?model=hf.co%2Fa%2Fb%3Aq4&num_ctx=8&prompt_tokens=9&key=k&session=s"
        "&exclude=a&exclude=b"
    )
    with serving({path: (200, explanation())}) as stub:
        options = ("--num-ctx", "8", "--prompt-tokens", "9", "--exclude", "a", "--exclude", "b")
        there = ("--key", "k", "--session", "s", "--admin", f"127.0.0.1:{stub.port}")
        assert command("explain", "hf.co/a/b:q4", *options, *there).exit_code == ExitCode.OK


def priced(name: str, order: int | None, **terms: float) -> dict[str, Any]:
    """A row with a price."""
    usual = {"wait_s": 0.0, "prefill_s": 0.5, "evict_s": 0.0, "total_s": 0.5, "share": 1.0}
    usual |= {"new_tokens": 300.0, "cached_tokens": 0.0, "promised": 0, "slow_factor": 1.0}
    return {
        "name": name,
        "may_serve": True,
        "order": order,
        "state": "in memory",
        "residency": "loaded",
        "in_flight": 1,
        "slots": 2,
        "kind": "go",
        "reason": "costs least: 0.50 s",
        "terms": usual | terms if order else {},
        "victims": [],
    }


def test_explain_shows_each_term_that_is_something(command: Command) -> None:
    """In its own column; the rest of what is known of a candidate stands beside it."""
    found = [
        priced("a", 1, cached_tokens=100.0, new_tokens=200.0, promised=1),
        priced("b", 2, wait_s=2.0, evict_s=1.5, total_s=4.0, share=2.0, slow_factor=0.4)
        | {"kind": "load", "victims": [{"model": "old", "evict_s": 1.5}]},
        priced("c", None) | {"reason": "no room"},
    ]
    doc = explanation(backends=found)
    with serving({"/_balancer/explain?model=m": (200, doc)}) as stub:
        lines = command("explain", "m", "--admin", f"127.0.0.1:{stub.port}").stdout.splitlines()
    assert lines[2].split() == (
        ["BACKEND", "MODEL", "THERE", "RUNNING", "WAIT", "PROMPT", "EVICTS", "TOTAL", "WHY"]
    )
    a, b, c = lines[3:]
    assert "1 of 2, 1 promised  0     0.50    0       0.50" in a
    assert a.endswith("can start; 100 of 300 tokens cached")
    assert b.endswith(
        "must load; shared with 1 more; unloads old (1.50); slow today (40% of its speed)"
    )
    assert c.split()[0] == "–"
    assert c.endswith("no room")


@pytest.mark.parametrize(
    ("waits", "words"),
    [
        (
            True,
            ["call r1 has waited for 3 s", "1 of them ahead of it", "hold a (a 2.00 s, b 3.50 s)"],
        ),
        (False, ["call r1 does not wait any more", "attempt 1, 4 s ago"]),
    ],
)
def test_explain_a_call(command: Command, waits: bool, words: list[str]) -> None:
    """Its place in the queue, and what was decided on it."""
    past = {"attempt": 1, "s_ago": 4.0, "kind": "hold", "backend": "a"}
    past["options"] = [{"backend": "a", "total_s": 2.0}, {"backend": "b", "total_s": 3.5}]
    doc = explanation(
        queued=2,
        call={"id": "r1", "waits": waits, "waited_s": 3.0},
        turn={"ahead": 1, "tag": 2.5, "virtual_time": 2.0},
        decisions=[past],
    )
    with serving({"/_balancer/explain?model=m&call=r1": (200, doc)}) as stub:
        told = command("explain", "m", "--call", "r1", "--admin", f"127.0.0.1:{stub.port}")
    for word in words:
        assert word in told.stdout


def test_explain_says_why_a_call_gets_more_than_a_clamp_allows(command: Command) -> None:
    """It shares what is in memory; the most that would be loaded for it is told, too."""
    context = RESIZED | {"policy": "clamp", "max": 8192, "asked": 8192, "gets": 16384}
    doc = explanation(num_ctx=context)
    with serving({"/_balancer/explain?model=m": (200, doc)}) as stub:
        told = command("explain", "m", "--admin", f"127.0.0.1:{stub.port}")
    words = "16384 written into the call, beyond max 8192: a runner with so much is there already"
    assert f"num_ctx: 8192 asked for, {words} (policy clamp)\n" in told.stdout


@pytest.mark.parametrize(("gets", "words"), [(8192, "8192 in it"), (None, "none in it")])
def test_explain_does_not_claim_what_a_call_asked_for(
    command: Command, gets: int | None, words: str
) -> None:
    """Where the policy may have changed the context, and what was asked for is not kept."""
    context: dict[str, Any] = {
        "policy": "reuse",
        "asked": None,
        "gets": gets,
        "rewritten": None,
        "defaults": {},
    }
    doc = explanation(num_ctx=context)
    with serving({"/_balancer/explain?model=m&call=r1": (200, doc)}) as stub:
        told = command("explain", "m", "--call", "r1", "--admin", f"127.0.0.1:{stub.port}")
    line = f"num_ctx: {words} (policy reuse); what it asked for is not kept\n"
    assert line in told.stdout


def test_explain_passes_a_refusal_on(command: Command) -> None:
    """In one line, as it was told."""
    with serving({"/_balancer/explain?model=x+y": (400, {"error": "invalid model name"})}) as stub:
        told = command("explain", "x y", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == ExitCode.FAILURE
    assert "(400): invalid model name" in told.stderr
    assert told.stderr.count("\n") == 1


def test_version_for_scripts(command: Command) -> None:
    """With what it runs on."""
    doc = json.loads(command("version", "--json").stdout)
    assert set(doc) == {"version", "python", "platform", "libraries"}
    assert doc["libraries"]["aiohttp"]
