from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from balancer.config import kinds
from balancer.config.addresses import EVERYWHERE, LOOPBACK

DIGEST = "0123456789abcdef" * 4
ALL = [kind for kind in vars(kinds).values() if hasattr(kind, "__metadata__")]


def read(kind: Any, value: object) -> Any:
    """Read a value the way the schema does."""
    return TypeAdapter(kind).validate_python(value)


def written(kind: Any, value: object) -> Any:
    """Read a value and write it again."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    return adapter.dump_python(adapter.validate_python(value), mode="json")


def refusal(kind: Any, value: object) -> str:
    """Return why a value is refused."""
    with pytest.raises(ValidationError) as refused:
        read(kind, value)
    (error,) = refused.value.errors()
    return str(error["ctx"]["error"])


@pytest.mark.parametrize("value", [True, "true", "YES", "on", "1", 1])
def test_flags_have_the_usual_words(value: object) -> None:
    """The environment has no booleans."""
    assert read(kinds.Flag, value) is True


def test_other_words_are_no_flags() -> None:
    """A typo must not turn something off."""
    assert refusal(kinds.Flag, "ture") == '"ture" is not true or false.'


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, "one", None, "9" * 5000, 10**9])
def test_counts_are_whole_and_positive(value: object) -> None:
    """True is no 1 here, and nothing overflows."""
    assert "is not a whole number of at least 1" in refusal(kinds.Count, value)


def test_texts_are_never_echoed() -> None:
    """A number where a secret belongs may be the secret."""
    assert refusal(kinds.Text, 12345) == "needs text. Put the value in quotes."
    assert refusal(kinds.SecretOrNull, 12345) == "needs text. Put the value in quotes."
    assert "hunter2" not in refusal(kinds.SecretOrNull, "hunter2\nx")
    assert "hunter2" not in refusal(kinds.Hash, "hunter2")


@pytest.mark.parametrize("value", ["", "  "])
def test_empty_texts_are_refused(value: str) -> None:
    """An empty file name or key is a slip, mostly of a variable."""
    assert refusal(kinds.TextOrNull, value) == "is empty."


def test_halves_of_characters_are_refused() -> None:
    """Bytes in the environment that are no UTF-8 arrive so; nothing could write them."""
    assert "not text" in refusal(kinds.Text, "a\udcff")


@pytest.mark.parametrize(
    "value", ["a,b", "a b", "a; b", ["a", "b"], ("a", "b"), " a , b "], ids=str
)
def test_lists_of_words_can_be_one_text(value: object) -> None:
    """In the environment there are only texts."""
    assert read(kinds.Words, value) == ("a", "b")


@pytest.mark.parametrize("value", [5, {"a": 1}, True])
def test_lists_are_lists(value: object) -> None:
    """The advice shows one."""
    assert refusal(kinds.Words, value) == "needs a list, such as [a, b]."


def test_choices_suggest_the_nearest() -> None:
    """All choices are listed as well."""
    assert refusal(kinds.OneStrategy, "least-load") == (
        '"least-load" is not one of plan, least-loaded, warm-first, round-robin. '
        'Did you mean "least-loaded"?'
    )
    assert read(kinds.OneLogLevel, "WARN") == read(kinds.OneLogLevel, "warning") == "warning"


@pytest.mark.parametrize(("value", "slots"), [("auto", None), (None, None), (4, 4), ("4", 4)])
def test_slots_are_learned_or_counted(value: object, slots: int | None) -> None:
    """None stands for learned."""
    assert read(kinds.Slots, value) == slots


def test_other_slots_are_refused() -> None:
    """A backend without slots is one that is not enabled."""
    assert refusal(kinds.Slots, 0) == "0 is neither auto nor a number of slots."


@pytest.mark.parametrize("value", ["min", "max", "0.33.0", "0.33.0-rc2"])
def test_versions_told_to_clients(value: str) -> None:
    """Extremes or a fixed one."""
    assert read(kinds.ModelVersion, value) == value


@pytest.mark.parametrize("value", [0.33, "minimum", None])
def test_other_versions_are_refused(value: object) -> None:
    """0.33 without quotes is a number, and 0.30 would be 0.3."""
    assert 'such as "0.33.0"' in refusal(kinds.ModelVersion, value)


@pytest.mark.parametrize(
    ("value", "fault"), [("gpu1:99999", "is not a port"), ("gpu1:0", "port 0 cannot be called")]
)
def test_a_backends_port_must_be_one(value: str, fault: str) -> None:
    """Ollama would use another port than written; in a list of backends that is a fault."""
    assert fault in refusal(kinds.Url, value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "-a", "x" * 65, "a\n"])
def test_names_fit_urls_headers_and_labels(name: str) -> None:
    """A name appears in all of them."""
    refusal(kinds.Name, name)


def test_anonymous_callers_are_networks() -> None:
    """Each word is a list of networks, so that there is one rule to apply."""
    assert read(kinds.Anonymous, "never") == ()
    assert read(kinds.Anonymous, "loopback") == LOOPBACK
    assert read(kinds.Anonymous, "always") == EVERYWHERE
    assert [str(n) for n in read(kinds.Anonymous, "10.0.0.0/8, ::1")] == ["10.0.0.0/8", "::1/128"]


def test_anonymous_is_written_as_read() -> None:
    """The words come back."""
    for word in ("never", "loopback", "always"):
        assert written(kinds.Anonymous, word) == word
    assert written(kinds.Anonymous, ["10.0.0.0/8"]) == ["10.0.0.0/8"]


def test_anonymous_says_what_can_be_written() -> None:
    """Words and networks share a key."""
    assert refusal(kinds.Anonymous, "alway").endswith(
        'Or write never, loopback or always. Did you mean "always"?'
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "x"},
        {"content-length": "1"},
        {"a b": "x"},
        {"X": "a\r\nb"},
        {"X": 5},
        {"X": "1", "x": "2"},
        ["X"],
    ],
    ids=str,
)
def test_headers_cannot_break_the_request(headers: object) -> None:
    """Framing is ours, and a value cannot start a new line."""
    refusal(kinds.Headers, headers)


@pytest.mark.parametrize(
    ("value", "aliases"),
    [
        (None, ()),
        ({}, ()),
        ({"gpt-4o-mini": "llama3.2"}, (("gpt-4o-mini", ("llama3.2",)),)),
        ({"fast": ["qwen3:8b", "m"], "b": "fast"}, (("fast", ("qwen3:8b", "m")), ("b", ("fast",)))),
        ("a=m:1, b=n,a=hf.co/x/y:Q4", (("a", ("m:1", "hf.co/x/y:Q4")), ("b", ("n",)))),
    ],
)
def test_aliases_stand_for_one_model_or_several(value: object, aliases: object) -> None:
    """A block in the file; pairs in the environment, a name with several models repeated."""
    assert read(kinds.ModelAliases, value) == aliases


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["a"], "needs a block of NAME: MODEL"),
        ({"a": 5}, "needs a list"),
        ({"a": "a"}, "a → a is a circle"),
        ({"a": []}, "a stands for nothing"),
        ({"a": "m x/"}, "is not the name of a model"),
        ("a", "is empty"),
        ({"a": "m", "A:latest": "m"}, "are one name"),
    ],
)
def test_aliases_that_cannot_serve_are_refused(value: object, text: str) -> None:
    """Circles, doubles, what is no name: told when the file is read, not when a client calls."""
    assert text in refusal(kinds.ModelAliases, value)


def test_aliases_are_written_as_people_write_them() -> None:
    """One model stands alone, several in a list."""
    value = {"a": "m", "b": ["m", "n"]}
    assert written(kinds.ModelAliases, {"a": ["m"], "b": ["m", "n"]}) == value


def test_no_headers_can_be_null() -> None:
    """As for every block."""
    assert read(kinds.Headers, None) == ()


def test_header_values_are_masked_when_written() -> None:
    """They are mostly keys."""
    assert written(kinds.Headers, {"X-Key": "hunter2"}) == {"X-Key": "***"}


@pytest.mark.parametrize("kind", [kinds.SecretOrNull, kinds.Hash])
def test_secrets_are_masked_when_written(kind: Any) -> None:
    """Null stays null, so that one sees which is set."""
    assert written(kind, DIGEST) == "***"
    assert written(kind, None) is None


@pytest.mark.parametrize("text", [DIGEST, f"sha256:{DIGEST}", f"sha256:{DIGEST.upper()}"])
def test_hashes_are_hexadecimal(text: str) -> None:
    """With or without the name of the method."""
    assert read(kinds.Hash, text) == bytes.fromhex(DIGEST)


def test_there_is_no_other_admin_listener() -> None:
    """Until there is one, an address there must not be accepted and ignored."""
    assert read(kinds.Nothing, None) is None
    assert "server.listen" in refusal(kinds.Nothing, "127.0.0.1:1")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


@settings(deadline=None)
@given(st.sampled_from(ALL), ANYTHING)
def test_no_kind_raises_anything_but_a_refusal(kind: Any, value: object) -> None:
    """Whatever YAML can hold is read, and can be written, or is refused with advice."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        result = adapter.validate_python(value)
    except ValidationError as refused:
        assert {error["type"] for error in refused.errors()} == {"value_error"}  # noqa: PT017 - a refusal is one of two good ends
        return
    adapter.dump_json(result)
