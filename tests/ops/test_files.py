"""Small files: written whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from balancer.ops.files import reason, replace


def test_a_file_is_replaced_and_nothing_is_left_over(tmp_path: Path) -> None:
    """New, and again."""
    file = tmp_path / "state.json"
    for text in (b"one", b"two"):
        replace(file, text)
        assert file.read_bytes() == text
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_what_cannot_be_written_whole_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one stays, and no half of a new one beside it."""
    file = tmp_path / "state.json"
    replace(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(2, "No such file or directory", "/x"), "No such file or directory"),
        (ValueError("not that"), "not that"),
        (RecursionError(), "RecursionError"),
    ],
)
def test_an_error_says_something(error: Exception, text: str) -> None:
    """In its own words, if it has any."""
    assert reason(error) == text
