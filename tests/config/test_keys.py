import hashlib
from collections.abc import Callable

import pytest

from balancer.config import Config, Key, Limits, load
from balancer.config.keys import key_places

Faults = Callable[..., list[str]]

LONG = "k" * 32
DIGEST = hashlib.sha256(LONG.encode()).digest()


def loaded(text: str, env: dict[str, str] | None = None, **files: str) -> Config:
    """Load a configuration with some files."""
    return load(text, env or {}, read_file=lambda path: files[path.strip("/")])


@pytest.mark.parametrize("item", [f"key: {LONG}", "key_file: /k", f"hash: 'sha256:{DIGEST.hex()}'"])
def test_a_key_is_kept_as_its_hash(item: str) -> None:
    """Given in clear, by file or hashed already: the result is the same."""
    config = loaded(f"auth: {{keys: [{{name: web, {item}}}]}}", k=f"{LONG}\n")
    assert config.auth.keys == (Key("web", DIGEST, "user"),)
    assert config.warnings == ()


@pytest.mark.parametrize(("name", "value"), [("", LONG), ("_FILE", "/k")])
def test_the_environments_key_is_an_admin(name: str, value: str) -> None:
    """One variable is enough to run safely."""
    config = loaded("", {f"BALANCER_API_KEY{name}": value}, k=LONG)
    assert config.auth.keys == (Key("env", DIGEST, "admin"),)


def test_keys_come_from_a_file_of_their_own() -> None:
    """Clear or hashed, with comments; the path is kept for who writes to it."""
    file = f"# name role key\n\nweb user {LONG}\n  ops admin sha256:{'ab' * 32}\n"
    config = loaded("auth: {keys_file: /k}", k=file)
    assert config.auth.keys == (
        Key("web", DIGEST, "user"),
        Key("ops", bytes.fromhex("ab" * 32), "admin"),
    )
    assert config.auth.keys_file == "/k"


@pytest.mark.parametrize(
    "line",
    [
        "hunter2-hunter2",
        "web hunter2-hunter2 user",
        "web user",
        "web user hunter2 more",
        "web user sha256:hunter2",
        "hünter2 user x",
        "web user hünter2-hunter2",
        "web user hunter2 models=",
        "web user hunter2 models=a models=b",
        "web user hunter2 expires=soon",
        "web user hunter2 key=more",
        "web user hunter2 hash=sha256:00",
    ],
)
def test_a_bad_line_is_named_but_not_shown(faults: Faults, line: str) -> None:
    """Any of its words may be the key."""
    file = f"# keys\n{line}\n"
    told = faults("auth: {keys_file: /k}", read_file=lambda _: file)
    where = (
        "where ROLE is user or admin, then models=GLOB,GLOB, expires=DATE, priority=N and limits "
        "such as rpm=N if wanted."
    )
    assert told == [f"/k:2:1 needs NAME ROLE KEY or NAME ROLE sha256:HEX, {where}"]


def test_a_missing_keys_file_is_a_fault(faults: Faults) -> None:
    """Running on without its keys would lock everybody out."""
    (told,) = faults("auth: {keys_file: /k}")
    assert 'auth.keys_file: cannot read "/k"' in told


def test_names_and_keys_are_unique_over_all_places(faults: Faults) -> None:
    """Whose call it was must be certain."""
    text = f"auth:\n  keys_file: /k\n  keys:\n  - {{name: a, key: {LONG}}}\n"
    file = f"a user {LONG}x\nb user {LONG}\n"
    assert faults(text, read_file=lambda _: file) == [
        '/k:1:1 duplicate name "a" (first at line 4).',
        '/k:2:1 the same key as "a".',
    ]


@pytest.mark.parametrize(
    "item", ["role: user", f"key: a, hash: {DIGEST.hex()}", "key: a, key_file: b"]
)
def test_a_key_has_exactly_one_source(faults: Faults, item: str) -> None:
    """None is no key, two may differ."""
    (told,) = faults(f"auth: {{keys: [{{name: web, {item}}}]}}")
    assert told == "config.yaml:1:15 auth.keys[0]: needs exactly one of hash, key, key_file."


def test_a_missing_key_file_is_a_fault(faults: Faults) -> None:
    """The other keys are still checked."""
    told = faults(
        f"auth: {{keys: [{{name: a, key_file: /k}}, {{name: b, key: {LONG}}},"
        f" {{name: b, hash: {'ab' * 32}}}]}}"
    )
    assert len(told) == 2
    assert 'auth.keys[0].key_file: cannot read "/k"' in told[0]
    assert 'duplicate name "b"' in told[1]


def test_keys_fit_into_a_header(faults: Faults) -> None:
    """A key with a space could never be sent."""
    (told,) = faults("auth: {keys: [{name: web, key: hunter2 hunter2}]}")
    assert told == "config.yaml:1:15 auth.keys[0]: a key is printable ASCII without spaces."


def test_a_short_key_is_warned_of_but_not_shown() -> None:
    """It can be found by trying."""
    (warning,) = loaded("", {"BALANCER_API_KEY": "hunter2"}).warnings
    assert 'API key "env" has only 7 characters' in warning
    assert "hunter2" not in warning


ENDS = 1_830_297_600.0  # when 2027-12-31 is over


def test_what_a_key_may_stands_with_it() -> None:
    """In either place the same words mean the same."""
    listed = loaded(
        f"auth: {{keys: [{{name: web, key: {LONG}, models: [a, 'b*'], expires: 2027-12-31}}]}}"
    )
    filed = loaded("auth: {keys_file: /k}", k=f"web user {LONG} models=a,b* expires=2027-12-31")
    expected = Key("web", DIGEST, "user", ("a", "b*"), ENDS)
    assert listed.auth.keys == filed.auth.keys == (expected,)
    assert listed.written["auth"]["keys"] == [
        {
            "name": "web",
            "key": "***",
            "role": "user",
            "models": ["a", "b*"],
            "expires": "2028-01-01T00:00:00Z",
        }
    ]


def test_a_key_for_no_model_at_all_is_a_fault(faults: Faults) -> None:
    """It could not be used; who means every model says nothing, or an asterisk."""
    (told,) = faults(f"auth: {{keys: [{{name: web, key: {LONG}, models: []}}]}}")
    assert "auth.keys[0].models: needs at least one" in told


@pytest.mark.parametrize(
    ("text", "env", "file", "elsewhere"),
    [
        ("auth: {keys_file: /k}", {}, "/k", []),
        ("auth: {keys_file: '${DIR}/k'}\nnope: 1", {"DIR": "/d"}, "/d/k", []),
        ("", {"BALANCER_AUTH__KEYS_FILE": "/e"}, "/e", []),
        (f"auth: {{keys: [{{name: web, key: {LONG}}}, 7]}}", {}, None, ["web"]),
        ("", {"BALANCER_API_KEY": LONG}, None, ["env"]),
        ("auth: 7", {}, None, []),
        ("auth: {keys_file: 7, keys: 8}", {}, None, []),
        ("]", {}, None, []),
    ],
)
def test_where_keys_stand_is_known_without_reading_them(
    text: str, env: dict[str, str], file: str | None, elsewhere: list[str]
) -> None:
    """Also of a configuration that is no good (yet): the file may be what it lacks."""
    assert key_places(text, env, "c.yaml") == (file, elsewhere)


def test_the_environments_key_may_be_a_known_one(faults: Faults) -> None:
    """Commands send it, and read the configuration; with another role it is a contradiction."""
    env = {"BALANCER_API_KEY": LONG}
    config = loaded("auth: {keys_file: /k}", env, k=f"ops admin {LONG}")
    assert config.auth.keys == (Key("ops", DIGEST, "admin"),)
    (told,) = faults("auth: {keys_file: /k}", env, read_file=lambda _: f"web user {LONG}")
    assert told == '/k:1:1 the same key as "env".'
    again = f"auth: {{keys: [{{name: a, key: {LONG}}}, {{name: b, key: {LONG}}}]}}"
    assert len(faults(again)) == 1


def test_a_key_may_have_a_priority_and_limits() -> None:
    """In the configuration or in a line of the file; a word is the number behind it."""
    more = "priority: batch, rpm: 60, tokens_per_minute: -1, slots: 2"
    text = f"auth: {{keys_file: /k, keys: [{{name: a, key: {LONG}, {more}}}]}}\n"
    text += "queue: {priorities: {batch: 7}}"
    config = loaded(text, k=f"b user {LONG}x priority=60 max_num_predict=100 rpm=-1\n")
    assert [(key.name, key.priority, key.limits) for key in config.auth.keys] == [
        ("a", 7, Limits(rpm=60, tokens_per_minute=-1, slots=2)),
        ("b", 60, Limits(rpm=-1, max_num_predict=100)),
    ]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("rpm: 0", "0 is not a whole number of at least 1, nor -1 for no limit."),
        ("slots: many", '"many" is not a whole number of at least 1, nor -1 for no limit.'),
        ("priority: urgent", '"urgent" is neither interactive, batch, nor a number of at least 0.'),
        ("priority: -3", "-3 is neither interactive, batch, nor a number of at least 0."),
    ],
)
def test_what_is_no_limit_or_priority(faults: Faults, more: str, text: str) -> None:
    """One fault, where it stands."""
    (told,) = faults(f"auth: {{keys: [{{name: a, key: {LONG}, {more}}}]}}")
    assert told.endswith(text)


@pytest.mark.parametrize("more", ["rpm=0", "priority=urgent", "slots=1 slots=2", "weight=3"])
def test_a_line_with_a_bad_limit_is_no_line(faults: Faults, more: str) -> None:
    """Told without its words, of which one is the key."""
    (told,) = faults("auth: {keys_file: /k}", read_file=lambda _: f"a user {LONG} {more}\n")
    assert told.startswith("/k:1:1 needs NAME ROLE KEY")
    assert LONG not in told
