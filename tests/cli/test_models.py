"""`models …`: against a real balancer, and what it says of answers that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from balancer.cli import models
from balancer.cli.exits import ExitCode
from balancer.sim.host import SimModel
from balancer.sim.management import Registry
from tests.conftest import Start
from tests.rig import Rig

from .conftest import Command
from .stub import serving

SMALL = [SimModel("m"), SimModel("e", capabilities=("embedding",))]
Ask = Callable[..., Any]


async def stage(start: Start, command: Command, **more: Any) -> tuple[Rig, Ask]:
    """Three hosts with two models, a registry with one more; and the command line."""
    rig = await start(3, models=SMALL, **more)
    registry = Registry([SimModel("new", size_bytes=5_000)])
    for host in rig.fleet:
        host.management.registry = registry
    for name, member in rig.balancer.pool.members.items():
        object.__setattr__(member.backend, "store", name)

    async def ask(*args: str) -> Result:
        there = ("--admin", rig.url)
        return await asyncio.to_thread(command, "models", *args, *there)

    return rig, ask


def having(rig: Rig, model: str) -> str:
    """The hosts that have a model."""
    return "".join(host.name for host in rig.fleet if host.host.find(model) is not None)


async def test_pull_goes_to_all_or_to_some(start: Start, command: Command) -> None:
    """Off a terminal each step is a line; `--json` gives the records as they come."""
    rig, ask = await stage(start, command)
    told = await ask("pull", "new", "--to", "a,b")
    assert (told.exit_code, having(rig, "new")) == (ExitCode.OK, "ab")
    assert told.stdout.splitlines()[0] == "pulling manifest"
    assert told.stdout.splitlines()[-1] == "success"
    told = await ask("pull", "new", "--json")
    assert having(rig, "new") == "abc"
    assert json.loads(told.stdout.splitlines()[-1])["status"] == "success"


async def test_pull_that_fails(start: Start, command: Command) -> None:
    """In Ollama's words, on stderr; of a name that is no backend with those there are."""
    _, ask = await stage(start, command)
    told = await ask("pull", "nonsense")
    assert (told.exit_code, told.stderr) == (1, "pull model manifest: file does not exist\n")
    told = await ask("pull", "new", "--to", "x")
    assert (told.exit_code, told.stderr) == (1, 'no backend "x". There are: a, b, c.\n')


async def test_an_update_is_asked_for(start: Start, command: Command) -> None:
    """Else a pull of what is there does nothing."""
    rig, ask = await stage(start, command)
    rig.fleet["a"].management.registry.add(SimModel("m", content="newer"))
    old = rig.fleet["a"].host.find("m")
    await ask("pull", "m")
    assert rig.fleet["a"].host.find("m") == old
    await ask("pull", "m", "--update")
    assert rig.fleet["a"].host.find("m") != old


async def test_list(start: Start, command: Command) -> None:
    """What is where, and in memory where."""
    rig, ask = await stage(start, command)
    await rig.warm("b", "m")
    told = await ask("list")
    assert "m:latest  2.1 GB  all 3  b" in told.stdout.splitlines()
    told = await ask("list", "--where")
    row = next(line for line in told.stdout.splitlines() if line.startswith("m:latest"))
    assert row.split()[-5:] == ["on", "disk", "loaded", "on", "disk"]
    doc = json.loads((await ask("list", "--json")).stdout)
    by_name = {model["name"]: model for model in doc["models"]}
    assert by_name["m:latest"]["backends"]["b"]["state"] == "loaded"


async def test_warm_and_unload(start: Start, command: Command) -> None:
    """On named backends, or where the next call would go; an embedding model as well."""
    rig, ask = await stage(start, command)
    told = await ask("warm", "m", "--on", "a", "--on", "c")
    assert told.stdout == "m is in memory on a\nm is in memory on c\n"
    assert rig.loaded() == {"a": ["m"], "b": [], "c": ["m"]}
    assert (await ask("warm", "m", "--on", "a")).exit_code == ExitCode.OK
    told = await ask("warm", "e")
    assert (told.exit_code, told.stdout) == (ExitCode.OK, "e is in memory\n")
    assert sum("e" in loaded for loaded in rig.loaded().values()) == 1
    told = await ask("unload", "m")
    assert told.stdout == "m: not in memory any more\n"
    assert [loaded for loaded in rig.loaded().values() if "m" in loaded] == []
    told = await ask("unload", "--all")
    assert told.stdout == "e:latest: not in memory any more\n"
    assert set(map(len, rig.loaded().values())) == {0}
    assert (await ask("unload", "--all")).stdout == "Nothing is in memory.\n"


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("warm", "m", "--on", "x"), 1, 'no backend "x". There are: a, b, c.'),
        (("warm", "none", "--on", "a"), 1, 'a does not have the model "none".'),
        (("warm", "none"), 1, "model 'none' not found"),
        (("unload", "none"), 1, "model 'none' not found"),
        (("unload",), ExitCode.USAGE, "Name a model, or say --all."),
        (("unload", "m", "--all"), ExitCode.USAGE, "Name a model, or say --all."),
        (("sync", "none"), 1, "No backend has none. Install it: ollama-balancer models pull none"),
        (("sync", "a b"), ExitCode.USAGE, "a b: "),
    ],
)
async def test_what_cannot_be_done(
    start: Start, command: Command, args: tuple[str, ...], code: int, told: str
) -> None:
    """One line that says why."""
    _, ask = await stage(start, command)
    result = await ask(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


async def test_a_load_that_fails_is_told(start: Start, command: Command) -> None:
    """With the host's words."""
    rig, ask = await stage(start, command)
    rig.fleet["a"].faults.fail("m")
    told = await ask("warm", "m", "--on", "a")
    assert (told.exit_code, told.stderr.startswith("a: ")) == (1, True)


async def test_sync(start: Start, command: Command) -> None:
    """What a registry has goes where it is missing; what none has is told, and what to do."""
    rig, ask = await stage(start, command)
    rig.fleet["a"].host.add(SimModel("new", size_bytes=5_000))
    rig.fleet["b"].host.add(SimModel("made-here"))
    for name in "ab":
        await rig.balancer.prober.relist(name)
    told = await ask("sync", "--dry-run")
    assert told.stdout == "made-here:latest to a, c\nnew:latest to b, c\n"
    doc = json.loads((await ask("sync", "--dry-run", "--json")).stdout)
    assert doc == {"pulls": {"made-here:latest": ["a", "c"], "new:latest": ["b", "c"]}}
    assert having(rig, "new") == "a"
    told = await ask("sync")
    assert (told.exit_code, having(rig, "new")) == (ExitCode.FAILURE, "abc")
    assert told.stderr == (
        "made-here:latest: pull model manifest: file does not exist. No registry has it: push it "
        "to one, or create it on each of them\n"
    )
    assert (await ask("sync", "new")).stdout == "Every backend has what it may have.\n"


def test_a_stranger_is_not_asked_to_pull(command: Command) -> None:
    """An Ollama at that address would do it by itself, without a balancer's rules."""
    answers: dict[str, tuple[int, object]] = {"/api/pull": (200, '{"status":"success"}\n')}
    with serving(answers) as stub:
        told = command("models", "pull", "m", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == ExitCode.NO_ADMIN
    assert [path for _, path, _ in stub.asked] == ["/_balancer/status"]


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        ((200, '{"status":"pulling manifest"}\n'), 1, "without saying that it succeeded"),
        ((200, "<html>\n"), ExitCode.NO_ADMIN, "is no ollama-balancer"),
        ((403, {"error": "To pull models here takes a key"}), 1, "To pull models here takes"),
    ],
)
def test_answers_that_are_none(
    command: Command, answer: tuple[int, object], code: int, told: str
) -> None:
    """A stream that breaks off is no success."""
    status = {"status_version": 1, "backends": []}
    with serving({"/_balancer/status": (200, status), "/api/pull": answer}) as stub:
        result = command("models", "pull", "m", "--admin", f"127.0.0.1:{stub.port}")
        none = command("models", "list", "--admin", f"127.0.0.1:{stub.port}")
    assert (result.exit_code, told in result.stderr) == (code, True)
    assert none.stdout.startswith("No models.")


def test_people_see_bars() -> None:
    """One for each layer, full in the end; other steps are lines above them."""
    console = Console(force_terminal=True, width=100, record=True)
    digest = "sha256:" + "a" * 64
    with models._bars(console) as say:
        say({"status": "pulling manifest"})
        say({"status": "pulling aaaa", "digest": digest, "total": 2_000_000_000})
        for completed in (1_000_000_000, 2_000_000_000):
            say({"status": "pulling aaaa", "digest": digest, "total": 2_000_000_000}
                | {"completed": completed})  # fmt: skip
        say({"status": "success"})
    told = console.export_text()
    assert "pulling aaaa" in told
    assert "2.0/2.0 GB" in told
