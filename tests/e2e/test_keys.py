"""API keys in use: in the path, for some models, for some time; and nowhere to be read."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from balancer.config import effective
from balancer.ops.log import LogWriter, configure
from balancer.sim.host import SimModel
from tests.e2e.stage import CHAT, HELLO, ROUTES, error_of, is_whole, models, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

USER, ADMIN, FEW, OLD = (f"key-of-{name}-{'0' * 16}" for name in ("user", "admin", "few", "old"))
KEYS = [
    {"name": "webui", "role": "user", "key": USER},
    {"name": "ops", "role": "admin", "key": ADMIN},
    {"name": "few", "role": "user", "key": FEW, "models": ["m", "gone", "gonesom"]},
    {"name": "old", "role": "user", "key": OLD, "expires": "2020-01-01"},
]
PLACES = ["bearer", "x-api-key", "path"]
LOCKED: dict[str, Any] = {
    "auth.keys": KEYS,
    "auth.anonymous": "never",
    "auth.accept": PLACES,
}


def bearer(key: str) -> dict[str, str]:
    """The usual way to show a key."""
    return {"Authorization": f"Bearer {key}"}


def told(reply: Reply) -> Any:
    """The answer as JSON."""
    return json.loads(reply.body)


# -- in the path ----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["chat", "chat, streamed", "v1 chat, streamed", "v1 messages"])
@virtual
async def test_a_key_in_the_path_opens(route: str) -> None:
    """It is the base of every dialect; what libraries send besides is passed over."""
    path, body = ROUTES[route]
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        await rig.warm("a", "m")
        for more in ({}, bearer("ollama"), {"x_api_key": "made up"}):
            assert is_whole(await rig.ask("POST", f"/k/{USER}{path}", body, **more), path)
        assert {call.key for call in rig.calls()} == {"webui"}
        assert {call.path for call in rig.calls()} == {f"/k/***{path}"}
        assert {seen.path for seen in rig.forwarded()} == {path}
        for wrong in (f"/k/{USER}x{path}", f"/k/{path}", f"/K/{USER}{path}", f"{path}/k/{USER}"):
            assert (await rig.ask("POST", wrong, body)).status in (400, 401)


@virtual
async def test_what_comes_first_comes_under_a_key_too() -> None:
    """Of Ollama's clients the root, of browsers a preflight, of ours the pages."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        for path in (f"/k/{USER}/", f"/k/{USER}"):
            assert (await rig.ask("GET", path)).body == b"Ollama is running"
        assert (await rig.ask("HEAD", f"/k/{USER}/")).status == 200
        assert (await rig.ask("GET", f"/k/{USER}/v1/models/m%3Alatest")).status == 200
        page = {"Origin": "http://localhost:1", "Access_Control_Request_Method": "POST"}
        asked = await rig.ask("OPTIONS", "/k/whatever/api/chat", None, **page)
        assert (asked.status, asked.get("allow")) == (204, "POST")
        assert (await rig.ask("GET", f"/k/{ADMIN}/_balancer/status")).status == 200
        assert (await rig.ask("GET", f"/k/{USER}/_balancer/status")).status == 403
        assert (await rig.ask("GET", f"/k/{USER}/nowhere")).status == 404


@virtual
async def test_where_paths_hold_no_keys_there_is_no_such_path() -> None:
    """By default; and the log says which setting it is."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("GET", f"/k/{USER}/api/tags")
        assert (reply.status, reply.body) == (404, b"404 page not found")
        (call,) = rig.calls()
        assert (call.path, "auth.accept" in call.error) == ("/k/***/api/tags", True)


@virtual
async def test_only_the_metrics_need_no_key() -> None:
    """Whatever else is called so does."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        assert (await rig.ask("GET", "/metrics")).status == 200
        for path in ("/v1/metrics", "/api/metrics", "/metrics/", "/metrics/x", "/k/x/metricsx"):
            for method in ("GET", "POST"):
                assert (await rig.ask(method, path, CHAT)).status == 401, path


# -- what a key is for ----------------------------------------------------------------------------

CALLS = {name: call for name, call in ROUTES.items() if "embed" not in name}


@pytest.mark.parametrize("route", [*CALLS, "other", "count"])
@virtual
async def test_a_key_is_for_its_models_alone(route: str) -> None:
    """Others are refused in the caller's dialect, and no host hears of it."""
    more: dict[str, tuple[str, dict[str, Any]]] = {
        "other": ("/v1/new/thing", {"model": "m"}),
        "count": ("/v1/messages/count_tokens", {"model": "m", "messages": HELLO}),
    }
    path, body = (CALLS | more)[route]
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        for name in ("other", "OTHER:latest", "library/other", "evil.example/library/m"):
            refused = await rig.ask("POST", path, body | {"model": name}, **bearer(FEW))
            assert refused.status == 403
            assert "'few' is not for the model" in error_of(refused)
            assert isinstance(told(refused)["error"], dict) == path.startswith("/v1/")
        assert rig.forwarded() == []
        if route in CALLS:
            assert is_whole(await rig.ask("POST", path, body, **bearer(FEW)), path)
            everything = body | {"model": "other"}
            assert is_whole(await rig.ask("POST", path, everything, **bearer(USER)), path)


@virtual
async def test_a_key_sees_its_models_alone() -> None:
    """Listed, looked up and described; for others every list is as ever, byte by byte."""
    async with running(2, models=models(0.0), config=LOCKED) as rig:
        await rig.warm("a", "m")
        await rig.warm("a", "other")
        seen: dict[str, list[str]] = {}
        for path, rows, name in (
            ("/api/tags", "models", "name"),
            ("/api/ps", "models", "model"),
            ("/v1/models", "data", "id"),
        ):
            few, user = [await rig.ask("GET", path, None, **bearer(key)) for key in (FEW, USER)]
            seen[path] = [row[name] for row in told(few)[rows]]
            assert [row for row in told(user)[rows] if row[name] == "m:latest"] == told(few)[rows]
            assert len(told(user)[rows]) > len(told(few)[rows])
            assert few.get("content-type") == user.get("content-type")
            assert few.body.endswith(b"\n") == user.body.endswith(b"\n")
        assert set(map(tuple, seen.values())) == {("m:latest",)}
        for model, status in (("m", 200), ("other", 403), ("gone", 404), ("nobody", 403)):
            asked = await rig.ask("POST", "/api/show", {"model": model}, **bearer(FEW))
            found = await rig.ask("GET", f"/v1/models/{model}", None, **bearer(FEW))
            assert (asked.status, found.status) == (status, status), model
        assert (await rig.ask("GET", "/v1/models/%20", None, **bearer(FEW))).status == 404


@virtual
async def test_no_hint_names_a_model_of_others() -> None:
    """The closest name is told to those who may use it."""
    named = (SimModel("gonesome"), SimModel("m"))
    async with running(1, models=named, config=LOCKED) as rig:
        for key, hinted in ((USER, True), (FEW, False)):
            for path, body in (("/api/chat", CHAT), ("/api/show", {})):
                reply = await rig.ask("POST", path, body | {"model": "gonesom"}, **bearer(key))
                assert (reply.status, b"gonesome" in reply.body) == (404, hinted), path


@virtual
async def test_no_hint_for_an_admin_of_some_models_names_others() -> None:
    """Also where it is about an unload, which the catalogue answers."""
    few = {"name": "half", "role": "admin", "key": FEW, "models": ["m", "gonesom"]}
    named = (SimModel("gonesome"), SimModel("m"))
    async with running(1, models=named, config=LOCKED | {"auth.keys": [few]}) as rig:
        body = {"model": "gonesom", "keep_alive": 0}
        reply = await rig.ask("POST", "/api/generate", body, **bearer(FEW))
        assert (reply.status, b"gonesome" in reply.body) == (404, False)


@virtual
async def test_management_keeps_to_the_models_of_a_key() -> None:
    """An admin's key may be for some models, too: also as what another is made from."""
    few = {"name": "half", "role": "admin", "key": FEW, "models": ["m*"]}
    async with running(1, models=models(0.0), config=LOCKED | {"auth.keys": [few]}) as rig:
        for method, path, body in (
            ("DELETE", "/api/delete", {"model": "other"}),
            ("POST", "/api/pull", {"model": "other"}),
            ("POST", "/api/copy", {"source": "other", "destination": "m2"}),
            ("POST", "/api/copy", {"source": "m", "destination": "taken"}),
            ("POST", "/api/create", {"model": "m2", "from": "other"}),
            ("POST", "/api/generate", {"model": "other", "keep_alive": 0}),
        ):
            refused = await rig.ask(method, path, body, **bearer(FEW))
            assert (refused.status, "is not for" in error_of(refused)) == (403, True), body


@virtual
async def test_an_old_key_is_none() -> None:
    """Its owner is told, by name; it counts as no guess."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        for _ in range(12):
            refused = await rig.ask("GET", "/api/tags", None, **bearer(OLD))
            assert (refused.status, "'old' has expired" in error_of(refused)) == (401, True)


@virtual
async def test_the_keys_file_counts_from_the_next_reload(tmp_path: Path) -> None:
    """A key comes and goes without a restart; a faulty line changes nothing."""
    file = tmp_path / "keys"
    line = f"web user sha256:{hashlib.sha256(USER.encode()).hexdigest()}"
    boss = f"ops admin {ADMIN}\n"
    file.write_text(boss)
    config = {"auth.keys_file": str(file), "auth.anonymous": "never"}

    async with running(1, models=models(0.0), config=config) as rig:

        async def after(text: str) -> tuple[int, int]:
            file.write_text(boss + text)
            reload = await rig.ask(
                "POST", "/_balancer/reload", {}, Content_Type="application/json", **bearer(ADMIN)
            )
            asked = await rig.ask("GET", "/api/tags", None, **bearer(USER))
            return reload.status, asked.status

        assert (await rig.ask("GET", "/api/tags", None, **bearer(USER))).status == 401
        assert await after(line) == (200, 200)
        assert await after("web user\n") == (422, 200)
        assert await after(f"{line} expires=2020-01-01") == (200, 401)
        assert await after("") == (200, 401)
        rig.config["auth.accept"] = ["path"]
        assert await after(line) == (200, 401)
        assert (await rig.ask("GET", f"/k/{USER}/api/tags")).status == 200


# -- nowhere to be read ---------------------------------------------------------------------------

CANARIES = tuple(f"canary{number}{'x' * 16}" for number in range(6))
BEARER, X_API, PATH, COOKIE, OTHER_KEY, REFERER = CANARIES
HOSTS_TOKEN, HOSTS_HEADER = "canary-of-a-host-token", "canary-of-a-host-header"


async def send_everything(rig: Rig) -> bytes:
    """Canaries on every route, welcome or not; all that came back."""
    secrets = {
        "Cookie": f"session={COOKIE}",
        "api_key": OTHER_KEY,
        "Proxy_Authorization": OTHER_KEY,
        "X_Forwarded_Access_Token": OTHER_KEY,
        "X_Auth_Request_Access_Token": OTHER_KEY,
        "Referer": f"http://127.0.0.1/k/{REFERER}/_balancer/",
    }
    ways: list[tuple[str, dict[str, str]]] = [
        ("", bearer(BEARER)),
        ("", {"x_api_key": X_API}),
        (f"/k/{PATH}", {}),
        (f"/K/{PATH}", {}),
        (f"/%6b/{PATH}", bearer(f"wrong-{BEARER}")),
        (f"/v1/k/{PATH}", {}),
    ]
    asked: list[tuple[str, str, Any]] = [("POST", *route) for route in ROUTES.values()]
    asked += [
        ("POST", "/v1/new/thing", {"model": "m"}),
        ("POST", "/v1/messages/count_tokens", {"model": "m", "messages": HELLO}),
        ("POST", "/api/show", {"model": "m", "verbose": True}),
        ("POST", "/api/pull", {"model": "m"}),
        ("POST", "/api/copy", {"source": "m", "destination": "m2"}),
        ("DELETE", "/api/delete", {"model": "m2"}),
        ("GET", "/api/tags", None),
        ("GET", "/nowhere", None),
        ("GET", "/../x", None),
        ("GET", "/_balancer/status", None),
        ("GET", "/_balancer/", None),
        ("GET", "/metrics", None),
    ]
    got = b""
    for prefix, headers in ways:
        for method, path, body in asked:
            reply = await rig.ask(method, f"{prefix}{path}", body, **headers, **secrets)
            got += reply.body + repr(reply.headers).encode()
    for raw in (
        b"GET /k/%s/api/tags HTTP/7.7\r\n\r\n",
        b"GET /k/%s/api/tags HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET http://127.0.0.1/k/%s/api/tags HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET http://elsewhere/k/%s/api/tags HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /k/%s/api/tags HTTP/1.1\r\nHost: x\r\nExpect: magic\r\n\r\n",
        b"POST /k/%s/api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    ):
        reply = await rig.raw(raw % PATH.encode())
        got += reply.body + repr(reply.headers).encode()
    return got


@pytest.mark.parametrize("anonymous", ["never", "loopback"])
@virtual
async def test_no_credential_is_told_or_passed_on(anonymous: str) -> None:
    """Clients' keys reach no host; they and the hosts' own stand in nothing that anybody reads."""
    out = io.StringIO()
    keys = [
        {"name": f"k{number}", "role": "admin", "key": key}
        for number, key in enumerate((BEARER, X_API, PATH))
    ]
    config = {"auth.keys": keys, "auth.anonymous": anonymous, "auth.accept": PLACES}
    backend = {
        "auth": {"type": "bearer", "token": HOSTS_TOKEN},
        "headers": {"X-Team": HOSTS_HEADER},
    }
    async with running(2, models=models(0.0), config=config, backend=backend) as rig:
        log = configure("debug", "json", stream=out, is_tty=False, env={}, wall=lambda: 1e9)
        rig.balancer.bus.subscribe(LogWriter(log))
        got = await send_everything(rig)
        rig.fleet["b"].faults.refuse()
        await rig.ask("POST", "/api/chat", CHAT, **bearer(BEARER))
        pages = ["/metrics", "/_balancer/status", "/_balancer/", "/_balancer/explain?model=m"]
        for path in pages:
            reply = await rig.ask("GET", path, None, **bearer(BEARER))
            assert reply.status == 200, path
            got += reply.body + repr(reply.headers).encode()
        got += repr(effective(rig.balancer.config)).encode() + repr(rig.balancer.config).encode()
        got += repr(rig.events.events).encode() + out.getvalue().encode()
        assert len(rig.forwarded()) > 40, "it was worth looking"
        assert out.getvalue().count("/k/***") > 40
        for canary in (*CANARIES, HOSTS_TOKEN, HOSTS_HEADER):
            assert canary.encode() not in got, canary
        seen = [one for host in rig.fleet for one in host.requests]
        for one in seen:
            sent = f"{one.method} {one.path} {one.headers} {one.body!r}"
            assert not [canary for canary in CANARIES if canary in sent], sent
        assert {dict(one.headers).get("Authorization") for one in rig.forwarded()} == {
            f"Bearer {HOSTS_TOKEN}"
        }


# -- less to be read ------------------------------------------------------------------------------


@virtual
async def test_minimal_headers_tell_users_of_no_host() -> None:
    """Neither good answers nor bad ones; admins are told, and a reload turns it on."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        await rig.warm("a", "m")

        async def heard(key: str) -> set[str]:
            reply = await rig.ask("POST", "/api/chat", CHAT, **bearer(key))
            return {name.lower() for name, _ in reply.headers if name.lower().startswith("x-")}

        assert "x-balancer-backend" in await heard(USER)
        rig.config["server.headers"] = "minimal"
        rig.balancer.reload_now()
        assert await heard(USER) == {"x-request-id", "x-accel-buffering"}
        assert "x-balancer-backend" in await heard(ADMIN)
        rig.fleet["a"].faults.refuse()
        for streamed, status in ((False, 503), (True, 200)):
            texts = []
            for key in (USER, ADMIN):
                body = CHAT | {"stream": streamed}
                reply = await rig.ask("POST", "/api/chat", body, **bearer(key))
                assert reply.status == status
                texts.append(json.loads(reply.body.splitlines()[-1])["error"])
                assert "a: " in rig.calls()[-1].error
            assert ["a: " in text for text in texts] == [False, True]
