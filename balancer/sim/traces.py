"""
What production looked like: arrivals, lengths and shared prefixes of published traces.

They are read from a directory, and not part of the source; without one, or where a file of it is
missing, calls of the same distributions are generated, and `Traces.sources` says so.

Source:
    Azure LLM inference traces 2023 (Patel et al., Splitwise, ISCA'24); Mooncake (Qin et al.,
    FAST'25); ShareGPT lengths (Agrawal et al., Sarathi-Serve, OSDI'24); ServeGen (Xiang et al.,
    2025). The parameters of what is generated were fitted to them.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

T = TypeVar("T")

BLOCK_TOKENS: Final = 512
GENERATED_ROWS: Final = 6000


class Row(NamedTuple):
    """One call of a trace. `blocks`: ids of its prompt's blocks, each naming all before it."""

    at_s: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fit:
    """Logarithmic mean and deviation of prompt and output tokens; rate and CV of the gaps."""

    prompt: tuple[float, float]
    output: tuple[float, float]
    most: tuple[int, int]
    gap_s: float
    cv: float

    def told(self) -> str:
        """For people."""
        (m, s), (n, t) = self.prompt, self.output
        return (
            f"generated: prompts lognormal({m}, {s}) up to {self.most[0]}, answers "
            f"lognormal({n}, {t}) up to {self.most[1]}, gamma gaps of {self.gap_s} s, CV {self.cv}"
        )


FITS: Final = {
    "conv": Fit((6.63, 0.99), (5.02, 0.86), (14050, 1000), 0.181, 1.09),
    "code": Fit((7.0, 1.36), (2.79, 0.85), (7437, 1899), 0.39, 13.2),
    "mooncake": Fit((8.9, 0.95), (5.3, 1.3), (120000, 2000), 0.48, 1.0),
}
ANSWERS: Final = (5.77, 1.0, 1024)  # ShareGPT: lognormal, at most


class Window(NamedTuple):
    """Ten minutes of a client: calls per second, and the gaps' distribution (gamma or Weibull)."""

    rate: float
    kind: str
    shape: float


@dataclass(frozen=True, slots=True)
class Client:
    """
    One production client over a day.

    Args:
        windows: Of ten minutes each.
        prompts: Equidistant quantiles of its prompts' tokens, for each quarter of the day.
        outputs: As `prompts`, of its answers.
    """

    name: str
    windows: tuple[Window, ...]
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


class Traces:
    """
    The traces of one directory, each read when it is first asked for.

    Attributes:
        sources: Where each trace that was used comes from, for people.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.sources: dict[str, str] = {}
        self._directory = directory
        self._rows: dict[str, Sequence[Row]] = {}
        self._answers: Sequence[int] = ()
        self._clients: Sequence[Client] = ()

    def azure(self, kind: str) -> Sequence[Row]:
        """An hour of a service: ``conv`` or ``code``."""
        if kind not in self._rows:
            self._rows[kind] = self._get(
                f"azure_{kind}_2023.csv.gz", _read_azure, FITS[kind].told(), lambda: _rows(kind)
            )
        return self._rows[kind]

    def mooncake(self) -> Sequence[Row]:
        """An hour of conversations with long prompts; a block of 512 tokens is common to all."""
        if "mooncake" not in self._rows:
            told = f"{FITS['mooncake'].told()}; 40 % of conversations go on, 45 s later"
            self._rows["mooncake"] = self._get(
                "mooncake_conversation.jsonl.gz", _read_mooncake, told, _conversations
            )
        return self._rows["mooncake"]

    def answers(self) -> Sequence[int]:
        """Lengths of ShareGPT's answers."""
        if not self._answers:
            mean, deviation, most = ANSWERS
            told = f"generated: lognormal({mean}, {deviation}) up to {most}"
            self._answers = self._get(
                "sharegpt_8k_lengths.csv.gz", _read_answers, told, _some_answers
            )
        return self._answers

    def clients(self) -> Sequence[Client]:
        """ServeGen's clients."""
        if not self._clients:
            told = "generated: 48 clients, rates lognormal(1, 2), gamma gaps of shapes 0.1 to 1"
            self._clients = self._get(
                "servegen_clients_day.json.gz", _read_clients, told, _some_clients
            )
        return self._clients

    def _get(self, file: str, read: Callable[[Path], T], told: str, generate: Callable[[], T]) -> T:
        name = file.split(".", maxsplit=1)[0]
        path = None if self._directory is None else self._directory / file
        if path is None or not path.exists():
            self.sources[name] = told
            return generate()
        self.sources[name] = f"trace {file}"
        return read(path)


def lognormal(chance: random.Random, fit: tuple[float, float], most: int) -> int:
    """A whole number from 1 to *most*."""
    return max(1, min(most, round(chance.lognormvariate(*fit))))


def gap(chance: random.Random, mean_s: float, kind: str, shape: float) -> float:
    """A gap between calls: ``g`` gamma, ``w`` Weibull."""
    if kind == "w":
        return chance.weibullvariate(mean_s / math.gamma(1.0 + 1.0 / shape), shape)
    return chance.gammavariate(shape, mean_s / shape)


# -- reading -----------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[list[int]]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = csv.reader(file)
        next(rows)
        yield from ([int(cell) for cell in row] for row in rows)


def _read_azure(path: Path) -> list[Row]:
    return [Row(ms / 1000.0, prompt, max(1, out)) for ms, prompt, out in _read_csv(path)]


def _read_answers(path: Path) -> list[int]:
    return [output for _, output in _read_csv(path)]


def _read_mooncake(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        told = [json.loads(line) for line in file]
    return [Row(ms / 1000.0, prompt, out, tuple(blocks)) for ms, prompt, out, blocks in told]


def _read_clients(path: Path) -> list[Client]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        told = json.load(file)["clients"]
    return [
        Client(
            f"{client['cat']}-{client['id']}",
            tuple(Window(rate, kind, shape) for rate, _, kind, shape in client["win"]),
            *(tuple(tuple(part[at]) for part in client["len"].values()) for at in (0, 1)),
        )
        for client in told
    ]


# -- generating --------------------------------------------------------------------------------


def _rows(kind: str) -> list[Row]:
    chance, fit, at_s = random.Random(2023), FITS[kind], 0.0
    rows = []
    for _ in range(GENERATED_ROWS):
        sizes = (
            lognormal(chance, fit.prompt, fit.most[0]),
            lognormal(chance, fit.output, fit.most[1]),
        )
        rows.append(Row(at_s, *sizes))
        at_s += gap(chance, fit.gap_s, "g", fit.cv**-2)
    return rows


def _conversations() -> list[Row]:
    chance, block = random.Random(2025), 0
    rows = []
    for first in _rows("mooncake"):
        at_s, prompt = first.at_s, first.prompt
        blocks: tuple[int, ...] = (0,)
        while True:
            new = math.ceil(prompt / BLOCK_TOKENS) - len(blocks)
            blocks += tuple(range(block + 1, block + 1 + new))
            block += max(0, new)
            rows.append(Row(at_s, prompt, first.output, blocks))
            if chance.uniform(0.0, 1.0) > 0.4:
                break
            blocks = blocks[: max(1, prompt // BLOCK_TOKENS)]  # the last was not full
            prompt += first.output + lognormal(chance, (5.0, 1.5), 20000)
            at_s += chance.lognormvariate(math.log(45.0), 1.0)
    return sorted(rows)


def _some_answers() -> list[int]:
    chance = random.Random(2024)
    mean, deviation, most = ANSWERS
    return [lognormal(chance, (mean, deviation), most) for _ in range(GENERATED_ROWS)]


def _some_clients() -> list[Client]:
    chance = random.Random(2026)

    def quantiles(mean: float, deviation: float) -> tuple[int, ...]:
        return tuple(sorted(lognormal(chance, (mean, deviation), 20000) for _ in range(32)))

    clients = []
    for number in range(48):
        rate, shape = chance.lognormvariate(1.0, 2.0), chance.uniform(0.1, 1.0)
        windows = (Window(rate, "g", shape),) * 144
        mean = chance.uniform(4.0, 7.5)
        lengths = ((quantiles(mean, 0.8),) * 4, (quantiles(5.0, 1.0),) * 4)
        clients.append(Client(f"generated-{number}", windows, *lengths))
    return clients
