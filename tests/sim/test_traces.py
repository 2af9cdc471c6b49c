"""Traces, read or generated."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest

from balancer.sim.traces import BLOCK_TOKENS, FITS, Traces, gap, lognormal


def write(path: Path, text: str) -> None:
    """A compressed file."""
    with gzip.open(path, "wt", encoding="ascii") as file:
        file.write(text)


def test_files_are_read_and_named(tmp_path: Path) -> None:
    """Each in its own format; milliseconds become seconds."""
    write(tmp_path / "azure_conv_2023.csv.gz", "t_ms,n_in,n_out\n0,374,44\n4315,396,0\n")
    write(tmp_path / "mooncake_conversation.jsonl.gz", "[500,700,3,[0,1]]\n")
    write(tmp_path / "sharegpt_8k_lengths.csv.gz", "n_in,n_out\n74,918\n")
    client = {"cat": "m", "id": 3, "win": [[2.5, 9.0, "w", 0.3]], "len": {"0": [[1, 2], [3, 4]]}}
    write(tmp_path / "servegen_clients_day.json.gz", json.dumps({"clients": [client]}))
    traces = Traces(tmp_path)
    assert traces.azure("conv") == [(0.0, 374, 44, ()), (4.315, 396, 1, ())]
    assert traces.mooncake() == [(0.5, 700, 3, (0, 1))]
    assert traces.answers() == [918]
    (found,) = traces.clients()
    assert (found.name, found.windows) == ("m-3", ((2.5, "w", 0.3),))
    assert (found.prompts, found.outputs) == (((1, 2),), ((3, 4),))
    assert traces.sources["azure_conv_2023"] == "trace azure_conv_2023.csv.gz"
    assert len(traces.sources) == 4
    assert all(told.startswith("trace ") for told in traces.sources.values())


@pytest.mark.parametrize("directory", [None, Path("no") / "such" / "place"])
def test_what_is_missing_is_generated_and_told(directory: Path | None) -> None:
    """Nobody takes it for the trace, and it is the same every time."""
    traces = Traces(directory)
    rows = traces.azure("code")
    assert traces.sources["azure_code_2023"] == FITS["code"].told()
    assert "lognormal(7.0, 1.36)" in traces.sources["azure_code_2023"]
    assert rows == Traces().azure("code")
    assert traces.answers()
    assert traces.clients()
    assert all("generated" in told for told in traces.sources.values())


@pytest.mark.parametrize("kind", ["conv", "code"])
def test_what_is_generated_is_like_the_trace(kind: str) -> None:
    """Medians, rate and burstiness are as published."""
    rows, fit = Traces().azure(kind), FITS[kind]
    assert statistics.median(row.prompt for row in rows) == pytest.approx(
        math.exp(fit.prompt[0]), rel=0.1
    )
    assert statistics.median(row.output for row in rows) == pytest.approx(
        math.exp(fit.output[0]), rel=0.1
    )
    gaps = [after.at_s - row.at_s for row, after in itertools.pairwise(rows)]
    assert statistics.fmean(gaps) == pytest.approx(fit.gap_s, rel=0.35)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(fit.cv, rel=0.35)


def test_generated_conversations_grow_block_by_block() -> None:
    """Blocks cover each prompt, the first is common to all; the next turn has the full ones."""
    rows = Traces().mooncake()
    assert all(len(row.blocks) == -(-row.prompt // BLOCK_TOKENS) for row in rows)
    assert {row.blocks[0] for row in rows} == {0}
    by_start: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row in rows:
        if row.prompt >= 2 * BLOCK_TOKENS:
            by_start.setdefault(row.blocks[:2], []).append(row.blocks)
    turns = [(a, b) for blocks in by_start.values() for a, b in itertools.pairwise(blocks)]
    assert len(turns) > 1000
    assert all(b[: len(a) - 1] == a[:-1] and len(b) >= len(a) for a, b in turns)


@pytest.mark.parametrize(
    ("kind", "shape", "cv"), [("g", 0.25, 2.0), ("g", 1.0, 1.0), ("w", 1.0, 1.0)]
)
def test_gaps_have_the_mean_and_the_spread_wanted(kind: str, shape: float, cv: float) -> None:
    """A gamma gap's CV is one over the root of its shape; a Weibull of shape 1 is exponential."""
    chance = random.Random(1)
    gaps = [gap(chance, 3.0, kind, shape) for _ in range(40_000)]
    assert statistics.fmean(gaps) == pytest.approx(3.0, rel=0.05)
    assert statistics.pstdev(gaps) / 3.0 == pytest.approx(cv, rel=0.05)


def test_lengths_stay_within_bounds() -> None:
    """However wide the distribution."""
    chance = random.Random(1)
    lengths = [lognormal(chance, (3.0, 4.0), 500) for _ in range(2000)]
    assert (min(lengths), max(lengths)) == (1, 500)
