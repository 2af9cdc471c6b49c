"""How an answer is put into bytes: native chat and generate, OpenAI, Anthropic.

One object per request. A stream is `opening`, a `piece` per token and `closing`, each a list of
chunks; `broken` replaces `closing` where the model failed. `whole` is the answer in one body.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from string import ascii_letters, ascii_lowercase, digits
from typing import Any, Literal

from balancer.sim import gojson
from balancer.sim.text import Piece

Headers = list[tuple[str, str]]
JSON: Headers = [("Content-Type", "application/json; charset=utf-8")]
PLAIN_JSON: Headers = [("Content-Type", "application/json")]
NDJSON: Headers = [("Content-Type", "application/x-ndjson")]
SSE: Headers = [("Content-Type", "text/event-stream")]
UNCACHED_SSE: Headers = [("Cache-Control", "no-cache"), ("Connection", "keep-alive"), *SSE]
HEX = "0123456789abcdef"


@dataclass(slots=True)
class Outcome:
    """What is known of a request when its answer is complete."""

    pieces: Sequence[Piece]
    done_reason: str
    """"" if the runner ended without saying so."""
    prompt_tokens: int = 0
    metrics: Mapping[str, int] = field(default_factory=dict)
    context: Sequence[int] | None = None

    def joined(self, kind: Literal["text", "thinking"] = "text") -> str:
        """All text of a kind."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)

    @property
    def calls(self) -> list[Piece]:
        """The tool calls."""
        return [piece for piece in self.pieces if piece.kind == "tool"]

    @property
    def tokens(self) -> int:
        """Tokens written, the one that ends the answer among them."""
        return len(self.pieces) + (self.done_reason == "stop")

    @property
    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's words."""
        out = self.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": out,
            "total_tokens": self.prompt_tokens + out,
        }


@dataclass(slots=True)
class Echo:
    """What a dialect must know of its request."""

    model: str
    """As the client sent it."""
    now_ns: Callable[[], int]
    rng: Random
    request: Mapping[str, Any] = field(default_factory=dict)
    jinja: bool = False

    def letters(self, count: int, alphabet: str = ascii_lowercase + digits) -> str:
        """Random characters for an id."""
        return "".join(self.rng.choices(alphabet, k=count))

    def call_id(self) -> str:
        """The id of a tool call."""
        return self.letters(32, ascii_letters + digits) if self.jinja else f"call_{self.letters(8)}"


class Dialect:
    """The common ground: a stream of records with nothing before them."""

    stream_headers: Headers = NDJSON
    body_headers: Headers = JSON
    loses_errors = False
    """A failure once the model runs is a 200 without a body."""

    def __init__(self, echo: Echo) -> None:
        self.echo = echo

    def opening(self) -> list[bytes]:
        """Records before the first token."""
        return []

    def piece(self, piece: Piece) -> list[bytes]:
        """Records for one token."""
        raise NotImplementedError

    def closing(self, outcome: Outcome) -> list[bytes]:
        """Records after the last token."""
        raise NotImplementedError

    def broken(self, text: str) -> list[bytes]:
        """Records that tell (or fail to tell) that the model failed."""
        raise NotImplementedError

    def whole(self, outcome: Outcome) -> bytes:
        """The answer as one body."""
        raise NotImplementedError

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """An error made by the handler."""
        raise NotImplementedError

    def early_error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """An error made while the request is decoded."""
        return JSON, self.error(status, text)[1].rstrip(b"\n")


class Native(Dialect):
    """What `/api/chat` and `/api/generate` have in common."""

    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        self._head = '{"model":' + gojson.encode(echo.model) + ',"created_at":"'
        self._top = echo.request.get("top_logprobs") if echo.request.get("logprobs") else None
        self._logprobs = bool(echo.request.get("logprobs"))

    def _stamped(self) -> str:
        return self._head + gojson.timestamp(self.echo.now_ns()) + '",'

    def _line(self, body: str, piece: Piece) -> list[bytes]:
        logprobs = ""
        if self._logprobs and piece.kind != "tool":
            logprobs = ',"logprobs":' + gojson.encode([self._logprob(piece.text)])
        return [f'{self._stamped()}{body},"done":false{logprobs}}}\n'.encode()]

    def _logprob(self, token: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"token": token, "logprob": 0, "bytes": list(token.encode())}
        return entry | {"top_logprobs": [dict(entry)]} if self._top else entry

    def _calls(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            {
                "id": self.echo.call_id(),
                "function": {"index": index, "name": piece.text, "arguments": piece.arguments},
            }
            for index, piece in enumerate(pieces)
        ]

    def _final(self, content: str, outcome: Outcome) -> bytes:
        tail: dict[str, Any] = {"done": bool(outcome.done_reason)}
        if outcome.done_reason:
            tail["done_reason"] = outcome.done_reason
        if outcome.context is not None:
            tail["context"] = list(outcome.context)
        tail |= {key: value for key, value in outcome.metrics.items() if value}
        return f"{self._stamped()}{content},{gojson.encode(tail)[1:]}".encode()

    def broken(self, text: str) -> list[bytes]:
        """An error line."""
        return [gojson.encode({"error": text}).encode() + b"\n"]

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:  # noqa: ARG002 - the native shape has no status
        """The text alone."""
        return JSON, gojson.encode({"error": text}).encode()


class Chat(Native):
    """`/api/chat`."""

    def piece(self, piece: Piece) -> list[bytes]:
        """A line with a message."""
        if piece.kind == "tool" and self.echo.jinja:
            return []
        return self._line(f'"message":{self._message([piece])}', piece)

    def _message(self, pieces: Sequence[Piece]) -> str:
        outcome = Outcome(pieces, "")
        message: dict[str, Any] = {"role": "assistant", "content": outcome.joined()}
        if thinking := outcome.joined("thinking"):
            message["thinking"] = thinking
        if calls := outcome.calls:
            message["tool_calls"] = self._calls(calls)
        return gojson.encode(message)

    def closing(self, outcome: Outcome) -> list[bytes]:
        """The `done` line."""
        last = outcome.calls if self.echo.jinja else []
        return [self._final(f'"message":{self._message(last)}', outcome) + b"\n"]

    def whole(self, outcome: Outcome) -> bytes:
        """The `done` object with all text in it."""
        return self._final(f'"message":{self._message(outcome.pieces)}', outcome)


class Generate(Native):
    """`/api/generate`."""

    _thought = False

    def piece(self, piece: Piece) -> list[bytes]:
        """A line with a response; thinking is preceded by an empty one."""
        line = self._line(self._fields([piece]), piece)
        if piece.kind == "thinking" and not self._thought:
            self._thought = True
            return self._line('"response":""', piece) + line
        return line

    def _fields(self, pieces: Sequence[Piece]) -> str:
        outcome = Outcome(pieces, "")
        fields: dict[str, Any] = {"response": outcome.joined()}
        if thinking := outcome.joined("thinking"):
            fields["thinking"] = thinking
        return gojson.encode(fields)[1:-1]

    def closing(self, outcome: Outcome) -> list[bytes]:
        """The `done` line."""
        return [self._final('"response":""', outcome) + b"\n"]

    def whole(self, outcome: Outcome) -> bytes:
        """The `done` object with all text in it."""
        return self._final(self._fields(outcome.pieces), outcome)


class Embed(Native):
    """Errors of the embedding routes, which have no stream."""


def _event(value: object) -> bytes:
    return f"data: {gojson.encode(value)}\n\n".encode()


def openai_error(status: int, text: str) -> tuple[Headers, bytes]:
    """OpenAI's error object, a line of its own."""
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    error = {"message": text, "type": kinds.get(status, "api_error"), "param": None, "code": None}
    return PLAIN_JSON, gojson.encode({"error": error}).encode() + b"\n"


class OpenAI(Dialect):
    """What the `/v1` routes of OpenAI have in common."""

    stream_headers = SSE
    body_headers = PLAIN_JSON
    prefix = "chatcmpl"

    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        self._id = f"{self.prefix}-{echo.rng.randrange(999)}"
        self._created = 0
        options = echo.request.get("stream_options")
        self._usage = isinstance(options, dict) and bool(options.get("include_usage"))

    def _pinned(self) -> int:
        self._created = self._created or self.echo.now_ns() // 1_000_000_000
        return self._created

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """OpenAI's error object."""
        return openai_error(status, text)


class V1Chat(OpenAI):
    """`/v1/chat/completions`."""

    _opened = False
    _called = False

    def _chunk(self, choices: object, model: str, **more: object) -> bytes:
        return _event(
            {
                "id": self._id,
                "object": "chat.completion.chunk",
                "created": self._pinned(),
                "model": model,
                "system_fingerprint": "fp_ollama",
                "choices": choices,
                **more,
            }
        )

    def _delta(self, delta: dict[str, Any], model: str) -> bytes:
        opened = {} if self._opened else {"role": "assistant"}
        self._opened = True
        choice = {"index": 0, "delta": opened | delta, "finish_reason": None}
        return self._chunk([choice], model)

    def piece(self, piece: Piece) -> list[bytes]:
        """A delta."""
        self._called = self._called or piece.kind == "tool"
        return [self._delta(self._message([piece]), self.echo.model)]

    def _message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        outcome = Outcome(pieces, "")
        message: dict[str, Any] = {"content": outcome.joined()}
        if thinking := outcome.joined("thinking"):
            message["reasoning"] = thinking
        if outcome.calls:
            message["tool_calls"] = [
                {
                    "id": self.echo.call_id(),
                    "index": index,
                    "type": "function",
                    "function": {"name": call.text, "arguments": gojson.encode(call.arguments)},
                }
                for index, call in enumerate(outcome.calls)
            ]
        return message

    def closing(self, outcome: Outcome) -> list[bytes]:
        """Finish, usage and `[DONE]` in one chunk; nothing if the runner gave up."""
        if not outcome.done_reason:
            return []
        reason = "tool_calls" if self._called else outcome.done_reason
        choice = {"index": 0, "delta": {}, "finish_reason": reason}
        last = self._chunk([choice], self.echo.model)
        if self._usage:
            last += self._chunk([], self.echo.model, usage=outcome.usage)
        return [last + b"data: [DONE]\n\n"]

    def broken(self, text: str) -> list[bytes]:  # noqa: ARG002 - the text is lost on this route
        """An empty delta of no model: all that is left of the error."""
        return [self._delta({"content": ""}, "")]

    def whole(self, outcome: Outcome) -> bytes:
        """The completion object, a line of its own."""
        reason = "tool_calls" if outcome.calls else outcome.done_reason or None
        message = {"role": "assistant"} | self._message(outcome.pieces)
        body = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._pinned(),
            "model": self.echo.model,
            "system_fingerprint": "fp_ollama",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": outcome.usage,
        }
        return gojson.encode(body).encode() + b"\n"


class V1Completions(OpenAI):
    """`/v1/completions`."""

    prefix = "cmpl"

    def _chunk(self, choices: object, model: str, usage: Mapping[str, int] | None = None) -> bytes:
        zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        chunk = {
            "id": self._id,
            "object": "text_completion",
            "created": self._pinned(),
            "choices": choices,
            "model": model,
            "system_fingerprint": "fp_ollama",
        }
        return _event(chunk | {"usage": usage or zero} if self._usage else chunk)

    def _choice(self, text: str, reason: str | None = None) -> list[dict[str, Any]]:
        return [{"text": text, "index": 0, "finish_reason": reason}]

    def piece(self, piece: Piece) -> list[bytes]:
        """A chunk of text; thinking is left out."""
        text = piece.text if piece.kind == "text" else ""
        return [self._chunk(self._choice(text), self.echo.model)]

    def closing(self, outcome: Outcome) -> list[bytes]:
        """Finish, usage and `[DONE]` in one chunk; nothing if the runner gave up."""
        if not outcome.done_reason:
            return []
        last = self._chunk(self._choice("", outcome.done_reason), self.echo.model)
        if self._usage:
            last += self._chunk([], self.echo.model, outcome.usage)
        return [last + b"data: [DONE]\n\n"]

    def broken(self, text: str) -> list[bytes]:  # noqa: ARG002 - the text is lost on this route
        """An empty text of no model."""
        return [self._chunk(self._choice(""), "")]

    def whole(self, outcome: Outcome) -> bytes:
        """The completion object, a line of its own."""
        body = {
            "id": self._id,
            "object": "text_completion",
            "created": self._pinned(),
            "model": self.echo.model,
            "system_fingerprint": "fp_ollama",
            "choices": self._choice(outcome.joined(), outcome.done_reason or None),
            "usage": outcome.usage,
        }
        return gojson.encode(body).encode() + b"\n"


class V1Embeddings(OpenAI):
    """Errors of `/v1/embeddings`, which has no stream."""


class Verbatim(Dialect):
    """Chunks given by the model itself; errors as the route has them."""

    def __init__(self, dialect: Dialect, chunks: Sequence[bytes]) -> None:
        super().__init__(dialect.echo)
        self._dialect = dialect
        self._chunks = chunks
        self._next = 0
        self.stream_headers = dialect.stream_headers
        self.body_headers = dialect.body_headers

    def piece(self, piece: Piece) -> list[bytes]:  # noqa: ARG002 - what is said is fixed
        """The next chunk."""
        self._next += 1
        return [self._chunks[self._next - 1]]

    def closing(self, outcome: Outcome) -> list[bytes]:  # noqa: ARG002 - what is said is fixed
        """Nothing: the chunks say it all."""
        return []

    def broken(self, text: str) -> list[bytes]:
        """As the route has it."""
        return self._dialect.broken(text)

    def whole(self, outcome: Outcome) -> bytes:  # noqa: ARG002 - what is said is fixed
        """All chunks."""
        return b"".join(self._chunks)

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """As the route has it."""
        return self._dialect.error(status, text)
