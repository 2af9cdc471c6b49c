"""Pages of other origins: who may call, what their browsers are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from balancer.core.errors import Forbidden
from balancer.ops.cors import Cors, check_asked, is_foreign, is_same_origin

LOCAL = "http://localhost:3000"
OURS = "gpu:11435"
OLLAMAS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,"
    "X-Stainless-Arch,X-Stainless-Async,X-Stainless-Custom-Poll-Interval,"
    "X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
    "X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,"
    "X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout"
)


def sent(origin: str | None, host: str = OURS, **more: str) -> CIMultiDict[str]:
    """Headers of a page's request."""
    fields = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    return CIMultiDict(fields | {name.replace("_", "-"): text for name, text in more.items()})


def is_refused(rules: Cors, origin: str) -> bool:
    """Whether a page is refused, and its preflight with it."""
    answers = {_refusal(rules.check, origin), _refusal(rules.preflight, origin)}
    assert answers in ({None}, {""})
    return answers == {""}


def _refusal(ask: Callable[[CIMultiDict[str]], object], origin: str) -> str | None:
    try:
        ask(sent(origin))
    except Forbidden as error:
        return error.text
    return None


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://localhost:3000",
        "http://127.0.0.1:8080",
        "https://0.0.0.0",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://1a2b",
        "vscode-file://vscode-app",
    ],
)
def test_local_pages_may_call(origin: str) -> None:
    """Pages and desktop applications of this machine, whatever else is allowed."""
    for rules in (Cors(), Cors(origins=("https://chat.example",))):
        told = dict(rules.check(sent(origin)))
        assert (told["Access-Control-Allow-Origin"], told["Vary"]) == (origin, "Origin")
        assert "Access-Control-Allow-Credentials" not in told


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "chrome-extension://abc",
        "http://localhost.evil.example",
        "http://localhost:3000.evil.example",
        "http://localhost:",
        "http://localhost@evil.example",
        "https://127.0.0.1.evil.example",
        "http://gpu:11436",
        "app://\udcff",
        "app://a b",
        "HTTP://LOCALHOST\n",
    ],
)
def test_foreign_pages_may_not(origin: str) -> None:
    """Any other page is refused with an empty body, as Ollama does it."""
    assert is_refused(Cors(), origin)
    assert is_refused(Cors(origins=("https://chat.example", "https://*.corp.example")), origin)


@pytest.mark.parametrize(
    ("pattern", "may", "may_not"),
    [
        ("https://chat.example", "https://CHAT.example", "http://chat.example"),
        ("https://chat.example", "https://chat.example", "https://chat.example:8443"),
        ("https://chat.example", "https://chat.example", "https://chat.example.evil"),
        ("https://*.corp.example", "https://a.b.corp.example", "https://corp.example"),
        ("https://*.corp.example", "https://a.corp.example", "https://.corp.example"),
        ("https://*.corp.example", "https://a.corp.example", "https://a.corp.example.evil"),
        ("http://192.168.1.7:*", "http://192.168.1.7:3000", "http://192.168.1.7"),
        ("chrome-extension://*", "chrome-extension://abc", "moz-extension://abc"),
        ("*.corp.example", "http://a.corp.example", "http://a.other.example"),
    ],
)
def test_what_the_operator_allows(pattern: str, may: str, may_not: str) -> None:
    """Exactly that, or with one asterisk for anything that is not empty."""
    rules = Cors(origins=(pattern,))
    assert dict(rules.check(sent(may)))["Access-Control-Allow-Origin"] == may
    assert is_refused(rules, may_not)


def test_every_page_is_told_so_without_its_name() -> None:
    """As Ollama does with an asterisk: one answer for all, that caches need not tell apart."""
    told = dict(Cors(origins=("*",)).check(sent("https://any.example")))
    assert told["Access-Control-Allow-Origin"] == "*"
    assert "Vary" not in told
    assert "Vary" not in dict(Cors(origins=("*",)).preflight(sent("null")) or ())


def test_credentials_are_for_named_pages_only() -> None:
    """Never together with an asterisk, even if it came past the configuration's own check."""
    rules = Cors(origins=("https://chat.example",), credentials=True)
    assert (
        dict(rules.check(sent("https://chat.example")))["Access-Control-Allow-Credentials"]
        == "true"
    )
    told = dict(Cors(origins=("*",), credentials=True).check(sent("https://any.example")))
    assert "Access-Control-Allow-Credentials" not in told


def test_switched_off_nobody_may_but_we() -> None:
    """Not even a page of this machine, and an asterisk does not count either."""
    for rules in (Cors(enabled=False), Cors(enabled=False, origins=("*",))):
        assert is_refused(rules, LOCAL)
        assert rules.check(sent(f"http://{OURS}")) == ()


def test_our_own_page_needs_no_cors() -> None:
    """The same origin, or none, is no matter of CORS."""
    for headers in (sent(None), sent("http://gpu:11435", "GPU:11435"), sent(f"https://{OURS}")):
        assert Cors().check(headers) == ()
        assert Cors().preflight(headers) is None
        assert not is_foreign(headers)


def test_same_origin() -> None:
    """Scheme aside, an origin is the same if its authority is exactly our Host."""
    assert is_same_origin("http://gpu:1", "gpu:1")
    assert not is_same_origin("http://gpu:1", "gpu")
    assert not is_same_origin("ftp://gpu", "gpu")


@given(
    st.text(max_size=60) | st.from_regex(r"(app|file|tauri)://.*", fullmatch=True),
    st.sampled_from([(), ("https://*",), ("*",)]),
)
def test_what_is_echoed_can_be_sent(origin: str, origins: tuple[str, ...]) -> None:
    """An origin that we repeat is printable ASCII, so no answer breaks on it."""
    try:
        told = dict(Cors(origins=origins).check(sent(origin, "gpu")))
    except Forbidden:
        return
    echoed = told.get("Access-Control-Allow-Origin", "")
    assert echoed.isascii()
    assert echoed.isprintable()


def test_a_preflight_is_answered_as_ollama_answers() -> None:
    """Order and methods are Ollama's; its headers come first, those of other clients follow."""
    answer = Cors().preflight(sent(LOCAL), "POST")
    assert answer is not None
    (name, headers), *rest = answer
    assert name == "Access-Control-Allow-Headers"
    assert headers.startswith(f"{OLLAMAS},")
    assert headers.removeprefix(f"{OLLAMAS},").lower().split(",") == [
        "x-api-key",
        "anthropic-version",
        "anthropic-beta",
        "anthropic-dangerous-direct-browser-access",
        "x-request-id",
        "x-request-timeout",
    ]
    assert rest == [
        ("Access-Control-Allow-Methods", "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
        ("Access-Control-Allow-Origin", LOCAL),
        ("Access-Control-Max-Age", "600"),
        ("Allow", "POST"),
        ("Vary", "Origin"),
        ("Vary", "Access-Control-Request-Method"),
        ("Vary", "Access-Control-Request-Headers"),
    ]


def test_a_preflight_for_an_unknown_path_has_no_allow() -> None:
    """It is answered all the same."""
    assert "Allow" not in dict(Cors().preflight(sent(LOCAL)) or ())


def test_headers_of_a_family_are_allowed_as_they_are_asked_for() -> None:
    """Ours and those of the SDKs have members nobody can list; nothing else is repeated."""
    asked = "X-Balancer-Priority, x-stainless-new, x-evil, x-balancer-a b, x-api-key,x-balancer-\r"
    answer = Cors().preflight(sent(LOCAL, Access_Control_Request_Headers=asked)) or ()
    told = dict(answer)["Access-Control-Allow-Headers"]
    assert told.endswith(",X-Request-Timeout,x-balancer-priority,x-stainless-new")


def test_a_page_can_read_what_we_say_of_an_answer() -> None:
    """By name: an asterisk would not count with credentials."""
    exposed = dict(Cors().check(sent(LOCAL)))["Access-Control-Expose-Headers"].lower().split(",")
    assert {"x-request-id", "x-balancer-backend", "retry-after"} <= set(exposed)
    assert "*" not in exposed


@pytest.mark.parametrize(
    ("method", "headers", "passes"),
    [
        ("POST", sent(LOCAL, Content_Type="application/json; charset=utf-8"), True),
        ("POST", sent(LOCAL, Content_Type="text/plain"), False),
        ("POST", sent(LOCAL, Content_Type="application/x-www-form-urlencoded"), False),
        ("POST", sent(LOCAL, Content_Type="multipart/form-data; boundary=x"), False),
        ("POST", sent(LOCAL), False),
        ("DELETE", sent(LOCAL), False),
        ("GET", sent(LOCAL), True),
        ("HEAD", sent(LOCAL), True),
        ("POST", sent(LOCAL, Content_Type="multipart/form-data", Authorization="x"), True),
        ("POST", sent(LOCAL, Content_Type="text/plain", x_api_key="x"), True),
        ("POST", sent(None, Content_Type="text/plain"), True),
        ("POST", sent(f"http://{OURS}", Content_Type="text/plain"), True),
    ],
)
def test_a_form_is_no_call(method: str, headers: CIMultiDict[str], *, passes: bool) -> None:
    """What a browser sends unasked is refused; what made it ask, and other programs, are not."""
    if passes:
        check_asked(method, headers)
        return
    with pytest.raises(Forbidden, match="application/json"):
        check_asked(method, headers)
