"""What is wrong with a configuration, told so that it can be put right."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Where a value stands: ``("backends", 1, "url")``."""

_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Problem:
    """
    One fault, and where it stands.

    *source* is a file, an environment variable or the command line. Lines and
    columns count from 1 and are None outside files.
    """

    source: str
    line: int | None
    column: int | None
    path: str
    message: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"
        return f"{where} {self.path}: {self.message}" if self.path else f"{where} {self.message}"


class ConfigError(Exception):
    """A configuration was refused; *problems* holds every fault found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def dotted(path: Path) -> str:
    """Write a path as users read it: ``backends[1].url``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean "…"?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def shown(value: object) -> str:
    """Quote a refused value for a message: on one line, short, and printable anywhere."""
    simple = value is None or isinstance(value, str | bool)
    text = json.dumps(value, ensure_ascii=False) if simple else str(value)
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS] + "…"
    return text.encode("utf-8", "replace").decode()
