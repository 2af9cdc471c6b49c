"""temporary"""
from __future__ import annotations
from collections.abc import Callable, Sequence
from balancer.core.domain import Attempt, Call
from balancer.core.verdicts import TABLE, Before

class Budget:
    def __init__(self, clock: Callable[[], float], ratio: float = 0.2) -> None:
        self.ratio = ratio
        self.refused: dict[str, int] = {}

    def note_call(self) -> None: ...

def again(call: Call, tried: Sequence[Attempt], budget: Budget) -> bool:
    last = tried[-1].outcome
    before = TABLE[last.verdict].before
    if not call.replayable:
        return False
    if before is Before.ONE_OTHER:
        return sum(a.outcome.verdict is last.verdict for a in tried) < 2
    if sum(a.outcome.crash for a in tried) >= 2:
        return False
    return before in (Before.ANOTHER, Before.SAME_FRESH)

def repeats_crash(tried: Sequence[Attempt]) -> bool:
    return any(a.outcome.crash for a in tried)
