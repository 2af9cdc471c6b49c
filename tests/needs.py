"""What a test needs of the machine: skipped with a loud reason at home, failing in CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Say that *what* is not there: a skip, or a failure where everything has to run (CI=true)."""
    if os.environ.get("CI"):
        pytest.fail(f"CI lacks {what}")
    pytest.skip(f"NOT TESTED here: {what} is not installed")


def program(*names: str) -> str:
    """The path of the first of these programs that is there."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    lacking(names[0])


def package(name: str) -> None:
    """Go on only if the Python package can be imported."""
    if importlib.util.find_spec(name) is None:
        lacking(f"the Python package {name}")
