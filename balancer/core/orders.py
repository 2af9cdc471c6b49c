"""
What a management request asks for: pull, push, create, copy, delete.

Read as Ollama's Go decoder would: the first JSON value, field names in any case, the last of equal
ones. Only what decides where an order goes is read; the rest is left to the backends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from balancer.core import names
from balancer.core.dialect import compact
from balancer.core.errors import BadRequest
from balancer.core.names import ModelName, quoted

DIGEST: Final = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_FILES: Final = ("files", "adapters", "draft_files")


def _no_number(text: str) -> None:
    raise ValueError(text)  # NaN and Infinity, which are not JSON


_DECODER: Final = json.JSONDecoder(parse_constant=_no_number)


@dataclass(frozen=True, slots=True)
class Order:
    """
    A management request, read.

    Args:
        model: As the client wrote it; the destination of a copy.
        streaming: Progress is asked for as records.
        source: Of a copy: the model copied. Of a create: the model it starts from, if any.
        digests: Of a create: the blobs it needs, each ``sha256:<hex>``.
        fields: All top-level fields, names in lower case.
    """

    model: str
    name: ModelName
    streaming: bool
    source: ModelName | None = None
    digests: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def body(self) -> bytes:
        """The same order, with its progress asked for as records."""
        return compact({**self.fields, "stream": True})


def read(operation: str, body: bytes) -> Order:
    """
    Read the body of an order.

    Raises:
        BadRequest: With Ollama's text.
    """
    fields = _fields(body)
    if operation == "copy":
        return _copy(fields)
    text = _text(fields, "model") or _text(fields, "name")
    name = _named(operation, text)
    base = _text(fields, "from") if operation == "create" else ""
    digests = _digests(fields) if operation == "create" else ()
    if operation == "create" and not base and not isinstance(fields.get("files"), dict):
        raise BadRequest("neither 'from' or 'files' was specified")
    source = _parsed(base, "invalid model name") if base else None
    return Order(text, name, fields.get("stream") is not False, source, digests, fields)


def digest_of(text: str) -> str | None:
    """A digest as it stands in a path, ``sha256:<hex>``; None: it is none."""
    match = DIGEST.fullmatch(text)
    return None if match is None else f"sha256:{match[1].lower()}"


def _fields(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise BadRequest("missing request body")
    try:
        text = body.decode("utf-8").lstrip(" \t\r\n")
        value, _ = _DECODER.raw_decode(text)
    except UnicodeDecodeError:
        raise BadRequest("invalid UTF-8 in request body") from None
    except (ValueError, RecursionError):
        raise BadRequest("malformed JSON in request body") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest("json: cannot unmarshal into Go value of type api.Request")
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        fields[key.lower()] = inner
    return fields


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRequest(f"json: cannot unmarshal into Go struct field .{key} of type string")
    return value


def _named(operation: str, text: str) -> ModelName:
    if not text.strip():
        needed = operation in ("push", "delete")
        raise BadRequest("model is required" if needed else "invalid model name")
    bad = f"name {quoted(text)} is invalid" if operation == "delete" else "invalid model name"
    return _parsed(text, bad)


def _parsed(text: str, complaint: str) -> ModelName:
    try:
        return names.parse(text)
    except names.InvalidName:
        raise BadRequest(complaint) from None


def _copy(fields: Mapping[str, Any]) -> Order:
    source, destination = _text(fields, "source"), _text(fields, "destination")
    origin = _parsed(source, f"source {quoted(source)} is invalid")
    target = _parsed(destination, f"destination {quoted(destination)} is invalid")
    return Order(destination, target, streaming=False, source=origin, fields=fields)


def _digests(fields: Mapping[str, Any]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for key in _FILES:
        files = fields.get(key)
        if isinstance(files, dict):
            for text in files.values():
                digest = digest_of(text) if isinstance(text, str) else None
                if digest is not None:
                    found[digest] = None
    return tuple(found)
