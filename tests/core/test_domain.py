"""The words: the one of them that reckons, and what kind of things they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balancer.core.domain import Framing, Usage
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


def test_records_are_values() -> None:
    """Equal by content, usable as keys, of no other fields than their own."""
    one, same, other = Usage(tokens_in=1), Usage(tokens_in=1), Usage(tokens_in=2)
    assert one == same != other
    assert {one: "here"}[same] == "here"
    assert replace(one, tokens_in=2) == other
    with pytest.raises(AttributeError):
        one.tokens = 3  # type: ignore[attr-defined]
