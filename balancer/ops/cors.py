"""
Which pages of other origins a browser may let call us, and what it is told of that.

Nothing here knows aiohttp or logs. A refusal of a foreign page has an empty text, which is
answered with an empty body, as Ollama does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from multidict import istr

from balancer.core.errors import Forbidden

if TYPE_CHECKING:
    from multidict import MultiMapping

    Headers = MultiMapping[str]
    Pairs = tuple[tuple[str, str], ...]

ANY: Final = "*"
ORIGIN: Final = istr("Origin")  # looked up with every request, and not made lower case each time
_LOCAL = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:[0-9]{1,5})?"
    r"|(app|file|tauri|vscode-webview|vscode-file)://[!-~]*"
)
_HEADERS: Final = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,"
    "X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,"
    "X-Stainless-Lang,X-Stainless-Os,X-Stainless-Package-Version,X-Stainless-Poll-Helper,"
    "X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout,"
    "X-Api-Key,Anthropic-Version,Anthropic-Beta,Anthropic-Dangerous-Direct-Browser-Access,"
    "X-Request-Id,X-Request-Timeout"
)
_FAMILY = re.compile(r"x-(balancer|stainless)-[a-z0-9-]{1,64}")
_EXPOSED: Final = (
    "X-Request-Id,X-Balancer-Backend,X-Balancer-Attempts,X-Balancer-Route,X-Balancer-Queue-Ms,"
    "X-Balancer-Queue-Wait,"
    "X-Balancer-Model,X-Balancer-Num-Ctx,X-Balancer-Skipped,X-Balancer-Version,X-Balancer-Demo,"
    "Retry-After,Retry-After-Ms,X-Should-Retry,Server-Timing"
)
_METHODS: Final = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
_VARY: Final = (
    ("Vary", "Origin"),
    ("Vary", "Access-Control-Request-Method"),
    ("Vary", "Access-Control-Request-Headers"),
)
_UNASKED: Final = ("GET", "HEAD", "OPTIONS")
_DECLARING: Final = ("Authorization", "x-api-key")  # no page sends these without a preflight


def is_same_origin(origin: str, host: str) -> bool:
    """Whether a page came from where it now calls."""
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another origin makes the request, allowed or not."""
    origin = headers.get(ORIGIN)
    return origin is not None and not is_same_origin(origin, headers.get("Host", ""))


def check_asked(method: str, headers: Headers) -> None:
    """
    Refuse what a browser lets a foreign page send without asking first, as it lets a form.

    Raises:
        Forbidden: It is not declared as JSON, and carries nothing that makes a browser ask.
    """
    if method in _UNASKED or not is_foreign(headers):
        return
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not any(name in headers for name in _DECLARING):
        raise Forbidden(
            "A page of another origin must send this with Content-Type: application/json."
        )


@dataclass(frozen=True, slots=True)
class Cors:
    """
    The rules of one configuration. Local pages and desktop applications are always allowed.

    Args:
        enabled: False: no page but our own may call.
        origins: More that may, each with at most one ``*``; ``*`` alone is every page.
        credentials: Whether the browser may send cookies and certificates along.
        max_age_s: How long a browser may remember the answer to a preflight.
    """

    enabled: bool = True
    origins: tuple[str, ...] = ()
    credentials: bool = False
    max_age_s: float = 600.0

    def check(self, headers: Headers) -> Pairs:
        """
        The headers an answer needs; none for the same origin, or without an Origin.

        Raises:
            Forbidden: A foreign page; empty text, as Ollama answers.
        """
        allowed = self._allowed(headers)
        return (*allowed, ("Access-Control-Expose-Headers", _EXPOSED)) if allowed else ()

    def preflight(self, headers: Headers, allow: str = "") -> Pairs | None:
        """
        The headers of the 204 that answers an OPTIONS of a page elsewhere, in Ollama's order.

        None: not a question of CORS (no Origin, or the same), so the route answers.

        Args:
            allow: The methods of the path, ``GET, HEAD``; empty: an unknown path, answered too.

        Raises:
            Forbidden: A foreign page; empty text.
        """
        allowed = self._allowed(headers)
        if not allowed:
            return None
        pairs = [pair for pair in allowed if pair[0] != "Vary"]
        pairs += [
            ("Access-Control-Allow-Headers", ",".join([_HEADERS, *_wanted(headers)])),
            ("Access-Control-Allow-Methods", _METHODS),
            ("Access-Control-Max-Age", str(int(self.max_age_s))),
            *([("Allow", allow)] if allow else []),
        ]
        return (*sorted(pairs), *(_VARY if ("Vary", "Origin") in allowed else ()))

    def _allowed(self, headers: Headers) -> Pairs:
        origin = headers.get(ORIGIN)
        if origin is None or not is_foreign(headers):
            return ()
        if self.enabled and ANY in self.origins:
            return (("Access-Control-Allow-Origin", ANY),)  # for everybody the same: no Vary
        if not self.enabled or not self._is_listed(origin):
            raise Forbidden("")
        trust = (("Access-Control-Allow-Credentials", "true"),) if self.credentials else ()
        return (("Access-Control-Allow-Origin", origin), *trust, ("Vary", "Origin"))

    def _is_listed(self, origin: str) -> bool:
        if _LOCAL.fullmatch(origin):
            return True
        if len(origin) > 512 or not re.fullmatch("[!-~]+", origin):
            return False
        return any(_covers(pattern, origin.lower()) for pattern in self.origins)


def _covers(pattern: str, origin: str) -> bool:
    head, star, tail = pattern.lower().partition(ANY)
    if not star:
        return origin == head
    long_enough = len(origin) > len(head) + len(tail)
    return long_enough and origin.startswith(head) and origin.endswith(tail)


def _wanted(headers: Headers) -> list[str]:
    """Of the headers a page asks for, those of families whose members nobody can list."""
    asked = headers.get("Access-Control-Request-Headers", "").lower().split(",")[:64]
    known = _HEADERS.lower().split(",")
    names = dict.fromkeys(name.strip() for name in asked)
    return [name for name in names if _FAMILY.fullmatch(name) and name not in known]
