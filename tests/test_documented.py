"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from balancer.cli import app
from balancer.config import load
from docs.generate import PAGES

ROOT = Path(__file__).resolve().parents[1]


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


def test_the_readme_names_every_command() -> None:
    """As it is typed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = vars(get_command(app))["commands"]
    missing = [name for name in commands if f"`{name}" not in readme]
    assert missing == []
