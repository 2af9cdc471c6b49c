from collections.abc import Mapping
from typing import Any

import pytest

from balancer.config import layers
from balancer.config.layers import Layers, lay


def lain(text: str = "", flags: Mapping[str, Any] | None = None, **env: str) -> Layers:
    """Lay the three over one another."""
    return lay(text, env, "c.yaml", flags or {})


def test_the_environment_wins_over_the_file_and_flags_over_both() -> None:
    """The nearer to the hand, the stronger."""
    text = "timeouts: {load: 1m, idle: 1m, connect: 1s}"
    env = {"BALANCER_TIMEOUTS__LOAD": "2m", "BALANCER_TIMEOUTS__IDLE": "2m"}
    result = lain(text, {"timeouts.load": "3m"}, **env)
    assert result.tree == {"timeouts": {"load": "3m", "idle": "2m", "connect": "1s"}}
    origins = [result.origin(("timeouts", key)) for key in ("load", "idle", "connect", "total")]
    assert origins == ["flag", "env:BALANCER_TIMEOUTS__IDLE", "file:1", None]


@pytest.mark.parametrize(
    ("name", "value", "tree"),
    [
        ("BALANCER_LISTEN", ":1", {"server": {"listen": ":1"}}),
        ("BALANCER_LOG_LEVEL", "debug", {"logging": {"level": "debug"}}),
        ("BALANCER_LOG_FORMAT", "json", {"logging": {"format": "json"}}),
        ("BALANCER_DEMO", "1", {"demo": {"enabled": "1"}}),
        ("BALANCER_BACKENDS", "a, b;c d", {"backends": [{"url": u} for u in "abcd"]}),
        ("BALANCER_BREAKER__HOST__IN_A_ROW", "5", {"breaker": {"host": {"in_a_row": "5"}}}),
        ("BALANCER_LISTEN", "", {}),
        ("BALANCER_CONFIG", "x.yaml", {}),
    ],
)
def test_variables_stand_for_settings(name: str, value: str, tree: object) -> None:
    """Short forms and the general one; an empty variable is unset, as compose files leave them."""
    result = lay("", {name: value}, "c.yaml", {})
    assert result.tree == tree
    assert result.warnings == []


@pytest.mark.parametrize("file", ["", "auth:", "auth: {keys: }", "auth: {keys: []}"])
def test_the_api_key_joins_the_files_keys(file: str) -> None:
    """It is one more admin key, called env."""
    result = lain(file, BALANCER_API_KEY="k")
    assert result.tree["auth"]["keys"] == [{"name": "env", "key": "k", "role": "admin"}]
    assert result.origin(("auth", "keys", 0, "name")) == "env:BALANCER_API_KEY"


def test_the_api_key_can_stand_in_a_file() -> None:
    """As Docker and Kubernetes hand out secrets."""
    result = lain(BALANCER_API_KEY_FILE="/run/key")
    assert result.tree["auth"]["keys"] == [{"name": "env", "key_file": "/run/key", "role": "admin"}]


def test_two_api_keys_are_one_too_many() -> None:
    """Which one counts would be a guess."""
    (problem,) = lain(BALANCER_API_KEY="k", BALANCER_API_KEY_FILE="/k").problems
    assert (
        str(problem) == "BALANCER_API_KEY BALANCER_API_KEY_FILE is set as well. Unset one of them."
    )


@pytest.mark.parametrize("file", ["auth: 5", "auth: {keys: 5}", "auth: []"])
def test_a_faulty_file_keeps_its_fault(file: str) -> None:
    """A variable must not hide it."""
    before = lain(file).tree
    assert lain(file, BALANCER_API_KEY="k", BALANCER_AUTH__ANONYMOUS="").tree == before


def test_a_variable_cannot_reach_into_a_plain_value() -> None:
    """The file's fault stays, and is told."""
    assert lain("timeouts: 5", BALANCER_TIMEOUTS__LOAD="1m").tree == {"timeouts": 5}


def test_an_unknown_variable_is_a_warning() -> None:
    """It may belong to somebody else; a near name is suggested."""
    (warning,) = lain(BALANCER_TIMEOUT__LOAD="1", OTHER="x").warnings
    assert warning == (
        "BALANCER_TIMEOUT__LOAD is not a setting and was ignored. "
        'Did you mean "BALANCER_TIMEOUTS__LOAD"?'
    )


def test_flags_that_were_not_given_change_nothing() -> None:
    """A command hands over all of its flags."""
    assert lain("demo: {enabled: true}", {"demo.enabled": None}).tree == {"demo": {"enabled": True}}


def test_backends_can_be_plain_addresses() -> None:
    """In the file, mixed with long ones, and from flags; marks stay with their items."""
    result = lain("backends:\n- gpu1\n- url: gpu2\n")
    assert result.tree == {"backends": [{"url": "gpu1"}, {"url": "gpu2"}]}
    assert result.origin(("backends", 0, "url")) == "file:2"
    assert result.origin(("backends", 0, "slots")) is None
    flags = lain("backends: [gpu1]", {"backends": ("gpu7",)})
    assert flags.tree == {"backends": [{"url": "gpu7"}]}
    assert flags.origin(("backends", 0, "url")) == "flag"


def test_a_problem_stands_at_the_value_or_its_key() -> None:
    """Unknown keys point to themselves, bad values to themselves, missing ones to the block."""
    result = lain("a:\n  b: 5\n")
    assert result.locate(("a", "b")) == ("c.yaml", 2, 6)
    assert result.locate(("a", "b"), key=True) == ("c.yaml", 2, 3)
    assert result.locate(("a", "c")) == ("c.yaml", 2, 3)
    assert result.locate(("a", "b", 7)) == ("c.yaml", 2, 6)


def test_what_stands_nowhere_has_no_line() -> None:
    """Without a file there is no line to name."""
    assert lain().locate(("a", "b")) == ("c.yaml", None, None)


def test_what_was_overridden_is_no_longer_at_fault() -> None:
    """A problem with the winning value points to where that came from."""
    result = lain("server: {listen: [x, y]}", BALANCER_LISTEN="z")
    assert result.locate(("server", "listen", 1)) == ("BALANCER_LISTEN", None, None)


def test_a_spoiled_value_is_known_until_overridden() -> None:
    """It was complained of once; that is enough."""
    text = "timeouts: {load: '${X}'}"
    path = ("timeouts", "load")
    assert lain(text).is_spoiled(path)
    assert not lain(text, BALANCER_TIMEOUTS__LOAD="1m").is_spoiled(path)


@pytest.mark.parametrize("text", ["[a, b]", "hello", "5"])
def test_a_file_is_a_block_of_keys(text: str) -> None:
    """Anything else is told at the first line."""
    (problem,) = lain(text).problems
    assert str(problem) == "c.yaml:1:1 needs keys such as backends: at the top."


def test_flags_are_told_from_variables() -> None:
    """`config show --origin` says which of the two it was."""
    result = lain("", {"demo.enabled": True})
    assert result.locate(("demo", "enabled")) == (layers.FLAG, None, None)


@pytest.mark.parametrize(
    ("text", "env", "origins", "origin"),
    [
        ("", {}, "http://o", "env:OLLAMA_ORIGINS"),
        ("cors:", {}, "http://o", "env:OLLAMA_ORIGINS"),
        ("cors: {allow_origins: []}", {}, "http://o", "env:OLLAMA_ORIGINS"),
        ("cors: {allow_origins: [http://f]}", {}, ["http://f"], "file:1"),
        ("", {"BALANCER_CORS__ALLOW_ORIGINS": "x"}, "x", "env:BALANCER_CORS__ALLOW_ORIGINS"),
    ],
)
def test_ollamas_origins_count_where_ours_name_none(
    text: str, env: dict[str, str], origins: object, origin: str
) -> None:
    """The variable may be meant for an Ollama beside us: what is said to us is stronger."""
    result = lain(text, None, OLLAMA_ORIGINS="http://o", **env)
    assert result.tree["cors"]["allow_origins"] == origins
    assert result.origin(("cors", "allow_origins")) == origin
    assert result.warnings == []


def test_a_cors_that_is_no_block_is_left_to_be_told() -> None:
    """One fault is one problem."""
    assert lain("cors: 7", OLLAMA_ORIGINS="http://o").tree == {"cors": 7}
