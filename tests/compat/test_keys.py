"""The three packages with keys of ours, right and wrong: what their users see."""

from __future__ import annotations

from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.compat.talk import ASKED, TEXT, models
from tests.conftest import Start
from tests.rig import LIMIT_S, Rig

pytestmark = pytest.mark.compat

KEY, WRONG = "key-of-a-client-of-ours", "made-up"
LOCKED: dict[str, Any] = {
    "auth.keys": [{"name": "app", "key": KEY, "models": ["llama3.2"]}],
    "auth.anonymous": "never",
    "auth.accept": ["bearer", "x-api-key", "path"],
}


@pytest.fixture
async def rig(start: Start, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """One host behind a balancer that wants keys."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OLLAMA_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return await start(1, models=models(), config=LOCKED)


async def by_openai(base: str, key: str, model: str = "llama3.2") -> str | None:
    """What the model says."""
    async with openai.AsyncOpenAI(
        base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=LIMIT_S
    ) as client:
        asked: Any = ASKED
        answer = await client.chat.completions.create(model=model, messages=asked)
        return answer.choices[0].message.content


async def by_anthropic(base: str, key: str, model: str = "llama3.2") -> str:
    """The same."""
    async with anthropic.AsyncAnthropic(
        base_url=base, api_key=key, max_retries=0, timeout=LIMIT_S
    ) as client:
        asked: Any = ASKED
        answer = await client.messages.create(model=model, max_tokens=100, messages=asked)
        return "".join(block.text for block in answer.content if block.type == "text")


async def by_ollama(base: str, key: str, model: str = "llama3.2") -> str | None:
    """The same."""
    headers = {"Authorization": f"Bearer {key}"}
    client: Any = ollama.AsyncClient(base, trust_env=False, timeout=LIMIT_S, headers=headers)
    try:
        text: str | None = (await client.chat(model, ASKED)).message.content
        return text
    finally:
        await client.close()


CLIENTS = (by_openai, by_anthropic, by_ollama)


@pytest.mark.parametrize("ask", CLIENTS)
async def test_the_right_key_opens(rig: Rig, ask: Any) -> None:
    """As each package sends it, and in the path whatever it sends besides."""
    assert await ask(rig.url, KEY) == TEXT
    assert await ask(f"{rig.url}/k/{KEY}", WRONG) == TEXT
    assert {call.key for call in rig.calls()} == {"app"}


@pytest.mark.parametrize("ask", CLIENTS)
async def test_the_wrong_key_is_told_so(rig: Rig, ask: Any) -> None:
    """Its user reads where to get one."""
    wrong = (openai.AuthenticationError, anthropic.AuthenticationError, ollama.ResponseError)
    for base in (rig.url, f"{rig.url}/k/nobodys"):
        with pytest.raises(wrong, match="ollama-balancer key new NAME") as refusal:
            await ask(base, WRONG)
        assert getattr(refusal.value, "status_code", None) == 401
    assert rig.forwarded() == []


@pytest.mark.parametrize("ask", CLIENTS)
async def test_a_model_that_the_key_is_not_for_is_told_so(rig: Rig, ask: Any) -> None:
    """In the package's own words for it."""
    denied = (
        openai.PermissionDeniedError,
        anthropic.PermissionDeniedError,
        ollama.ResponseError,
    )
    with pytest.raises(denied, match=r"only for: llama3\.2") as refusal:
        await ask(rig.url, KEY, "tooled")
    assert getattr(refusal.value, "status_code", None) == 403


async def test_a_client_sees_its_models(rig: Rig) -> None:
    """And no others, by a base that is all it was given."""
    client: Any = ollama.AsyncClient(f"{rig.url}/k/{KEY}", trust_env=False, timeout=LIMIT_S)
    assert [row.model for row in (await client.list()).models] == ["llama3.2:latest"]
    await client.close()
