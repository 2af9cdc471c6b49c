"""YAML text to plain values, with the place of each and all faults at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from .problems import Path, Problem, dotted

_MERGE = "tag:yaml.org,2002:merge"
_MOST_NODES = 20_000  # aliases of aliases grow without bound
_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)"
    r"|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}"
    r"|(?P<broken>\{))"
)
_NUMBER_TRAP = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the text, counted from 1; *plain* is an unquoted scalar as written."""

    line: int
    column: int
    plain: str | None = None


@dataclass(slots=True)
class YamlText:
    """
    What a text says: the *tree* of values, and where values and keys stand.

    *spoiled* are the values that could not be read and stand in the tree unread.
    """

    tree: Any = None
    values: dict[Path, Mark] = field(default_factory=dict)
    keys: dict[Path, Mark] = field(default_factory=dict)
    spoiled: set[Path] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def read_yaml(text: str, env: Mapping[str, str], source: str) -> YamlText:
    """
    Read one YAML document; faults become problems, never exceptions.

    ``${NAME}``, ``${NAME:-default}`` and ``$$`` are replaced in string values.
    """
    return _Reader(text, env, source).read()


class _Reader:
    def __init__(self, text: str, env: Mapping[str, str], source: str) -> None:
        self._text = text
        self._env = env
        self._source = source
        self._result = YamlText()
        self._nodes_left = _MOST_NODES

    def read(self) -> YamlText:
        try:
            self._loader = yaml.SafeLoader(self._text)
            node = self._loader.get_single_node()
            if node is not None:
                self._result.tree = self._build(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._problem((), mark, f"not valid YAML: {error.problem or error.context}.")
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            column = error.position - self._text.rfind("\n", 0, error.position)
            message = "not valid YAML: an unprintable character."
            self._result.problems.append(Problem(self._source, line, column, "", message))
        except RecursionError:
            self._problem((), None, "not usable YAML: nested too deeply, or too large.")
        return self._result

    def _build(self, node: yaml.Node, path: Path) -> Any:
        self._nodes_left -= 1
        if self._nodes_left < 0:  # also ends an alias that contains itself
            raise RecursionError
        mark = node.start_mark
        plain = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None
        self._result.values[path] = Mark(mark.line + 1, mark.column + 1, plain)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            if key.tag == _MERGE:
                merged |= self._merge(value, path)
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._problem(path, key.start_mark, "a key must be one word.")
                continue
            name, line = str(key.value), key.start_mark.line + 1  # as written: "on" is no bool here
            if not _is_text(name):
                self._problem(path, key.start_mark, "a key holds characters that are not text.")
                continue
            where = (*path, name)
            if name in lines:
                first = lines[name]
                self._problem(where, key.start_mark, f"duplicate key (first at line {first}).")
                continue
            lines[name] = line
            self._result.keys[where] = Mark(line, key.start_mark.column + 1)
            own[name] = self._build(value, where)
        return merged | own

    def _merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """Build what ``<<`` names: a mapping, or a list of them where the first wins."""
        mark = self._result.values[path]
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for item in reversed(nodes):
            if isinstance(item, yaml.MappingNode):
                merged |= self._build(item, path)
            else:
                self._problem(path, item.start_mark, '"<<" takes a block of keys.')
        self._result.values[path] = mark
        return merged

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            value = self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError):
            return self._spoil(path, node, "not a value YAML can read. Put it in quotes.")
        if isinstance(value, str):
            if not _is_text(value):
                return self._spoil(path, node, "holds characters that are not text.")
            return _VARIABLE.sub(lambda match: self._variable(match, node, path), value)
        if isinstance(value, int | float) and _NUMBER_TRAP.fullmatch(node.value):
            message = f"YAML reads {node.value} as {value}. Write the number, or use quotes."
            self._result.warnings.append(self._at(path, node.start_mark, message))
        return value

    def _variable(self, match: re.Match[str], node: yaml.Node, path: Path) -> str:
        name, default = match["name"], match["default"]
        if match["dollar"]:
            return "$"
        if match["broken"]:
            message = "write ${NAME} or ${NAME:-default}; a plain dollar sign is $$."
            self._spoil(path, node, message)
        elif default is not None:
            return self._env.get(name) or str(default)
        elif name in self._env:
            return self._env[name]
        else:
            message = f"${{{name}}} is not set. Set {name}, or write ${{{name}:-default}}."
            self._spoil(path, node, message)
        return match[0]

    def _spoil(self, path: Path, node: yaml.Node, message: str) -> str:
        self._result.spoiled.add(path)
        self._problem(path, node.start_mark, message)
        return "?"

    def _problem(self, path: Path, mark: Any, message: str) -> None:
        self._result.problems.append(self._at(path, mark, message))

    def _at(self, path: Path, mark: Any, message: str) -> Problem:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return Problem(self._source, line, column, dotted(path), message)


def _is_text(value: str) -> bool:
    """Refuse halves of surrogate pairs, which nothing can encode."""
    return value.isascii() or not re.search("[\ud800-\udfff]", value)
