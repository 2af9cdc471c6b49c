"""The documentation says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from balancer.cli import app
from docs.generate import PAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_generated_pages_are_current(name: str) -> None:
    """If this fails: make docs."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name]


def test_the_readme_names_every_command() -> None:
    """As it is typed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = vars(get_command(app))["commands"]
    missing = [name for name in commands if f"`{name}" not in readme]
    assert missing == []
