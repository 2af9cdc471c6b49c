"""Which hosts are looked for, and how those that are found join those that are written."""

from __future__ import annotations

import pytest

from balancer.config import LOCAL_PORT, Candidate, Config, join, load, places, port_ranges
from balancer.config.addresses import parse_ollama_host
from balancer.config.discovery import _name
from tests.config.conftest import Faults

LOCAL = ("http://127.0.0.1:11434", "http://[::1]:11434", "http://127.0.0.1:11440")


def tried(env: dict[str, str], text: str = "", sources: str = "env") -> list[str]:
    """The addresses of the candidates."""
    config = load(text, {"BALANCER_DISCOVER": sources, **env})
    return [one.url for one in config.discovery.candidates]


def warnings(env: dict[str, str]) -> tuple[str, ...]:
    """What is said of the environment."""
    return load("", env).warnings


def names(config: Config) -> dict[str, str]:
    """Backends: name and address."""
    return {spec.name: spec.url.removeprefix("http://") for spec in config.backends}


# -- when --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "env", "flags", "sources"),
    [
        ("", {}, {}, ("env", "local")),
        ("backends: []", {}, {}, ("env", "local")),
        ("backends: [gpu1]", {}, {}, ()),
        ("", {"BALANCER_BACKENDS": "gpu1"}, {}, ()),
        ("", {}, {"backends": ["gpu1"]}, ()),
        ("backends: [gpu1]\ndiscovery: {sources: [local]}", {}, {}, ("local",)),
        ("backends: [gpu1]", {"BALANCER_DISCOVER": "local, env"}, {}, ("local", "env")),
        ("discovery: {sources: [env]}", {}, {"discovery.sources": ["none"]}, ()),
        ("discovery: {sources: [env]}", {}, {"discovery.sources": ["auto"]}, ("env", "local")),
        ("discovery: {sources: [env]}\ndemo: {enabled: true}", {}, {}, ()),
    ],
)
def test_named_backends_turn_it_off_unless_sources_are_named(
    text: str, env: dict[str, str], flags: dict[str, object], sources: tuple[str, ...]
) -> None:
    """Who names hosts means those; who names sources means them, too; a demo has only its own."""
    assert load(text, env, overrides=flags).discovery.sources == sources


def test_what_is_no_source_and_no_port_is_refused(faults: Faults) -> None:
    """With what there is."""
    (told,) = faults("discovery: {sources: [dns]}")
    assert '"dns" is not one of env, local.' in told
    for ports in ("[0]", "[70000]", "['11449-11440']", "[x]", "['1-2000']", "[true]", "-5"):
        assert len(faults(f"discovery: {{local: {{ports: {ports}}}}}")) == 1, ports


@pytest.mark.parametrize("text", ["[1, '3-5', 4, 9]", "'1,3-5, 9'", "['1','3','4','5','9']"])
def test_ports_are_numbers_and_ranges(text: str) -> None:
    """Each once, in the order named; shown as ranges again."""
    config = load(f"discovery: {{local: {{ports: {text}}}}}", {})
    assert config.discovery.ports == (1, 3, 4, 5, 9)
    assert config.written["discovery"]["local"]["ports"] == [1, "3-5", 9]
    assert port_ranges((5, 4)) == [5, 4]


# -- what --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("nas", "http://nas:11434"),
        ("http://nas", "http://nas:80"),
        ("https://nas/ollama/", "https://nas:443/ollama"),
        (' "nas:1" ', "http://nas:1"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":8000", "http://127.0.0.1:8000"),
        ("nas:port", "http://nas:11434"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(text: str, url: str) -> None:
    """Paths, quotes, wildcards and bad ports included."""
    assert tried({"OLLAMA_HOST": text}) == [url]


def test_open_webui_names_several() -> None:
    """With semicolons between; what is named twice is asked once."""
    env = {"OLLAMA_HOST": "nas", "OLLAMA_BASE_URLS": "http://a:1; ;nas:11434;http://b:2/x"}
    assert tried(env) == ["http://nas:11434", "http://a:1", "http://b:2/x"]


def test_what_cannot_be_used_is_said_without_secrets() -> None:
    """A warning, never a refusal: the variable is not ours."""
    (told,) = warnings({"OLLAMA_HOST": "http://me:hunter2@nas"})
    assert told.startswith("OLLAMA_HOST is no host to look at")
    assert "hunter2" not in told
    assert warnings({"OLLAMA_HOST": "nas:port"}) == (
        'OLLAMA_HOST: "port" is not a port (0 to 65535); using 11434.',
    )
    assert warnings({"OLLAMA_HOST": " ", "BALANCER_BACKENDS": "x"}) == ()
    assert warnings({"OLLAMA_HOST": "me:pw@nas", "BALANCER_BACKENDS": "x"}) == ()


@pytest.mark.parametrize("text", ["127.0.0.1:11435", "http://localhost:11435", "0.0.0.0:11435"])
def test_our_own_address_is_no_candidate(text: str) -> None:
    """Whoever exported it for clients hears that it is right for those."""
    assert tried({"OLLAMA_HOST": text}) == []
    (told,) = warnings({"OLLAMA_HOST": text})
    assert "is our own address" in told


def test_local_ports_are_tried_but_for_ours() -> None:
    """Both loopback addresses; a balancer that took Ollama's port does not ask itself."""
    assert tried({}, sources="local")[:3] == list(LOCAL)
    ours = tried({}, "server: {listen: '127.0.0.1:11434'}", "local")
    assert ours[0] == LOCAL[2]
    assert len(ours) == 20


# -- joining -----------------------------------------------------------------------------------


def found(config: Config, *numbers: int) -> list[Candidate]:
    """Candidates by number."""
    return [config.discovery.candidates[number] for number in numbers]


def test_names_say_what_they_can() -> None:
    """Ollama's port is local, the ports of one per GPU are gpu0 and so on, others their host."""
    env = {"OLLAMA_BASE_URLS": "http://nas;http://nas:2;localhost:11449;127.0.0.1:99"}
    config = load("", env)
    everything = [*config.discovery.candidates[:4], *found(config, 4, 6, 8)]
    joined = join(config, everything)
    assert names(joined) == {
        "nas": "nas:80",
        "nas:2": "nas:2",
        "gpu9": "localhost:11449",
        "local:99": "127.0.0.1:99",
        "local": "127.0.0.1:11434",
        "gpu0": "127.0.0.1:11440",
        "gpu1": "127.0.0.1:11441",
    }
    told = places(joined)
    assert (told["nas"], told["local"]) == ("OLLAMA_BASE_URLS", LOCAL_PORT)


def test_a_name_that_is_taken_is_not_taken_away() -> None:
    """Written names stay; ever longer ones are left for what is found."""
    url = parse_ollama_host("127.0.0.1:11440")
    taken: list[str] = []
    for name in ("gpu0", "local:11440", "127.0.0.1:11440", "127.0.0.1:11440-2"):
        assert _name(url, taken) == name
        taken.append(name)


def test_what_is_written_of_a_host_counts() -> None:
    """It is not added again, in whatever spelling; the rest joins behind."""
    text = (
        "backends: [{name: mine, url: 'localhost:11440', slots: 3}]\ndiscovery: {sources: [local]}"
    )
    config = load(text, {})
    joined = join(config, found(config, 2, 3, 4))
    assert names(joined) == {"mine": "localhost:11440", "gpu1": "127.0.0.1:11441"}
    assert joined.backends[0] == config.backends[0]
    assert places(joined) == {"mine": "line 1", "gpu1": LOCAL_PORT}
    assert [item["name"] for item in joined.written["backends"]] == ["mine", "gpu1"]


def test_what_is_no_candidate_any_more_leaves() -> None:
    """Discovery that was turned off, or other ports."""
    config = load("", {})
    one = found(config, 2)
    assert names(join(config, one)) == {"gpu0": "127.0.0.1:11440"}
    off = load("discovery: {sources: none}", {})
    assert join(off, one).backends == ()


def test_joining_again_changes_nothing() -> None:
    """The same finds give the same backends, so that their memory stays."""
    config = load("", {})
    first = join(config, found(config, 4))
    assert join(config, found(config, 4)) == first
    more = join(config, found(config, 4, 2))
    assert more.backends[0] == first.backends[0]


def test_nothing_found_is_the_configuration_itself() -> None:
    """And https needs no more than a url."""
    config = load("", {"OLLAMA_HOST": "https://nas"})
    assert join(config, []) == config
    (spec,) = join(config, found(config, 0)).backends
    assert spec.tls is not None
    assert spec.tls.verify
