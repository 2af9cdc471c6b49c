"""What stands at the scheduler's door: which candidates have context enough, and what is a Run."""

from __future__ import annotations

from balancer.core.domain import Candidate, Residency
from balancer.core.scheduler import split_by_context
from tests.core.bench import call


def candidate(backend: str, context: int | None) -> Candidate:
    """One with that much context."""
    return Candidate(backend, Residency.LOADED, 0, 2, 0, True, 0.0, context, 0)


def test_context_is_measured_by_prompt_and_answer() -> None:
    """What is unknown passes; what is exactly enough fits; the rest is short."""
    some = [candidate("a", None), candidate("b", 150), candidate("c", 149)]
    fits, short = split_by_context(call("m:1", prompt_tokens=100, output_tokens=50), some)
    assert ([c.backend for c in fits], [c.backend for c in short]) == (["a", "b"], ["c"])
