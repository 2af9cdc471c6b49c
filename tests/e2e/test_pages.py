"""Pages of other origins, as a browser lives it: preflight, request, and what it may read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.stage import CHAT, error_of, is_whole, models, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

CHAT_APP, LOCAL, EVIL = "https://chat.example", "http://localhost:3000", "https://evil.example"
KEY = "key-of-the-chat-app-itself"
SDK = "authorization,content-type,x-stainless-helper-method,x-stainless-brand-new"
ANTHROPIC = "x-api-key,anthropic-version,anthropic-dangerous-direct-browser-access,content-type"
WHOLE = CHAT | {"stream": False}


class Browser:
    """Does what a browser does for a page; raises PermissionError where the page sees nothing."""

    def __init__(self, rig: Rig, origin: str, *, credentials: bool = False) -> None:
        self.rig = rig
        self.origin = origin
        self.credentials = credentials
        self.asked = 0

    async def fetch(
        self, path: str, body: Any = None, method: str = "POST", /, **headers: str
    ) -> Reply:
        """The answer, if the page may read it."""
        names = {name.replace("_", "-").lower() for name in headers}
        simple = headers.get("Content_Type", "text/plain") in ("text/plain", "multipart/form-data")
        unsafe = names - {"content-type"} if simple else names
        if unsafe or method not in ("GET", "HEAD", "POST"):
            await self._ask_first(path, method, unsafe)
        payload = None if body is None else json.dumps(body).encode()
        reply = await self.rig.ask(method, path, payload, Origin=self.origin, **headers)
        self._check(reply)
        return reply

    async def _ask_first(self, path: str, method: str, names: set[str]) -> None:
        self.asked += 1
        wanted = {"Access_Control_Request_Headers": ",".join(sorted(names))} if names else {}
        reply = await self.rig.ask(
            "OPTIONS",
            path,
            None,
            Origin=self.origin,
            Access_Control_Request_Method=method,
            **wanted,
        )
        self._check(reply)
        allowed = _listed(reply, "access-control-allow-headers")
        methods = _listed(reply, "access-control-allow-methods")
        if reply.status not in (200, 204) or names - allowed or method.lower() not in methods:
            raise PermissionError(f"preflight: {names - allowed}")

    def _check(self, reply: Reply) -> None:
        allowed = reply.get("access-control-allow-origin")
        if self.credentials:
            trusted = reply.get("access-control-allow-credentials") == "true"
            may = allowed == self.origin and trusted
        else:
            may = allowed in (self.origin, "*")
        if not may:
            raise PermissionError(f"{reply.status}")


def _listed(reply: Reply, name: str) -> set[str]:
    return {part.strip().lower() for part in (reply.get(name) or "").split(",")}


@virtual
async def test_a_page_of_this_machine_talks_to_us() -> None:
    """Stream and all, with the headers of the usual libraries; and may read who answered."""
    async with running(1, models=models(0.0)) as rig:
        page = Browser(rig, LOCAL)
        openai = dict.fromkeys(SDK.replace("-", "_").split(","), "x") | {
            "content_type": "application/json"
        }
        reply = await page.fetch("/v1/chat/completions", CHAT | {"stream": True}, **openai)
        assert is_whole(reply, "/v1/chat/completions")
        assert "x-balancer-backend" in _listed(reply, "access-control-expose-headers")
        claude = dict.fromkeys(ANTHROPIC.replace("-", "_").split(","), "x") | {
            "content_type": "application/json"
        }
        body = CHAT | {"max_tokens": 100}
        assert is_whole(await page.fetch("/v1/messages", body, **claude), "/v1/messages")
        listed = await page.fetch("/api/tags", None, "GET")
        assert (listed.status, listed.get("vary"), page.asked) == (200, "Origin", 2)
        assert not [
            name for seen in rig.forwarded() for name, _ in seen.headers if name == "Origin"
        ]


@virtual
async def test_a_page_can_read_why_it_was_refused() -> None:
    """Also where a key is wanted: without the headers it would see a bare network error."""
    config = {
        "auth.keys": [{"name": "chat", "key": KEY, "models": ["m"]}],
        "auth.anonymous": "never",
        "cors.allow_origins": [CHAT_APP],
    }
    async with running(1, models=models(0.0), config=config) as rig:
        page = Browser(rig, CHAT_APP)
        json_ = {"Content_Type": "application/json"}
        for key, status in (("wrong", 401), (KEY, 200)):
            more = json_ | {"Authorization": f"Bearer {key}"}
            assert (await page.fetch("/api/chat", WHOLE, **more)).status == status
        more = json_ | {"x_api_key": KEY}
        body = CHAT | {"model": "other", "max_tokens": 9}
        other = await page.fetch("/v1/messages", body, **more)
        assert (other.status, told(other)["error"]["type"]) == (403, "permission_error")
        assert (await page.fetch("/nowhere", None, "GET", **more)).status == 404
        assert (await page.fetch("/api/chat", WHOLE, "PUT", **more)).status == 405


def told(reply: Reply) -> Any:
    """The answer as JSON."""
    return json.loads(reply.body)


@virtual
async def test_a_foreign_page_gets_nothing() -> None:
    """Neither by asking first, nor by what a browser sends unasked: an empty 403, as Ollama."""
    async with running(1, models=models(0.0), config={"cors.allow_origins": [CHAT_APP]}) as rig:
        for origin in (EVIL, "null", f"{CHAT_APP}.evil.example", "chrome-extension://abc"):
            page = Browser(rig, origin)
            for path, body, method, headers in (
                ("/api/chat", WHOLE, "POST", {"Content_Type": "application/json"}),
                ("/api/chat", WHOLE, "POST", {"Content_Type": "text/plain"}),
                ("/api/tags", None, "GET", {}),
                ("/_balancer/status", None, "GET", {}),
                ("/metrics", None, "GET", {}),
            ):
                with pytest.raises(PermissionError):
                    await page.fetch(path, body, method, **headers)
            reply = await rig.ask("POST", "/api/chat", WHOLE, Origin=origin)
            assert (reply.status, reply.body) == (403, b"")
        assert rig.forwarded() == []


@virtual
async def test_a_form_of_a_page_that_may_call_does_nothing() -> None:
    """What was not asked first is no call; the reason can be read."""
    async with running(1, models=models(0.0), config={"cors.allow_origins": ["*"]}) as rig:
        for origin in (LOCAL, EVIL):
            page = Browser(rig, origin)
            for kind in ("text/plain", "multipart/form-data"):
                reply = await page.fetch("/api/chat", WHOLE, Content_Type=kind)
                assert (reply.status, page.asked) == (403, 0)
                assert "application/json" in error_of(reply)
        assert rig.forwarded() == []
        own = {"Origin": f"http://127.0.0.1:{rig.port}", "Content_Type": "text/plain"}
        assert is_whole(await rig.ask("POST", "/api/chat", WHOLE, **own), "/api/chat")


@virtual
async def test_every_page_may_call_but_never_steer() -> None:
    """Even with an asterisk: what the balancer tells of itself is for its own pages and keys."""
    async with running(1, models=models(0.0), config={"cors.allow_origins": ["*"]}) as rig:
        page = Browser(rig, EVIL)
        json_ = {"Content_Type": "application/json"}
        assert is_whole(await page.fetch("/api/chat", WHOLE, **json_), "/api/chat")
        assert (await page.fetch("/_balancer/status", None, "GET")).status == 403
        assert (await page.fetch("/_balancer/reload", {}, **json_)).status == 403
        trusted = Browser(rig, EVIL, credentials=True)
        with pytest.raises(PermissionError):
            await trusted.fetch("/api/tags", None, "GET")
        rebound = await rig.raw(
            b"GET /api/tags HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n\r\n"
        )
        assert rebound.status == 403


@virtual
async def test_pages_are_let_in_and_out_by_a_reload() -> None:
    """Named ones with credentials; switched off, not even those of this machine."""
    async with running(1, models=models(0.0)) as rig:
        chat, local = Browser(rig, CHAT_APP, credentials=True), Browser(rig, LOCAL)

        async def may(page: Browser) -> bool:
            try:
                return (await page.fetch("/api/tags", None, "GET", x_api_key="x")).status == 200
            except PermissionError:
                return False

        assert (await may(chat), await may(local)) == (False, True)
        rig.config |= {"cors.allow_origins": [CHAT_APP], "cors.allow_credentials": True}
        assert rig.balancer.reload_now().problems == ()
        assert (await may(chat), await may(local)) == (True, True)
        rig.config["cors.enabled"] = False
        assert rig.balancer.reload_now().problems == ()
        assert (await may(chat), await may(local)) == (False, False)
        assert (await rig.ask("GET", "/api/tags")).status == 200
