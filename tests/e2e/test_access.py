"""Who may do what: keys, roles, the admin's pages, and what anybody may see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.stage import CHAT, ROUTES, error_of, is_whole, models, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

USER, ADMIN, WRONG = (
    "key-of-a-user-of-sixteen",
    "key-of-an-admin-of-it-all",
    "key-of-somebody-else",
)
KEYS = [
    {"name": "webui", "role": "user", "key": USER},
    {"name": "ops", "role": "admin", "key": ADMIN},
]
LOCKED: dict[str, Any] = {"auth.keys": KEYS, "auth.anonymous": "never"}
JSON = {"Content_Type": "application/json"}
UNLOAD = {"model": "m", "keep_alive": 0}


def bearer(key: str) -> dict[str, str]:
    """The usual way to show a key."""
    return {"Authorization": f"Bearer {key}"}


def refusal(reply: Reply, path: str) -> str:
    """The text of an error of ours; fails if it is not in the path's own dialect."""
    told = json.loads(reply.body)
    if path.startswith("/v1/messages"):
        assert told["type"] == "error"
    else:
        assert isinstance(told["error"], dict) == path.startswith("/v1/")
    return error_of(reply)


@pytest.mark.parametrize(
    "sent", [{}, bearer(WRONG), {"x_api_key": WRONG}, {"Authorization": "Basic eA=="}]
)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/api/tags"])
@virtual
async def test_no_key_no_entry(path: str, sent: dict[str, str]) -> None:
    """None or a wrong one: 401 in the dialect of the path, and no host hears of it."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        method = "GET" if path == "/api/tags" else "POST"
        reply = await rig.ask(method, path, CHAT if method == "POST" else None, **sent)
        assert reply.status == 401
        assert "API key" in refusal(reply, path)
        assert WRONG.encode() not in reply.body
        assert rig.forwarded() == []
        (told,) = rig.calls()
        assert (told.outcome, told.key) == ("rejected", "anonymous")


@pytest.mark.parametrize(
    "sent", [bearer(USER), {"x_api_key": USER}, {"Authorization": f"bearer {USER}"}]
)
@pytest.mark.parametrize("route", ["chat", "v1 chat, streamed", "embed"])
@virtual
async def test_a_key_opens(route: str, sent: dict[str, str]) -> None:
    """As a bearer or as x-api-key; its name is told, itself never goes to a host."""
    path, body = ROUTES[route]
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        assert is_whole(await rig.ask("POST", path, body, **sent), path)
        assert rig.calls()[0].key == "webui"
        (seen,) = rig.forwarded()
        assert not any(USER in value for _, value in seen.headers)
        assert USER.encode() not in seen.body


@virtual
async def test_a_role_is_needed() -> None:
    """A user's key calls and reads; it neither reloads, looks behind the scenes nor unloads."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        asked: list[tuple[str, str, Any]] = [
            ("POST", "/_balancer/reload", {}),
            ("GET", "/_balancer/status", None),
            ("POST", "/api/generate", UNLOAD),
            ("POST", "/api/push", {"model": "m", "stream": False}),
            ("DELETE", "/api/delete", {"model": "other"}),
        ]
        await rig.warm("a", "m")
        for method, path, body in asked:
            refused = await rig.ask(method, path, body, **JSON, **bearer(USER))
            assert (refused.status, "role admin" in refusal(refused, path)) == (403, True), path
            none = await rig.ask(method, path, body, **JSON)
            assert none.status == 401, path
        assert rig.loaded() == {"a": ["m"]}
        statuses = []
        for method, path, body in asked:
            statuses.append((await rig.ask(method, path, body, **JSON, **bearer(ADMIN))).status)
        assert statuses[:3] + statuses[4:] == [200, 200, 200, 200]
        assert statuses[3] not in (401, 403)
        assert rig.loaded() == {"a": []}
        assert (await rig.ask("GET", "/api/tags", None, **bearer(USER))).status == 200


@virtual
async def test_this_machine_is_the_admin() -> None:
    """Without a word of configuration a caller on loopback may do everything."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        assert (await rig.ask("GET", "/_balancer/status")).status == 200
        assert (await rig.ask("POST", "/_balancer/reload", {}, **JSON)).status == 200
        assert (await rig.ask("POST", "/api/generate", UNLOAD)).status == 200
        assert (await rig.ask("GET", "/metrics")).status == 200
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT, **bearer("ollama")), "/api/chat")
        assert {call.key for call in rig.calls()} == {"anonymous"}


@virtual
async def test_behind_a_proxy_nobody_is_local() -> None:
    """A forwarded call comes from elsewhere: no entry, unless a trusted proxy says whence."""
    forwarded = {"X_Forwarded_For": "203.0.113.7"}
    async with running(1, models=models(0.0)) as rig:
        refused = await rig.ask("POST", "/api/chat", CHAT, **forwarded)
        assert refused.status == 401
        assert "server.trusted_proxies" in error_of(refused)
        assert (await rig.ask("GET", "/_balancer/status", None, **forwarded)).status in (401, 403)
    trusting: dict[str, Any] = {
        "server.trusted_proxies": ["127.0.0.0/8"],
        "auth.anonymous": ["203.0.113.0/24"],
    }
    async with running(1, models=models(0.0), config=trusting) as rig:
        reply = await rig.ask("POST", "/api/chat", CHAT, **forwarded)
        assert is_whole(reply, "/api/chat")
        assert rig.calls()[0].client == "203.0.113.7"
        assert dict(rig.forwarded()[0].headers)["X-Forwarded-For"] == "203.0.113.7"
        unload = await rig.ask("POST", "/api/generate", UNLOAD, **forwarded)
        assert unload.status == 403
        elsewhere = await rig.ask("POST", "/api/chat", CHAT, X_Forwarded_For="198.51.100.1")
        assert elsewhere.status == 401


@pytest.mark.parametrize("path", ["/_balancer/live", "/_balancer/ready"])
@pytest.mark.parametrize(
    "sent", [{}, bearer(WRONG), {"X_Forwarded_For": "203.0.113.7"}, {"Origin": "https://x.example"}]
)
@virtual
async def test_open_pages_answer_anybody(path: str, sent: dict[str, str]) -> None:
    """Whoever asks, from wherever: probes have no keys."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        assert (await rig.ask("GET", path, None, **sent)).status == 200


@virtual
async def test_the_metrics_guard() -> None:
    """From where they may be reached they need no key; from elsewhere a key does not help."""
    more = LOCKED | {"server.trusted_proxies": ["127.0.0.0/8"], "auth.anonymous": "loopback"}
    async with running(1, models=models(0.0), config=more) as rig:
        assert (await rig.ask("GET", "/metrics")).status == 200
        far = {"X_Forwarded_For": "203.0.113.7"}
        refused = await rig.ask("GET", "/metrics", None, **far, **bearer(ADMIN))
        assert (refused.status, "admin.allowed_cidrs" in error_of(refused)) == (403, True)
        rebound = await rig.raw(b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert rebound.status == 403


@virtual
async def test_a_scraper_needs_no_key() -> None:
    """Where everybody needs a key, the metrics still answer within admin.allowed_cidrs."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        assert (await rig.ask("GET", "/metrics")).status == 200


@virtual
async def test_a_page_cannot_make_a_browser_steer() -> None:
    """Changes need a POST declared as JSON, from no other origin."""
    async with running(1, models=models(0.0)) as rig:

        async def steer(method: str = "POST", **headers: str) -> int:
            return (await rig.ask(method, "/_balancer/reload", {}, **headers)).status

        assert await steer(**JSON) == 200
        assert await steer() == 400
        assert await steer(Content_Type="text/plain") == 400
        assert await steer(Origin="http://localhost:3000", **JSON) == 403
        assert await steer(Origin=f"http://127.0.0.1:{rig.port}", **JSON) == 200
        assert await steer("GET") in (404, 405)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("box.local", 200),
        ("evil.example", 403),
        ("127.0.0.1.nip.io", 403),
    ],
)
@virtual
async def test_a_rebound_name_is_refused(host: str, status: int) -> None:
    """Without a key only names that no foreign page could point at us; else an empty 403."""
    async with running(1, models=models(0.0)) as rig:
        reply = await asked_as(rig, host)
        assert reply.status == status
        assert status == 200 or reply.body == b""


@virtual
async def test_a_key_opens_under_any_name() -> None:
    """A foreign page has no key to send."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        head = f"GET /api/tags HTTP/1.1\r\nHost: ai.example\r\nx-api-key: {USER}\r\n\r\n"
        assert (await rig.raw(head.encode())).status == 200


async def asked_as(rig: Rig, host: str) -> Reply:
    """The list, asked for under a name."""
    return await rig.raw(f"GET /api/tags HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


@virtual
async def test_guessing_is_slowed_down() -> None:
    """After ten wrong keys the address hears that it must rest; the right one is let in."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        for number in range(10):
            assert (
                await rig.ask("GET", "/api/tags", None, **bearer(f"guess-{number}"))
            ).status == 401
        assert (await rig.ask("GET", "/api/tags", None, **bearer(USER))).status == 200
        rested = await rig.ask("GET", "/api/tags", None, **bearer("guess"))
        assert (rested.status, "Too many" in error_of(rested)) == (401, True)
        assert 1 <= int(rested.get("retry-after") or 0) <= 60
