"""Facts: what follows from a host's URL and from what the balancer says."""

from __future__ import annotations

import pytest

from balancer.cli.doctor_facts import Facts, Host, Trouble


@pytest.mark.parametrize(
    ("url", "hostname", "port", "is_loopback"),
    [
        ("http://gpu1:11434", "gpu1", 11434, False),
        ("http://gpu1", "gpu1", 80, False),
        ("https://ai.example.org/ollama", "ai.example.org", 443, False),
        ("http://localhost:11434", "localhost", 11434, True),
        ("http://[::1]:11434", "::1", 11434, True),
        ("http://127.0.0.2:1", "127.0.0.2", 1, True),
        ("http://10.0.0.1:1", "10.0.0.1", 1, False),
    ],
)
def test_of_a_url(url: str, hostname: str, port: int, is_loopback: bool) -> None:
    """The port that is meant where none is written, and whether others know the address."""
    host = Host("a", url)
    assert (host.hostname, host.port, host.is_loopback) == (hostname, port, is_loopback)


def test_hosts_in_trouble_are_not_compared() -> None:
    """Only those that answer are."""
    well, ill = Host("a", "http://a:1"), Host("b", "http://b:1", Trouble.SILENT)
    assert Facts(hosts=(well, ill)).answering == (well,)


def test_what_the_balancer_says_of_a_backend() -> None:
    """Nothing, where none runs or it does not know the backend."""
    status = {"backends": [{"name": "a", "url": "http://a:1", "up": True}]}
    assert Facts().backend("http://a:1") == Facts(status=status).backend("http://b:1") == {}
    assert Facts(status=status).backend("http://a:1")["up"]
