"""What requests want, brought down to the native ones."""

import math
from typing import Any

import pytest

from balancer.sim import reading
from balancer.sim.gojson import DecodeError
from balancer.sim.host import SimModel
from balancer.sim.reading import RefusedError
from balancer.sim.text import ASSISTANT

HELLO = {"role": "user", "content": "hello"}


def wanted(**body: Any) -> reading.Wanted:
    """A native chat."""
    return reading.read({"model": "m", "messages": [HELLO]} | body, "chat", streams=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (5, 5.0),
        (0.5, 0.5),
        (-1, math.inf),
        ("10m", 600.0),
        ("-1m", math.inf),
        ("0", 0),
    ],
)
def test_keep_alive(value: object, seconds: float | None) -> None:
    """Numbers are seconds, strings durations, anything negative is for ever."""
    assert wanted(keep_alive=value).keep_alive_s == seconds


@pytest.mark.parametrize("value", ["300", "", True, [1]])
def test_keep_alive_refused(value: object) -> None:
    """Bare numbers in a string, nothing, other types."""
    with pytest.raises(DecodeError):
        wanted(keep_alive=value)


@pytest.mark.parametrize(
    ("asked", "tokens"), [(None, 4096), (2048, 2048), (99999, 8192), (0, 4), (-5, 4), (100.9, 100)]
)
def test_the_context_is_clamped(asked: float | None, tokens: int) -> None:
    """Between four and what the model was trained for."""
    options = {} if asked is None else {"num_ctx": asked}
    model = SimModel("m", context_length=8192)
    assert wanted(options=options).num_ctx(model, 4096) == tokens


def test_only_runner_options_make_another_runner() -> None:
    """Sampling does not, nor defaults spelt out, nor nulls; the shift flag does."""
    plain = wanted().runner_options()
    assert wanted(options={"num_gpu": None, "num_thread": None}).runner_options() == plain
    assert wanted(options={"temperature": 0, "num_gpu": -1}, shift=True).runner_options() == plain
    for body in ({"options": {"num_gpu": 0}}, {"options": {"num_thread": 4}}, {"shift": False}):
        assert wanted(**body).runner_options() != plain


@pytest.mark.parametrize(
    "options", [{"num_ctx": "x"}, {"seed": True}, {"stop": "a"}, {"top_p": []}]
)
def test_options_of_a_wrong_type(options: dict[str, object]) -> None:
    """A 500 that names the option."""
    with pytest.raises(RefusedError, match=f'option "{next(iter(options))}" must be of type'):
        reading.check_options(options)
    reading.check_options({"num_ctx": 4.5, "stop": ["a"], "unknown": object(), "seed": None})


def test_the_last_turn_is_left_open() -> None:
    """After a user the model's turn is opened, a begun one is gone on with or closed."""
    begun = [HELLO, {"role": "assistant", "content": "I"}]
    assert wanted().prompt(reopens=True).endswith(ASSISTANT)
    assert wanted(messages=begun).prompt(reopens=True).endswith(f"{ASSISTANT}I")
    assert wanted(messages=begun).prompt(reopens=False).endswith(f"I\n{ASSISTANT}")


def test_openai_chat_becomes_native() -> None:
    """Limits, sampling, parts of a message, formats and efforts."""
    native = reading.from_v1_chat(
        {
            "model": "m",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 7,
            "seed": 3,
            "response_format": {"type": "json_object"},
            "reasoning_effort": "none",
        }
    )
    found = reading.read(native, "chat", streams=True)
    assert (found.limit, found.stream, found.question) == (7, False, "hi")
    assert (native["format"], native["think"], native["options"]["seed"]) == ("json", False, 3)


def test_empty_requests() -> None:
    """No message, no prompt, nothing to embed."""
    assert wanted(messages=[]).is_empty
    assert reading.read({"model": "m", "prompt": ""}, "generate", streams=True).is_empty
    assert reading.read({"model": "m", "input": ["", "x"]}, "embed", streams=False).inputs == [
        "",
        "x",
    ]
    assert reading.read({"model": "m", "input": []}, "embed", streams=False).is_empty
