"""
The chain of a prompt: hashes of its beginnings, by which we know what a backend has cached.

Each link covers everything before it, so two prompts begin alike as far as they share a link. What
is hashed is the JSON text itself: a client writes what it said before in the same bytes again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec import Raw, Struct

from balancer.core.domain import Route

Chain = tuple[tuple[int, int], ...]

LARGEST: Final = 1 << 18  # bytes; to hash more would hold up everybody else
MOST_MESSAGES: Final = 2000
MOST_LINKS: Final = 256  # of the messages, the last are remembered
BLOCK: Final = 1 << 10  # bytes of a prompt that is not divided into messages
IMAGE_TOKENS: Final = 700
NOTHING: Final[tuple[Chain, int]] = ((), 0)

_NONE = Raw(b"")


class _Prompt(Struct, gc=False):
    """The fields that carry prompt, whatever the operation."""

    messages: list[Raw] = []  # msgspec makes a new one for each
    tools: Raw = _NONE
    system: Raw = _NONE
    instructions: Raw = _NONE
    input: Raw = _NONE
    context: Raw = _NONE
    images: Raw = _NONE
    prompt: Raw = _NONE
    suffix: Raw = _NONE


class _Role(Struct, gc=False):
    role: str = ""


class _Part(Struct, gc=False):
    type: str = ""
    text: Raw = _NONE


class _Turn(Struct, gc=False):
    role: str = ""
    content: Raw = _NONE


_PROMPT = msgspec.json.Decoder(_Prompt)
_ROLE = msgspec.json.Decoder(_Role)
_TURN = msgspec.json.Decoder(_Turn)
_PARTS = msgspec.json.Decoder(list[_Part])
_ITEMS = msgspec.json.Decoder(list[Raw])
_SYSTEM = frozenset({"system", "developer"})

# What stands before and behind the images of a message; and below how many bytes there is none.
_BASE64_URL = (b";base64,", b'"')
_IMAGES: Final = {
    "chat": (b'"images"', b"]"),
    "v1_chat": _BASE64_URL,
    "v1_responses": _BASE64_URL,
    "v1_messages": (b'"data"', b"}"),
}
_PLAIN = 1 << 10

# Anthropic's clients move a mark from turn to turn, and a marked text becomes a list of one part.
_MARK = re.compile(rb',\s*"cache_control":\s*\{[^{}]*\}|"cache_control":\s*\{[^{}]*\}\s*,?')


def chain(body: bytes | bytearray, route: Route, model: str = "") -> tuple[Chain, int]:
    """
    The chain of a request's prompt, and how many leading links tell tools and system prompt only.

    A link is a hash of 64 bits and the prompt tokens (bytes / 4, 700 per image) up to its end.
    Empty: the body is too large, cannot be read so, or prompts nothing.

    Args:
        body: As `body.read` accepted it.
        model: Canonical name; chains of two models have no link in common.
    """
    if len(body) > LARGEST or route.operation not in _READERS:
        return NOTHING
    try:
        prompt = _PROMPT.decode(body)
        return _READERS[route.operation](_Links(model, route.operation), prompt)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return NOTHING


class _Links:
    """A chain being made."""

    __slots__ = ("_bytes", "_hash", "_images", "_operation", "links", "shared")

    def __init__(self, model: str, operation: str) -> None:
        self._hash = blake2b(model.encode(), digest_size=8)
        self._operation = operation
        self._bytes = self._images = 0
        self.links: list[tuple[int, int]] = []
        self.shared = 0

    def add(self, piece: Raw | bytes) -> None:
        """More of the prompt."""
        self._hash.update(piece)
        self._bytes += len(piece)

    def close(self) -> None:
        """A link ends here."""
        tokens = self._bytes // 4 + self._images * IMAGE_TOKENS
        self.links.append((int.from_bytes(self._hash.digest(), "big"), tokens))

    def share(self, pieces: Iterable[Raw]) -> None:
        """What is told ahead of every conversation, as one link, if there is any."""
        for piece in pieces:
            if _is_given(piece):
                self.add(_unmarked(piece))
        if self._bytes:
            self._hash.update(b"\0")  # a system prompt is not a message
            self.close()
            self.shared = 1

    def messages(self, items: Sequence[Raw]) -> None:
        """A link for each of the last, which are those that a next turn is looked up by."""
        linked_from = len(items) - MOST_LINKS
        update, digest, add = self._hash.update, self._hash.digest, self.links.append
        anthropic = self._operation == "v1_messages"
        for index, item in enumerate(items):
            update(_plain(item) if anthropic else item)
            size = len(item)
            self._bytes += size
            if size > _PLAIN:
                self._see_images(bytes(item))
            if index >= linked_from:
                tokens = self._bytes // 4 + self._images * IMAGE_TOKENS
                add((int.from_bytes(digest(), "big"), tokens))

    def blocks(self, text: Raw) -> None:
        """A link for each KiB."""
        if _is_given(text):
            inside = memoryview(text)[1:-1]  # without quotes or brackets
            for start in range(0, len(inside), BLOCK):
                self.add(bytes(inside[start : start + BLOCK]))
                self.close()
            self._hash.update(b"\0")

    def pictures(self, images: Raw) -> None:
        """Images beside a prompt."""
        if _is_given(images):
            self._hash.update(images)
            self._images += bytes(images).count(b'"') // 2

    def _see_images(self, text: bytes) -> None:
        """Count them as images, not as the text they are written in."""
        mark, close = _IMAGES[self._operation]
        end = 0
        while (start := text.find(mark, end)) >= 0:
            end = text.find(close, start + len(mark))
            if end < 0:
                break
            self._bytes -= end - start
            several = close == b"]"
            self._images += text.count(b'"', start + len(mark), end) // 2 if several else 1

    def done(self) -> tuple[Chain, int]:
        """The chain."""
        return tuple(self.links), self.shared


def _is_given(value: Raw) -> bool:
    return len(value) > 2 and memoryview(value)[0] != ord("n")  # more than "" or [], not null


def _is_list(value: Raw) -> bool:
    return len(value) > 0 and memoryview(value)[0] == ord("[")


def _unmarked(piece: Raw) -> bytes:
    text = bytes(piece)
    return _MARK.sub(b"", text) if b'"cache_control"' in text else text


def _plain(item: Raw) -> bytes:
    """A message the same whether it is marked or not."""
    turn = _TURN.decode(item)
    content = turn.content
    if _is_list(content):
        parts = _PARTS.decode(content)
        if len(parts) == 1 and parts[0].type == "text":
            content = parts[0].text
    return b"%b:%b" % (turn.role.encode(), _unmarked(content))


def _of_messages(links: _Links, prompt: _Prompt) -> tuple[Chain, int]:
    return _conversation(links, (prompt.tools, prompt.system), prompt.messages)


def _of_input(links: _Links, prompt: _Prompt) -> tuple[Chain, int]:
    ahead = (prompt.tools, prompt.instructions)
    if _is_list(prompt.input):
        return _conversation(links, ahead, _ITEMS.decode(prompt.input))
    links.share(ahead)
    links.blocks(prompt.input)
    return links.done()


def _conversation(links: _Links, ahead: Iterable[Raw], items: list[Raw]) -> tuple[Chain, int]:
    if len(items) > MOST_MESSAGES:
        return NOTHING
    leading = 0
    while leading < len(items) and _ROLE.decode(items[leading]).role in _SYSTEM:
        leading += 1
    links.share((*ahead, *items[:leading]))
    links.messages(items[leading:] if leading else items)
    return links.done()


def _of_text(links: _Links, prompt: _Prompt) -> tuple[Chain, int]:
    links.share((prompt.system,))
    links.pictures(prompt.images)
    for text in (prompt.context, prompt.prompt, prompt.suffix):
        links.blocks(text)
    return links.done()


_READERS: Final = {
    "chat": _of_messages,
    "v1_chat": _of_messages,
    "v1_messages": _of_messages,
    "v1_responses": _of_input,
    "generate": _of_text,
    "v1_completions": _of_text,
}
