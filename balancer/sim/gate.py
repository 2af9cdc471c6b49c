"""What Ollama checks before it looks at the route: doubled slashes, Host, CORS."""

import ipaddress
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from balancer.sim.delivery import Delivery

_CORS_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,"
    "X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,"
    "X-Stainless-Os,X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,"
    "X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_ALLOWED_SCHEMES = {"app", "file", "tauri", "vscode-webview", "vscode-file"}
_LOCAL_NAMES = {"localhost", "127.0.0.1", "0.0.0.0"}


class Gate:
    """The checks of a server bound to a loopback address; `is_open` switches the last two off.

    `methods` names the methods of a path, `origins` the origins allowed besides the usual.
    """

    def __init__(
        self,
        methods: Callable[[str], tuple[str, ...]],
        *,
        origins: Sequence[str] = (),
        is_open: bool = False,
    ) -> None:
        self._methods = methods
        self._origins = origins
        self._is_open = is_open

    def passes(self, delivery: Delivery) -> bool:
        """Redirects, the Host check and CORS; False if they have answered."""
        request = delivery.exchange.request
        path = request.target.partition("?")[0]
        if "//" in path:
            location = "/" + "/".join(part for part in path.split("/") if part) + request.query
            delivery.reply(307, [("Location", location)])
        elif path != "/" and path.endswith("/") and self._methods(path.rstrip("/")):
            self._redirect(delivery, path.rstrip("/") + request.query)
        elif not self._is_open and not _is_local(request.get("host") or ""):
            delivery.reply(403, [])
        else:
            return self._passes_cors(delivery, request.get("origin"))
        return False

    @staticmethod
    def _redirect(delivery: Delivery, location: str) -> None:
        if delivery.seen.method == "GET":
            headers = [("Content-Type", "text/html; charset=utf-8"), ("Location", location)]
            body = f'<a href="{location}">Moved Permanently</a>.\n\n'
            delivery.reply(301, headers, body.encode())
        else:
            delivery.reply(307, [("Location", location)])

    def _passes_cors(self, delivery: Delivery, origin: str | None) -> bool:
        request = delivery.exchange.request
        host = request.get("host") or ""
        if self._is_open or not origin or urlsplit(origin).netloc == host:
            return True
        allowed = "*" if "*" in self._origins else origin
        if allowed != "*" and not self._allows(origin):
            delivery.reply(403, [])
            return False
        vary = [] if allowed == "*" else [("Vary", "Origin")]
        delivery.cors = [("Access-Control-Allow-Origin", allowed), *vary]
        if request.method != "OPTIONS":
            return True
        self._preflight(delivery, allowed)
        return False

    def _preflight(self, delivery: Delivery, allowed: str) -> None:
        methods = self._methods(delivery.seen.path)
        headers = [
            ("Access-Control-Allow-Headers", _CORS_HEADERS),
            ("Access-Control-Allow-Methods", "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
            ("Access-Control-Allow-Origin", allowed),
            ("Access-Control-Max-Age", "43200"),
            *([("Allow", ", ".join(methods))] if methods else []),
        ]
        if allowed != "*":
            varies = ("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers")
            headers += [("Vary", name) for name in varies]
        delivery.cors = []
        delivery.reply(204, headers)

    def _allows(self, origin: str) -> bool:
        parts = urlsplit(origin)
        return (
            origin in self._origins
            or parts.scheme in _ALLOWED_SCHEMES
            or (parts.scheme in {"http", "https"} and parts.hostname in _LOCAL_NAMES)
        )


def _host_name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or ""


def is_named(host: str) -> bool:
    """Whether a Host header holds a name, not an address."""
    try:
        ipaddress.ip_address(_host_name(host))
    except ValueError:
        return True
    return False


def _is_local(host: str) -> bool:
    """What a server bound to a loopback address accepts as Host."""
    name = _host_name(host)
    if is_named(host):
        return name in {"", "localhost"} or name.endswith((".localhost", ".local", ".internal"))
    address = ipaddress.ip_address(name)
    return address.is_loopback or address.is_private or address.is_unspecified
