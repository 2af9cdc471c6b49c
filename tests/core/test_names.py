"""Model names as Ollama reads and prints them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.names import InvalidName, closest, covered, display, matches, parse, quoted

LIBRARY = "registry.ollama.ai/library"


@pytest.mark.parametrize(
    ("text", "canonical", "display"),
    [
        ("llama3.2", f"{LIBRARY}/llama3.2:latest", "llama3.2:latest"),
        ("Llama3.2:1B", f"{LIBRARY}/llama3.2:1b", "Llama3.2:1B"),
        ("  m\n", f"{LIBRARY}/m:latest", "m:latest"),
        ("\u2003m\u00a0", f"{LIBRARY}/m:latest", "m:latest"),
        ("library/m", f"{LIBRARY}/m:latest", "m:latest"),
        ("Registry.Ollama.AI/Library/m:LATEST", f"{LIBRARY}/m:latest", "m:LATEST"),
        ("ns/m:tag", "registry.ollama.ai/ns/m:tag", "ns/m:tag"),
        ("hf.co/NS/repo:Q4_K_M", "hf.co/ns/repo:q4_k_m", "hf.co/NS/repo:Q4_K_M"),
        ("hf.co/library/m", "hf.co/library/m:latest", "hf.co/library/m:latest"),
        ("reg.example:5000/ns/m", "reg.example:5000/ns/m:latest", "reg.example:5000/ns/m:latest"),
        ("http://reg:80/ns/m:t", "reg:80/ns/m:t", "reg:80/ns/m:t"),
        ("http:///ns/m", "registry.ollama.ai/ns/m:latest", "ns/m:latest"),
        ("x:local", f"{LIBRARY}/x:latest", "x:latest"),
        ("x:1b:LOCAL", f"{LIBRARY}/x:1b", "x:1b"),
        ("_", f"{LIBRARY}/_:latest", "_:latest"),
        ("n" * 80, f"{LIBRARY}/{'n' * 80}:latest", f"{'n' * 80}:latest"),
        ("h" * 350 + "/n/m", f"{'h' * 350}/n/m:latest", f"{'h' * 350}/n/m:latest"),
    ],
)
def test_names_are_read_and_printed_as_ollama_does(text: str, canonical: str, display: str) -> None:
    """Defaults, host ports, schemes, white space and letter case come out as in Ollama."""
    name = parse(text)
    assert (name.canonical, name.display, name.cloud) == (canonical, display, False)


@pytest.mark.parametrize(
    "text",
    [
        *("m:", ":t", "/m", "ns/", "//m", "a//m", "a/b/c/d", "m@sha256:ab", "m m", ".m", "-m"),
        *("a.b/m", "a:b/m", "m:t:u", "http://m", "é", "\u212a", "m\x1c", "n" * 81, ":cloud"),
        *("a :cloud", "m:-cloud", f"{'h' * 351}/n/m", f"m{' ' * 2000}", f"{'s' * 2000}://h/n/m"),
    ],
)
def test_what_breaks_the_grammar_is_no_name(text: str) -> None:
    """Empty, overlong or foreign parts are refused with Ollama's text."""
    with pytest.raises(InvalidName, match=r"\Ainvalid model name\Z"):
        parse(text)


@pytest.mark.parametrize("text", ["", " ", "\t\n\u3000"])
def test_nothing_is_told_apart_from_nonsense(text: str) -> None:
    """An empty name has its own text, since routes answer it differently."""
    with pytest.raises(InvalidName, match=r"\Amodel is required\Z"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "display"),
    [
        ("kimi-k3:cloud", "kimi-k3:cloud"),
        ("kimi-k3:latest:cloud", "kimi-k3:cloud"),
        ("gpt-oss:120b-cloud", "gpt-oss:120b-cloud"),
        ("gpt-oss:120b:Cloud", "gpt-oss:120b-cloud"),
        ("gpt-oss:120b: cloud", "gpt-oss:120b-cloud"),
    ],
)
def test_a_cloud_model_is_not_the_local_one(text: str, display: str) -> None:
    """Each spelling of a cloud name is one name, spelled like its stub, apart from the local."""
    name = parse(text)
    assert name.cloud
    assert name.display == display
    assert name.canonical == parse(display).canonical == f"{LIBRARY}/{display}"


def test_a_cloud_suffix_needs_a_tag_of_its_own() -> None:
    """A model may be called something-cloud, and a host's port may stand before one."""
    assert not parse("my-cloud").cloud
    assert not parse("reg:5000/ns/m-cloud").cloud


@pytest.mark.parametrize("text", ["a:cloud:local", "a:local:cloud", " a:b-cloud:local "])
def test_two_sources_are_refused(text: str) -> None:
    """The text repeats the name, trimmed and quoted."""
    with pytest.raises(InvalidName) as refused:
        parse(text)
    assert str(refused.value) == f'use either :local or :cloud, not both: "{text.strip()}"'


PARTS = st.sampled_from(
    ["a", "B2", "x.y", ":", "/", "://", "cloud", "-cloud", ":Local", "latest", " ", "-", "hf.co"]
)


@given(st.lists(PARTS, max_size=8).map("".join))
def test_printing_and_reading_agree(text: str) -> None:
    """Whatever is a name stays the same name when it is printed and read again."""
    try:
        name = parse(text)
    except InvalidName:
        return
    assert parse(name.display).canonical == name.canonical
    assert display(name.canonical) == name.display.lower()
    assert parse(name.canonical).canonical == name.canonical
    assert parse(text.swapcase()).canonical == name.canonical


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("*", "hf.co/a/b:c", True),
        ("llama3.2", "llama3.2", True),
        ("llama3.2", "llama3.2:1b", False),
        ("llama3.?", "llama3.2", True),
        ("llama3*", "llama3.2:70b", True),
        ("LLAMA3*", "Llama3.2:70b", True),
        ("*:70b", "ns/llama3.2:70B", True),
        ("*:70b", "llama3.2:7b", False),
        ("hf.co/*", "hf.co/ns/m:q4", True),
        ("hf.co/*", "huggingface.co/ns/m:q4", False),
        ("library/llama3.2", "llama3.2", True),
        ("registry.ollama.ai/library/*", "llama3.2:1b", True),
        ("ns/*", "other/m", False),
        ("reg:5000/*", "reg:5000/ns/m", True),
        ("reg:5000/ns/m", "reg:5000/ns/m", True),
        ("reg:5000/ns/m", "reg:5000/ns/m:1b", False),
        ("llama3.2", "llama3.2:local", True),
        ("kimi*", "kimi-k3:cloud", True),
        ("*cloud", "gpt-oss:120b:cloud", True),
        ("gpt-oss:120b", "gpt-oss:120b-cloud", False),
    ],
)
def test_globs(glob: str, name: str, expected: bool) -> None:
    """A glob without a tag means latest, wildcards run over separators, case does not count."""
    assert matches(glob, parse(name)) is expected


KNOWN = ["llama3.2:1b", "llama3.2:latest", "llama3.1:latest", "qwen3:0.6b", "hf.co/ns/repo:q4"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3.2:3b", "llama3.2:1b"),
        ("Lama3.2", "llama3.2:latest"),
        ("qwen3", "qwen3:0.6b"),
        ("qwem3:0.6b", "qwen3:0.6b"),
        ("hf.co/ns/repp", "hf.co/ns/repo:q4"),
        ("mistral", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_a_suggestion_looks_at_the_model_before_the_tag(name: str, expected: str | None) -> None:
    """The nearest model wins, then its nearest tag; what is far from all gets none."""
    assert closest(name, KNOWN) == expected


def test_no_suggestion_without_models() -> None:
    """An empty pool suggests nothing."""
    assert closest("m", []) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a"b\\', r'"a\"b\\"'),
        ("é\n\x1f\x7f", r'"é\n\x1f\x7f"'),
        ("\u00a0\U000e0001", r'"\u00a0\U000e0001"'),
    ],
)
def test_quoting_is_gos(text: str, expected: str) -> None:
    """Quotes, controls and what cannot be printed are escaped as Go does."""
    assert quoted(text) == expected


@pytest.mark.parametrize(
    ("globs", "name", "may"),
    [
        (("*",), "anything", True),
        (("llama3.2",), "llama3.2", True),
        (("llama3.2",), "LLAMA3.2:latest", True),
        (("llama3.2",), "library/llama3.2", True),
        (("llama3.2",), "registry.ollama.ai/library/llama3.2", True),
        (("llama3.2",), "llama3.2:1b", False),
        (("llama3.2",), "me/llama3.2", False),
        (("llama3.2",), "evil.example/library/llama3.2", False),
        (("llama3.2*",), "llama3.2:1b", True),
        (("a", "b"), "b", True),
        (("a", "b"), "c", False),
        (("gpt-oss",), "gpt-oss:cloud", False),
        (("gpt-oss",), "gpt-oss:local", True),
        ((), "a", False),
    ],
)
def test_globs_cover_a_model(globs: tuple[str, ...], name: str, *, may: bool) -> None:
    """However a model's name is spelled, it is the same model."""
    assert covered(globs, parse(name).canonical) is may
