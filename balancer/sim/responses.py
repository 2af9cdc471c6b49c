"""`/v1/responses`: OpenAI's newer dialect."""

from collections.abc import Mapping, Sequence
from string import digits
from typing import Any

from balancer.sim import gojson
from balancer.sim.dialects import (
    PLAIN_JSON,
    UNCACHED_SSE,
    Dialect,
    Echo,
    Headers,
    Outcome,
    openai_error,
)
from balancer.sim.reading import Body
from balancer.sim.text import Piece

_ORDER = (
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model",
    "previous_response_id", "instructions", "output", "error", "tools", "tool_choice",
    "truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty", "frequency_penalty",
    "top_logprobs", "temperature", "reasoning", "usage", "max_output_tokens", "max_tool_calls",
    "store", "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
)  # fmt: skip


class Responses(Dialect):
    """Numbered events, their keys in alphabetical order; thinking is left out."""

    stream_headers = UNCACHED_SSE
    body_headers = PLAIN_JSON

    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        self._id = f"resp_{echo.letters(6, digits)}"
        self._message_id = f"msg_{echo.letters(6, digits)}"
        self._call_id = f"fc_{echo.letters(6, digits)}"
        self._number = 0
        self._begun = False
        self._calls: list[dict[str, Any]] = []

    def _event(self, kind: str, **more: object) -> bytes:
        value = more | {"type": kind, "sequence_number": self._number}
        self._number += 1
        return f"event: {kind}\ndata: {gojson.encode(value, sort=True)}\n\n".encode()

    def opening(self) -> list[bytes]:
        """The response, created and in progress."""
        response = self._response("in_progress", [], None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def piece(self, piece: Piece) -> list[bytes]:
        """A delta, with the beginning of its item if it is the first."""
        if piece.kind == "tool":
            return self._tool(piece)
        if piece.kind == "thinking":
            return []
        begin = [] if self._begun else self._begin()
        delta = self._text_event("response.output_text.delta", delta=piece.text, logprobs=[])
        return [*begin, delta]

    def _begin(self) -> list[bytes]:
        self._begun = True
        item = self._message("in_progress", [])
        return [
            self._event("response.output_item.added", item=item, output_index=0),
            self._text_event("response.content_part.added", part=_part("")),
        ]

    def _text_event(self, kind: str, **more: object) -> bytes:
        place = {"content_index": 0, "item_id": self._message_id, "output_index": 0}
        return self._event(kind, **place, **more)

    def _message(self, status: str, content: Sequence[object]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _function_call(self, piece: Piece, index: int) -> dict[str, Any]:
        return {
            "id": f"{self._call_id}_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": self.echo.call_id(),
            "name": piece.text,
            "arguments": gojson.encode(piece.arguments),
        }

    def _tool(self, piece: Piece) -> list[bytes]:
        call = self._function_call(piece, len(self._calls))
        self._calls.append(call)
        added = call | {"arguments": "", "status": "in_progress"}
        place = {"item_id": call["id"], "output_index": 0}
        kind = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", item=added, output_index=0),
            self._event(f"{kind}.delta", delta=call["arguments"], **place),
            self._event(f"{kind}.done", arguments=call["arguments"], **place),
            self._event("response.output_item.done", item=call, output_index=0),
        ]

    def closing(self, outcome: Outcome) -> list[bytes]:
        """The end of the message, unless tools were called, and of the response."""
        said = outcome.joined()
        message = self._message("completed", [_part(said)])
        events = []
        if self._begun and not self._calls:
            events = [
                self._text_event("response.output_text.done", text=said, logprobs=[]),
                self._text_event("response.content_part.done", part=_part(said)),
                self._event("response.output_item.done", item=message, output_index=0),
            ]
        output = [*self._calls, message] if said else self._calls
        response = self._response("completed", output, outcome)
        return [*events, self._event("response.completed", response=response)]

    def broken(self, text: str) -> list[bytes]:  # noqa: ARG002 - the text is lost on this route
        """Nothing at all."""
        return []

    def whole(self, outcome: Outcome) -> bytes:
        """The response, a line of its own."""
        output = [self._function_call(call, index) for index, call in enumerate(outcome.calls)]
        if said := outcome.joined():
            output.append(self._message("completed", [_part(said)]))
        response = self._response("completed", output, outcome)
        ordered = {name: response[name] for name in _ORDER}
        return gojson.encode(ordered).encode() + b"\n"

    def _response(
        self, status: str, output: Sequence[object], outcome: Outcome | None
    ) -> dict[str, Any]:
        sent, now_s = self.echo.request, self.echo.now_ns() // 1_000_000_000
        return {
            "id": self._id,
            "object": "response",
            "created_at": now_s,
            "completed_at": now_s if outcome else None,
            "status": status,
            "incomplete_details": None,
            "model": self.echo.model,
            "previous_response_id": sent.get("previous_response_id"),
            "instructions": sent.get("instructions"),
            "output": output,
            "error": None,
            "tools": [_shown_tool(tool) for tool in sent.get("tools") or ()],
            "tool_choice": "auto",
            "truncation": "disabled",
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}},
            "top_p": sent.get("top_p", 1),
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": 0,
            "temperature": sent.get("temperature", 1),
            "reasoning": None,
            "usage": _usage(outcome) if outcome else None,
            "max_output_tokens": sent.get("max_output_tokens"),
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": {},
            "safety_identifier": None,
            "prompt_cache_key": None,
        }

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """OpenAI's error object."""
        return openai_error(status, text)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "input_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.tokens,
        "total_tokens": outcome.prompt_tokens + outcome.tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def _shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": tool.get("description"),
        "strict": tool.get("strict"),
        "parameters": tool.get("parameters"),
    }


def from_responses(body: Body) -> Body:
    """A native chat body from `/v1/responses`."""
    given = body.get("input")
    messages: list[Any] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        messages += [item for item in given if isinstance(item, dict)]
    return {
        "model": body.get("model"),
        "stream": bool(body.get("stream")),
        "messages": messages,
        "options": {
            "num_predict": body.get("max_output_tokens"),
            "temperature": body.get("temperature"),
        },
        "tools": [
            {"type": "function", "function": tool}
            for tool in body.get("tools") or ()
            if tool.get("type") == "function"
        ],
    }
