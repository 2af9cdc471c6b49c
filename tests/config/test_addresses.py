import ipaddress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balancer.config import addresses
from balancer.config.addresses import parse_listen, parse_ollama_host


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("example.com", "http://example.com:11434"),
        ("example.com:1234", "http://example.com:1234"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("http://1.2.3.4:4321", "http://1.2.3.4:4321"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://example.com/ollama", "https://example.com:443/ollama"),
        ("example.com/ollama/", "http://example.com:11434/ollama"),
        ("ollama.com", "https://ollama.com:443"),
        (" 1.2.3.4 ", "http://1.2.3.4:11434"),
        ('"1.2.3.4"', "http://1.2.3.4:11434"),
        ("' 1.2.3.4 '", "http://1.2.3.4:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:1", "http://[::1]:1"),
        ("GPU1", "http://gpu1:11434"),
        ("http://[::ffff:10.0.0.1]", "http://10.0.0.1:80"),
        ("bücher.lan", "http://xn--bcher-kva.lan:11434"),
    ],
)
def test_addresses_mean_what_they_mean_to_ollama(text: str, url: str) -> None:
    """One habit for both programs; what cannot be called becomes loopback."""
    parsed = parse_ollama_host(text)
    assert str(parsed) == url
    assert parsed.warning is None


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("gpu1:66000", "http://gpu1:11434"),
        ("gpu1:-1", "http://gpu1:11434"),
        ("gpu1:", "http://gpu1:11434"),
        ("http://gpu1:http", "http://gpu1:80"),
        ("https://gpu1:x", "https://gpu1:443"),
    ],
)
def test_a_bad_port_gives_the_default_and_a_warning(text: str, url: str) -> None:
    """Ollama does not refuse it either, and says what it used."""
    parsed = parse_ollama_host(text)
    assert str(parsed) == url
    assert parsed.warning is not None
    assert "is not a port" in parsed.warning


@pytest.mark.parametrize(
    "text",
    [
        "ftp://gpu1",
        "file:///etc/passwd",
        "gpu 1",
        "gpu1/a b",
        "gpu1/../x",
        "gpu1//x",
        "gpu1?x=1",
        "gpu1#x",
        "a:b:c",
        "-gpu",
        "gpu..1",
        "169.254.169.254",
        "http://[fe80::1]",
        "http://[fe80::1%25eth0]",
        "http://[::ffff:169.254.169.254]",
        "224.0.0.1",
        "255.255.255.255",
        "http://[ff02::1]",
        "http://[64:ff9b::a9fe:a9fe]",
        "metadata.google.internal",
        "METADATA.google.internal.",
        "100.100.100.200",
        "http://[fd00:ec2::254]",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://169.254.43518",
        "1.2.3",
        "gpu1\n2",
        "x" * 300,
    ],
)
def test_what_no_backend_can_be_is_refused(text: str) -> None:
    """Neither other schemes nor the places that leak a cloud's secrets, however they are spelt."""
    with pytest.raises(ValueError):
        parse_ollama_host(text)


@pytest.mark.parametrize(
    "text", ["http://me:hunter2@gpu1", "me:hunter2@gpu1:1", "gpu1:hunter2@x", "//hunter2@x?y"]
)
def test_a_refused_password_is_not_repeated(text: str) -> None:
    """Messages end up in logs and bug reports."""
    with pytest.raises(ValueError) as refused:
        parse_ollama_host(text)
    assert "hunter2" not in str(refused.value)
    assert "auth" in str(refused.value)


@pytest.mark.parametrize("text", ["gpu1?token=hunter2", "gpu1/#hunter2"])
def test_a_refused_query_is_not_repeated(text: str) -> None:
    """Queries carry keys as well."""
    with pytest.raises(ValueError) as refused:
        parse_ollama_host(text)
    assert "hunter2" not in str(refused.value)


@settings(deadline=None)
@given(st.text())
@example("http://[::1")
@example("[")
@example("::%")
@example("http://:")
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    """Addresses come from files, variables and command lines; none may crash us."""
    try:
        url = parse_ollama_host(text)
    except ValueError:
        return
    assert 0 <= url.port <= 65535
    assert parse_ollama_host(str(url)) == addresses.BackendUrl(
        url.scheme, url.host, url.port, url.path
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("localhost", "127.0.0.1"),
        ("localhost", "[::1]"),
        ("http://localhost:80", "http://127.0.0.1"),
        ("gpu1", "GPU1.:11434"),
    ],
)
def test_spellings_of_one_place_are_the_same_place(one: str, other: str) -> None:
    """An Ollama written twice would get twice its share."""
    assert parse_ollama_host(one).same_place() == parse_ollama_host(other).same_place()


@pytest.mark.parametrize("other", ["gpu1:11435", "https://gpu1:11434", "gpu1/x", "gpu2"])
def test_different_places_stay_apart(other: str) -> None:
    """Port, scheme, path and host all count."""
    assert parse_ollama_host("gpu1").same_place() != parse_ollama_host(other).same_place()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:11435", "127.0.0.1", 11435),
        (":80", "", 80),
        ("*:80", "", 80),
        ("[::1]:80", "::1", 80),
        ("localhost:0", "localhost", 0),
        ("0.0.0.0", "0.0.0.0", 11435),
        ("::1", "::1", 11435),
    ],
)
def test_listen_addresses_have_host_and_port(text: str, host: str, port: int) -> None:
    """The usual forms work; without a port it is ours."""
    assert parse_listen(text) == addresses.Listen(host, port)


def test_a_unix_socket_is_a_listen_address() -> None:
    """Its path is absolute and it reads back."""
    listen = parse_listen("unix:/run/b.sock")
    assert (listen.path, str(listen), listen.is_local) == ("/run/b.sock", "unix:/run/b.sock", True)


def test_a_socket_of_systemd_is_a_listen_address() -> None:
    """It reads back; whom it is open to is not known, so it counts as open to the network."""
    listen = parse_listen("fd:api")
    assert (listen.fd, str(listen), listen.is_local) == ("api", "fd:api", False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fd:",
        "fd:a:b",
        "unix:relative",
        "http://127.0.0.1:1",
        "host:99999",
        "host:",
        "a b:1",
        "1.2.3:4",
        "11435",
    ],
)
def test_other_listen_addresses_are_refused(text: str) -> None:
    """A mistake must not open another address than meant."""
    with pytest.raises(ValueError):
        parse_listen(text)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        (":1", False),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.1.5:1", False),
        ("myhost:1", False),
    ],
)
def test_local_means_only_this_machine(text: str, *, local: bool) -> None:
    """In doubt an address counts as open to the network."""
    assert parse_listen(text).is_local is local


@pytest.mark.parametrize(
    ("listen", "backend", "reached"),
    [
        ("127.0.0.1:11435", "localhost:11435", True),
        ("localhost:11435", "[::1]:11435", True),
        (":11435", "127.0.0.5:11435", True),
        ("0.0.0.0:11435", "localhost:11435", True),
        ("gpu1:11435", "gpu1:11435", True),
        ("127.0.0.1:11435", "localhost:11434", False),
        (":11435", "gpu1:11435", False),
        ("127.0.0.1:11435", "127.0.0.2:11435", False),
        ("localhost:0", "localhost:1", False),
        ("unix:/x", "localhost:11435", False),
    ],
)
def test_a_backend_that_is_ourselves_is_noticed(
    listen: str, backend: str, *, reached: bool
) -> None:
    """Such a call would go round until something breaks."""
    assert parse_listen(listen).is_reached_by(parse_ollama_host(backend)) is reached


def test_networks_and_single_addresses_are_read() -> None:
    """One address is a network of one."""
    assert addresses.parse_network("10.0.0.7") == ipaddress.ip_network("10.0.0.7/32")
    assert addresses.parse_network(" fd00::/8 ") == ipaddress.ip_network("fd00::/8")


@pytest.mark.parametrize(
    ("text", "advice"), [("192.168.1.5/24", "Write 192.168.1.0/24"), ("lan", "is not a network")]
)
def test_wrong_networks_come_with_the_right_one(text: str, advice: str) -> None:
    """Host bits are the usual slip, and the fix is known."""
    with pytest.raises(ValueError, match=advice):
        addresses.parse_network(text)


def test_host_names_are_bare_and_lower_case() -> None:
    """They are compared with the Host header."""
    assert addresses.parse_host_name("AI.Example.org") == "ai.example.org"
    assert addresses.parse_host_name("[::1]") == "::1"


@pytest.mark.parametrize("text", ["http://x", "x:80", "x/y", "", "*.x"])
def test_what_is_more_than_a_host_name_is_refused(text: str) -> None:
    """With a port it would never match."""
    with pytest.raises(ValueError):
        addresses.parse_host_name(text)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Chat.example.org", "https://chat.example.org"),
        ("http://10.0.0.1:8080/", "http://10.0.0.1:8080"),
        ("https://*.example.org", "https://*.example.org"),
        ("*.example.org", "*.example.org"),
        ("chrome-extension://*", "chrome-extension://*"),
        ("*", "*"),
    ],
)
def test_origins_are_what_browsers_send(text: str, origin: str) -> None:
    """In lower case and without a path; one asterisk may stand for anything."""
    assert addresses.parse_origin(text) == origin


@pytest.mark.parametrize(
    "text", ["chat.example.org", "https://x/y", "https://*.x.*", "null", "", "https://", "a b://c"]
)
def test_what_no_browser_sends_is_refused(text: str) -> None:
    """It would never match, or (null) be any sandboxed page."""
    with pytest.raises(ValueError, match="is not the origin of a page"):
        addresses.parse_origin(text)
