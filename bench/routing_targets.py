"""The targets of the scheduler, judged on medians over seeds."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

Found = Mapping[str, Mapping[str, Mapping[str, float]]]  # figures by workload and policy

BASELINES: Final = ("push-least-loaded", "push-warm-first", "push-round-robin")
LEAST, WARM = BASELINES[:2]


@dataclass(frozen=True, slots=True)
class Target:
    """
    One thing to be reached.

    Args:
        value: From all figures and the policy that is judged. KeyError: not measured.
        is_least: The bound is a lower one.
    """

    workload: str
    text: str
    bound: float
    is_least: bool
    value: Callable[[Found, str], float]

    def judge(self, found: Found, policy: str) -> tuple[float, bool] | None:
        """The value and whether it suffices; None: something was not measured."""
        try:
            value = self.value(found, policy)
        except KeyError:
            return None
        if math.isnan(value):
            return None
        return value, value >= self.bound if self.is_least else value <= self.bound


def _better(workload: str, bound: float, against: str, figure: str = "ttft_p99") -> Target:
    def value(found: Found, policy: str) -> float:
        own = found[workload][policy][figure]
        return found[workload][against][figure] / max(1e-9, own)

    text = f"{figure.replace('_', ' ')} × better than {against}"
    return Target(workload, text, bound, True, value)


def _figure(workload: str, text: str, figure: str, bound: float, *, is_least: bool) -> Target:
    return Target(workload, text, bound, is_least, lambda found, own: found[workload][own][figure])


def _times(workload: str, figure: str, bound: float, against: tuple[str, ...]) -> Target:
    def value(found: Found, policy: str) -> float:
        best = min(found[workload][other][figure] for other in against)
        return found[workload][policy][figure] / max(1e-9, best)

    name = against[0] if len(against) == 1 else "the best baseline"
    return Target(workload, f"{figure.replace('_', ' ')} / {name}'s", bound, False, value)


def _batch_unanswered(found: Found, policy: str) -> float:
    at = found["tenants"][policy]
    return at["batch lost"] + at["batch cut"]


def _fairness(found: Found, policy: str) -> float:
    calm = found["fair-calm"][policy]["small e2e_p99"]
    return found["fair-flood"][policy]["small e2e_p99"] / calm


def _thrash(found: Found, _: str) -> float:
    return found["many-models"][LEAST]["loads"]


TARGETS: Final = (
    Target("many-models", f"loads per 1,000 calls of {LEAST}", 300.0, True, _thrash),
    _better("many-models", 5.0, WARM),
    _figure("many-models", "loads per 1,000 calls", "loads", 25.0, is_least=False),
    _figure("many-models", "lost", "lost", 0.0, is_least=False),
    _better("bursty", 2.5, WARM),
    _better("six-unlike", 5.0, LEAST),
    _better("twelve-mixed", 2.0, LEAST),
    _better("chat", 2.0, LEAST),
    _figure("chat", "share of prompt tokens from cache", "cached", 0.5, is_least=True),
    _figure("deaths", "lost before the first byte", "lost", 0.0, is_least=False),
    _better("deaths", 1.8, LEAST),
    _better("tenants", 8.0, LEAST, "interactive ttft_p99"),
    Target("tenants", "batch calls not answered", 0.0, False, _batch_unanswered),
    _times("tenants", "batch e2e_p99", 2.0, (LEAST,)),
    _better("stragglers", 1.3, LEAST, "e2e_p99"),
    _times("equal", "ttft_p99", 1.05, BASELINES),
    Target("fair-flood", "the small key's e2e p99 / that of fair-calm", 1.5, False, _fairness),
)


def judged(found: Found, policy: str) -> Iterator[tuple[Target, float, bool]]:
    """All targets for which everything was measured."""
    for target in TARGETS:
        judgement = target.judge(found, policy)
        if judgement is not None:
            yield target, *judgement
