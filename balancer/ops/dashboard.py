"""
The status page: one template, one module, one style sheet, all of them ours.

The template writes the page as it is now, so that it can be read without JavaScript; with it,
`page.js` goes on from there with what `feed` tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from balancer.core.dialect import Rendered
from balancer.core.errors import BalancerError
from balancer.ops.feed import Feed

ROOT: Final = "/_balancer/"
FOLDER: Final = Path(__file__).parent / "page"
HTML: Final = "text/html; charset=utf-8"
ASSETS: Final = {
    "page.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.svg": "image/svg+xml",
}
GUARDS: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Asked(Protocol):
    """What these handlers need of a request on its way through."""

    @property
    def request(self) -> web.BaseRequest:
        """The request."""

    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""


Page = Callable[[Any], Awaitable[web.StreamResponse]]


class Dashboard:
    """
    The handlers.

    Args:
        state: Makes the status document.
    """

    def __init__(self, state: Callable[[], dict[str, Any]], feed: Feed) -> None:
        self._state = state
        self._feed = feed
        environment = Environment(
            loader=FileSystemLoader(FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["clock"] = _clock
        self._page = environment.get_template("page.html")
        self._refusal = environment.get_template("refused.html")
        self._assets = {name: _Asset(name, kind) for name, kind in ASSETS.items()}

    def pages(self) -> Mapping[tuple[str, str], Page]:
        """By method and path."""
        pages: dict[tuple[str, str], Page] = {
            ("GET", ROOT.rstrip("/")): self.moved,
            ("GET", ROOT): self.page,
            ("GET", f"{ROOT}events"): self._feed.events,
        }
        for name, asset in self._assets.items():
            pages["GET", f"{ROOT}{name}"] = asset.send
        return pages

    def refusals(self) -> Mapping[str, Callable[[Rendered, BalancerError], Rendered]]:
        """By path: how a refusal looks to people."""
        return {ROOT: self.refused}

    async def moved(self, asked: Asked) -> web.StreamResponse:
        """To the page; relative, as a proxy before us may have put it elsewhere."""
        return web.Response(status=308, headers=asked.headers() | {"Location": "_balancer/"})

    async def page(self, asked: Asked) -> web.StreamResponse:
        """The page as it is now."""
        text = self._page.render(status=self._state(), host=asked.request.headers.get("Host", ""))
        headers = asked.headers() | GUARDS | {"Content-Type": HTML, "Cache-Control": "no-store"}
        return web.Response(text=text, headers=headers)

    def refused(self, told: Rendered, error: BalancerError) -> Rendered:
        """The same refusal, for a browser."""
        body = self._refusal.render(status=told.status, text=error.text).encode()
        kept = tuple(pair for pair in told.headers if pair[0] != "Content-Type")
        more = (("Content-Type", HTML), ("Cache-Control", "no-store"), *GUARDS.items())
        return replace(told, headers=(*kept, *more), body=body)


class _Asset:
    """A file of the page; browsers keep it, and ask each time whether it is still the same."""

    def __init__(self, name: str, kind: str) -> None:
        self._body = (FOLDER / name).read_bytes()
        tag = f'"{hashlib.sha256(self._body).hexdigest()[:16]}"'
        self._headers = GUARDS | {"Content-Type": kind, "Cache-Control": "no-cache", "ETag": tag}
        self._tag = tag

    async def send(self, asked: Asked) -> web.StreamResponse:
        headers = asked.headers() | self._headers
        if asked.request.headers.get("If-None-Match") == self._tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=self._body, headers=headers)


def _clock(at: float) -> str:
    """Unix seconds as a time of day; the page's module writes it anew in the reader's zone."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC"
