# ruff: noqa: INP001 - a script, no package
"""Writes the pages of this folder that are made from the code: ``make docs``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from balancer.core import verdicts
from balancer.ops import metrics

_VERDICTS: Final = """\
# What counts as a failure

Every attempt at a backend ends in exactly one verdict, and the verdict decides everything else.
Made from the table in `balancer/core/verdicts.py`; do not edit by hand.

*credit* resets a breaker's count of failures, **blame** adds to it, · leaves it alone. The
backend's breaker takes the whole backend out of use, the model's breaker one model on it.
*Before commit* is what becomes of the call while its client has not been sent anything yet; after
that an answer is never begun anew, and a failure is told in the stream.

"""

PAGES: Final = {
    "metrics.md": metrics.document(),
    "verdicts.md": _VERDICTS + verdicts.document(),
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
