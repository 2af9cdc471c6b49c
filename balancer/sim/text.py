"""What simulated models say: words, tool arguments and vectors that follow from the request."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from balancer.sim.host import SimModel

ASSISTANT = "<|assistant|>"
"""Opens the model's turn in a rendered chat; a raw prompt holding it goes on from there."""
REPEATS_ALLOWED = 30

_SUBJECTS = (
    "The harbour", "A quiet engine", "Every second train", "The night shift", "One patient clerk",
    "The northern line", "A borrowed lantern", "The old reservoir", "Half the orchestra",
    "The lighthouse keeper",
)  # fmt: skip
_VERBS = (
    "remembers", "answers", "waits for", "carries", "measures", "follows", "forgets", "repairs",
    "outlasts", "paints",
)  # fmt: skip
_OBJECTS = (
    "the long winter", "a ledger of small debts", "the last ferry", "twelve copper bells",
    "the road to the coast", "a letter without a stamp", "the smell of rain", "its own reflection",
    "a map of the tides", "the first snow — ☃",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer."""

    text: str
    kind: Literal["text", "thinking", "tool"] = "text"
    arguments: Mapping[str, Any] | None = None
    """Of a tool call, whose name is `text`."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What decides an answer."""

    prompt: str
    """The whole rendered prompt."""
    question: str
    """What the user said last."""
    seed: int = 0
    limit: float = math.inf
    tools: Sequence[Mapping[str, Any]] = ()
    schema: Mapping[str, Any] | None = None
    """Of the JSON to answer with; an empty one is any object."""
    thinks: bool = True
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of an answer and why it ends: "" if the runner gives up without a word."""

    pieces: tuple[Piece, ...]
    done_reason: Literal["stop", "length", ""]


def answer(model: SimModel, ask: Ask) -> Answer:
    """The model's answer, cut to the limit."""
    pieces: list[Piece] = []
    repeats = 0
    for piece in _pieces(model, ask):
        if len(pieces) >= ask.limit:
            return Answer(tuple(pieces), "length")
        repeats = repeats + 1 if pieces and piece.text == pieces[-1].text else 0
        pieces.append(piece)
        if repeats == REPEATS_ALLOWED:
            return Answer(tuple(pieces), "")
    # The token that says stop is one too many if the limit is reached.
    return Answer(tuple(pieces), "length" if len(pieces) >= ask.limit else "stop")


def _pieces(model: SimModel, ask: Ask) -> Iterator[Piece]:
    if ask.thinks:
        yield from (Piece(word, "thinking") for word in model.thinking)
    called = _called_tool(model, ask)
    if called is not None:
        yield from (Piece(word) for word in model.tool_words)
        yield Piece(called["name"], "tool", _example(called.get("parameters") or {}))
        return
    yield from _continued(model, ask)


def _called_tool(model: SimModel, ask: Ask) -> Mapping[str, Any] | None:
    if "tools" not in model.capabilities:
        return None
    for tool in ask.tools:
        function: Mapping[str, Any] = tool.get("function") or tool
        if model.always_calls or function.get("name", "\0") in ask.question:
            return function
    return None


def _continued(model: SimModel, ask: Ask) -> Iterator[Piece]:
    """The answer from where the prompt's open assistant turn, if any, left off."""
    head, marker, said = ask.prompt.rpartition(ASSISTANT)
    if not marker or not model.reopens:
        head, said = ask.prompt, ""
    words = _words(model, ask, head)
    if model.jinja and said:
        yield Piece(said + next(words, ""))
        yield from map(Piece, words)
        return
    for word in words if said else ():
        if not said.startswith(word):
            yield Piece(word.removeprefix(said))
            break
        said = said.removeprefix(word)
    yield from map(Piece, words)


def _words(model: SimModel, ask: Ask, prompt: str) -> Iterator[str]:
    if ask.schema is not None:
        yield from (
            json.dumps(_example(ask.schema) or {"answer": "yes"}).replace(" ", "\0 ").split("\0")
        )
        return
    if model.words is not None:
        while True:
            yield from model.words
            if not (model.endless and model.words):
                return
    rng = Random(f"{model.name}|{ask.seed}|{prompt}")
    if ask.prefix:
        yield ask.prefix
    yield from _sentences(rng, rng.randint(*model.answer_words), opening=" " if ask.prefix else "")


def _sentences(rng: Random, words: int, opening: str) -> Iterator[str]:
    while words > 0:
        sentence = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}."
        for word in sentence.split(" ")[:words]:
            yield opening + word
            opening = " "
            words -= 1


def _example(schema: Mapping[str, Any]) -> Any:
    """A value that fits a JSON schema, if it is a plain one."""
    if schema.get("enum"):
        return schema["enum"][0]
    match schema.get("type", "object"):
        case "string":
            return "Paris"
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "array":
            return [_example(schema.get("items") or {"type": "string"})]
        case _:
            wanted = schema.get("properties") or {}
            return {name: _example(inner) for name, inner in wanted.items()}


def count_tokens(text: str) -> int:
    """About one token for four characters, at least one."""
    return len(text) // 4 + 1


def vector(model: SimModel, text: str, dimensions: int | None) -> list[float]:
    """A unit vector that follows from the model and the text."""
    if model.vector is not None:
        return list(model.vector)[:dimensions]
    rng = Random(f"{model.parsed.key}|{text}")
    values = [rng.gauss(0.0, 1.0) for _ in range(model.embedding_length)][:dimensions]
    norm = math.sqrt(sum(value * value for value in values)) or 1.0
    return [round(value / norm, 7) for value in values]
