import base64
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.config import BackendSpec, ConfigError, Timeouts, Tls, load

Faults = Callable[..., list[str]]


def backends(text: str, **files: str) -> tuple[BackendSpec, ...]:
    """Load items of ``backends``; files by name without slash."""
    return load(f"backends:\n{text}", {}, read_file=lambda path: files[path.strip("/")]).backends


def test_a_plain_address_is_a_whole_backend() -> None:
    """Everything but the url has a default."""
    (spec,) = backends("- gpu1\n")
    assert spec == BackendSpec(
        name="gpu1",
        url="http://gpu1:11434",
        slots=None,
        allow=("*",),
        deny=(),
        enabled=True,
        headers=(),
        auth_headers=(),
        tls=None,
        timeouts=None,
    )


def test_everything_written_arrives() -> None:
    """Each key reaches its field."""
    (spec,) = backends(
        "- {name: g, url: 'https://gpu1/x', slots: 4, models: {allow: ['q*'], deny: [z]},\n"
        "   enabled: false, headers: {X-A: b}, tls: {verify: false, server_name: s}}\n"
    )
    assert (spec.name, spec.url, spec.slots) == ("g", "https://gpu1:443/x", 4)
    assert (spec.allow, spec.deny, spec.enabled) == (("q*",), ("z",), False)
    assert spec.headers == (("X-A", "b"),)
    assert spec.tls == Tls(
        verify=False, ca_file=None, server_name="s", client_cert_file=None, client_key_file=None
    )


def test_what_the_scheduler_goes_by_arrives() -> None:
    """Weight, tier, soft rule, memory; and without them none has an effect."""
    (spec,) = backends(
        "- {url: a, weight: 0.5, priority: 50, prefer: ['q*', 'nomic*'], vram: 24GiB}\n"
    )
    assert (spec.weight, spec.priority) == (0.5, 50)
    assert (spec.prefer, spec.vram_bytes) == (("q*", "nomic*"), 24 << 30)
    (plain,) = backends("- a\n")
    told = (plain.weight, plain.priority, plain.prefer, plain.vram_bytes)
    assert told == (1.0, 100, (), None)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("weight: 0", "0 is not a weight. Write a number from 0.01 to 100."),
        ("priority: -1", "-1 is not a whole number of at least 0."),
        ("priority: 1.5", "1.5 is not a whole number of at least 0."),
        ("prefer: {a: b}", "needs a list, such as [a, b]."),
        ("vram: 24", "24 is not the memory of a host. Write 24GiB, 80GB."),
    ],
)
def test_what_the_scheduler_could_not_go_by_is_refused(faults: Faults, key: str, told: str) -> None:
    """With what to write instead."""
    (fault,) = faults(f"backends: [{{url: a, {key}}}]")
    assert fault.endswith(f"backends[0].{key.partition(':')[0]}: {told}")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("- gpu1\n- gpu2\n", ["gpu1", "gpu2"]),
        ("- gpu1:1\n- gpu1:2\n- gpu2\n", ["gpu1:1", "gpu1:2", "gpu2"]),
        ("- {name: gpu1, url: x}\n- gpu1\n", ["gpu1", "gpu1:11434"]),
        ("- {name: a, url: 'gpu1:1'}\n- gpu1:2\n", ["a", "gpu1"]),
        ("- '[::1]:1'\n- '[::1]:2'\n", ["[::1]:1", "[::1]:2"]),
    ],
)
def test_the_nameless_are_named_after_their_host(text: str, names: list[str]) -> None:
    """With the port only where the host alone would not be unique."""
    assert [spec.name for spec in backends(text)] == names


def test_a_duplicate_name_points_to_the_first(faults: Faults) -> None:
    """Names are what a backend is remembered by."""
    text = "backends:\n- {name: gpu0, url: a}\n- {name: gpu0, url: b}\n"
    assert faults(text) == ['config.yaml:3:3 backends: duplicate name "gpu0" (first at line 2).']


def test_a_duplicate_place_is_found_in_any_spelling(faults: Faults) -> None:
    """One Ollama twice would get twice the load; which of the two counts must be told."""
    text = (
        "backends:\n- {name: a, url: 'localhost:11440'}\n- {slots: 2, url: 'http://[::1]:11440'}\n"
    )
    assert faults(text) == [
        "config.yaml:3:3 backends: duplicate url http://[::1]:11440 (first at line 2)."
    ]


def test_duplicates_outside_the_file_are_named_by_number(faults: Faults) -> None:
    """A flag has no lines."""
    twice = [{"name": "a", "url": "x"}, {"name": "b", "url": "x"}]
    assert faults("", overrides={"backends": twice}) == [
        "command line backends: duplicate url http://x:11434 (first backends[0])."
    ]


def test_an_address_that_is_only_named_twice_is_one_backend() -> None:
    """What says more about it stays, whatever the order; a line tells; later lines are right."""
    text = (
        "backends:\n- gpu1\n- {url: 'gpu1:11434', slots: 2}\n- http://gpu1:11434\n- gpu2\n"
        "- {url: gpu3, slots: 4}\n"
    )
    config = load(text, {})
    assert [(spec.name, spec.slots) for spec in config.backends] == [
        ("gpu1", 2),
        ("gpu2", None),
        ("gpu3", 4),
    ]
    assert config.warnings == (
        "config.yaml:4:3 backends[2]: http://gpu1:11434 is the same host as gpu1: used once.",
        "config.yaml:2:3 backends[0]: gpu1 is the same host as gpu1:11434: used once.",
    )
    origins = [config.origins[f"backends[{index}].url"] for index in range(3)]
    assert origins == ["file:3", "file:5", "file:6"]
    assert config.origins["backends[2].slots"] == "file:6"


def test_one_host_in_two_spellings_of_a_variable() -> None:
    """The first spelling is used."""
    config = load("", {"BALANCER_BACKENDS": "localhost:11440, 127.0.0.1:11440"})
    assert [spec.url for spec in config.backends] == ["http://localhost:11440"]
    assert "is the same host as localhost:11440" in config.warnings[0]


def test_our_own_address_is_no_backend(faults: Faults) -> None:
    """The call would come back to us."""
    assert faults("backends: ['localhost:11435']") == [
        (
            "config.yaml:1:12 backends[0].url: "
            "http://localhost:11435 is our own address (server.listen)."
        )
    ]


@pytest.mark.parametrize(
    ("auth", "header"),
    [
        ("{type: bearer, token: abc}", ("Authorization", "Bearer abc")),
        ("{type: bearer, token_file: /t}", ("Authorization", "Bearer from-file")),
        ("{type: header, name: X-Key, value: abc}", ("X-Key", "abc")),
        ("{type: header, name: X-Key, value_file: /t}", ("X-Key", "from-file")),
    ],
)
def test_credentials_become_one_header(auth: str, header: tuple[str, str]) -> None:
    """In place or from a file."""
    (spec,) = backends(f"- {{url: gpu1, auth: {auth}}}\n", t="from-file\n")
    ((name, value),) = spec.auth_headers
    assert (name, value.reveal()) == header


def test_basic_credentials_are_encoded() -> None:
    """As RFC 7617 has it, in UTF-8."""
    (spec,) = backends("- {url: g, auth: {type: basic, username: me, password_file: /t}}\n", t="pä")
    ((_, value),) = spec.auth_headers
    scheme, encoded = value.reveal().split()
    assert (scheme, base64.b64decode(encoded).decode()) == ("Basic", "me:pä")


@pytest.mark.parametrize(
    ("auth", "message"),
    [
        ("{type: bearer}", "type bearer needs one of: token, token_file."),
        ("{type: bearer, token: a, token_file: b}", "type bearer needs one of: token, token_file."),
        ("{type: basic, password: a}", "type basic needs one of: username."),
        (
            "{type: basic, username: a, password: a, token: b}",
            "token does not belong to type basic.",
        ),
        ("{token: a}", "token does not belong to type none."),
    ],
)
def test_credentials_must_fit_their_type(faults: Faults, auth: str, message: str) -> None:
    """Half of them would fail only at the first call."""
    text = f"backends:\n- url: gpu1\n  auth: {auth}\n"
    assert faults(text) == [f"config.yaml:3:9 backends[0].auth: {message}"]


def test_own_timeouts_change_only_what_they_name() -> None:
    """The rest is as for all; -1 lifts a limit here too."""
    text = "timeouts: {connect: 7s}\nbackends:\n- {url: a, timeouts: {load: 20m, idle: -1}}\n- b\n"
    one, other = load(text, {}).backends
    assert one.timeouts == Timeouts(
        connect_s=7, first_byte_s=30, load_s=1200, idle_s=None, total_s=None, pull_idle_s=600
    )
    assert other.timeouts is None


def test_https_is_verified_unless_told_otherwise() -> None:
    """Safe without a word in the file."""
    (spec,) = backends("- https://gpu1\n")
    assert spec.tls is not None
    assert spec.tls.verify


def test_tls_without_https_is_warned_of() -> None:
    """The call goes out in clear, whatever stands there."""
    config = load("backends:\n- {url: gpu1, tls: {ca_file: /c}}\n", {}, read_file=lambda _: "pem")
    assert config.backends[0].tls is None
    assert config.warnings == (
        "config.yaml:2:20 backends[0].tls: has no effect: http://gpu1:11434 is not https.",
    )


def test_missing_certificates_are_found_at_once(faults: Faults) -> None:
    """Not at the first call."""
    text = "backends:\n- {url: 'https://a', tls: {ca_file: /none}}\n"
    assert faults(text) == [
        'config.yaml:2:37 backends[0].tls.ca_file: cannot read "/none": No such file or directory.'
    ]


def test_a_client_key_needs_its_certificate(faults: Faults) -> None:
    """One without the other cannot be used."""
    (fault,) = faults("backends: [{url: 'https://a', tls: {client_key_file: /k}}]")
    assert "client_key_file needs client_cert_file" in fault


@settings(deadline=None)
@given(st.lists(st.text(), max_size=4))
def test_any_addresses_load_or_are_complained_of(urls: list[str]) -> None:
    """The command line can say anything."""
    try:
        config = load("", {}, overrides={"backends": urls})
    except ConfigError:
        return
    assert len({spec.name for spec in config.backends}) == len(config.backends)
    assert len(config.backends) + len(config.warnings) == len(urls)


def test_cloud_is_for_those_that_are_marked() -> None:
    """No backend has an account unless it is said."""
    one, other = backends("- {url: gpu1, cloud: true}\n- gpu2\n")
    assert (one.cloud, one.provider) == (True, False)
    assert (other.cloud, other.provider) == (False, False)


@pytest.mark.parametrize("url", ["https://ollama.com", "ollama.com", "https://Ollama.com./"])
def test_ollama_com_is_known_by_its_name(url: str) -> None:
    """It needs no mark; its key goes with every request to it."""
    (spec,) = backends(f"- {{url: '{url}', auth: {{type: bearer, token: t}}}}\n")
    assert (spec.cloud, spec.provider) == (True, True)
    assert [(name, secret.reveal()) for name, secret in spec.auth_headers] == [
        ("Authorization", "Bearer t")
    ]
    assert spec.tls is not None


def test_ollama_com_needs_a_key_and_tls(faults: Faults) -> None:
    """Without a key nothing would work, without TLS everybody could read it."""
    (told,) = faults("backends: ['http://ollama.com']")
    assert "https://ollama.com" in told
    (warning,) = load("backends: ['https://ollama.com']", {}).warnings
    assert "token_file" in warning
