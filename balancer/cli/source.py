"""Where the configuration comes from: file, environment, flags."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from balancer.cli.exits import CommandError, ExitCode
from balancer.config import Config, ConfigError, Listen, Problem, find_file, listening, load

FLAGS: Final = "command line"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """
    What is read at the start and again on every reload.

    Args:
        overrides: Flags by dotted key.
    """

    file: Path | None
    env: Mapping[str, str]
    overrides: Mapping[str, Any]

    @property
    def told(self) -> str | None:
        """The file as people wrote it."""
        return None if self.file is None else str(self.file)

    def read(self) -> Config:
        """
        Read it.

        Raises:
            ConfigError: It is no good.
            OSError: The file cannot be read.
        """
        source, text = self._text()
        return load(text, self.env, source=source, overrides=self.overrides)

    def listening(self, *, guess: bool) -> tuple[Listen, ...]:
        """Where a balancer that reads it listens, see `config.listening`; raises as `read`."""
        source, text = self._text()
        return listening(text, self.env, source=source, guess=guess)

    def _text(self) -> tuple[str, str]:
        """The file's name, and what is in it."""
        if self.file is None:
            return "config.yaml", ""
        try:
            return str(self.file), self.file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            place = Problem(str(self.file), None, None, "", "is not a text in UTF-8.")
            raise ConfigError([place]) from None

    def over(self, **overrides: Any) -> Source:
        """The same with one more flag."""
        return replace(self, overrides={**self.overrides, **overrides})


def find(config: str | None, overrides: Mapping[str, Any] | None = None) -> Source:
    """The source that flags and environment name, or the first file of the usual places."""
    return Source(find_file(config, os.environ), os.environ, overrides or {})


def read_or_refuse(source: Source) -> Config:
    """
    Read it for a command.

    Raises:
        CommandError: One line per fault; wrong usage if flags alone are at fault.
    """
    return or_refuse(source, source.read)


def or_refuse(source: Source, read: Callable[[], T]) -> T:
    """What *read* makes of it; raises as `read_or_refuse`."""
    try:
        return read()
    except ConfigError as error:
        flags = all(problem.source == FLAGS for problem in error.problems)
        code = ExitCode.USAGE if flags else ExitCode.CONFIG
        raise CommandError(*map(str, error.problems), code=code) from None
    except OSError as error:
        raise CommandError(unreadable(source, error), code=ExitCode.CONFIG) from None


def unreadable(source: Source, error: OSError) -> str:
    """Why the file cannot be read, and what to do."""
    lacks = isinstance(error, FileNotFoundError)
    hint = f"Write one: ollama-balancer init -o {source.told}" if lacks else ""
    return f"Cannot read the configuration {source.told}: {error.strerror}. {hint}".rstrip()
