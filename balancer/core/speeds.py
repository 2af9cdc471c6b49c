"""
How fast one backend is: learned from what passes through, guessed from its other models until then.

A prompt's work grows with what it attends to; a stream slows down by the streams beside it. All
speeds are tokens per second, of a standard model of 8 billion parameters in 4.9 GB where no model
is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Final

PROMPT_RATE: Final = 1500.0
DECODE_RATE: Final = 60.0
PENALTY: Final = 0.15
CPU: Final = (75.0, 9.0, 0.5)  # the same three of a backend without an accelerator
LOAD_RATE: Final = 1.0  # GB/s
OFFLOADED: Final = 0.15  # of its speed keeps a model of which a part is left to the CPU

STANDARD_GB: Final = 4.9
STANDARD_B: Final = 8.0
GB_PER_B: Final = 0.6
# However small a model is, it cannot outrun what each step costs anyway.
MOST_PROMPT: Final = 12.0
MOST_DECODE: Final = 6.0

KEPT: Final = 0.98  # of what a fit knows, with each sample
LONGEST_STEP: Final = 8.0  # a single sample cannot say more than so many times faster or slower
OPINION_SAMPLES: Final = 8  # until then the operator's weight counts
SLOW_BELOW: Final = 0.7
SLOWEST: Final = 0.05
TRUTH_S: Final = 180.0
FORGIVEN: Final = 0.01
MOST_MODELS: Final = 1000
MOST_TOLD: Final = 1e300  # a file may hold integers that are no float

BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "prompt_rate": (1.0, 200_000.0),
    "decode_rate": (0.05, 5_000.0),
    "load_rate": (0.01, 50.0),
    "penalty": (0.02, 1.0),
    "correction": (1 / 64, 64.0),
    "samples": (0.0, 1e9),
}


def ignore(kind: str, value: float) -> None:
    """Who need not know what was discarded."""


def work(new: float, cached: float) -> float:
    """What it takes to evaluate *new* tokens behind *cached* ones, in tokens behind none."""
    return new * (1.0 + 1e-4 * (cached + 0.5 * new))


def is_in_bounds(kind: str, value: object) -> bool:
    """Whether *value* is a number such as may be believed of *kind*."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    low, high = BOUNDS[kind]
    return low <= value <= high  # not a number is in no bounds


@dataclass(frozen=True, slots=True)
class Size:
    """A model's size: file in GB, parameters in billions."""

    file_gb: float
    params_b: float

    @classmethod
    def of(cls, size_bytes: int, params_b: float | None) -> Size:
        """What a catalogue tells of it; 0 bytes or None: not told."""
        known_b = params_b if params_b is not None and params_b > 0 else 0.0
        if size_bytes > 0:
            file_gb = size_bytes / 1e9
            return cls(file_gb, known_b or file_gb / GB_PER_B)
        return cls(known_b * GB_PER_B or STANDARD_GB, known_b or STANDARD_B)


@dataclass(slots=True)
class _Pair:
    """Corrections for one model on one backend, and how many samples they rest on."""

    prompt: float = 1.0
    decode: float = 1.0
    prompt_samples: int = 0
    decode_samples: int = 0


@dataclass(slots=True)
class _Fit:
    """A straight line by least squares, which forgets."""

    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n = self.n * KEPT + 1.0
        self.x = self.x * KEPT + x
        self.xx = self.xx * KEPT + x * x
        self.y = self.y * KEPT + y
        self.xy = self.xy * KEPT + x * y

    def relative_slope(self) -> float | None:
        """Slope / intercept; None: not enough is known."""
        if self.n <= 8 or self.xx / self.n - (self.x / self.n) ** 2 <= 0.2:
            return None
        slope = (self.n * self.xy - self.x * self.y) / (self.n * self.xx - self.x * self.x)
        intercept = (self.y - slope * self.x) / self.n
        return slope / intercept if intercept > 0 else None


class Speed:
    """
    How fast one backend is, and whether it is slower than it used to be.

    Args:
        cpu: It has no accelerator.
        weight: What the operator thinks of it, as a factor, until measurement knows better.
        discarded: Told kind and value of the first sample of each kind that was beyond belief.
    """

    def __init__(
        self,
        *,
        cpu: bool = False,
        weight: float = 1.0,
        discarded: Callable[[str, float], None] = ignore,
    ) -> None:
        self.prompt_rate, self.decode_rate, self.penalty = PROMPT_RATE, DECODE_RATE, PENALTY
        self.load_rate = LOAD_RATE
        self._assumed = (self.prompt_rate, self.decode_rate, self.load_rate)
        self.slow_factor = 1.0
        self.edition = 0
        self._weight = weight
        self._discarded = discarded
        self._told: set[str] = set()
        self._samples = {"prompt": 0, "decode": 0, "load": 0}
        self._pairs: dict[tuple[str, bool], _Pair] = {}
        self._offloaded: set[str] = set()
        self._fit = _Fit()
        self._smoothed = 1.0
        self._slow_since: float | None = None
        self._known: dict[str, tuple[Size, float, float]] = {}
        if cpu:
            self.set_cpu()

    # -- what is predicted ---------------------------------------------------------------------

    def prompt(self, model: str, size: Size) -> float:
        """Tokens of `work` per second."""
        known = self._known.get(model)
        if known is None or known[0] is not size:
            known = self._predict(model, size)
        return known[1]

    def decode(self, model: str, size: Size) -> float:
        """Tokens per second of a stream that is alone."""
        known = self._known.get(model)
        if known is None or known[0] is not size:
            known = self._predict(model, size)
        return known[2]

    def tpot(self, model: str, size: Size, streams: float) -> float:
        """Seconds per token of each of so many streams."""
        known = self._known.get(model)
        if known is None or known[0] is not size:
            known = self._predict(model, size)
        return (1.0 + self.penalty * (streams - 1.0)) / known[2] if streams > 1.0 else 1 / known[2]

    def load_s(self, size: Size) -> float:
        """Seconds to load it where there is room."""
        return size.file_gb / self.load_rate + 1.0

    def _predict(self, model: str, size: Size) -> tuple[Size, float, float]:
        if len(self._known) >= MOST_MODELS:
            self._known.clear()
        found = (
            size,
            self._quick("prompt", model, size) * self._opinion("prompt") * self.slow_factor,
            self._quick("decode", model, size) * self._opinion("decode") * self.slow_factor,
        )
        self._known[model] = found
        return found

    def _quick(self, kind: str, model: str, size: Size) -> float:
        """Its speed on a good day."""
        pair = self._pairs.get((model, model in self._offloaded)) or self._unmeasured(model)
        if kind == "prompt":
            return self.prompt_rate * min(STANDARD_B / size.params_b, MOST_PROMPT) * pair.prompt
        return self.decode_rate * _decode_ratio(size) * pair.decode

    def _unmeasured(self, model: str) -> _Pair:
        if model not in self._offloaded:
            return _Pair()
        whole = self._pairs.get((model, False), _Pair())
        return _Pair(whole.prompt * OFFLOADED, whole.decode * OFFLOADED)

    def weigh(self, weight: float) -> None:
        """The operator thinks otherwise of it now."""
        if weight != self._weight:
            self._weight = weight
            self._changed()

    def _opinion(self, kind: str) -> float:
        return self._weight if self._samples[kind] < OPINION_SAMPLES else 1.0

    # -- what is learned -----------------------------------------------------------------------

    def learn_prompt(self, model: str, size: Size, tokens_per_s: float) -> None:
        """Work done per second, of a prompt that was alone and not cached; not of slow days."""
        if self.slow_factor > SLOW_BELOW and self._is_fit("prompt_rate", tokens_per_s):
            self._correct("prompt", model, tokens_per_s / self._quick("prompt", model, size))

    def learn_decode(self, model: str, size: Size, tokens_per_s: float, streams: float) -> None:
        """Tokens per second of one of so many streams (a mean over its time); not of slow days."""
        if self.slow_factor <= SLOW_BELOW or not self._is_fit("decode_rate", tokens_per_s):
            return
        others = max(0.0, streams - 1.0)
        if model not in self._offloaded:
            alone = self._quick("decode", model, size) / self.decode_rate
            self._fit.add(others, alone / tokens_per_s)
            slope = self._fit.relative_slope()
            if slope is not None:
                self.penalty += 0.1 * (min(max(slope, 0.02), 1.0) - self.penalty)
        measured = tokens_per_s * (1.0 + self.penalty * others)
        self._correct("decode", model, measured / self._quick("decode", model, size))

    def learn_load(self, size: Size, seconds: float) -> None:
        """How long a load of ours took."""
        rate = size.file_gb / max(0.2, seconds - 1.0)
        if self._is_fit("load_rate", rate):
            self._samples["load"] += 1
            self.load_rate += max(0.3, 1.0 / self._samples["load"]) * (rate - self.load_rate)
            self._changed()

    def _correct(self, kind: str, model: str, error: float) -> None:
        """
        Share an error between backend and pair.

        A model that is partly left to the CPU tells nothing of the backend's others.
        """
        error = min(max(error, 1.0 / LONGEST_STEP), LONGEST_STEP)
        offloaded = model in self._offloaded
        pair = self._pairs.pop((model, offloaded), None) or self._unmeasured(model)
        self._pairs[model, offloaded] = pair
        if len(self._pairs) > MOST_MODELS:
            del self._pairs[next(iter(self._pairs))]
        count = getattr(pair, f"{kind}_samples") + 1
        setattr(pair, f"{kind}_samples", count)
        to_pair = max(0.2, 1.0 / count)
        if not offloaded:
            self._samples[kind] += 1
            gain = max(0.2, 1.0 / self._samples[kind])
            to_pair = 0.3 * gain
            rate = f"{kind}_rate"
            setattr(self, rate, _held(rate, getattr(self, rate) * error ** (0.7 * gain)))
        setattr(pair, kind, _held("correction", getattr(pair, kind) * error**to_pair))
        self._changed()

    def _is_fit(self, kind: str, value: float) -> bool:
        if is_in_bounds(kind, value):
            return True
        self._discard(kind, value)
        return False

    def _discard(self, kind: str, value: float) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._discarded(kind, value)

    def _changed(self) -> None:
        self.edition += 1
        self._known.clear()

    # -- what is seen --------------------------------------------------------------------------

    def set_cpu(self) -> None:
        """What it holds is in no accelerator's memory; that counts until something is measured."""
        rates = self.prompt_rate, self.decode_rate, self.penalty
        if not self._samples["prompt"] and not self._samples["decode"] and rates != CPU:
            self.prompt_rate, self.decode_rate, self.penalty = CPU
            self._changed()

    @property
    def is_measured(self) -> bool:
        """Whether anything but the operator's word and a guess is known of it."""
        return bool(self._samples["prompt"] and self._samples["decode"])

    def assume(self, prompt_rate: float, decode_rate: float, load_rate: float) -> None:
        """What others can do is taken to hold here, where nothing at all has been seen."""
        guess = prompt_rate, decode_rate, load_rate
        known = self.prompt_rate, self.decode_rate, self.load_rate
        samples = (self._samples[kind] for kind in ("prompt", "decode", "load"))
        before = self._assumed
        self._assumed = guess
        new = [
            g if not n and k == old else k
            for g, k, old, n in zip(guess, known, before, samples, strict=True)
        ]
        if tuple(new) != known:
            self.prompt_rate, self.decode_rate, self.load_rate = new
            self._changed()

    def suppose_prompt(self, model: str, size: Size, tokens_per_s: float) -> None:
        """A prompt is read no faster than that, as far as it has come; no sample yet."""
        usual = self.prompt(model, size)
        if not self._samples["prompt"] and tokens_per_s < usual:
            self.prompt_rate = max(
                BOUNDS["prompt_rate"][0], self.prompt_rate * tokens_per_s / usual
            )
            self._changed()

    def offloaded(self, model: str, is_so: bool) -> None:  # noqa: FBT001 - the only thing told
        """Whether a part of it is left to the CPU: then what was measured before does not hold."""
        if is_so != (model in self._offloaded):
            (self._offloaded.add if is_so else self._offloaded.discard)(model)
            self._changed()

    def observe(self, f: float | None, now: float) -> None:
        """
        One tick of the watch for stragglers.

        Args:
            f: How fast it was, as a share of what was learned; None: nothing ran.
        """
        if f is None:
            self._smoothed = min(1.0, self._smoothed + FORGIVEN)
        else:
            self._smoothed += 0.5 * (min(max(f, 0.0), 1.0) - self._smoothed)
        slow = self._smoothed < SLOW_BELOW
        factor = max(SLOWEST, self._smoothed) if slow else 1.0
        if not slow:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now
        elif now - self._slow_since >= TRUTH_S:
            self.prompt_rate = _held("prompt_rate", self.prompt_rate * factor)
            self.decode_rate = _held("decode_rate", self.decode_rate * factor)
            self._smoothed, self._slow_since, factor = 1.0, None, 1.0
        if factor != self.slow_factor:
            self.slow_factor = factor
            self._changed()

    # -- over a restart ------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """What was learned, as plain JSON; today's slowness is not."""
        return {
            "prompt_rate": self.prompt_rate,
            "decode_rate": self.decode_rate,
            "load_rate": self.load_rate,
            "penalty": self.penalty,
            "samples": dict(self._samples),
            "pairs": [
                [model, offloaded, *astuple(pair)]
                for (model, offloaded), pair in self._pairs.items()
            ],
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `dump` gave, but for what cannot be."""
        samples = kept.get("samples")
        for kind in self._samples:
            rate = f"{kind}_rate"
            count = samples.get(kind) if isinstance(samples, Mapping) else None
            if count == 0:
                continue  # a prior, which may be another by now
            if self._is_kept("samples", count) and self._is_kept(rate, kept.get(rate)):
                setattr(self, rate, float(kept[rate]))
                self._samples[kind] = int(count or 0)
        if self._samples["decode"] and self._is_kept("penalty", kept.get("penalty")):
            self.penalty = float(kept["penalty"])
        pairs = kept.get("pairs")
        for row in pairs[-MOST_MODELS:] if isinstance(pairs, list) else ():
            self._restore_pair(row)
        self._changed()

    def _restore_pair(self, row: Any) -> None:
        match row:
            case [str() as model, bool() as offloaded, prompt, decode, *counts] if len(row) == 6:
                rates = all(self._is_kept("correction", each) for each in (prompt, decode))
                if rates and all(self._is_kept("samples", each) for each in counts):
                    pair = _Pair(float(prompt), float(decode), *map(int, counts))
                    self._pairs[model, offloaded] = pair
            case _:
                self._discard("pair", math.nan)

    def _is_kept(self, kind: str, value: Any) -> bool:
        if is_in_bounds(kind, value):
            return True
        number = isinstance(value, (int, float)) and abs(value) <= MOST_TOLD
        self._discard(kind, float(value) if number else math.nan)
        return False


def _decode_ratio(size: Size) -> float:
    return min(math.pow(STANDARD_GB / size.file_gb, 0.95), MOST_DECODE)


def _held(kind: str, value: float) -> float:
    low, high = BOUNDS[kind]
    return min(max(value, low), high)
