"""
What was written where: the file, then the environment, then flags, each over the last.

Below them all is what Ollama's own variable says of pages (``OLLAMA_ORIGINS``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .addresses import parse_ollama_host
from .blocks import leaf_paths
from .kinds import read_words
from .problems import Path, Problem, dotted, suggestion
from .yamltext import Mark, read_yaml

FLAG = "command line"

_PREFIX = "BALANCER_"
_SHORT: dict[str, Path] = {
    "BALANCER_LISTEN": ("server", "listen"),
    "BALANCER_LOG_LEVEL": ("logging", "level"),
    "BALANCER_LOG_FORMAT": ("logging", "format"),
    "BALANCER_DEMO": ("demo", "enabled"),
    "BALANCER_BACKENDS": ("backends",),
    "BALANCER_DISCOVER": ("discovery", "sources"),
}
API_KEY, API_KEY_FILE = "BALANCER_API_KEY", "BALANCER_API_KEY_FILE"
_ORIGINS = "OLLAMA_ORIGINS"
_OTHERS = frozenset({API_KEY, API_KEY_FILE, "BALANCER_CONFIG"})


@dataclass(slots=True)
class Layers:
    """
    All that was written, as one tree, and where each part of it came from.

    *overrides* names the variable, or the command line, that set a path.
    *is_read* is false where the file could not be read at all.
    """

    source: str
    is_read: bool
    tree: dict[str, Any]
    values: dict[Path, Mark]
    keys: dict[Path, Mark]
    spoiled: set[Path]
    problems: list[Problem]
    warnings: list[str]
    overrides: dict[Path, str] = field(default_factory=dict)

    def locate(self, path: Path, *, key: bool = False) -> tuple[str, int | None, int | None]:
        """Return source, line and column of a value (or its key), or of what encloses it."""
        if key and (mark := self.keys.get(path)):
            return self.source, mark.line, mark.column
        for enclosing in _upwards(path):
            if enclosing in self.overrides:
                return self.overrides[enclosing], None, None
            if mark := self.values.get(enclosing):
                return self.source, mark.line, mark.column
        return self.source, None, None

    def problem(self, path: Path, message: str, *, key: bool = False) -> Problem:
        """Say that something is wrong at *path*."""
        return Problem(*self.locate(path, key=key), dotted(path), message)

    def is_spoiled(self, path: Path) -> bool:
        """Whether the value, or what encloses it, could not be read and was complained of."""
        return any(enclosing in self.spoiled for enclosing in _upwards(path))

    def origin(self, path: Path) -> str | None:
        """Return ``file:LINE``, ``env:NAME`` or ``flag``; None for what nobody wrote."""
        if not _stands_in(self.tree, path):
            return None
        source, line, _ = self.locate(path)
        if line is not None:
            return f"file:{line}"
        return "flag" if source == FLAG else f"env:{source}"

    def put(self, path: Path, value: Any, source: str) -> None:
        """Lay *value* over what stands at *path*."""
        box: Any = self.tree
        for step in path[:-1]:
            if box.get(step) is None:
                box[step] = {}
            box = box[step]
            if not isinstance(box, dict):
                return  # a plain value where a block belongs: a fault of the file, told later
        box[path[-1]] = value
        self._mask(path, source)

    def add_key(self, item: dict[str, str], source: str) -> None:
        """Append an API key that stands in the environment."""
        if self.tree.get("auth") is None:
            self.tree["auth"] = {}
        auth = self.tree["auth"]
        if not isinstance(auth, dict):
            return  # a fault of the file, told later
        if auth.get("keys") is None:
            auth["keys"] = []
        if isinstance(auth["keys"], list):
            self._mask(("auth", "keys", len(auth["keys"])), source)
            auth["keys"].append(item)

    def drop(self, path: Path, index: int) -> None:
        """Take an item out of the list at *path*; those behind it move up."""
        box: Any = self.tree
        for step in path:
            box = box[step]
        del box[index]
        at = len(path)
        for marks in (self.values, self.keys):
            moved = {}
            for known, mark in marks.items():
                place = known[at] if known[:at] == path and len(known) > at else None
                if isinstance(place, int) and place > index:
                    moved[(*path, place - 1, *known[at + 1 :])] = mark
                elif place != index:
                    moved[known] = mark
            marks.clear()
            marks.update(moved)

    def _mask(self, path: Path, source: str) -> None:
        for marks in (self.values, self.keys):
            for hidden in [known for known in marks if known[: len(path)] == path]:
                del marks[hidden]
        self.spoiled = {known for known in self.spoiled if known[: len(path)] != path}
        self.overrides[path] = source


def lay(text: str, env: Mapping[str, str], source: str, overrides: Mapping[str, Any]) -> Layers:
    """Read file, environment and flags into one tree."""
    file = read_yaml(text, env, source)
    is_read = isinstance(file.tree, dict) or (file.tree is None and not file.problems)
    if not is_read and not file.problems:
        file.problems.append(Problem(source, 1, 1, "", "needs keys such as backends: at the top."))
    layers = Layers(
        source=source,
        is_read=is_read,
        tree=file.tree if isinstance(file.tree, dict) else {},
        values=file.values,
        keys=file.keys,
        spoiled=file.spoiled,
        problems=file.problems,
        warnings=[str(warning) for warning in file.warnings],
    )
    _lay_environment(layers, env)
    for name, value in overrides.items():
        if value is not None:
            layers.put(tuple(name.split(".")), value, FLAG)
    _lay_ollama_origins(layers, env)
    _spell_out_backends(layers.tree)
    _join_doubles(layers)
    return layers


def _lay_environment(layers: Layers, env: Mapping[str, str]) -> None:
    known = _SHORT | {
        _PREFIX + "__".join(path).upper(): path for path in leaf_paths() if len(path) > 1
    }
    for name, path in known.items():
        if env.get(name):
            layers.put(path, env[name], name)
    if env.get(API_KEY) and env.get(API_KEY_FILE):
        message = f"{API_KEY_FILE} is set as well. Unset one of them."
        layers.problems.append(Problem(API_KEY, None, None, "", message))
    if env.get(API_KEY):
        layers.add_key({"name": "env", "key": env[API_KEY], "role": "admin"}, API_KEY)
    elif env.get(API_KEY_FILE):
        item = {"name": "env", "key_file": env[API_KEY_FILE], "role": "admin"}
        layers.add_key(item, API_KEY_FILE)
    known_names = [*known, *_OTHERS]
    for name in sorted(env):
        if name.startswith(_PREFIX) and name not in known_names:
            hint = suggestion(name, known_names)
            layers.warnings.append(f"{name} is not a setting and was ignored.{hint}")


def _lay_ollama_origins(layers: Layers, env: Mapping[str, str]) -> None:
    """What Ollama reads counts where nothing of ours names a page."""
    cors = layers.tree.get("cors")
    named = cors.get("allow_origins") if isinstance(cors, dict) else None
    if env.get(_ORIGINS) and not named:
        layers.put(("cors", "allow_origins"), env[_ORIGINS], _ORIGINS)


def _spell_out_backends(tree: dict[str, Any]) -> None:
    """Turn ``backends: gpu1, gpu2`` and ``[gpu1, gpu2]`` into the long form."""
    backends = tree.get("backends")
    if isinstance(backends, str):
        backends = read_words(backends)
    if isinstance(backends, list | tuple):
        tree["backends"] = [{"url": b} if isinstance(b, str) else b for b in backends]


def _join_doubles(layers: Layers) -> None:
    """Of two backends at one address, one that says no more than the address goes."""
    items = layers.tree.get("backends")
    if not isinstance(items, list):
        return
    for index in reversed(range(len(items))):
        place = _place(items[index])
        is_bare = isinstance(items[index], dict) and items[index].keys() == {"url"}
        others = [one for i, one in enumerate(items) if i != index and _place(one) == place]
        if place is not None and is_bare and others:
            message = f"{items[index]['url']} is the same host as {others[0]['url']}: used once."
            layers.warnings.append(str(layers.problem(("backends", index), message)))
            layers.drop(("backends",), index)


def _place(item: Any) -> object:
    """Equal for two spellings of one address; None for what is none."""
    try:
        return parse_ollama_host(item["url"]).same_place()
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _upwards(path: Path) -> Iterable[Path]:
    return (path[:length] for length in range(len(path), -1, -1))


def _stands_in(tree: Any, path: Path) -> bool:
    try:
        for step in path:
            tree = tree[step]
    except (LookupError, TypeError):
        return False
    return True
