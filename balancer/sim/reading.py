"""What a request for inference wants: bodies of all routes brought down to the native one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from balancer.sim import gojson
from balancer.sim.host import SimModel
from balancer.sim.text import ASSISTANT

Body = Mapping[str, Any]
Kind = Literal["generate", "chat", "embed", "embeddings"]

_INTEGERS = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "num_keep",
    "seed", "num_predict", "top_k", "repeat_last_n",
)  # fmt: skip
_FLOATS = (
    "top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_RELOADING = ("num_batch", "main_gpu", "use_mmap", "num_thread", "draft_num_predict")
_LEAST_CONTEXT = 4
_EFFORTS = ("low", "medium", "high", "max")


class RefusedError(Exception):
    """The request is answered with an error; `is_early` before the handler proper."""

    def __init__(
        self, status: int, text: str, *, is_early: bool = False, is_native: bool = False
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.is_early = is_early
        self.is_native = is_native
        """In the native shape whatever the route."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as the native handlers see it."""

    kind: Kind
    body: Body
    model: str
    stream: bool
    options: Body
    keep_alive_s: float | None
    messages: Sequence[Body]
    inputs: Sequence[str]
    """What is to be embedded."""

    @property
    def is_embedding(self) -> bool:
        """Asks for vectors."""
        return self.kind in {"embed", "embeddings"}

    @property
    def is_empty(self) -> bool:
        """Asks for nothing but a load or an unload."""
        if self.is_embedding:
            return not self.inputs
        return not (self.messages if self.kind == "chat" else self.body.get("prompt"))

    @property
    def limit(self) -> int | None:
        """The most tokens to write, None if not said."""
        limit = self.options.get("num_predict")
        return int(limit) if limit is not None and limit > 0 else None

    @property
    def tools(self) -> Sequence[Body]:
        """The tools offered."""
        tools = self.body.get("tools")
        return tools if isinstance(tools, list) else ()

    @property
    def question(self) -> str:
        """What the user said last."""
        if self.kind != "chat":
            return str(self.body.get("prompt") or "")
        last = self.messages[-1] if self.messages else {}
        return content_of(last) if last.get("role") == "user" else ""

    @property
    def last_roles(self) -> list[Any]:
        """Who said the last two messages."""
        return [message.get("role") for message in self.messages[-2:]]

    def prompt(self, *, reopens: bool) -> str:
        """What the engine reads; `reopens` leaves a trailing assistant message open."""
        if self.kind == "chat":
            return _render_chat(self.messages, reopens=reopens)
        return _render_generate(self.body)

    def num_ctx(self, model: SimModel, default: int) -> int:
        """The context the runner needs, between 4 and what the model was trained for."""
        own = next((int(value) for name, value in model.parameters if name == "num_ctx"), default)
        wanted = self.options.get("num_ctx")
        tokens = own if wanted is None else int(wanted)
        return max(_LEAST_CONTEXT, min(tokens, model.context_length))

    def runner_options(self) -> tuple[tuple[str, object], ...]:
        """Options that make another runner, those left at their default not counted."""
        chosen = {key: self.options[key] for key in _RELOADING if key in self.options}
        if (layers := self.options.get("num_gpu", -1)) >= 0:
            chosen["num_gpu"] = layers
        if self.body.get("shift") is False:
            chosen["shift"] = False
        return tuple(sorted(chosen.items()))


def read(body: Body, kind: Kind, *, streams: bool) -> Wanted:
    """A native body; `streams` is the route's default. Raises DecodeError or RefusedError."""
    stream = body.get("stream")
    options = _typed(body, "options", dict) or {}
    return Wanted(
        kind,
        body,
        str(_typed(body, "model", str) or ""),
        streams if stream is None else bool(stream),
        {name: value for name, value in options.items() if value is not None},
        keep_alive_s(body.get("keep_alive")),
        messages_of(body) if kind == "chat" else (),
        _inputs(body, kind),
    )


def _inputs(body: Body, kind: Kind) -> list[str]:
    given = body.get({"embed": "input", "embeddings": "prompt"}.get(kind, ""))
    if given in (None, ""):
        return []
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        return given
    raise RefusedError(400, "invalid input type")


def _typed(body: Body, name: str, wanted: type) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, wanted):
        raise gojson.DecodeError(
            f"json: cannot unmarshal {gojson.kind(value)} into Go struct field "
            f"Request.{name} of type {'string' if wanted is str else wanted.__name__}"
        )
    return value


def keep_alive_s(value: object) -> float | None:
    """Seconds, infinite for ever, None if not given; raises DecodeError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise gojson.DecodeError(f"Unsupported type: '{gojson.kind(value)}'")
    seconds = gojson.duration_s(value) if isinstance(value, str) else float(value)
    return math.inf if seconds < 0 else seconds


def check_options(options: Body) -> None:
    """A wrong type is a 500, as on the real thing."""
    for name, value in options.items():
        wanted = _wanted_type(name)
        if wanted and not _fits(wanted, value):
            raise RefusedError(500, f'option "{name}" must be of type {wanted}')


def _wanted_type(name: str) -> str:
    if name in _INTEGERS:
        return "integer"
    if name in _FLOATS:
        return "float32"
    return {"use_mmap": "boolean", "stop": "array"}.get(name, "")


def _fits(wanted: str, value: object) -> bool:
    if value is None:
        return True
    if wanted == "array":
        return isinstance(value, list)
    if wanted == "boolean":
        return isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool)


def wanted_schema(value: object) -> Body | None:
    """The schema that `format` asks for; an empty one is any object."""
    if value == "json":
        return {}
    return value if isinstance(value, dict) else None


def unfit_format(value: object) -> str:
    """The complaint about a `format` of a wrong kind."""
    if value in (None, "", "json") or isinstance(value, dict):
        return ""
    shown = gojson.encode(gojson.encode(value))
    return f'invalid format: {shown}; expected "json" or a valid JSON Schema object'


def wanted_thinking(body: Body) -> bool | None:
    """True, False or not said; raises DecodeError for anything else."""
    think = body.get("think")
    if think is None or isinstance(think, bool):
        return think
    if think in _EFFORTS:
        return True
    raise gojson.DecodeError(
        f'invalid think value: {gojson.encode(think)} (must be "high", "medium", "low", "max", '
        "true, or false)"
    )


# -- prompts ------------------------------------------------------------------------------------


def messages_of(body: Body) -> list[dict[str, Any]]:
    """The messages with their keys in lower case."""
    found = _typed(body, "messages", list) or []
    return [gojson.lower_keys(message) for message in found if isinstance(message, dict)]


def content_of(message: Body) -> str:
    """The text of a message, of OpenAI's lists of parts too."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _render_chat(messages: Sequence[Body], *, reopens: bool) -> str:
    """The prompt: one turn a line, the model's turn open at the end."""
    parts = [f"<|{message.get('role', 'user')}|>{content_of(message)}" for message in messages]
    text = "\n".join(parts)
    if messages and messages[-1].get("role") == "assistant" and reopens:
        return text
    return f"{text}\n{ASSISTANT}"


def _render_generate(body: Body) -> str:
    """The prompt of generate: the system text, then the user's."""
    prompt, system = str(body.get("prompt") or ""), str(body.get("system") or "")
    if body.get("raw"):
        return prompt
    return f"{system} {prompt} " if system else f"{prompt} "


# -- OpenAI -------------------------------------------------------------------------------------


def from_v1_chat(body: Body) -> Body:
    """A native chat body from `/v1/chat/completions`."""
    messages = messages_of(body)
    if not messages:
        raise RefusedError(400, "[] is too short - 'messages'", is_early=True)
    native = _from_v1(body, "max_tokens", "max_completion_tokens") | {"messages": messages}
    if body.get("tools"):
        native["tools"] = body["tools"]
    if isinstance(wanted := body.get("response_format"), dict):
        schema = wanted.get("json_schema")
        native["format"] = (
            schema.get("schema") if isinstance(schema, dict)
            else "json" if wanted.get("type") == "json_object" else None
        )  # fmt: skip
    if (effort := body.get("reasoning_effort")) is not None:
        native["think"] = False if effort == "none" else effort
    return native


def from_v1_completions(body: Body) -> Body:
    """A native generate body from `/v1/completions`."""
    return _from_v1(body, "max_tokens") | {
        "prompt": body.get("prompt"),
        "suffix": body.get("suffix"),
    }


def _from_v1(body: Body, *limits: str) -> dict[str, Any]:
    options = {
        name: body[name]
        for name in ("seed", "temperature", "top_p", "presence_penalty", "frequency_penalty")
        if body.get(name) is not None
    }
    for limit in limits:
        if body.get(limit) is not None:
            options["num_predict"] = body[limit]
    return {
        "model": body.get("model"),
        "stream": bool(body.get("stream")),
        "options": options,
        "_debug_render_only": body.get("_debug_render_only"),
    }


def from_v1_embeddings(body: Body) -> Body:
    """A native embed body from `/v1/embeddings`."""
    if body.get("input") in (None, "", []):
        raise RefusedError(400, "invalid input", is_early=True)
    return {
        "model": body.get("model"),
        "input": body["input"],
        "dimensions": body.get("dimensions"),
    }
