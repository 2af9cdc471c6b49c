"""`/v1/messages`: Anthropic's dialect."""

from collections.abc import Mapping
from typing import Any

from balancer.sim import gojson, reading
from balancer.sim.dialects import HEX, PLAIN_JSON, UNCACHED_SSE, Dialect, Echo, Headers, Outcome
from balancer.sim.reading import Body, RefusedError
from balancer.sim.text import Piece

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_STOPS = {"stop": "end_turn", "length": "max_tokens", "load": "end_turn"}
_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}


class Messages(Dialect):
    """Blocks of text, thinking and tool use, each with a start and a stop."""

    stream_headers = UNCACHED_SSE
    body_headers = PLAIN_JSON

    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        self._id = f"msg_{echo.letters(24, HEX)}"
        self._index = -1
        self._open = ""
        self._called = False

    def _event(self, kind: str, **more: object) -> bytes:
        return f"event: {kind}\ndata: {gojson.encode({'type': kind} | more)}\n\n".encode()

    def opening(self) -> list[bytes]:
        """`message_start`, with a guess at the size of the prompt."""
        characters = len(gojson.encode(self.echo.request.get("messages")))
        message = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.echo.model,
            "content": [],
            "usage": {"input_tokens": characters // 4, "output_tokens": 0},
        }
        return [self._event("message_start", message=message)]

    def piece(self, piece: Piece) -> list[bytes]:
        """A delta, with the start of its block if it is the first."""
        if piece.kind == "tool":
            return self._tool(piece)
        events = []
        if self._open != piece.kind:
            events = [*self._close(), self._start({"type": piece.kind, piece.kind: ""}, piece.kind)]
        delta = {"type": _DELTAS[piece.kind], piece.kind: piece.text}
        return [*events, self._event("content_block_delta", index=self._index, delta=delta)]

    def _tool(self, piece: Piece) -> list[bytes]:
        self._called = True
        block = {"type": "tool_use", "id": self.echo.call_id(), "name": piece.text, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": gojson.encode(piece.arguments)}
        return [
            *self._close(),
            self._start(block, "tool"),
            self._event("content_block_delta", index=self._index, delta=delta),
            *self._close(),
        ]

    def _start(self, block: Mapping[str, object], kind: str) -> bytes:
        self._index += 1
        self._open = kind
        return self._event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = ""
        return [self._event("content_block_stop", index=self._index)]

    def closing(self, outcome: Outcome) -> list[bytes]:
        """The last block's stop, the real usage, `message_stop`."""
        reason = "tool_use" if self._called else _STOPS[outcome.done_reason]
        delta = {"stop_reason": reason}
        return [
            *self._close(),
            self._event("message_delta", delta=delta, usage=_usage(outcome)),
            self._event("message_stop"),
        ]

    def broken(self, text: str) -> list[bytes]:  # noqa: ARG002 - the text is lost on this route
        """Nothing at all."""
        return []

    def whole(self, outcome: Outcome) -> bytes:
        """The message, a line of its own."""
        content: list[dict[str, Any]] = []
        if thinking := outcome.joined("thinking"):
            content.append({"type": "thinking", "thinking": thinking})
        if said := outcome.joined():
            content.append({"type": "text", "text": said})
        for call in outcome.calls:
            block = {"type": "tool_use", "id": self.echo.call_id(), "name": call.text}
            content.append(block | {"input": call.arguments})
        body = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.echo.model,
            "content": content,
            "stop_reason": "tool_use" if outcome.calls else _STOPS.get(outcome.done_reason),
            "usage": _usage(outcome),
        }
        return gojson.encode(body).encode() + b"\n"

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """Anthropic's error object, a line of its own."""
        body = {
            "type": "error",
            "error": {"type": _ERRORS.get(status, "api_error"), "message": text},
            "request_id": f"req_{self.echo.letters(24, HEX)}",
        }
        return PLAIN_JSON, gojson.encode(body).encode() + b"\n"


def _usage(outcome: Outcome) -> dict[str, int]:
    return {"input_tokens": outcome.prompt_tokens, "output_tokens": outcome.tokens}


def from_messages(body: Body) -> Body:
    """A native chat body from `/v1/messages`."""
    if not body.get("model"):
        raise RefusedError(400, "model is required", is_early=True)
    limit = body.get("max_tokens")
    if not isinstance(limit, int) or limit <= 0:
        raise RefusedError(400, "max_tokens is required and must be positive", is_early=True)
    messages = reading.messages_of(body)
    if not messages:
        raise RefusedError(400, "messages is required", is_early=True)
    system = reading.content_of({"content": body.get("system")})
    thinking = body.get("thinking")
    is_off = isinstance(thinking, dict) and thinking.get("type") == "disabled"
    return {
        "model": body["model"],
        "stream": bool(body.get("stream")),
        "messages": [{"role": "system", "content": system}, *messages] if system else messages,
        "options": {"num_predict": limit, "temperature": body.get("temperature")},
        "tools": [_tool(tool) for tool in body.get("tools") or ()],
        "think": False if is_off else None,
    }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool.get("name", ""), "parameters": tool.get("input_schema") or {}}
    return {"type": "function", "function": function}
