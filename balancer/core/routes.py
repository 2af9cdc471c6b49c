"""
The route table: every path of Ollama's surface and who answers it.

Adding a route is adding a row. Paths are matched decoded and exactly, with one trailing slash
forgiven where Ollama forgives it; what goes to a backend is the row's path, never client text.

What an Ollama to come may have is passed on all the same (`other`): a POST below ``/api/`` or
``/v1/`` that is in no row and whose JSON body names a model. Such a path is client text, and goes
up only if it is made of plain words.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from balancer.core.domain import OTHER, Dialect, Framing, Kind, Role, Route

_O, _R, _A, _N = Dialect.OPENAI, Dialect.RESPONSES, Dialect.ANTHROPIC, Dialect.OLLAMA


def _native(path: str, operation: str, *, streams: bool) -> Route:
    framing = Framing.NDJSON if streams else None
    return Route("POST", path, _N, operation, Kind.ONE, framing, streams, replayable=True)


def _v1(path: str, operation: str, dialect: Dialect = _O, *, streams: bool) -> Route:
    framing = Framing.SSE if streams else None
    return Route("POST", path, dialect, operation, Kind.ONE, framing, replayable=True)


def _read(method: str, path: str, operation: str, dialect: Dialect = _N) -> Route:
    return Route(method, path, dialect, operation, Kind.MERGE, replayable=True)


def _account(method: str, path: str, operation: str) -> Route:
    return Route(method, path, _N, operation, Kind.ACCOUNT, role=Role.ADMIN)


def _managed(method: str, path: str, operation: str) -> Route:
    """Who may do it is a setting, and looked up by who does it."""
    return Route(method, path, _N, operation, Kind.MANY)


TABLE: Final[tuple[Route, ...]] = (
    Route("GET", "/", _N, "root", Kind.LOCAL),
    Route("HEAD", "/", _N, "root", Kind.LOCAL),
    _read("GET", "/api/version", "version"),
    _read("HEAD", "/api/version", "version"),
    _read("GET", "/api/tags", "tags"),
    _read("HEAD", "/api/tags", "tags"),
    _read("GET", "/api/ps", "ps"),
    _read("POST", "/api/show", "show"),
    _read("GET", "/v1/models", "models", _O),
    _read("GET", "/v1/models/{model}", "model", _O),
    _native("/api/generate", "generate", streams=True),
    _native("/api/chat", "chat", streams=True),
    _native("/api/embed", "embed", streams=False),
    _native("/api/embeddings", "embeddings", streams=False),
    _v1("/v1/chat/completions", "v1_chat", streams=True),
    _v1("/v1/completions", "v1_completions", streams=True),
    _v1("/v1/embeddings", "v1_embeddings", streams=False),
    _v1("/v1/responses", "v1_responses", _R, streams=True),
    _v1("/v1/messages", "v1_messages", _A, streams=True),
    replace(_v1("/v1/messages/count_tokens", "v1_count_tokens", _A, streams=False), optional=True),
    _v1("/v1/audio/transcriptions", "v1_transcriptions", streams=False),
    _managed("POST", "/api/pull", "pull"),
    _managed("POST", "/api/push", "push"),
    _managed("POST", "/api/create", "create"),
    _managed("POST", "/api/copy", "copy"),
    _managed("DELETE", "/api/delete", "delete"),
    _managed("HEAD", "/api/blobs/{digest}", "blobs"),
    _managed("POST", "/api/blobs/{digest}", "blobs"),
    _account("POST", "/api/me", "me"),
    _account("POST", "/api/signout", "signout"),
    _account("DELETE", "/api/user/keys/{key}", "signout"),
    _account("GET", "/api/status", "cloud_status"),
    _account("POST", "/api/experimental/web_search", "web_search"),
    _account("POST", "/api/experimental/web_fetch", "web_fetch"),
    _account("GET", "/api/experimental/model-recommendations", "recommendations"),
)

EMBEDDING: Final = frozenset({"embed", "embeddings", "v1_embeddings"})
# Bodies may be compressed where Ollama takes them so.
ZSTD: Final = frozenset(
    {"v1_chat", "v1_completions", "v1_embeddings", "v1_responses", "v1_messages"}
)
# A good answer need not be JSON: a text, or whatever a route to come may answer.
FREE_FORM: Final = frozenset({"v1_transcriptions", OTHER})

KEYED: Final = "/k/"  # what follows, up to the next slash, is an API key
_SLASH = r"(?:[/\\]|%2f|%5c)"
_STEP = rf"{_SLASH}(?:(?:\.|%2e){{1,2}}(?={_SLASH}))?"  # a dot segment comes with its slash
_KEY_IN_PATH = re.compile(rf"{_SLASH}(?:k|%6b|%4b)(?:{_STEP})++[^/?]+", re.IGNORECASE)
_PLAIN = re.compile(r"/(?:api|v1)(?:/(?!\.\.?(?:/|$))[A-Za-z0-9_~.-]{1,64}){1,8}")
_CLOSED: Final = "/api/experimental/"  # acts on a host or for its account

_BY_NAME: Final = {(route.method, route.path): route for route in TABLE}


def find(method: str, path: str) -> Route:
    """The row of exactly that method and path. Raises KeyError."""
    return _BY_NAME[method, path]


def other(method: str, path: str) -> Route | None:
    """The route of a path that is in no row; None: it is none. Sent once, nobody else is asked."""
    if method != "POST" or path.startswith(_CLOSED) or not _PLAIN.fullmatch(path):
        return None
    if without_key(path) != path:
        return None  # a key in the wrong place: no backend may see it
    return Route(method, path, dialect_of(path), OTHER, Kind.ONE, optional=True)


def split_key(path: str) -> tuple[str, str]:
    """The key of ``/k/KEY/…`` and the path behind it; an empty key: the path as it is."""
    if not path.startswith(KEYED):
        return "", path
    key, _, rest = path.removeprefix(KEYED).partition("/")
    return (key, f"/{rest}") if key else ("", path)


def without_key(path: str) -> str:
    """A path for people: a key anywhere in it, however it is spelled, shows as ``/k/***``."""
    return _KEY_IN_PATH.sub(f"{KEYED}***", path)


def dialect_of(path: str) -> Dialect:
    """Whose errors a path speaks, known or not."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    if path.startswith("/v1/responses"):
        return Dialect.RESPONSES
    return Dialect.OPENAI if path.startswith("/v1/") else Dialect.OLLAMA
