"""Questions to the one backend that speaks for the account: what goes up, and what if it fails."""

from __future__ import annotations

import json

import pytest

from balancer.sim.cloud import Cloud
from tests.e2e.stage import error_of, models, virtual
from tests.rig import running

pytestmark = pytest.mark.usefixtures("quiet")
QUERY = {"query": "who was it?", "max_results": 3}


@virtual
async def test_what_goes_up() -> None:
    """Path, body and the caller's program as they were; ours in Via; no key of a client's."""
    async with running(1, models=models(0.0)) as rig:
        rig.fleet["a"].cloud = Cloud()
        path = "/api/experimental/web_search"
        sent = {"Authorization": "Bearer of-a-client", "User-Agent": "ollama/0.33"}
        assert (await rig.ask("POST", path, QUERY, **sent)).status == 200
        seen = rig.fleet["a"].requests[-1]
        headers = {name.lower(): value for name, value in seen.headers}
        assert (seen.path, json.loads(seen.body)) == (path, QUERY)
        assert headers["user-agent"] == "ollama/0.33"
        assert "ollama-balancer" in headers["via"]
        assert "authorization" not in headers
        await rig.ask("DELETE", "/api/user/keys/c3No%2BeA==")
        assert rig.fleet["a"].requests[-1].path == "/api/user/keys/c3No+eA=="


@virtual
async def test_a_refusal_is_counted_as_one() -> None:
    """It is relayed; the log tells it from a failure of the backend."""
    async with running(1, models=models(0.0)) as rig:
        rig.fleet["a"].cloud = cloud = Cloud(signed_in=False)
        assert (await rig.ask("POST", "/api/me")).status == 401
        cloud.signed_in, cloud.refusal = True, (503, '{"error":"account unavailable"}')
        assert (await rig.ask("POST", "/api/me")).status == 503
        assert [call.outcome for call in rig.calls()] == ["rejected", "upstream_error"]
        assert [call.endpoint for call in rig.calls()] == ["me", "me"]


@virtual
async def test_who_cannot_be_reached_is_named() -> None:
    """503 with a reason, whether that is known already or found out now; nobody else is asked."""
    async with running(1, models=models(0.0)) as rig:
        rig.fleet["a"].faults.refuse()
        reply = await rig.ask("POST", "/api/me")
        assert reply.status == 503
        assert "a, which speaks for the account" in error_of(reply)
        await rig.events.until(lambda: not rig.balancer.pool.members["a"].health.up, 60.0)
        reply = await rig.ask("POST", "/api/me")
        assert reply.status == 503
        assert "is down" in error_of(reply)


@virtual
async def test_without_backends_there_is_no_account() -> None:
    """503, as nothing is known yet; cloud counts as off."""
    async with running(0) as rig:
        assert (await rig.ask("POST", "/api/me")).status == 503
        told = json.loads((await rig.ask("GET", "/api/status")).body)
        assert told == {"cloud": {"disabled": True, "source": "config"}}
