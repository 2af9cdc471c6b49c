"""What the tests of the configuration share."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from balancer.config import ConfigError, load

Faults = Callable[..., list[str]]


def no_file(path: str) -> str:
    """A disk without files."""
    raise FileNotFoundError(2, "No such file or directory", path)


@pytest.fixture
def faults() -> Faults:
    """Load and return the texts of all problems, none if the configuration is good."""

    def load_and_tell(text: str, env: Mapping[str, str] | None = None, **more: Any) -> list[str]:
        try:
            load(text, env or {}, **({"read_file": no_file} | more))
        except ConfigError as error:
            return [str(problem) for problem in error.problems] or ["refused without a reason"]
        return []

    return load_and_tell
