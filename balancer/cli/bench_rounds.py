"""
Who is asked in which order: directly and through the balancer, by turns, or many at once.

Nothing here knows a socket: calls are functions, so their order can be told in a test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

IN_A_ROW: Final = 3
FEW: Final = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One call. Times are seconds.

    Args:
        backend: Who answered; empty: not told.
        first_s: From the question to the first token; of a call without tokens to its end.
        gaps_s: Between tokens, as they arrived here.
        tokens: By the backend's own count, else as many as arrived.
        load_s: How long it waited for the model to be ready, by the backend's own words.
        wrong: Why it is not to be counted; empty: it is.
        late: It was cut off because our own time was over.
    """

    backend: str
    first_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    tokens: int = 0
    load_s: float = 0.0
    wrong: str = ""
    late: bool = False

    @property
    def rate(self) -> float | None:
        """Tokens a second, the wait for the first not counted; None: too few to tell."""
        span_s = sum(self.gaps_s)
        return (self.tokens - 1) / span_s if self.tokens > 1 and span_s > 0 else None


Call = Callable[[str | None], Sample]  # to a backend by name; None: through the balancer
GoOn = Callable[[], bool]


@dataclass(slots=True)
class Turns:
    """
    What came of calling by turns.

    Args:
        pairs: Direct, and through the balancer to the same backend, of one round.
        rounds: How many were made.
        first_calls: Made first, to be ready; not counted.
    """

    direct: list[Sample] = field(default_factory=list)
    through: list[Sample] = field(default_factory=list)
    pairs: list[tuple[Sample, Sample]] = field(default_factory=list)
    first_calls: list[Sample] = field(default_factory=list)
    rounds: int = 0

    @property
    def fails(self) -> bool:
        """Nothing but failures lately: more of them would teach nobody anything."""
        return any(
            len(made) >= IN_A_ROW and all(s.wrong for s in made[-IN_A_ROW:])
            for made in (self.direct, self.through)
        )


def by_turns(call: Call, reachable: Collection[str], rounds: int, go_on: GoOn) -> Turns:
    """
    Call through the balancer and, in the same round, directly where that call went.

    Every other round the direct one comes first, so that none has the advantage of coming second.
    """
    made = Turns()
    if not go_on():
        return made
    made.first_calls.append(call(None))
    last = made.first_calls[0].backend
    if last in reachable:
        made.first_calls.append(call(last))
    while made.rounds < rounds and not made.fails and go_on():
        direct = call(last) if made.rounds % 2 and last in reachable else None
        through = call(None)
        made.through.append(through)
        if direct is not None:
            made.direct.append(direct)
        last = through.backend or last
        if last in reachable and (direct is None or direct.backend != last):
            direct = call(last)
            made.direct.append(direct)
        if direct and direct.backend == last and not (direct.wrong or through.wrong):
            made.pairs.append((direct, through))
        made.rounds += 1
    return made


def the_others(call: Call, made: Turns, reachable: Collection[str], go_on: GoOn) -> None:
    """A few direct calls to each backend that had none, to see what it gives."""
    had = {sample.backend for sample in made.direct}
    for backend in [name for name in reachable if name not in had]:
        if go_on():
            made.first_calls.append(call(backend))
        for _ in range(FEW):
            if go_on():
                made.direct.append(call(backend))


@dataclass(frozen=True, slots=True)
class Crowd:
    """What came of many calls at once."""

    callers: int
    samples: tuple[Sample, ...]
    took_s: float


def at_once(
    calls: Sequence[Call],
    each: int,
    go_on: GoOn,
    clock: Callable[[], float],
) -> Crowd:
    """
    So many callers, each with one call after the other through the balancer, until one fails.

    Args:
        calls: One for each caller, who has a thread of its own.
        each: How often a caller calls.
    """
    samples: list[Sample] = []
    ended_at: list[float] = []

    def work(call: Call) -> None:
        mine: list[Sample] = []
        while len(mine) < each and go_on() and not (mine and mine[-1].wrong):
            mine.append(call(None))
        samples.extend(mine)
        ended_at.append(clock())

    threads = [threading.Thread(target=work, args=(call,), daemon=True) for call in calls]
    began = clock()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Crowd(len(calls), tuple(samples), max(ended_at) - began)
