"""What loads much comes last: from then on each garbage collection takes longer."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The frameworks behind all other tests, whatever the directories are called."""
    items.sort(key=lambda item: item.path.name == "test_frameworks.py")
