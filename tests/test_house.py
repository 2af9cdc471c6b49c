"""
The laws of the house, read off the source: who imports whom, who reads clocks, who is tested.

An import counts wherever it stands, in a function or for types only: it is a dependency.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "balancer"

# Third parties of one room or module alone.
OWNERS: dict[str, str | tuple[str, ...]] = {
    "pybreaker": "balancer.core.breaker",
    "msgspec": (
        "balancer.core.body",
        "balancer.core.framing",  # the JSON of each side
        "balancer.core.chains",  # what of it is prompt
    ),
    "structlog": "balancer.ops.log",
    "prometheus_client": "balancer.ops.metrics",
    "jinja2": "balancer.ops.dashboard",
    "aiohttp_sse": "balancer.ops.feed",
    "yaml": "balancer.config",
    "pydantic": "balancer.config",
    "pydantic_core": "balancer.config",
    "typer": "balancer.cli",
    "rich": "balancer.cli",
}
NEVER_IN_CORE = {"asyncio", "aiohttp", "structlog", "yaml", "pydantic", "logging", "socket", "time"}

# What of the simulation may know the balancer: what runs both.
RUNS_BOTH = {
    "balancer.sim.demo",
    "balancer.sim.laws",
    "balancer.sim.probing",
    "balancer.sim.shell",
    "balancer.sim.storm",
    "balancer.sim.wired",
    "balancer.sim.world",
}


def homes(library: str) -> tuple[str, ...]:
    """Where a library of one room or module alone is used."""
    owner = OWNERS.get(library, ())
    return (owner,) if isinstance(owner, str) else owner


# Clocks, chance and tasks are given, not taken; apart from where they come from.
TAKEN = {
    ("balancer.app", "time.time"): "the wall clock's one source",
    ("balancer.app", "os.urandom"): "the seed of all chance, told in the log",
    ("balancer.app", "time.perf_counter"): "how long the plan takes; the loop's clock may stand",
    ("balancer.cli.bench", "time.monotonic"): "how long calls take",
    ("balancer.cli.doctor", "time.monotonic"): "how long hosts take to answer",
    ("balancer.cli.doctor", "time.time"): "clocks of hosts are compared with ours",
    ("balancer.cli.inspect", "time.sleep"): "a person watches: `status --watch`",
    ("balancer.cli.key", "os.urandom"): "what makes a key",
    ("balancer.cli.key", "time.time"): "a person asks whether a key has expired",
    ("balancer.cli.operate", "time.time"): "a person asks since when a configuration is in force",
    ("balancer.cli.serving", "time.time"): "timestamps of log lines",
    (
        "balancer.cli.serving",
        "time.monotonic",
    ): "systemd compares it with its own, to the microsecond",
    ("balancer.net.server", "uuid.uuid4"): "request ids, a default that tests replace",
    ("balancer.sim.ollama", "time.time"): "a default: clients of the simulation see today",
    ("balancer.net.tasks", "loop.create_task"): "the owner of background tasks",
    ("balancer.app", "loop.create_task"): "awaited in the same function",
    ("balancer.sim.storm", "loop.create_task"): "awaited in the same function",
}
BANNED = {
    "asyncio.create_task",
    "asyncio.ensure_future",
    "loop.create_task",
    "datetime.datetime.now",
    "datetime.datetime.today",
    "datetime.datetime.utcnow",
    "datetime.date.today",
    "os.urandom",
}
BANNED_MODULES = {"time", "random", "secrets", "uuid"}
GIVEN = {"random.Random"}  # made from a seed

# Imports that come round, and why they are borne.
ROUND = {
    ("balancer.sim.faults", "balancer.sim.host"): "types alone: a fault is put into the host it has"
}

# Modules without a test file of their own, and why.
UNTESTED = {
    "balancer": "the version",
    "balancer.__main__": "calls the command line",
    "balancer.app": "tests/e2e",
    "balancer.cli": "tests/cli/test_cli.py",
    "balancer.cli.exits": "names of numbers",
    "balancer.config": "names what others have",
    "balancer.core.running": "tests/core/test_pool.py",
    "balancer.core.window": "tests/core/test_cells.py",
    "balancer.core": "empty",
    "balancer.core.errors": "names; told in tests/core/test_dialect.py",
    "balancer.core.events": "names",
    "balancer.core.sight": "names of what the pool has",
    "balancer.net": "empty",
    "balancer.net.blobs": "tests/net/test_manage.py",
    "balancer.net.reach": "tests/net/test_manage.py",
    "balancer.ops": "empty",
    "balancer.ops.admin": "tests/e2e/test_seeing.py",
    "balancer.ops.door": "tests/e2e/test_access.py",
    "balancer.ops.explain": "tests/e2e/test_explain.py",
    "balancer.ops.reload": "tests/e2e/test_reload.py",
    "balancer.ops.status": "tests/e2e/test_seeing.py",
    "balancer.ops.steering": "tests/e2e/test_steering.py",
    "balancer.sim": "empty",
    "balancer.sim.anthropic": "held against recordings in tests/sim/test_golden.py",
    "balancer.sim.catalogue": "held against recordings in tests/sim/test_golden.py",
    "balancer.sim.delivery": "tests/sim/test_ollama.py",
    "balancer.sim.inference": "held against recordings in tests/sim/test_golden.py",
    "balancer.sim.jobs": "tests/sim/test_world.py",
    "balancer.sim.probing": "tests/sim/test_world.py",
    "balancer.sim.responses": "held against recordings in tests/sim/test_golden.py",
    "balancer.sim.script": "tests/sim/test_ollama.py",
    "balancer.sim.shell": "tests/sim/test_world.py",
    "balancer.sim.storm": "tests/faults/test_storm.py",
    "balancer.sim.timeline": "tests/sim/test_machine.py",
    "balancer.sim.traffic": "tests/sim/test_demo.py",
}


# -- reading -----------------------------------------------------------------------------------


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    """The module's source, parsed."""
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Everything it imports: modules of ours in full, of others as written."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return frozenset(found)


def _base(module: str, node: ast.ImportFrom) -> str:
    """What ``from … import`` names, dots undone."""
    if not node.level:
        return node.module or ""
    up = node.level - (FILES[module].name == "__init__.py")
    package = ".".join(module.split(".")[: -up or None])
    return f"{package}.{node.module}" if node.module else package


def ours(module: str) -> frozenset[str]:
    """The modules of ours that it imports."""
    return imports(module) & FILES.keys()


def reached(module: str) -> set[str]:
    """The modules of ours that it imports, directly or not, but for those of `ROUND`."""
    found: set[str] = set()
    left = [module]
    while left:
        at = left.pop()
        new = {name for name in ours(at) - found if (at, name) not in ROUND}
        found |= new
        left += new
    return found


def room(module: str) -> str:
    """The package under `balancer` it belongs to; of `balancer.app` itself: app."""
    return module.split(".")[1] if "." in module else ""


def within(module: str, place: str) -> bool:
    """Whether it is *place* or lies in it."""
    return module == place or module.startswith(f"{place}.")


def modules(place: str) -> list[str]:
    """The modules of one room."""
    return [module for module in FILES if within(module, f"balancer.{place}")]


def uses(module: str) -> Iterator[tuple[str, int]]:
    """Dotted names it uses, with aliases undone, and their lines."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute | ast.Name):
            dotted = _dotted(node)
            if dotted is not None:
                head, dot, rest = dotted.partition(".")
                yield bound.get(head, head) + dot + rest, node.lineno


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value)
        return None if value is None else f"{value}.{node.attr}"
    return None


# -- rooms -------------------------------------------------------------------------------------


def test_the_source_was_found() -> None:
    """A law about nothing would always hold."""
    assert {room(module) for module in FILES} >= {"core", "net", "ops", "sim", "config", "cli"}
    assert "balancer.core.domain" in imports("balancer.core.dispatch")
    assert "asyncio" in imports("balancer.net.proxy")


@pytest.mark.parametrize("module", modules("core"))
def test_core_knows_nothing_but_itself(module: str) -> None:
    """The standard library without anything that acts, core, and two libraries in one file each."""
    for name in imports(module):
        top = name.split(".")[0]
        assert top not in NEVER_IN_CORE, f"{module} imports {name}"
        mine = within(name, "balancer.core") or module in homes(top)
        assert mine or top in sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize("module", modules("core"))
def test_core_does_not_wait(module: str) -> None:
    """No coroutine, and so no point at which the world may change in the middle of a decision."""
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node for node in ast.walk(tree(module)) if isinstance(node, waits)]


def test_the_words_depend_on_nothing() -> None:
    """What everything is written in imports nothing of ours but the words."""
    assert ours("balancer.core.domain") == ours("balancer.core.errors") == frozenset()
    assert ours("balancer.core.events") == {"balancer.core.domain"}


def test_net_and_ops_do_not_know_each_other() -> None:
    """Only what wires them knows both."""
    for module in modules("net"):
        assert not [name for name in ours(module) if room(name) == "ops"], module
    for module in modules("ops"):
        assert not [name for name in ours(module) if room(name) == "net"], module


def test_the_rooms_stand_on_the_floor_below() -> None:
    """Net and ops on core and the configuration; nobody below on the hall."""
    for module in [*modules("net"), *modules("ops")]:
        assert {room(name) for name in ours(module)} <= {"core", "config", room(module)}, module
    for module in modules("config"):
        assert {room(name) for name in ours(module)} <= {"core", "config"}, module
    assert not [name for name in reached("balancer.app") if room(name) in ("cli", "sim")]


def test_the_front_does_not_know_who_answers() -> None:
    """Handlers are given to the server; of its own room it has how bodies are read and written."""
    parts = ("bodies", "inflate", "listener", "outlet", "visitor")
    wire = {f"balancer.net.{name}" for name in parts}
    assert {room(name) for name in ours("balancer.net.server") - wire} == {"core"}
    assert {room(name) for module in wire for name in ours(module) - wire} <= {"core"}


def test_the_simulation_shares_nothing_with_what_it_tests() -> None:
    """A fake that used our code would hide our bugs; only what runs both knows both."""
    for module in modules("sim"):
        if module not in RUNS_BOTH:
            strange = [name for name in reached(module) if not within(name, "balancer.sim")]
            assert strange == [], module


def test_nothing_depends_on_the_simulation() -> None:
    """But itself and the commands that start it."""
    for module in FILES:
        if room(module) not in ("sim", "cli"):
            assert not [name for name in ours(module) if room(name) == "sim"], module


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_home(library: str) -> None:
    """It could be exchanged there without anybody else noticing; and it is used there."""
    users = {m for m in FILES for name in imports(m) if name.split(".")[0] == library}
    assert users
    strangers = [m for m in users if not any(within(m, home) for home in homes(library))]
    assert strangers == []


def test_no_import_comes_round() -> None:
    """Modules can be read, and understood, from the bottom up."""
    for module in FILES:
        assert module not in reached(module), f"{module} imports itself: {sorted(ours(module))}"


# -- clocks, chance, tasks ---------------------------------------------------------------------


def taken() -> set[tuple[str, str]]:
    """Where a clock, chance or a task without an owner is taken and not given."""
    found = set()
    for module in FILES:
        for name, _ in uses(module):
            is_function = name.split(".")[0] in BANNED_MODULES and "." in name
            if name in BANNED or (is_function and name not in GIVEN):
                found.add((module, name))
    return found


def test_clocks_chance_and_tasks_are_given() -> None:
    """So that every history can be repeated; the exceptions are listed, and none is out of date."""
    assert taken() == TAKEN.keys()


def test_the_eye_for_clocks_sees_through_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases and imported functions hide nothing."""
    source = (
        "import time as t, datetime\nfrom random import random as dice\n"
        "from asyncio import create_task\nt.sleep(1); dice(); create_task(x)\n"
        "datetime.datetime.now()\n"
    )
    monkeypatch.setitem(globals(), "tree", lambda _: ast.parse(source))
    assert {name for name, _ in uses("any")} >= {
        "time.sleep",
        "random.random",
        "asyncio.create_task",
        "datetime.datetime.now",
    }


# -- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_a_module_says_what_it_is(module: str) -> None:
    """In its first line."""
    assert ast.get_docstring(tree(module)), module


def test_every_module_has_its_tests() -> None:
    """balancer/x/y.py is tested by tests/x/test_y.py; what is tested elsewhere is listed."""
    lacking = set()
    for module, path in FILES.items():
        place = path.relative_to(PACKAGE)
        if not (ROOT / "tests" / place.parent / f"test_{place.name}").exists():
            lacking.add(module)
    assert lacking == UNTESTED.keys()
