from collections.abc import Callable
from typing import Any

import pytest

from balancer.config import PinSpec, load

Faults = Callable[..., list[str]]

HOSTS = "backends: [{name: a, url: 'a:1'}, {name: b, url: 'b:1', models: {deny: ['q*']}}]\n"


def pins(text: str, env: dict[str, str] | None = None) -> tuple[PinSpec, ...]:
    """What is pinned."""
    return load(f"{HOSTS}models: {{pin: {text}}}", env or {}).models.pin


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("[m]", PinSpec("m", (), 1, None)),
        ("m", PinSpec("m", (), 1, None)),
        ("[{model: m}]", PinSpec("m", (), 1, None)),
        ("[{model: m, copies: 2}]", PinSpec("m", (), 2, None)),
        ("[{model: m, backends: [a, b]}]", PinSpec("m", ("a", "b"), 1, None)),
        ("[{model: m, backends: a, num_ctx: 32768}]", PinSpec("m", ("a",), 1, 32768)),
    ],
)
def test_a_pin_in_each_spelling(text: str, spec: PinSpec) -> None:
    """A name alone is a copy anywhere."""
    assert pins(text) == (spec,)


@pytest.mark.parametrize("text", ["[]", "", "null"])
def test_nothing_is_pinned_unless_it_is_written(text: str) -> None:
    """A key without a value is the default."""
    assert pins(text) == ()


def test_the_environment_can_pin_by_name() -> None:
    """As with other lists; what it says counts."""
    specs = pins("[z]", {"BALANCER_MODELS__PIN": "m, n:1"})
    assert [spec.model for spec in specs] == ["m", "n:1"]


def test_what_is_written_is_shown() -> None:
    """In the long form."""
    written = load(f"{HOSTS}models: {{pin: [{{model: m, copies: 2}}]}}", {}).written
    assert written["models"]["pin"] == [
        {"model": "m", "backends": [], "copies": 2, "num_ctx": None}
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[{copies: 1}]", "models.pin[0].model: is needed."),
        ("{model: m}", "models.pin: needs a list."),
        ("[{model: m, copies: 0}]", "copies: 0 is not a whole number of at least 1."),
        ("[{model: m, copies: 1, backends: [a]}]", "or copies (on any), not both."),
        ("[{model: m, num_ctx: 32}]", "32 is not a context: it counts tokens. 32k is 32768."),
        ("[{model: m, num_ctx: x}]", '"x" is not a whole number of at least 256.'),
        ("['not/a/good/name/at/all']", "is not the name of a model"),
        ("['m:cloud']", '"m:cloud" runs at ollama.com: no host of yours can keep it.'),
        ("[m, 'M:latest']", "pin[1]: M:latest is pinned already (first at line 2)."),
        ("[{model: m, backends: [a]}, {model: m, backends: [b, a]}]", "is pinned already"),
        ("[{model: m, backends: [a]}, {model: m, num_ctx: 4096}]", "is pinned already"),
        ("[{model: m, device: 1}]", "models.pin[0].device: unknown key."),
    ],
)
def test_what_cannot_be_is_refused(faults: Faults, text: str, told: str) -> None:
    """With the way out."""
    (fault,) = faults(f"{HOSTS}models: {{pin: {text}}}")
    assert told in fault


def test_contexts_of_one_model_may_differ_by_backend() -> None:
    """A host keeps one copy of a model; two hosts may keep two kinds."""
    both = "[{model: m, backends: [a]}, {model: m, backends: [b], num_ctx: 4096}]"
    assert len(pins(both)) == 2


def test_an_alias_is_not_what_is_in_memory(faults: Faults) -> None:
    """Nobody would ever ask for a model of that name."""
    text = "models: {aliases: {fast: [m, n]}, pin: [Fast]}"
    assert faults(text) == [
        "config.yaml:1:41 models.pin[0].model: Fast is an alias. Pin the model: m or n."
    ]


@pytest.mark.parametrize(
    ("pin", "told"),
    [
        ("{model: m, backends: [a]}", None),
        ("{model: m, backends: [a, gpu0]}", "no backend written here is named gpu0: m waits"),
        ("{model: qwen3, backends: [a, b]}", "the rules of b rule qwen3 out: it is not kept there"),
    ],
)
def test_what_is_probably_not_meant_is_told(pin: Any, told: str | None) -> None:
    """No fault: a backend of that name may be found yet."""
    warnings = load(f"{HOSTS}models: {{pin: [{pin}]}}", {}).warnings
    assert len(warnings) == (told is not None)
    assert all(str(told) in warning for warning in warnings)


@pytest.mark.parametrize(
    ("pinned", "policy", "told"),
    [
        (8192, "{policy: pin, default: 8192}", False),
        (8192, "{policy: pin, default: 4096}", True),
        (8192, "{policy: reuse, default: 4096}", False),
        ("null", "{policy: pin, default: 4096}", False),
    ],
)
@pytest.mark.parametrize("place", ["num_ctx: {}", "overrides: {{m*: {{num_ctx: {}}}}}"])
def test_a_context_that_no_call_gets_is_told(
    pinned: Any, policy: str, told: bool, place: str
) -> None:
    """The rules for contexts and the pin contradict each other."""
    pin = f"pin: [{{model: m, num_ctx: {pinned}}}]"
    warnings = load(f"{HOSTS}models: {{{place.format(policy)}, {pin}}}", {}).warnings
    assert ["8192 of m serves no call" in warning for warning in warnings] == [True] * told
