"""
The route table: every path of Ollama's surface and who answers it.

Adding a route is adding a row. Paths are matched decoded and exactly, with one trailing slash
forgiven where Ollama forgives it; what goes to a backend is the row's path, never client text.
"""

from __future__ import annotations

from typing import Final

from balancer.core.domain import Dialect, Framing, Kind, Role, Route

_O, _A, _N = Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.OLLAMA


def _native(path: str, operation: str, *, streams: bool) -> Route:
    framing = Framing.NDJSON if streams else None
    return Route("POST", path, _N, operation, Kind.ONE, framing, streams, replayable=True)


def _v1(path: str, operation: str, *, streams: bool) -> Route:
    framing = Framing.SSE if streams else None
    return Route("POST", path, _O, operation, Kind.ONE, framing, replayable=True)


def _read(method: str, path: str, operation: str, dialect: Dialect = _N) -> Route:
    return Route(method, path, dialect, operation, Kind.MERGE, replayable=True)


def _later(method: str, path: str, operation: str, dialect: Dialect = _N) -> Route:
    return Route(method, path, dialect, operation, Kind.LATER, role=Role.ADMIN)


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
    _later("POST", "/v1/responses", "v1_responses", _O),
    _later("POST", "/v1/messages", "v1_messages", _A),
    _later("POST", "/v1/messages/count_tokens", "v1_count_tokens", _A),
    _later("POST", "/v1/audio/transcriptions", "v1_transcriptions", _O),
    _later("POST", "/api/pull", "pull"),
    _later("POST", "/api/push", "push"),
    _later("POST", "/api/create", "create"),
    _later("POST", "/api/copy", "copy"),
    _later("DELETE", "/api/delete", "delete"),
    _later("HEAD", "/api/blobs/{digest}", "blobs"),
    _later("POST", "/api/blobs/{digest}", "blobs"),
    _later("POST", "/api/me", "me"),
    _later("POST", "/api/signout", "signout"),
    _later("DELETE", "/api/user/keys/{key}", "signout"),
    _later("GET", "/api/status", "cloud_status"),
    _later("POST", "/api/experimental/web_search", "web_search"),
    _later("POST", "/api/experimental/web_fetch", "web_fetch"),
    _later("GET", "/api/experimental/model-recommendations", "recommendations"),
)

EMBEDDING: Final = frozenset({"embed", "embeddings", "v1_embeddings"})


_BY_NAME: Final = {(route.method, route.path): route for route in TABLE}


def find(method: str, path: str) -> Route:
    """The row of exactly that method and path. Raises KeyError."""
    return _BY_NAME[method, path]


def dialect_of(path: str) -> Dialect:
    """Whose errors a path speaks, known or not."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    return Dialect.OPENAI if path.startswith("/v1/") else Dialect.OLLAMA
