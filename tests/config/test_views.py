import pytest
import yaml

from balancer.config import Difference, diff, effective, load, to_yaml

TEXT = """\
timeouts: {idle: 90s}
backends:
- {name: a, url: gpu1, auth: {type: bearer, token: hunter2}, headers: {X-Key: hunter2}}
- {name: b, url: gpu2, timeouts: {load: 20m}}
auth:
  keys: [{name: ops, role: admin, key: hunter2-hunter2-hunter2}]
"""


def test_every_value_in_force_is_listed_with_its_origin() -> None:
    """File, variable, flag or default."""
    config = load(TEXT, {"BALANCER_TIMEOUTS__LOAD": "15m"}, overrides={"demo.enabled": True})
    shown = {setting.path: (setting.value, setting.origin) for setting in effective(config)}
    assert shown["timeouts.idle"] == ("1m30s", "file:1")
    assert shown["timeouts.load"] == ("15m", "env:BALANCER_TIMEOUTS__LOAD")
    assert shown["timeouts.total"] == ("-1", "default")
    assert shown["demo.enabled"] == ("true", "flag")
    assert shown["server.listen"] == ('["127.0.0.1:11435"]', "default")
    assert shown["backends[0].url"] == ("http://gpu1:11434", "file:3")
    assert shown["backends[1].timeouts.load"] == ("20m", "file:4")
    assert shown["backends[1].slots"] == ("auto", "default")
    assert shown["admin.listen"] == ("null", "default")


def test_secrets_are_masked_in_all_views() -> None:
    """They are made to be shown and pasted."""
    config = load(TEXT, {})
    shown = {setting.path: setting.value for setting in effective(config)}
    assert shown["auth.keys[0].key"] == "***"
    assert shown["backends[0].auth.token"] == "***"
    assert shown["backends[0].headers.X-Key"] == "***"
    assert "hunter2" not in f"{shown} {to_yaml(config)}"


def test_the_written_configuration_loads_to_the_same() -> None:
    """Without secrets, what is shown is what is used."""
    text = "backends: [gpu1, {url: 'https://gpu2/x', slots: 2, timeouts: {idle: -1}}]\n"
    text += "auth: {anonymous: [10.0.0.0/8, 127.0.0.0/8]}\nserver: {listen: ':1'}\n"
    config = load(text, {})
    assert load(to_yaml(config), {}) == config


def test_a_derived_name_is_shown() -> None:
    """It is the name commands take."""
    (item,) = yaml.safe_load(to_yaml(load("backends: [gpu1]", {})))["backends"]
    assert (item["name"], item["url"]) == ("gpu1", "http://gpu1:11434")


def test_equal_configurations_do_not_differ() -> None:
    """Also when written in another way."""
    other = TEXT.replace("90s", "1.5m").replace("gpu2", "http://gpu2:11434")
    assert diff(load(TEXT, {}), load(other, {})) == Difference((), ())


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("idle: 90s", "idle: 91s", ("timeouts.idle",)),
        ("url: gpu1", "url: gpu3", ("backends[a].url",)),
        ("name: b", "name: c", ("backends[b]", "backends[c]")),
        ("token: hunter2", "token: other", ("backends[a].auth",)),
        ("X-Key: hunter2", "X-Key: other", ("backends[a].headers",)),
        ("{load: 20m}", "{idle: 20m}", ("backends[b].timeouts.idle", "backends[b].timeouts.load")),
        ("{load: 20m}", "{}", ("backends[b].timeouts", "backends[b].timeouts.load")),
        ("key: hunter2-hunter2-hunter2", "key: other-other-other-other", ("auth.keys",)),
        ("role: admin", "role: user", ("auth.keys",)),
    ],
)
def test_what_changed_is_named(old: str, new: str, changed: tuple[str, ...]) -> None:
    """Backends by name, secrets too, each once."""
    assert old in TEXT
    difference = diff(load(TEXT, {}), load(TEXT.replace(old, new), {}))
    assert difference == Difference(changed, ())


def test_a_secret_changed_behind_its_file_is_a_change() -> None:
    """Rotating a token needs only a reload."""
    text = "backends: [{name: a, url: g, auth: {type: bearer, token_file: /t}}]"
    old = load(text, {}, read_file=lambda _: "one")
    new = load(text, {}, read_file=lambda _: "two")
    assert diff(old, new).changed == ("backends[a].auth",)


def test_only_what_is_made_once_needs_a_restart() -> None:
    """All else is swapped in place."""
    difference = diff(load("", {}), load("server: {listen: '127.0.0.1:1', max_body: 1MiB}", {}))
    assert difference == Difference(("server.listen", "server.max_body"), ("server.listen",))
