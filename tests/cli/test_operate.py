"""`reload`: what it says of each way a reload can go."""

from __future__ import annotations

import pytest

from balancer.cli.exits import ExitCode

from .conftest import Command
from .stub import serving


@pytest.mark.parametrize(
    ("status", "answer", "code", "words"),
    [
        (200, {"reloaded": True, "changed": []}, ExitCode.OK, ["Nothing has changed"]),
        (
            200,
            {"reloaded": True, "changed": ["queue.max_wait"], "needs_restart": ["server.listen"]},
            ExitCode.OK,
            ["Changed: queue.max_wait", "Only a restart takes over: server.listen"],
        ),
        (
            422,
            {"reloaded": False, "problems": ["a.yaml:1:1 x: unknown key.", "a.yaml:2:1 y: no."]},
            ExitCode.CONFIG,
            [
                "still running the previous configuration. Nothing was changed",
                "\na.yaml:1:1 x: unknown key.\na.yaml:2:1 y: no.\n",
            ],
        ),
        (
            422,
            {"reloaded": False, "problems": ["no"], "loaded_s_ago": 30},
            ExitCode.CONFIG,
            ["still running the previous configuration (loaded ", "). Nothing was changed.\nno\n"],
        ),
        (403, {"error": "needs the role admin"}, ExitCode.FAILURE, ["(403): needs the role"]),
    ],
)
def test_reload(
    command: Command, status: int, answer: object, code: ExitCode, words: list[str]
) -> None:
    """Taken over, refused with every reason, or not allowed."""
    with serving({"/_balancer/reload": (status, answer)}) as stub:
        told = command("reload", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == code
    assert [(method, path) for method, path, _ in stub.asked] == [("POST", "/_balancer/reload")]
    for word in words:
        assert word in told.output
