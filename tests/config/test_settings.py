import dataclasses
from collections.abc import Iterator, Mapping
from typing import get_args

import pytest

from balancer.config import Config, Key, Secret, load, settings
from balancer.core.strategy import STRATEGIES


def test_a_secret_shows_only_when_asked() -> None:
    """Neither printing nor formatting nor a traceback's repr gives it away."""
    secret = Secret("hunter2")
    assert f"{secret} {secret!r} {[secret]}" == "*** *** [***]"
    assert secret.reveal() == "hunter2"
    assert secret == Secret("hunter2") != Secret("other")


def test_a_key_does_not_show_its_hash() -> None:
    """A weak key could be found from it."""
    assert "abc" not in repr(Key("ops", b"abc", "admin"))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_settings_cannot_be_changed(name: str) -> None:
    """A reload swaps the whole."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(load("", {}), name, None)


def test_the_strategies_are_those_there_are() -> None:
    """They are written twice, so that reading a file does not import every one of them."""
    assert get_args(settings.Strategy) == STRATEGIES


def test_all_settings_have_slots() -> None:
    """A misspelt attribute cannot appear."""
    kinds = [k for k in vars(settings).values() if dataclasses.is_dataclass(k)]
    assert len(kinds) > 15
    assert all("__slots__" in vars(kind) for kind in kinds)


def everything_in(value: object) -> Iterator[object]:
    """Yield a value and all it holds."""
    yield value
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from everything_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from (part for pair in value.items() for part in everything_in(pair))
    elif isinstance(value, list | tuple):
        yield from (part for item in value for part in everything_in(item))


def test_a_loaded_configuration_holds_nothing_of_the_libraries() -> None:
    """What runs inside is plain; pydantic and YAML stay at the edge."""
    text = "backends: [{url: 'https://a', auth: {type: bearer, token: x}, timeouts: {load: 1m}}]"
    config = load(text, {"BALANCER_API_KEY": "k" * 32})
    homes = {type(part).__module__.split(".")[0] for part in everything_in(config)}
    assert homes == {"balancer", "builtins", "ipaddress"}


def test_equality_is_about_settings_only() -> None:
    """Where a value came from makes no difference to what runs."""
    assert load("demo: {enabled: false}", {"BALANCER_X": "1"}) == load("", {})
    assert load("demo: {enabled: true}", {}) != load("", {})


def test_no_repr_of_a_configuration_holds_a_secret() -> None:
    """Configurations end up in debug logs."""
    text = """
auth: {keys: [{name: a, key: hunter2-hunter2-hunter2}]}
backends:
- {url: gpu1, headers: {X-Key: hunter2}, auth: {type: bearer, token: hunter2}}
- {url: gpu2, auth: {type: basic, username: me, password: hunter2}}
"""
    assert "hunter2" not in repr(load(text, {}))
