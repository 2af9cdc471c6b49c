"""The words: the one of them that reckons."""

from __future__ import annotations

import pytest

from balancer.core.domain import Framing
from tests.core.bench import call


@pytest.mark.parametrize(
    ("path", "streaming", "framing"),
    [
        ("/api/chat", True, Framing.NDJSON),
        ("/api/chat", False, Framing.JSON),
        ("/v1/chat/completions", True, Framing.SSE),
        ("/v1/chat/completions", False, Framing.JSON),
        ("/api/embed", True, Framing.JSON),
    ],
)
def test_answers_are_framed_by_route_and_wish(path: str, streaming: bool, framing: Framing) -> None:
    """A stream has its route's framing; whatever does not stream is one document."""
    assert call(path=path, streaming=streaming).framing is framing
