"""Model names as Ollama reads them."""

import pytest

from balancer.sim.names import BadNameError, parse


@pytest.mark.parametrize(
    "text",
    [
        "llama3.2",
        "Llama3.2",
        " llama3.2:latest ",
        "library/llama3.2",
        "https://registry.ollama.ai/library/llama3.2:LATEST",
        "llama3.2:local",
    ],
)
def test_spellings_of_one_model(text: str) -> None:
    """Defaults, case, a scheme and blanks around do not make another model."""
    assert parse(text).key == "registry.ollama.ai/library/llama3.2:latest"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("m", "m:latest"),
        ("ns/m:Q4", "ns/m:Q4"),
        ("hf.co/ns/repo:Q4_K_M", "hf.co/ns/repo:Q4_K_M"),
        ("example.com:5000/ns/m", "example.com:5000/ns/m:latest"),
        ("LIBRARY/M", "M:latest"),
    ],
)
def test_lists_print_the_shortest(text: str, short: str) -> None:
    """Default host and namespace are dropped, the tag never."""
    assert parse(text).shortest == short


@pytest.mark.parametrize(
    ("text", "source", "short"),
    [
        ("kimi:cloud", "cloud", "kimi:latest"),
        ("gpt-oss:120b-cloud", "cloud", "gpt-oss:120b"),
        ("gpt-oss:120b:CLOUD", "cloud", "gpt-oss:120b"),
        ("x:local", "local", "x:latest"),
        ("my-cloud", "", "my-cloud:latest"),
    ],
)
def test_the_last_word_may_say_where(text: str, source: str, short: str) -> None:
    """A suffix after the colon, not a name that merely ends so."""
    name = parse(text)
    assert (name.source, name.shortest) == (source, short)


@pytest.mark.parametrize(
    "text", ["m:", ":x", "a@sha256", "a b", ".m", "n.s/m", "a/b/c/d", "x" * 81]
)
def test_what_is_no_name(text: str) -> None:
    """Empty parts, odd signs, parts too many or too long."""
    with pytest.raises(BadNameError):
        parse(text)
