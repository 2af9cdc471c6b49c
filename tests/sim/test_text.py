"""What models say."""

import math

import pytest

from balancer.sim.host import SimModel
from balancer.sim.text import ASSISTANT, Answer, Ask, answer, count_tokens, vector

FIXED = SimModel("fixed", words=("One", " two", " three"))


def ask(prompt: str = f"hello\n{ASSISTANT}", **more: object) -> Ask:
    """A question."""
    return Ask(prompt, "hello", **more)  # type: ignore[arg-type]


def spoken(found: Answer) -> str:
    """The text of an answer."""
    return "".join(piece.text for piece in found.pieces if piece.kind == "text")


@pytest.mark.parametrize(
    ("limit", "said", "reason"),
    [
        (math.inf, "One two three", "stop"),
        (4, "One two three", "stop"),
        (3, "One two three", "length"),
        (1, "One", "length"),
    ],
)
def test_limits(limit: float, said: str, reason: str) -> None:
    """The token that says stop needs room too."""
    found = answer(FIXED, ask(limit=limit))
    assert (spoken(found), found.done_reason) == (said, reason)


@pytest.mark.parametrize(
    ("begun", "rest"),
    [("One", " two three"), ("One t", "wo three"), ("One two three", ""), ("Six", "One two three")],
)
def test_a_begun_answer_goes_on(begun: str, rest: str) -> None:
    """Also inside a word; one it would not give is followed by the whole."""
    assert spoken(answer(FIXED, ask(f"hello\n{ASSISTANT}{begun}"))) == rest


def test_some_models_begin_anew() -> None:
    """`reopens=False` closes the begun turn."""
    model = SimModel("m", words=FIXED.words, reopens=False)
    begun = ask(f"hello\n{ASSISTANT}One\n{ASSISTANT}")
    assert spoken(answer(model, begun)) == "One two three"


def test_repeating_itself_it_gives_up() -> None:
    """After 31 equal tokens, without a reason."""
    found = answer(SimModel("m", words=(" echo",), endless=True), ask(limit=1000))
    assert (len(found.pieces), found.done_reason) == (31, "")


def test_made_up_answers_are_sentences_of_the_right_size() -> None:
    """Between the model's bounds, the same each time, another for another seed."""
    model = SimModel("m", answer_words=(10, 15))
    texts = {spoken(answer(model, ask(seed=seed))) for seed in range(50)}
    assert len(texts) > 40
    assert all(10 <= len(text.split(" ")) <= 15 for text in texts)
    assert spoken(answer(model, ask())) == spoken(answer(model, ask()))


def test_a_json_answer_comes_in_pieces() -> None:
    """With a value for each property, whatever its type."""
    kinds = ("string", "integer", "boolean", "array")
    schema = {"properties": {kind: {"type": kind} for kind in kinds}}
    found = answer(FIXED, ask(schema=schema))
    assert spoken(found) == '{"string": "Paris", "integer": 1, "boolean": true, "array": ["Paris"]}'
    assert len(found.pieces) > 3
    assert spoken(answer(FIXED, ask(schema={}))) == '{"answer": "yes"}'


def test_vectors_are_unit_and_repeatable() -> None:
    """Equal for equal text, different for other text or another model."""
    model, other = SimModel("m", embedding_length=16), SimModel("n", embedding_length=16)
    found = vector(model, "x", None)
    assert sum(value * value for value in found) == pytest.approx(1.0, abs=1e-5)
    assert found == vector(model, "x", None)
    assert len({tuple(vector(m, t, None)) for m in (model, other) for t in "xy"}) == 4


def test_tokens_are_at_least_one() -> None:
    """Even of nothing."""
    assert (count_tokens(""), count_tokens("x" * 40)) == (1, 11)
