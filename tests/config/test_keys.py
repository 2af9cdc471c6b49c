import hashlib
from collections.abc import Callable

import pytest

from balancer.config import Config, Key, load

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
    ],
)
def test_a_bad_line_is_named_but_not_shown(faults: Faults, line: str) -> None:
    """Any of its words may be the key."""
    file = f"# keys\n{line}\n"
    told = faults("auth: {keys_file: /k}", read_file=lambda _: file)
    assert told == [
        "/k:2:1 needs NAME ROLE KEY or NAME ROLE sha256:HEX, where ROLE is user or admin."
    ]


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
