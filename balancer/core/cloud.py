"""
Models that run at ollama.com: how they are called there, and how a host of ours lists them.

An Ollama host takes ``gpt-oss:120b-cloud`` and asks ollama.com for ``gpt-oss:120b``. Where
ollama.com itself is a backend, we do what that host does.

Source:
    ollama/ollama, server/cloud_proxy.go; docs/cloud/api.mdx.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from balancer.core import body, names
from balancer.core.domain import Call

HOST: Final = "ollama.com"
VERSION: Final = "0.0.0"  # of no release: what it calls itself there
REMOTE_HOST: Final = "https://ollama.com:443"  # as Ollama writes it into a stub
# What only a host of ours calls by these names.
PATHS: Final[Mapping[str, str]] = {
    "/api/experimental/web_search": "/api/web_search",
    "/api/experimental/web_fetch": "/api/web_fetch",
}
_HEX = re.compile(r"[0-9a-f]{1,64}")
# Of a caller's headers only these are ollama.com's business: web servers on the way here add names,
# addresses and tokens of our network, under ever new names.
PASSED: Final = frozenset(
    {
        "accept",
        "accept-encoding",
        "content-type",
        "traceparent",
        "tracestate",
        "user-agent",
        "via",
        "x-request-id",
    }
)
_FAMILIES: Final = ("anthropic-", "openai-", "x-stainless-")


def at_provider(call: Call) -> Call:
    """A call as ollama.com expects it: the model under the name it has there."""
    kind = next((value for name, value in call.headers if name.lower() == "content-type"), "")
    return replace(
        call,
        body=body.renamed(call.route, call.body, kind, there(call.key.model)),
        headers=tuple(pair for pair in call.headers if _is_passed(pair[0].lower())),
    )


def _is_passed(name: str) -> bool:
    return name in PASSED or name.startswith(_FAMILIES)


def there(model: str) -> str:
    """What ollama.com calls a cloud model (a canonical name)."""
    return names.without_source(names.display(model))


def stubs(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """The models that ollama.com lists, as an Ollama host would list them after a pull."""
    return [made for row in rows if (made := _stub(row)) is not None]


def _stub(row: Any) -> dict[str, Any] | None:
    """
    One of them; None: it has no name.

    Its digest is short there, where clients cut pieces out of a long one.
    """
    told = row.get("name") or row.get("model") if isinstance(row, dict) else None
    if not isinstance(told, str):
        return None
    try:
        name = names.parse(told)
    except names.InvalidName:
        return None
    shown = replace(name, cloud=True).display
    short = row.get("digest")
    begin = short if isinstance(short, str) and _HEX.fullmatch(short) else ""
    digest = (begin + hashlib.sha256(shown.encode()).hexdigest())[:64]
    kept = {key: value for key, value in row.items() if key not in ("name", "model", "digest")}
    remote = {"remote_model": told, "remote_host": REMOTE_HOST}
    return {"name": shown, "model": shown, **remote, **kept, "digest": digest}
