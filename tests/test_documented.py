"""The documentation says what the code does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from balancer.cli import app
from balancer.config import load, schema
from balancer.core import slots, speeds
from balancer.core.knobs import Knobs
from balancer.core.pool import PoolSettings
from balancer.core.routes import TABLE
from balancer.core.sharing import BATCH_BELOW, MANY_INPUTS
from balancer.ops.metrics import METRICS, PREFIX
from docs.generate import PAGES

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = ("ollama-balancer", "olb")

# What looks like a setting, or like an option of a command, and belongs to somebody else.
NO_SETTINGS = {"error.code", "journald.conf", "ai.example.org"}
# Fields of the log.
NO_SETTINGS |= {f"route.{name}" for name in ("kind", "backend", "runner_up", "cost_s", "wait_s")}
NO_SETTINGS |= {"route.predicted_ttft_s", "route.cached_tokens"}
NO_OPTIONS = {"--profile": "docker compose"}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_generated_pages_are_current(name: str) -> None:
    """If this fails: make docs."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name]


def test_configurations_in_the_readme_are_good() -> None:
    """Whoever copies one gets no fault and no warning."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("```yaml\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for text in blocks:
        assert load(text, {"WEBUI_KEY": "0123456789abcdef"}).warnings == ()


def test_numbers_in_words_are_those_of_the_code() -> None:
    """Nobody who changes one of them thinks of what is written about it."""
    knobs, pool = Knobs(), PoolSettings()
    assert (speeds.OPINION_SAMPLES, knobs.prefer_s, pool.host.ratio) == (8, 0.5, 0.5)
    assert (knobs.batch_reserve, knobs.batch_weight, knobs.batch_floor) == (0.1, 0.25, 0.1)
    assert (knobs.tier_patience_s, knobs.decline_s, knobs.batch_patience_s) == (10.0, 10.0, 60.0)
    assert (pool.model.ratio, pool.model.window_s) == (0.5, 120.0)
    example = re.sub(r"[\s#]+", " ", read("config.example.yaml"))
    for words in (
        f"Calls below {BATCH_BELOW} are batch",
        f"Embeddings of more than {MANY_INPUTS} texts are batch",
        f"auto: {slots.DEFAULT}. The strategy plan learns: from {slots.DEFAULT} on",
        f"last {pool.host.window_s:.0f} s do, too, if there are at least {pool.host.minimum}",
        f"last two minutes, if there are at least {pool.model.minimum}",
        "after eight measured calls it counts no more",
        "no more than half a second longer",
        "would take more than 10 s",
    ):
        assert words in example
    page = re.sub(r"\s+", " ", read("docs/routing.md"))
    assert (
        f"priority is below {BATCH_BELOW}, and embeddings of more than {MANY_INPUTS} texts" in page
    )


def test_the_readme_names_every_command() -> None:
    """As it is typed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in commands() if f"`{name}" not in readme]
    assert missing == []


# -- what is named is there ------------------------------------------------------------------


@cache
def read(name: str) -> str:
    """One of the texts."""
    return (ROOT / name).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """What stands between backticks in prose."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each call of our program, in blocks and in prose."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^    (.+)$", text.replace("\\\n", " "), re.MULTILINE)
    for line in "\n".join(blocks + spans(text)).splitlines():
        for part in re.split(r"&&|\|\||[;|]", re.sub(r"\s#\s.*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:  # half a quotation: no command
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words and words[0].rpartition("/")[2] in PROGRAMS:
                yield words[1:]


def commands(group: Any = None) -> dict[str, Any]:
    """The commands of a group, or of the program, by name."""
    return dict(vars(group or get_command(app)).get("commands", {}))


def options(command: Any) -> set[str]:
    """All options of a command, and of those below it."""
    own = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return own.union({"--help"}, *map(options, commands(command).values()))


def faults(words: list[str]) -> str:
    """What is wrong with a command line; empty: nothing."""
    if not words or words[0].startswith("-"):
        words = ["serve", *words]
    command = get_command(app)
    while below := commands(command):
        name, *words = words or ["nothing"]
        if name not in below:
            return f"{name} is no command"
        command = below[name]
    try:
        command.make_context(command.name, words)
    except Exception as error:  # noqa: BLE001 - typer's own click has the class
        return str(error)
    return ""


def settings(shape: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names in a JSON schema, sections too; of lists those of an entry."""
    if "$ref" in shape:
        shape = root["$defs"][shape["$ref"].rpartition("/")[2]]
    for each in (
        *shape.get("anyOf", ()),
        *shape.get("allOf", ()),
        *filter(None, [shape.get("items")]),
    ):
        yield from settings(each, root, path)
    for name, each in shape.get("properties", {}).items():
        yield f"{path}{name}"
        yield from settings(each, root, f"{path}{name}.")


SETTINGS = frozenset(settings(schema(), schema()))


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    """To a file that is there, and to a heading in it; pictures too."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.is_file(), target
        titles = (
            re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor
            else []
        )
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in slugs, target


@pytest.mark.parametrize("name", TEXTS)
def test_settings_exist(name: str) -> None:
    """Those in dotted form, and those of the environment."""
    named = {re.split("[:=]", span)[0] for span in spans(read(name))}
    dotted = {each for each in named if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", each)}
    assert dotted - SETTINGS - NO_SETTINGS == set()
    variables = set(re.findall(r"\bBALANCER_[A-Z_]*[A-Z]\b(?!_)", read(name)))
    warned = load("", dict.fromkeys(variables, "")).warnings
    assert [warning for warning in warned if "not a setting" in warning] == []


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name: str) -> None:
    """With their options and arguments; options that stand alone belong to one of them."""
    text = read(name)
    assert {
        " ".join(words): found for words in command_lines(text) if (found := faults(words))
    } == {}
    alone = {span.split()[0] for span in spans(text) if span.startswith("--")}
    assert alone - options(get_command(app)) - set(NO_OPTIONS) == set()


def test_the_table_of_commands_is_right() -> None:
    """What stands beside a command is a part or an option of it."""
    rows = re.findall(
        r"^\| (`[^|]+) \| ([^|]+) \|$", read("README.md").partition("| Command |")[2], re.MULTILINE
    )
    named = [name for cell, _ in rows for name in spans(cell)]
    assert sorted(named) == sorted(commands())
    for cell, told in rows:
        row = [commands()[name] for name in spans(cell)]
        below = set().union(*map(commands, row))
        for span in spans(told):
            for word in span.split():
                assert word in below.union(*map(options, row)), f"{cell}: {span}"


@pytest.mark.parametrize("name", TEXTS)
def test_metrics_exist(name: str) -> None:
    """Whole names."""
    known = {f"{PREFIX}{metric.name}" for metric in METRICS}
    assert set(re.findall(rf"\b{PREFIX}[a-z_]+", read(name))) - known == set()


@pytest.mark.parametrize("name", TEXTS)
def test_paths_and_headers_exist(name: str) -> None:
    """Routes of Ollama's interface, pages of ours, and what is added to answers."""
    text = read(name)
    routes = {re.sub(r"/\{.*", "", route.path) for route in TABLE}
    named = {path.rstrip("/") for path in re.findall(r"`(/(?:api|v1)/[a-z_/]+)`", text)}
    assert named - routes == set()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "balancer").rglob("*.py"))
    words = re.findall(r"/_balancer/[a-z]+|\bX-(?:Balancer|Request)-[A-Za-z-]*[a-z]", text)
    assert {word for word in words if f'"{word}"' not in source} == set()


@pytest.mark.parametrize("name", TEXTS)
def test_targets_of_make_exist(name: str) -> None:
    """In the Makefile."""
    named = re.findall(r"(?:^|`)make ([a-z]+)", read(name), re.MULTILINE)
    assert set(named) <= set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
