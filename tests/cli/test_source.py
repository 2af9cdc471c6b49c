"""Where the configuration comes from, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from balancer.cli import source
from balancer.cli.exits import CommandError, ExitCode


def refused(found: source.Source) -> CommandError:
    """How it is refused."""
    with pytest.raises(CommandError) as caught:
        source.read_or_refuse(found)
    return caught.value


def test_flags_are_over_environment_and_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three says something else; the nearest to the user wins."""
    (place / "ollama-balancer.yaml").write_text("backends: [a]\nserver: {listen: ':1'}\n")
    monkeypatch.setenv("BALANCER_LISTEN", "127.0.0.1:2")
    config = source.read_or_refuse(source.find(None, {"backends": ["b"]}))
    assert [spec.name for spec in config.backends] == ["b"]
    assert [str(address) for address in config.server.listen] == ["127.0.0.1:2"]


def test_every_fault_of_a_file_is_a_line(place: Path) -> None:
    """File, line, column and reason; exit code 3."""
    file = place / "bad.yaml"
    file.write_text("backnds: [gpu1]\ntimeouts: {load: 15 secs}\n")
    error = refused(source.find(str(file)))
    assert error.code == ExitCode.CONFIG
    assert [line.split()[0] for line in error.lines] == [f"{file}:1:1", f"{file}:2:18"]
    assert 'Did you mean "backends"?' in error.lines[0]


def test_faults_of_flags_alone_are_wrong_usage(place: Path) -> None:
    """A wrong flag is exit code 2; beside a faulty file it is 3."""
    assert refused(source.find(None, {"backends": ["ftp://x"]})).code == ExitCode.USAGE
    file = place / "bad.yaml"
    file.write_text("nonsense: 1\n")
    assert refused(source.find(str(file), {"backends": ["ftp://x"]})).code == ExitCode.CONFIG


def test_a_file_that_is_missing_or_no_text_is_refused(place: Path) -> None:
    """The line names the file and the reason."""
    missing = refused(source.find("nowhere.yaml"))
    assert missing.code == ExitCode.CONFIG
    assert "nowhere.yaml: No such file" in missing.lines[0]
    (place / "latin.yaml").write_bytes(b"backends: [gpu\xe9]\n")
    assert "UTF-8" in refused(source.find("latin.yaml")).lines[0]
