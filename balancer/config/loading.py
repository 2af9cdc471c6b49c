"""From text, environment and flags to one frozen `Config`, or to every fault in them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from . import blocks
from .addresses import Listen
from .building import build
from .layers import Layers, lay
from .problems import ConfigError, Path, Problem, dotted, shown, suggestion
from .settings import Config
from .sources import Sources
from .views import leaves

_LISTEN = ("server", "listen")


def load(
    text: str,
    env: Mapping[str, str],
    *,
    source: str = "config.yaml",
    overrides: Mapping[str, Any] = MappingProxyType({}),
    read_file: Callable[[str], str] = lambda path: FilePath(path).read_text(encoding="utf-8"),
) -> Config:
    """
    Join defaults, file, environment and flags, the later over the earlier.

    Args:
        text: The YAML; empty for no file.
        env: The environment; of it ``BALANCER_*``, what ``${…}`` names, and for discovery
            ``OLLAMA_HOST`` and ``OLLAMA_BASE_URLS``, for pages ``OLLAMA_ORIGINS``.
        source: What messages call the file.
        overrides: Flags by dotted key; None means not given.
        read_file: Returns the text of a secret's, key's or certificate's file, or raises OSError.

    Raises:
        ConfigError: Something is wrong; it holds every problem found.
    """
    layers = lay(text, env, source, overrides)
    file, refused = _validate(layers)
    config = build(file, Sources(layers, refused, read_file), env)
    if layers.problems:
        raise ConfigError(sorted(layers.problems, key=_in_reading_order))
    origins = {dotted(path): layers.origin(path) for path, _ in leaves(config.written)}
    return replace(
        config,
        warnings=tuple(layers.warnings),
        origins={path: origin for path, origin in origins.items() if origin},
    )


def listening(
    text: str, env: Mapping[str, str], *, source: str, guess: bool = False
) -> tuple[Listen, ...]:
    """
    Return where a balancer with that configuration listens, as another process may tell.

    Keys, files and variables that only the balancer has are no faults here; and where the
    environment tells the address, none of the file's is.

    Args:
        guess: No fault keeps it from telling; where none can be read it is the default.

    Raises:
        ConfigError: As `load`.
    """
    layers = lay(text, env, source, {})
    file, _ = _validate(layers)
    unread = {dotted(path) for path in layers.spoiled if path[: len(_LISTEN)] != _LISTEN}
    is_in_env = _LISTEN in layers.overrides
    problems = [
        problem
        for problem in layers.problems
        if problem.path not in unread
        and (problem.path.startswith(dotted(_LISTEN)) or not is_in_env)
    ]
    if problems and not guess:
        raise ConfigError(sorted(problems, key=_in_reading_order))
    return file.server.listen


def find_file(
    explicit: str | None,
    env: Mapping[str, str],
    exists: Callable[[FilePath], bool] = FilePath.is_file,
) -> FilePath | None:
    """
    Return the file to read: the one named (by flag or ``BALANCER_CONFIG``), else the first found.

    A named file is returned whether it exists or not. None: there is no file.
    """
    named = explicit or env.get("BALANCER_CONFIG")
    if named:
        return FilePath(named)
    places = [FilePath("ollama-balancer.yaml")]
    if env.get("XDG_CONFIG_HOME"):
        places.append(FilePath(env["XDG_CONFIG_HOME"], "ollama-balancer/config.yaml"))
    elif env.get("HOME"):
        places.append(FilePath(env["HOME"], ".config/ollama-balancer/config.yaml"))
    places.append(FilePath("/etc/ollama-balancer/config.yaml"))
    return next(filter(exists, places), None)


def _validate(layers: Layers) -> tuple[blocks.File, set[Path]]:
    """
    Hold the tree against the schema.

    What was refused is taken out and the rest tried again, so that checks
    across keys can report in the same run.
    """
    try:
        return blocks.File.model_validate(layers.tree), set()
    except ValidationError as error:
        faults = error.errors(include_url=False)
    for fault in faults:
        if not layers.is_spoiled(fault["loc"]):
            layers.problems.append(_problem(layers, fault))
    refused = {_removable(fault["loc"]) for fault in faults}
    return blocks.File.model_validate(_without(layers.tree, refused)), refused


def _problem(layers: Layers, fault: Mapping[str, Any]) -> Problem:
    path: Path = fault["loc"]
    unknown = fault["type"] == "extra_forbidden"
    mark = layers.values.get(path)
    message = _unknown(path) if unknown else _advice(fault, (mark and mark.plain) or "")
    return layers.problem(path, message, key=unknown)


def _unknown(path: Path) -> str:
    block = blocks.block_at(path[:-1])
    known = list(block.model_fields) if block else []
    hint = suggestion(str(path[-1]), known) or f" Known here: {', '.join(known)}."
    return f"unknown key.{hint}"


def _advice(fault: Mapping[str, Any], plain: str) -> str:
    match fault["type"]:
        case "missing":
            return "is needed."
        case "tuple_type":
            return "needs a list."
        case "value_error":
            text = str(fault["ctx"]["error"])
            if isinstance(fault["input"], bool) and plain.lower() not in ("true", "false", ""):
                text += f" YAML reads {plain} as {shown(fault['input'])}."
            return text
        case _:
            return "needs a block of keys."


def _removable(path: Path) -> Path:
    """Return *path*, or what encloses it and makes no sense without it."""
    if path[0] == "backends" and path[2:] == ("url",):
        return path[:2]
    for length in range(len(path)):
        block = blocks.block_at(path[:length])
        in_list = isinstance(path[length], int)
        if block and block.stands_whole and not in_list:
            return path[:length]
    return path


def _without(tree: Any, refused: set[Path], path: Path = ()) -> Any:
    kept: Any
    if isinstance(tree, dict):
        kept = {step: value for step, value in tree.items() if (*path, step) not in refused}
        return {step: _without(value, refused, (*path, step)) for step, value in kept.items()}
    if isinstance(tree, list):
        kept = [(i, value) for i, value in enumerate(tree) if (*path, i) not in refused]
        return [_without(value, refused, (*path, i)) for i, value in kept]
    return tree


def _in_reading_order(problem: Problem) -> tuple[bool, str, int, int]:
    return problem.line is None, problem.source, problem.line or 0, problem.column or 0
