"""The status page in a real browser, before a real balancer and simulated hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from balancer.core.domain import Switch
from balancer.sim.fleet import standard_models
from balancer.sim.host import SimModel
from tests import needs
from tests.e2e.stage import Asking
from tests.rig import Rig, running

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tests.browser import Stage

pytestmark = [
    pytest.mark.compat,
    # raised inside selenium, at the end of the process, where nobody could act on it
    pytest.mark.filterwarnings("ignore::ResourceWarning:selenium"),
]

HOSTILE: Final = "<img src=x onerror=\"document.title='owned'\">"
QUICK: Final[dict[str, Any]] = {"health.interval": "200ms", "health.timeout": "2s"}
ENDLESS: Final = SimModel("endless", endless=True, words=(" on", " and", " off", " then"))

# Every text that can be seen, and its contrast with what is behind it.
CONTRAST: Final = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const [r, g, b, a = 1] = rgb(getComputedStyle(at).backgroundColor);
    if (a === 1) return [r, g, b];
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !element.checkVisibility() || element.closest(".skip")) continue;
  const [a, b] = [light(rgb(getComputedStyle(element).color)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  found.push([Math.round(ratio * 100) / 100, element.textContent.trim().slice(0, 40)]);
}
return found;
"""

# What a screen reader would miss.
LACKING: Final = """
const all = (what) => [...document.querySelectorAll(what)];
const seen = (what) => all(what).filter((e) => e.checkVisibility());
const byId = (id) => document.getElementById(id);
const named = (e) => (e.getAttribute("aria-label") || byId(e.getAttribute("aria-labelledby"))
  ?.textContent || e.labels?.[0]?.textContent || e.textContent).trim();
const lacking = [];
const say = (told, found) => found.forEach(
  (e) => lacking.push(`${told}: ${e.outerHTML.slice(0, 80)}`));
say("no name", seen("button, input, section, [role=region]").filter((e) => !named(e)));
say("no alt", all("img:not([alt])"));
say("no scope", all("th:not([scope])"));
say("no item", all("ul, ol").flatMap((l) => [...l.children]).filter((e) => e.tagName !== "LI"));
say("id twice", all("[id]").filter((e) => all(`[id="${e.id}"]`).length > 1));
say("points nowhere", all("[aria-labelledby]")
  .filter((e) => !byId(e.getAttribute("aria-labelledby"))));
say("scrolls by mouse alone", seen("*").filter((e) => e.tabIndex < 0
  && e.scrollHeight > e.clientHeight + 1 && getComputedStyle(e).overflowY === "auto"));
const regions = seen("section, [role=region]").map(named);
say("not the only one", seen("section, [role=region]")
  .filter((e) => regions.filter((name) => name === named(e)).length > 1));
say("outside of landmarks", [...document.body.children].filter((e) => e.checkVisibility()
  && !e.matches("header, main, footer, dialog, .skip")));
for (const what of ["html[lang]", "title", "header", "main", "footer", "h1"]) {
  if (all(what).length !== 1) lacking.push(`there is not one ${what}`);
}
const levels = seen("h1, h2, h3").map((e) => Number(e.tagName[1]));
levels.forEach((level, at) => {
  if (at && level > levels[at - 1] + 1) lacking.push(`h${level} after h${levels[at - 1]}`);
});
return lacking;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """One browser for all."""
    needs.package("selenium")
    from tests.browser import browsing  # noqa: PLC0415 - only where there is selenium

    with browsing() as started:
        yield started


@pytest.fixture
def stage(browser: Chrome) -> Iterator[Stage[Rig]]:
    """Three hosts, and the page before them; at the end the browser may not have complained."""
    from tests.browser import behind, coloured, sized  # noqa: PLC0415 - as above

    models = [*standard_models(100.0), ENDLESS]
    with behind(lambda: running(3, models=models, config=QUICK)) as started:
        sized(browser, 1280)
        coloured(browser, "light")
        complaints(browser)  # what it said of earlier pages
        show(browser, started)
        yield started
        told = complaints(browser)
        browser.get("about:blank")
    assert told == []


def show(browser: Chrome, stage: Stage[Rig]) -> None:
    """Open the page, and wait until it is live."""
    browser.get(f"{stage.scene.url}/_balancer/")
    until(browser, "document.querySelector('#link').dataset.link === 'live'")


def complaints(browser: Chrome) -> list[str]:
    """What its console was told since this was last asked: errors, and breaches of the policy."""
    log: list[dict[str, str]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in log]


def until(browser: Chrome, script: str, *given: object) -> Any:
    """Wait until an expression is true in the page."""
    from tests import browser as tools  # noqa: PLC0415 - as above

    return tools.until(browser, script, *given)


CARD: Final = "document.querySelector(`#cards [data-key='${arguments[0]}']`)"


def becomes(browser: Chrome, name: str, state: str) -> None:
    """Wait until a backend's card says so, in a word too."""
    script = f"{CARD}.dataset.state === arguments[1]"
    until(browser, script, name, state)
    assert (
        browser.execute_script(f"return {CARD}.querySelector('.state').textContent", name) == state
    )


def visible_acts(browser: Chrome, name: str) -> list[str]:
    """The buttons of a card."""
    buttons = f"[...{CARD}.querySelectorAll('button')].filter((b) => b.checkVisibility())"
    script = f"return {buttons}.map((b) => b.dataset.act)"
    return list(browser.execute_script(script, name))


def switch(stage: Stage[Rig], name: str) -> Switch:
    """How a backend's switch stands in the balancer itself."""
    return stage.do(lambda rig: rig.balancer.pool.members[name].switch)


def test_it_shows_the_fleet(browser: Chrome, stage: Stage[Rig]) -> None:
    """Every host has a card, every model a row, with where it is in memory and what runs."""
    assert browser.title.startswith("3/3 up")
    for name in "abc":
        becomes(browser, name, "up")

    async def begin(rig: Rig) -> Asking:
        await rig.warm("b", "endless")
        return await Asking.of(rig, "/api/generate", {"model": "endless", "prompt": "go on"})

    asking = stage.wait(begin)
    cell = "document.querySelector('#rows [data-key=\"endless:latest\"] [data-key=b]')"
    until(browser, f"{cell}.textContent.includes('1 running')")
    assert browser.execute_script(f"return {cell}.dataset.state") == "loaded"
    until(browser, "document.querySelector('#running').textContent === '1'")
    stage.do(lambda _: asking.hang_up())
    until(browser, "document.querySelector('#running').textContent === '0'")


def test_a_death_is_seen_without_a_reload(browser: Chrome, stage: Stage[Rig]) -> None:
    """Card, title, events and the line that is read aloud; and the return."""
    browser.execute_script("window.stillHere = true")
    stage.do(lambda rig: rig.fleet["b"].faults.refuse())
    becomes(browser, "b", "down")
    until(browser, f"{CARD}.textContent.includes('connection refused')", "b")
    until(browser, "document.title.startsWith('2/3 up')")
    until(browser, "document.querySelector('#said').textContent.includes('b is down')")
    until(browser, "document.querySelector('#events').textContent.includes('is down')")
    stage.do(lambda rig: rig.fleet["b"].faults.heal())
    becomes(browser, "b", "up")
    assert browser.execute_script("return window.stillHere") is True


def test_drain_and_resume_by_button(browser: Chrome, stage: Stage[Rig]) -> None:
    """The balancer does it, the page shows it, and offers the way back."""
    assert visible_acts(browser, "a") == ["drain", "disable"]
    browser.find_element("css selector", "#cards [data-key=a] [data-act=drain]").click()
    becomes(browser, "a", "draining")
    assert switch(stage, "a") is Switch.DRAINING
    assert visible_acts(browser, "a") == ["resume", "disable"]
    focused = browser.switch_to.active_element
    assert focused.get_attribute("data-act") == "resume"  # its button is gone, its place is not
    focused.click()
    becomes(browser, "a", "up")
    assert switch(stage, "a") is Switch.SERVING


def test_everything_by_keyboard(browser: Chrome, stage: Stage[Rig]) -> None:
    """To a backend, drain and resume it, the list of keys, and keys switched off."""
    from selenium.webdriver import ActionChains  # noqa: PLC0415 - only where there is selenium
    from selenium.webdriver.common.keys import Keys  # noqa: PLC0415 - as above

    def press(*keys: str) -> None:
        for key in keys:
            ActionChains(browser).send_keys(key).perform()

    press("j", "j")
    assert browser.switch_to.active_element.get_attribute("data-key") == "b"
    press("d")
    becomes(browser, "b", "draining")
    press("r")
    becomes(browser, "b", "up")
    press("k")
    assert browser.switch_to.active_element.get_attribute("data-key") == "a"
    press(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("data-act") == "drain"
    width = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(width) == "solid"
    press("?")
    until(browser, "document.querySelector('#keys').open")
    browser.find_element("id", "single").click()
    press(Keys.ESCAPE)
    until(browser, "!document.querySelector('#keys').open")
    press("j", "d")
    assert switch(stage, "a") is switch(stage, "b") is Switch.SERVING


def test_a_broken_model_and_its_reset(browser: Chrome, stage: Stage[Rig]) -> None:
    """The grid says broken, the card why and when it is tried, counting down; reset closes it."""

    def heal(rig: Rig) -> None:
        for host in rig.fleet:
            host.faults.heal()

    async def fail(rig: Rig) -> None:
        for host in rig.fleet:
            host.faults.fail("tooled", "CUDA error: out of memory")
        for _ in range(4):
            body = {"model": "tooled", "prompt": "hi", "stream": False}
            await rig.ask("POST", "/api/generate", body, X_Request_Timeout="2")

    stage.wait(fail)
    row = "document.querySelector('#rows [data-key=\"tooled:latest\"]')"
    until(browser, f"{row}.querySelector('[data-state=broken]')")
    name = browser.execute_script(f"return {row}.querySelector('[data-state=broken]').dataset.key")
    seconds = f"Number({CARD}.textContent.match(/trial in (\\d+) s/)?.[1])"
    first = until(browser, seconds, name)
    until(browser, f"{seconds} < arguments[1]", name, first)
    assert "out of memory" in browser.execute_script(f"return {CARD}.textContent", name)
    stage.do(heal)
    browser.find_element("css selector", f"#cards [data-key={name}] [data-act=reset]").click()
    until(browser, f"!{row}.querySelector('[data-key={name}][data-state=broken]')")


def test_what_others_say_stays_text(browser: Chrome, stage: Stage[Rig]) -> None:
    """Names, errors and events that would be markup run nothing, load nothing, and can be read."""

    def poison(rig: Rig) -> None:
        real = rig.balancer.admin.state

        def poisoned() -> dict[str, Any]:
            state = real()
            backend = state["backends"][0]
            backend["name"] = backend["models"][0]["name"] = HOSTILE
            backend |= {"error": HOSTILE, "up": False, "state": "down", "trouble": HOSTILE}
            backend["breaker"] |= {"state": "open", "reason": HOSTILE}
            row = {"event": HOSTILE, "backend": HOSTILE, "model": HOSTILE, "text": HOSTILE}
            state["recent"] = [{"at": 1.0, "count": 2, **row}]
            state["config"]["rejected"] = [HOSTILE]
            state["queue"]["per_model"] = {HOSTILE: 1}
            return state

        rig.balancer.feed._state = poisoned

    stage.do(poison)
    until(browser, "document.querySelector('#cards').textContent.includes(arguments[0])", HOSTILE)
    until(browser, "document.querySelector('#said').textContent.includes(arguments[0])", HOSTILE)
    assert browser.execute_script("return document.images.length") == 1
    assert "owned" not in browser.title
    shown = browser.execute_script("return document.querySelector('main').textContent")
    assert shown.count(HOSTILE) > 8


def test_where_a_call_would_go(browser: Chrome, stage: Stage[Rig]) -> None:
    """Told beside the field, for a model that is there and for one that is not."""
    stage.wait(lambda rig: rig.warm("c", "llama3.2"))
    field = browser.find_element("id", "asked")
    field.send_keys("llama3.2\n")
    answer = "document.querySelector('#answer').textContent"
    until(browser, f"{answer}.includes('would go to c')")
    field.clear()
    field.send_keys("nobody-has-it\n")
    until(browser, f"{answer}.includes('not found')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(browser: Chrome, stage: Stage[Rig], scheme: str) -> None:
    """Contrast of 4.5 for every text, in each colour scheme, with trouble to be seen."""
    from tests.browser import coloured  # noqa: PLC0415 - only where there is selenium

    coloured(browser, scheme)
    stage.do(lambda rig: rig.fleet["c"].faults.refuse())
    becomes(browser, "c", "down")
    stage.do(lambda rig: rig.balancer.pool.turn("b", Switch.DRAINING, "test"))
    becomes(browser, "b", "draining")
    browser.execute_script("document.querySelector('#keys').showModal()")
    found = browser.execute_script(CONTRAST)
    assert len(found) > 50
    assert [each for each in found if each[0] < 4.5] == []
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(246, 246, 243)") == (scheme == "light")


def test_a_screen_reader_finds_its_way(browser: Chrome, stage: Stage[Rig]) -> None:
    """Landmarks, headings in order, names of what can be pressed; little speaks by itself."""
    assert browser.execute_script(LACKING) == []
    assert browser.execute_script("return document.querySelectorAll('[aria-live]').length") == 2


@pytest.mark.parametrize("width", [360, 640, 1280])
def test_nothing_is_wider_than_the_screen(browser: Chrome, stage: Stage[Rig], width: int) -> None:
    """On a phone, and at 200 % on a desktop; with an address and an error that do not wrap well."""
    from tests.browser import sized  # noqa: PLC0415 - only where there is selenium

    def lengthen(rig: Rig) -> None:
        real = rig.balancer.admin.state

        def longer() -> dict[str, Any]:
            state = real()
            state["backends"][0] |= {"url": f"http://{'h' * 120}", "trouble": "e" * 300}
            state["backends"][1]["models"][0]["name"] = "m" * 120
            return state

        rig.balancer.feed._state = longer

    sized(browser, width)
    stage.do(lengthen)
    until(browser, "document.querySelector('#cards').textContent.includes('e'.repeat(300))")
    until(browser, "innerWidth === arguments[0]", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_lost_balancer_is_seen_and_found_again(browser: Chrome, stage: Stage[Rig]) -> None:
    """The page says that what it shows is old, and goes on by itself once there is a stream."""

    async def lose(rig: Rig) -> None:
        rig.balancer.feed.close()

    def find(rig: Rig) -> None:
        rig.balancer.feed._closed = asyncio.Event()

    stage.wait(lose)
    until(browser, "document.querySelector('#link').dataset.link === 'lost'")
    complaints(browser)
    stage.do(find)
    until(browser, "document.querySelector('#link').dataset.link === 'live'")
    told = complaints(browser)
    assert all("503" in each for each in told)


def test_without_javascript_it_is_still_a_page(browser: Chrome, stage: Stage[Rig]) -> None:
    """It shows the fleet, offers no button that does nothing, and reloads by itself."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"{stage.scene.url}/_balancer/")
        cards = [card.text for card in browser.find_elements("css selector", "#cards > li")]
        assert [card.split("\n")[0] for card in cards] == ["a", "b", "c"]
        buttons = browser.find_elements("css selector", "button")
        assert not [button for button in buttons if button.is_displayed()]
        before = len(stage.do(seen))
        stage.do(lambda rig: rig.fleet["b"].faults.refuse())

        async def reloaded(rig: Rig) -> None:
            await rig.events.until(lambda: len(seen(rig)) > before, 30.0)

        stage.wait(reloaded)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def seen(rig: Rig) -> list[str]:
    """The times the page itself was fetched."""
    return [call.path for call in rig.calls() if call.path == "/_balancer/"]
