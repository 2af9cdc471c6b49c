"""The status page as it is served: what is in it, how it is guarded, and to whom."""

from __future__ import annotations

import asyncio
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from balancer.cli import app
from balancer.core.dialect import Rendered
from balancer.core.domain import Switch
from balancer.core.errors import Forbidden
from balancer.ops import recent
from balancer.ops.dashboard import ASSETS, FOLDER, Dashboard
from balancer.ops.feed import Feed
from balancer.ops.log import SWITCHED
from balancer.sim.host import SimModel
from tests.e2e.stage import models, virtual
from tests.rig import running

pytestmark = pytest.mark.usefixtures("quiet")

HOSTILE = "<img src=x onerror=alert(1)>\"'&"
LOCKED: dict[str, Any] = {
    "auth.keys": [{"name": "ops", "role": "admin", "key": "key-of-an-admin-of-it-all"}],
    "auth.anonymous": "never",
}


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("path", ["", *ASSETS])
@virtual
async def test_everything_is_served_under_guard(path: str) -> None:
    """Only our own files may be loaded, nobody may frame the page, and types are not guessed."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("GET", f"/_balancer/{path}")
        assert reply.status == 200
        policy = reply.get("content-security-policy") or ""
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert reply.get("x-content-type-options") == "nosniff"
        assert reply.get("cache-control") == ("no-cache" if path else "no-store")
        assert (reply.get("content-type") or "").startswith(
            ASSETS.get(path, "text/html").partition(";")[0]
        )


@virtual
async def test_files_are_not_sent_twice() -> None:
    """A browser asks whether its copy is still the same."""
    async with running(1, models=models(0.0)) as rig:
        for name in ASSETS:
            first = await rig.ask("GET", f"/_balancer/{name}")
            again = await rig.ask(
                "GET", f"/_balancer/{name}", If_None_Match=first.get("etag") or ""
            )
            assert (again.status, again.body) == (304, b"")


@virtual
async def test_without_the_slash_one_is_led_to_it() -> None:
    """By a relative address, which holds behind a proxy too."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("GET", "/_balancer")
        assert (reply.status, reply.get("location")) == (308, "_balancer/")


@virtual
async def test_the_page_can_be_read_without_javascript() -> None:
    """Hosts, models, what is wrong, and a reload by itself; buttons that could do nothing hide."""
    async with running(2, models=models(0.0), dead=["gone"]) as rig:
        await rig.warm("a", "m")
        await asyncio.sleep(20.0)
        page = Reader((await rig.ask("GET", "/_balancer/")).body.decode())
        assert ("meta", {"http-equiv": "refresh", "content": "5"}) in page.tags
        states = {
            attrs["data-key"]: attrs["data-state"]
            for tag, attrs in page.tags
            if tag == "li" and attrs.get("class") == "card" and attrs["data-key"]
        }
        assert states == {"gone": "down", "a": "up", "b": "up"}
        assert "cannot connect: connection refused" in page.text
        assert "m:latest" in page.text
        assert f"OLLAMA_HOST=http://127.0.0.1:{rig.port}" in page.text
        assert all("hidden" in attrs for _, attrs in page.tags if attrs.get("class") == "acts")


@virtual
async def test_every_event_has_words() -> None:
    """Those of backends, of the configuration, and of each order, as `Recent` names them."""
    orders = ("pull", "push", "create", "copy", "delete", "blob")
    source = inspect.getsource(recent)
    names = (
        set(re.findall(r"_add\(\s*\"(\w+)\"", source)) | {"backend_down"} | set(SWITCHED.values())
    )
    names |= {f"breaker_{word}" for word in ("opened", "reopened", "closed")}
    async with running(1, models=models(0.0)) as rig:
        page = Reader((await rig.ask("GET", "/_balancer/")).body.decode())
    worded = {attrs["data-event"] for tag, attrs in page.tags if tag == "i"}
    assert worded == names | {f"model_{order}" for order in orders}


@virtual
async def test_the_page_names_commands_that_exist() -> None:
    """Whoever copies one from it gets no error."""
    async with running(1, models=models(0.0)) as rig:
        page = Reader((await rig.ask("GET", "/_balancer/")).body.decode())
    lines = re.findall(r"ollama-balancer ([a-z]+)(?: ([a-z]+))?", page.text)
    assert ("backends", "drain") in lines
    commands: Any = get_command(app)
    for name, inner in lines:
        command = commands.get_command(None, name)
        assert command is not None, name
        assert inner in getattr(command, "commands", {inner}), inner


@virtual
async def test_nothing_in_the_page_is_inline_or_from_elsewhere() -> None:
    """It works in a sealed network, and the policy forbids nothing that it needs."""
    async with running(1, models=models(0.0)) as rig:
        body = (await rig.ask("GET", "/_balancer/")).body.decode()
        page = Reader(body)
        for tag, attrs in page.tags:
            assert not [name for name in attrs if name.startswith("on") or name == "style"], tag
            address = attrs.get("src") or attrs.get("href") or ""
            assert address.startswith("#") or address in ("", *ASSETS), address
        assert "<style" not in body
        assert not re.search(r"<script[^>]*>[^<]", body)
        for name in ASSETS:
            text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/", "")
            assert not re.search(r"https?://|url\(|@import|innerHTML|insertAdjacent|eval\(", text)


@virtual
async def test_what_backends_say_stays_text() -> None:
    """A model and an error that would be markup are shown as they are."""
    model = SimModel(f"evil/{'x' * 8}")
    async with running(1, models=[model]) as rig:
        real = rig.balancer.admin.state

        def poisoned() -> dict[str, Any]:
            state = real()
            (backend,) = state["backends"]
            backend["models"][0]["name"] = backend["name"] = HOSTILE
            backend |= {"error": HOSTILE, "up": False, "trouble": HOSTILE, "version": HOSTILE}
            backend["breaker"] |= {"state": "open", "reason": HOSTILE}
            state["queue"]["per_model"] = {HOSTILE: 1}
            state["config"]["rejected"] = [HOSTILE]
            row = {"event": HOSTILE, "backend": HOSTILE, "model": HOSTILE, "text": HOSTILE}
            state["recent"] = [{"at": 1.0, "count": 2, **row}]
            return state

        board = Dashboard(poisoned, Feed(poisoned, lambda: 0.0))
        rig.balancer.front._pages["GET", "/_balancer/"] = board.page
        page = Reader((await rig.ask("GET", "/_balancer/")).body.decode())
        assert page.text.count(HOSTILE) > 10
        assert [attrs for tag, attrs in page.tags if tag == "img"] == [
            {"src": "page.svg", "alt": "", "width": "28", "height": "28"}
        ]


@virtual
async def test_who_may_not_see_it_is_told_how() -> None:
    """In a page that a browser shows, with the status that programs look at; escaped."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        refused = await rig.ask("GET", "/_balancer/")
        assert (refused.status, refused.get("www-authenticate")) == (401, "Bearer")
        assert (refused.get("content-type") or "").startswith("text/html")
        assert "An API key is needed" in Reader(refused.body.decode()).text
        for path in ("events", *ASSETS):
            assert (await rig.ask("GET", f"/_balancer/{path}")).status == 401
        key = {"Authorization": "Bearer key-of-an-admin-of-it-all"}
        assert (await rig.ask("GET", "/_balancer/", None, **key)).status == 200
    board = Dashboard(dict, Feed(dict, lambda: 0.0))
    told = board.refused(Rendered(403, (("Content-Type", "x"),), b""), Forbidden(HOSTILE))
    assert HOSTILE in Reader(told.body.decode()).text
    assert b"<img" not in told.body


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"Origin": "http://{here}", "Content_Type": "application/json"}, 200),
        ({"Origin": "http://localhost:3000", "Content_Type": "application/json"}, 403),
        ({"Origin": "null", "Content_Type": "application/json"}, 403),
        ({"Origin": "http://{here}", "Content_Type": "text/plain"}, 400),
        ({"Origin": "http://{here}", "Content_Type": "application/x-www-form-urlencoded"}, 400),
    ],
)
@virtual
async def test_only_this_page_may_press_its_buttons(sent: dict[str, str], status: int) -> None:
    """A page from elsewhere cannot make the operator's browser do it, nor can a form."""
    async with running(1, models=models(0.0)) as rig:
        headers = {name: text.format(here=f"127.0.0.1:{rig.port}") for name, text in sent.items()}
        reply = await rig.ask("POST", "/_balancer/backends/a/drain", {}, **headers)
        assert reply.status == status
        drained = rig.balancer.pool.members["a"].switch is Switch.DRAINING
        assert drained == (status == 200)


@virtual
async def test_it_can_be_switched_off() -> None:
    """Then there is no page and no stream, and status goes on."""
    async with running(1, models=models(0.0), config={"dashboard.enabled": False}) as rig:
        for path in ("", "events", *ASSETS):
            assert (await rig.ask("GET", f"/_balancer/{path}")).status == 404
        assert (await rig.ask("GET", "/_balancer/status")).status == 200


def test_it_stands_where_packages_are_built_from() -> None:
    """Everything the page needs lies in one folder of the package."""
    assert {path.name for path in FOLDER.iterdir()} == {*ASSETS, "page.html", "refused.html"}
    assert FOLDER.is_relative_to(Path(__file__).parents[2] / "balancer")
