# ruff: noqa: INP001 - a script, no package
"""Writes the pages of this folder that are made from the code: ``make docs``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

from balancer.core import dialect, verdicts
from balancer.ops import metrics
from docs import situations

_VERDICTS: Final = """\
# What counts as a failure

Every attempt at a backend ends in exactly one verdict, and the verdict decides everything else.
Made from the table in `balancer/core/verdicts.py`; do not edit by hand.

*credit* resets a breaker's count of failures, **blame** adds to it, · leaves it alone. The
backend's breaker takes the whole backend out of use, the model's breaker one model on it.
*Before commit* is what becomes of the call while its client has not been sent anything yet; after
that an answer is never begun anew, and a failure is told in the stream. A *canary* is a short call
of the balancer's own that asks whether a silent backend still answers.

"""

_ERRORS: Final = """\
# Errors

Every refusal or failure of the balancer's own, in the shape the client's library expects. Made from
`balancer/core/errors.py` and `balancer/core/dialect.py`; do not edit by hand.

What a *backend* answers is passed on as it is, unless another backend can still serve the call
(see [verdicts.md](verdicts.md)). Unknown paths and wrong methods are answered as Ollama answers
them, in plain text: `404 page not found`, `405 method not allowed`. What is no HTTP at all gets
`400 Bad Request` or `431 Request Header Fields Too Large` in plain text, and the connection is
closed.

The code stands in OpenAI's `error.code`. Codes in brackets are not sent, because Ollama sends none
there. `Retry-After` is 1 to 60 whole seconds, `retry-after-ms` the same in milliseconds; both are
up to a quarter longer than need be, so that not all clients come back at once. The libraries of
OpenAI and Anthropic wait as they say. They leave it at one try where `x-should-retry: false` says
so; by themselves they would try every 408, 409, 429 and 5xx again. The request id in the text and
in `X-Request-Id` is the one in the log.

"""

_DIFFERENCES: Final = """\
# Where the balancer differs from Ollama

What a client sees through the balancer is what it would see from one Ollama host, byte by byte, but
for what is listed here. Every recorded exchange with Ollama is held to this list. Made from
`docs/differences.toml`; do not edit by hand.

"""


def differences() -> str:
    """The list as Markdown."""
    path = Path(__file__).parent / "differences.toml"
    listed = tomllib.loads(path.read_text(encoding="utf-8"))
    everywhere = "".join(f"- {text}\n" for text in listed["everywhere"])
    rows = "".join(
        f"| {each['where']} | {each['here']} | {each['why']} |\n" for each in listed["difference"]
    )
    head = "| where | here | why |\n| --- | --- | --- |\n"
    return f"## Everywhere\n\n{everywhere}\n## In places\n\n{head}{rows}"


def routing() -> str:
    """The page as it stands, with what `explain` tells put in anew between its marks."""
    page = (Path(__file__).parent / "routing.md").read_text(encoding="utf-8")
    for title, text in situations.texts().items():
        begin, end = f"<!-- explain: {title} -->\n", "<!-- end -->"
        before, mark, rest = page.partition(begin)
        if not mark:
            raise LookupError(f"routing.md has no place for {title!r}")
        page = f"{before}{mark}```text\n{text}\n```\n{end}{rest.partition(end)[2]}"
    return page


PAGES: Final = {
    "differences.md": _DIFFERENCES + differences(),
    "errors.md": _ERRORS + dialect.document(),
    "metrics.md": metrics.document(),
    "routing.md": routing(),
    "verdicts.md": _VERDICTS + verdicts.document(),
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
