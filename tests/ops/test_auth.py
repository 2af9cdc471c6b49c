"""Access: addresses behind proxies, keys, Host, the admin guard."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from balancer.core.domain import INTERACTIVE, Allowance, Principal, Role
from balancer.core.errors import BadRequest, Forbidden, Unauthorized
from balancer.ops import auth
from balancer.ops.auth import (
    ANONYMOUS,
    Access,
    Failures,
    check_host,
    client_address,
    require,
)

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SECRET = "lab-0123456789abcdef0123456789abcdef"
BOSS = "boss-0123456789abcdef0123456789abcde"
OUTSIDER = "203.0.113.9"


@dataclass(frozen=True)
class Key:
    name: str
    sha256: bytes
    role: Role = Role.USER
    models: tuple[str, ...] = ("*",)
    expires_at: float | None = None
    priority: int = INTERACTIVE
    allowance: Allowance = Allowance()  # noqa: RUF009 - frozen


KEYS = (
    Key("lab", hashlib.sha256(SECRET.encode()).digest()),
    Key("boss", hashlib.sha256(BOSS.encode()).digest(), Role.ADMIN),
)
ADMIN = Principal("boss", Role.ADMIN)


def access(**rules: Any) -> Access:
    usual: dict[str, Any] = {"keys": KEYS, "wall": lambda: 0.0}
    return Access(**(usual | rules))


def headers(**fields: str) -> CIMultiDict[str]:
    return CIMultiDict({name.replace("_", "-"): value for name, value in fields.items()})


def bearer(token: str) -> CIMultiDict[str]:
    return headers(Authorization=f"Bearer {token}")


def ask(
    rules: Access,
    sent: CIMultiDict[str],
    peer: str = OUTSIDER,
    now: float = 0.0,
    in_path: str = "",
) -> Principal:
    return rules.authenticate(sent, rules.caller(peer, sent), now, in_path)


# -- addresses ------------------------------------------------------------------------------

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("127.0.0.0/8"), ip_network("fd00::/8"))
ADDRESSES = st.ip_addresses().map(str) | st.sampled_from(["10.0.0.1", "127.0.0.1", "fd00::1"])


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.1", ['"[2001:db8::1]:80"'], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4, unknown"], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("", ["1.2.3.4"], ""),
    ],
)
def test_client_address(peer: str, lines: list[str], client: str) -> None:
    """Hops are believed from the right, as long as a trusted proxy wrote them."""
    assert client_address(peer, lines, TRUSTED) == client


@UNTIMED
@given(ADDRESSES, st.lists(st.text(max_size=40) | ADDRESSES))
def test_an_untrusted_peer_is_the_client(peer: str, lines: list[str]) -> None:
    """Nobody talks himself into another address."""
    assert client_address(peer, lines, ()) == peer


@UNTIMED
@given(st.lists(st.text(max_size=40) | ADDRESSES), st.ip_addresses(v=4, network="203.0.113.0/24"))
def test_claims_left_of_the_client_do_not_matter(claims: list[str], client: Any) -> None:
    """Whatever a client puts into the header, the hop that our proxy wrote stands."""
    assert client_address("10.0.0.1", [*claims, str(client)], TRUSTED) == str(client)
    joined = ",".join([*claims, str(client)])
    assert client_address("10.0.0.1", [joined], TRUSTED) == str(client)


@UNTIMED
@given(st.text(max_size=300))
def test_odd_addresses_are_nobody(text: str) -> None:
    """Text that is no address has no rights of any address."""
    caller = access().caller(text, headers())
    try:
        ip_address(text)
    except ValueError:
        assert caller.ip is None
        assert not caller.is_loopback


def test_long_addresses_are_not_kept() -> None:
    """The cache of parsed addresses cannot be filled with long strings."""
    auth._parsed.cache_clear()
    client_address("10.0.0.1", ["x" * 65], TRUSTED)
    assert auth._parsed.cache_info().currsize == 1


@pytest.mark.parametrize(
    ("peer", "sent", "trusted", "loopback"),
    [
        ("127.0.0.1", {}, (), True),
        ("::1", {}, (), True),
        ("::ffff:127.0.0.1", {}, (), True),
        ("203.0.113.9", {}, (), False),
        ("127.0.0.1", {"X-Forwarded-For": "1.2.3.4"}, (), False),
        ("127.0.0.1", {"Forwarded": "for=1.2.3.4"}, (), False),
        ("127.0.0.1", {"X-Real-IP": "1.2.3.4"}, (), False),
        ("127.0.0.1", {"X-Real-IP": "1.2.3.4"}, ("127.0.0.1",), False),
        ("127.0.0.1", {"X-Forwarded-For": "unknown"}, ("127.0.0.1",), False),
        ("127.0.0.1", {"X-Forwarded-For": "1.2.3.4"}, ("127.0.0.1",), False),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, ("127.0.0.1",), True),
        ("10.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, ("10.0.0.0/8",), False),
        ("", {}, (), False),
    ],
)
def test_who_is_on_this_machine(
    peer: str, sent: dict[str, str], trusted: tuple[str, ...], *, loopback: bool
) -> None:
    """A proxy on this machine does not make the world local, nor does one elsewhere."""
    rules = access(trusted_proxies=trusted)
    assert rules.caller(peer, CIMultiDict(sent)).is_loopback is loopback


# -- keys -----------------------------------------------------------------------------------


def test_a_key_opens_as_bearer_and_as_x_api_key() -> None:
    """Both ways that clients know, the scheme in any case."""
    rules = access(anonymous="never")
    lab = Principal("lab", Role.USER)
    assert ask(rules, bearer(SECRET)) == lab
    assert ask(rules, headers(authorization=f"bEARER  {SECRET} ")) == lab
    assert ask(rules, headers(x_api_key=SECRET)) == lab
    assert ask(rules, headers(x_api_key=BOSS)) == ADMIN


def test_either_of_two_keys_will_do() -> None:
    """Some clients send both headers, one of them made up."""
    sent = headers(Authorization="Bearer made-up", x_api_key=SECRET)
    assert ask(access(anonymous="never"), sent).name == "lab"


def test_a_way_that_is_not_accepted_is_not_read() -> None:
    """`auth.accept` narrows where a key may stand."""
    rules = access(anonymous="never", accept=("bearer",))
    with pytest.raises(Unauthorized):
        ask(rules, headers(x_api_key=SECRET))


PLACES = ("bearer", "x-api-key", "path")


def test_a_key_may_stand_in_the_path() -> None:
    """Only where that is accepted; beside it libraries go on sending made-up ones."""
    everywhere = access(anonymous="never", accept=PLACES)
    assert ask(everywhere, headers(), in_path=SECRET).name == "lab"
    assert ask(everywhere, bearer("ollama"), in_path=SECRET).name == "lab"
    assert ask(everywhere, bearer(SECRET), in_path="ollama").name == "lab"
    assert (everywhere.takes_path, access().takes_path) == (True, False)
    with pytest.raises(Unauthorized, match="is needed"):
        ask(access(anonymous="never"), headers(), in_path=SECRET)


def test_wrong_keys_in_the_path_are_guesses_too() -> None:
    """The address rests for them as for others."""
    rules = access(anonymous="never", accept=PLACES)
    for number in range(10):
        with pytest.raises(Unauthorized, match="not known"):
            ask(rules, headers(), in_path=f"guess-{number}")
    with pytest.raises(Unauthorized, match="Too many"):
        ask(rules, headers(), in_path="guess")


@pytest.mark.parametrize(
    ("accept", "told", "untold"),
    [
        (("bearer",), ["Authorization: Bearer KEY"], ["x-api-key", "/k/"]),
        (("bearer", "x-api-key"), ["Authorization: Bearer KEY", "x-api-key: KEY"], ["/k/"]),
        (("path",), ["http://HOST/k/KEY/v1", "OLLAMA_HOST"], ["Bearer", "x-api-key"]),
    ],
)
def test_who_has_no_key_is_told_how_to_send_one(
    accept: tuple[str, ...], told: list[str], untold: list[str]
) -> None:
    """Only the ways that would be read, and where keys come from."""
    with pytest.raises(Unauthorized) as refusal:
        ask(access(anonymous="never", accept=accept), headers(Authorization="a2V5:c2ln"))
    assert all(way in refusal.value.text for way in [*told, "ollama-balancer key new"])
    assert not any(way in refusal.value.text for way in untold)


def test_a_key_ends_on_time() -> None:
    """Until the instant it opens, from then on its owner hears why not; it is no guess."""
    wall = [99.9]
    key = Key("temp", hashlib.sha256(SECRET.encode()).digest(), expires_at=100.0)
    rules = access(keys=(key,), anonymous="never", wall=lambda: wall[0])
    assert ask(rules, bearer(SECRET)).name == "temp"
    wall[0] = 100.0
    for _ in range(20):
        with pytest.raises(Unauthorized, match="'temp' has expired"):
            ask(rules, bearer(SECRET))
    with pytest.raises(Unauthorized, match="not known"):
        ask(rules, bearer("guess"))


def test_an_expired_key_is_as_good_as_a_made_up_one() -> None:
    """Where none is needed it does no harm; and it does not hide a good one beside it."""
    old = Key("old", hashlib.sha256(SECRET.encode()).digest(), Role.ADMIN, expires_at=1.0)
    rules = access(keys=(old, KEYS[1]), wall=lambda: 2.0, anonymous="always")
    assert ask(rules, bearer(SECRET)) == Principal(ANONYMOUS, Role.USER)
    assert ask(rules, headers(Authorization=f"Bearer {SECRET}", x_api_key=BOSS)).name == "boss"


def test_a_key_brings_its_models() -> None:
    """They are the caller's own."""
    key = Key("lab", hashlib.sha256(SECRET.encode()).digest(), models=("llama*", "e"))
    assert ask(access(keys=(key,)), bearer(SECRET)).models == ("llama*", "e")
    assert ask(access(keys=(key,)), headers(), "127.0.0.1").models == ("*",)


@pytest.mark.parametrize(
    ("anonymous", "peer", "role"),
    [
        ("loopback", "127.0.0.1", Role.ADMIN),
        ("always", "127.0.0.1", Role.ADMIN),
        ("always", OUTSIDER, Role.USER),
        (("203.0.113.0/24",), OUTSIDER, Role.USER),
        (("127.0.0.0/8",), "127.0.0.1", Role.ADMIN),
    ],
)
@pytest.mark.parametrize("sent", [headers(), bearer("ollama"), headers(Authorization="a2V5:c2ln")])
def test_where_anonymous_callers_are_welcome(
    anonymous: Any, peer: str, role: Role, sent: CIMultiDict[str]
) -> None:
    """No key, a made-up key and the command line's signature are all the same there."""
    assert ask(access(anonymous=anonymous), sent, peer) == Principal(ANONYMOUS, role)


@pytest.mark.parametrize(
    ("anonymous", "peer"),
    [
        ("never", "127.0.0.1"),
        ("loopback", OUTSIDER),
        ("loopback", ""),
        (("192.168.1.0/24",), OUTSIDER),
        (("192.168.1.0/24",), "127.0.0.1"),
        ((), "127.0.0.1"),
    ],
)
@pytest.mark.parametrize("sent", [headers(), bearer("ollama"), headers(Authorization="a2V5:c2ln")])
def test_where_they_are_not(anonymous: Any, peer: str, sent: CIMultiDict[str]) -> None:
    """Elsewhere each of them is refused; a list of networks is exactly that list."""
    with pytest.raises(Unauthorized):
        ask(access(anonymous=anonymous), sent, peer)


def test_a_known_key_counts_where_none_is_needed() -> None:
    """Who shows a key is its owner, even with fewer rights than the anonymous caller."""
    assert ask(access(), bearer(SECRET), "127.0.0.1") == Principal("lab", Role.USER)


def test_a_hidden_caller_is_told_why() -> None:
    """The usual mistake with a web server in front is named in the refusal."""
    with pytest.raises(Unauthorized, match="trusted_proxies"):
        ask(access(), headers(X_Forwarded_For="1.2.3.4"), "127.0.0.1")
    everybody = access(anonymous="always")
    sent = headers(X_Forwarded_For="1.2.3.4")
    assert ask(everybody, sent, "127.0.0.1") == Principal(ANONYMOUS, Role.USER)


TOKENS = st.text(min_size=1, max_size=100) | st.text(
    alphabet="\x00\n\x7f\x80\ud800\udc80\udcff\U0001f600é:= ", min_size=1
)


@UNTIMED
@given(TOKENS)
def test_no_token_raises_anything_else_or_is_repeated(token: str) -> None:
    """Whatever stands in the headers, the answer is 401, and its text does not hold the key."""
    for sent in (bearer(f"{token}#{token}"), headers(x_api_key=f"{token}#{token}")):
        with pytest.raises(Unauthorized) as refusal:
            ask(access(anonymous="never"), sent)
        assert f"{token}#{token}" not in refusal.value.text
    assert ask(access(anonymous="always"), headers(Authorization=token)).name == ANONYMOUS


@UNTIMED
@given(st.text(max_size=len(SECRET) + 2))
def test_only_the_very_key_is_the_key(token: str) -> None:
    """Nothing but the key itself passes for it."""
    passed = ask(access(anonymous="always"), bearer(token)).name != ANONYMOUS
    assert passed is (token.strip() in (SECRET, BOSS))


def test_no_key_may_be_called_anonymous() -> None:
    """The anonymous caller's name is his alone: rules go by it."""
    with pytest.raises(ValueError, match="anonymous"):
        access(keys=(Key("anonymous", b"x" * 32),))


def test_a_key_that_is_all_zeros_is_nobodys() -> None:
    """The stand-in that unknown keys are compared with opens nothing."""
    with pytest.raises(Unauthorized):
        ask(access(keys=(), anonymous="never"), bearer("x"))


def test_roles() -> None:
    """An admin may everything, a user what users may."""
    user = Principal("lab", Role.USER)
    require(user, Role.USER)
    require(ADMIN, Role.USER)
    require(ADMIN, Role.ADMIN)
    with pytest.raises(Forbidden, match=r"^lab may not"):
        require(user, Role.ADMIN)
    with pytest.raises(Forbidden, match="needs an API key"):
        require(Principal(ANONYMOUS, Role.USER), Role.ADMIN)


# -- failures -------------------------------------------------------------------------------


def guess(rules: Access, times: int, peer: str = OUTSIDER, now: float = 0.0) -> None:
    for number in range(times):
        with pytest.raises(Unauthorized):
            ask(rules, bearer(f"guess-{number}"), peer, now)


def test_who_guesses_rests() -> None:
    """After ten wrong keys in a minute an address hears so for a minute; a right key is let in."""
    rules = access(anonymous="never")
    guess(rules, 9)
    assert ask(rules, bearer(SECRET)).name == "lab"
    guess(rules, 1, now=30.0)
    with pytest.raises(Unauthorized, match="Too many") as refusal:
        ask(rules, bearer("guess"), now=89.0)
    assert refusal.value.retry_after_s == 1.0
    assert ask(rules, bearer(SECRET), now=89.0).name == "lab"
    with pytest.raises(Unauthorized, match="not known"):
        ask(rules, bearer("guess"), now=90.0)


def test_others_go_on_while_one_rests() -> None:
    """The rest is the address's own; in IPv6 that is a whole /64."""
    rules = access(anonymous="never")
    guess(rules, 10, "2001:db8::1")
    with pytest.raises(Unauthorized, match="not known"):
        ask(rules, bearer("guess"), "2001:db8:0:1::1")
    with pytest.raises(Unauthorized, match="Too many"):
        ask(rules, bearer("guess"), "2001:db8::2")


def test_slow_failures_never_add_up() -> None:
    """A client with an old key in its settings that asks now and then is not locked out."""
    rules = access(anonymous="never")
    for minute in range(20):
        guess(rules, 5, now=60.0 * minute)
        assert ask(rules, bearer(SECRET), now=60.0 * minute).name == "lab"


def test_no_key_at_all_is_no_guess() -> None:
    """A page or a check without a key does not lock its address."""
    rules = access(anonymous="never")
    for _ in range(30):
        with pytest.raises(Unauthorized, match="is needed"):
            ask(rules, headers())
    assert ask(rules, bearer(SECRET)).name == "lab"


def test_made_up_keys_of_welcome_callers_are_no_guesses() -> None:
    """Libraries that must send some key go on for ever where none is needed."""
    rules = access()
    for _ in range(30):
        assert ask(rules, bearer("ollama"), "127.0.0.1").name == ANONYMOUS
    assert ask(rules, bearer(SECRET), "127.0.0.1").name == "lab"


def test_guesses_through_a_proxy_do_not_lock_this_machine() -> None:
    """Who is welcome is never refused for what came through an unknown proxy beside him."""
    rules = access()
    for _ in range(30):
        with pytest.raises(Unauthorized):
            ask(rules, headers(x_api_key="guess", X_Forwarded_For="1.2.3.4"), "127.0.0.1")
    assert ask(rules, bearer(SECRET), "127.0.0.1").name == "lab"


@UNTIMED
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.0, 30.0)), max_size=200))
def test_the_table_of_failures(steps: list[tuple[str, float]]) -> None:
    """It stays small, and nobody gets twenty look-ups within a minute."""
    failures, now = Failures(limit=10, size=3), 0.0
    looked_up: dict[str, list[float]] = {}
    for name, pause_s in steps:
        now += pause_s
        caller = access().caller(name, headers())
        rest_s = failures.rest_s(caller, now)
        assert 0.0 <= rest_s <= 60.0
        if rest_s == 0.0:
            failures.note(caller, now)
            looked_up.setdefault(name, []).append(now)
        assert len(failures._table) <= 3
    if len(looked_up) <= 3:  # nobody was forgotten
        for times in looked_up.values():
            assert all(b - a >= 60.0 for a, b in zip(times, times[19:], strict=False))


# -- Host -----------------------------------------------------------------------------------

OURS = [
    "localhost",
    "LocalHost:11435",
    "127.0.0.1",
    "127.0.0.1:11435",
    "[::1]:11435",
    "0.0.0.0:11435",
    "10.1.2.3",
    "192.168.1.5:80",
    "172.31.0.1",
    "[fd00::1]",
    "a.localhost",
    "nas.local",
    "x.y.internal",
    "localhost.",
    "",
    "mybox",
    "extra.example",
]
ONLY_ELSEWHERE = ["gpu-box", "gpu_box:80", "nas.lan", "nas.home.arpa", "8.8.8.8", "[2001:db8::1]"]
FOREIGN = [
    "evil.example",
    "evil.example:11435",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "local",
    "a@evil",
    "a, b",
    "a/../b",
    "a b",
    "evil.example:80:80",
    "x y.local",
    "bücher.local",
    "..local",
]


def is_refused(host: str, *, loopback: bool) -> bool:
    try:
        check_host(
            host,
            listener_loopback=loopback,
            local_names={"mybox"},
            allowed_hosts={"extra.example"},
        )
    except Forbidden:
        return True
    return False


def test_the_refusal_of_a_host() -> None:
    """Ollama's own refusal has no text; ours names the key that would help."""
    with pytest.raises(Forbidden) as refusal:
        check_host("evil.example", listener_loopback=True)
    assert refusal.value.text == ""
    with pytest.raises(Forbidden, match=r"server\.allowed_hosts"):
        check_host("evil.example", listener_loopback=False)


@pytest.mark.parametrize("host", OURS)
def test_our_names(host: str) -> None:
    """What Ollama takes for its own is ours on any listener."""
    assert not is_refused(host, loopback=True)
    assert not is_refused(host, loopback=False)


@pytest.mark.parametrize("host", ONLY_ELSEWHERE)
def test_names_of_a_network(host: str) -> None:
    """Beyond loopback a network's own names and any address will do; on loopback they are odd."""
    assert is_refused(host, loopback=True)
    assert not is_refused(host, loopback=False)


@pytest.mark.parametrize("host", FOREIGN)
def test_names_of_others(host: str) -> None:
    """A name that anybody can register, or no name at all, is refused."""
    assert is_refused(host, loopback=True)
    assert is_refused(host, loopback=False) is (host != "local")


@UNTIMED
@given(st.text(max_size=80))
def test_any_host_is_answered(host: str) -> None:
    """No Host header does more than be refused."""
    for loopback in (True, False):
        is_refused(host, loopback=loopback)


@UNTIMED
@given(
    st.from_regex(r"[a-z0-9-]{1,10}(\.[a-z0-9-]{1,10}){0,3}\.(com|example|org|dev)", fullmatch=True)
)
def test_public_names_are_refused(host: str) -> None:
    """No name under a public suffix passes, whatever its front looks like."""
    assert host == "extra.example" or is_refused(host, loopback=True)
    assert host == "extra.example" or is_refused(host, loopback=False)


def test_a_key_needs_no_host() -> None:
    """Only anonymous callers can be the victims of a rebound name."""
    rules = access(listener_loopback=False)
    rules.check_host("api.example.com", Principal("lab", Role.USER))
    with pytest.raises(Forbidden, match=r"server\.allowed_hosts"):
        rules.check_host("api.example.com", Principal(ANONYMOUS, Role.USER))
    access(allowed_hosts=("API.example.com",)).check_host(
        "api.example.com:443", Principal(ANONYMOUS, Role.USER)
    )


# -- admin ----------------------------------------------------------------------------------

POST = {"Host": "127.0.0.1:11435", "Content-Type": "application/json; charset=utf-8"}


def guard(
    method: str = "POST",
    peer: str = "127.0.0.1",
    principal: Principal = ADMIN,
    sent: dict[str, str] | None = None,
    **rules: Any,
) -> None:
    its, head = access(**rules), CIMultiDict(POST | (sent or {}))
    its.guard_admin(principal, its.caller(peer, head), method, head)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method": "GET"},
        {"method": "HEAD"},
        {"method": "GET", "sent": {"Content-Type": "text/plain"}},
        {"method": "GET", "sent": {"Origin": "http://localhost:3000"}},
        {"method": "GET", "principal": Principal(ANONYMOUS, Role.ADMIN)},
        {"sent": {"Origin": "http://127.0.0.1:11435"}},
        {"sent": {"Origin": "http://127.0.0.1:11435", "Sec-Fetch-Site": "same-origin"}},
        {"sent": {"Host": "localhost:11435"}},
        {"sent": {"Host": "mybox"}, "local_names": ("MyBox",)},
        {"sent": {"Host": "lb.example"}, "admin_hosts": ("lb.example",)},
        {"peer": "10.0.0.7", "admin_cidrs": ("10.0.0.0/8",)},
    ],
)
def test_the_admin_may(change: dict[str, Any]) -> None:
    """Reads and JSON changes from within reach pass."""
    guard(**change)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sent": {"Sec-Fetch-Site": "cross-site"}}, "Only a page of this balancer"),
        ({"sent": {"Sec-Fetch-Site": "same-site"}}, "Only a page of this balancer"),
        ({"peer": "10.0.0.7"}, "admin.allowed_cidrs"),
        ({"peer": ""}, "admin.allowed_cidrs"),
        ({"sent": {"X-Forwarded-For": "127.0.0.1"}}, "trusted_proxies"),
        ({"sent": {"Host": "evil.example"}}, "admin.allowed_hosts"),
        ({"sent": {"Host": "mybox"}}, "admin.allowed_hosts"),
        ({"sent": {"Host": ""}}, "admin.allowed_hosts"),
        ({"principal": Principal("lab", Role.USER)}, "role admin"),
        ({"principal": Principal("lab", Role.USER), "method": "GET"}, "role admin"),
        ({"method": "PUT"}, "POST"),
        ({"method": "DELETE"}, "POST"),
        ({"sent": {"Origin": "http://localhost:3000"}}, "page of this balancer"),
        ({"sent": {"Origin": "null"}}, "page of this balancer"),
        (
            {
                "method": "GET",
                "principal": Principal(ANONYMOUS, Role.ADMIN),
                "sent": {"Origin": "http://localhost:3000"},
            },
            "without an API key",
        ),
    ],
)
def test_others_may_not(change: dict[str, Any], why: str) -> None:
    """Each condition of the guard holds by itself; even a local page may not change anything."""
    with pytest.raises(Forbidden, match=why):
        guard(**change)


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
def test_a_change_is_declared_as_json(content_type: str) -> None:
    """What a form can send without a preflight changes nothing."""
    with pytest.raises(BadRequest):
        guard(sent={"Content-Type": content_type})


def test_metrics_need_reach_but_no_key() -> None:
    """A scraper within the networks passes without a key."""
    rules = access(admin_cidrs=("10.0.0.0/8",))
    sent = headers(Host="10.0.0.1:11435")
    rules.guard_reach(rules.caller("10.0.0.7", sent), sent)
    with pytest.raises(Forbidden):
        rules.guard_reach(rules.caller("127.0.0.1", sent), sent)


def test_nothing_shows_a_key() -> None:
    """Not even the rules themselves print what they were given."""
    rules = access()
    assert SECRET not in repr(rules) + json.dumps(repr(vars(rules)))


# -- whom a proxy names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "lines", "user"),
    [
        ("10.0.0.1", ["ann"], "ann"),
        ("10.0.0.1", [" ann "], "ann"),
        ("10.0.0.1", ["ann", "bob"], ""),
        ("10.0.0.1", [], ""),
        (OUTSIDER, ["ann"], ""),
        ("", ["ann"], ""),
    ],
)
def test_only_a_trusted_proxy_names_the_user(peer: str, lines: list[str], user: str) -> None:
    """And only one; whoever comes past it could call himself anything."""
    rules = access(trusted_proxies=["10.0.0.0/8"], user_header="X-User")
    sent = CIMultiDict([("x-user", line) for line in lines])
    assert rules.user(peer, sent) == user
    assert access(trusted_proxies=["10.0.0.0/8"]).user(peer, sent) == ""


def test_what_a_key_may_comes_with_its_owner() -> None:
    """Its priority and limits; anonymous callers have those of nobody in particular."""
    few = Allowance(rpm=1)
    digest = hashlib.sha256(SECRET.encode()).digest()
    lab = Key("lab", digest, priority=10, allowance=few)
    rules = access(keys=(lab,), anonymous="always", priority=60, allowance=Allowance(slots=2))
    owner = ask(rules, bearer(SECRET))
    assert (owner.priority, owner.allowance) == (10, few)
    nobody = ask(rules, headers())
    assert (nobody.priority, nobody.allowance) == (60, Allowance(slots=2))
