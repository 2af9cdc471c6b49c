"""
How clients are told where the balancer is: one table.

In texts, ``<BASE>`` is its URL, ``<V1>`` the same for OpenAI clients, ``<HOST>`` as OLLAMA_HOST
has it, ``<DOCKER>`` its URL from inside a container, ``<MODEL>`` a model that is there, ``<KEY>``
the key, or a word where a client insists on one. A line that begins with ``+key `` is left out
without a key, one with ``-key `` with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Literal

Language = Literal["sh", "python", "js", "json", "yaml", "toml", "text"]
NO_KEY: Final = "unused"


@dataclass(frozen=True, slots=True)
class Place:
    """
    What is filled in.

    Args:
        base: Scheme, host and port, perhaps a path; no final slash.
        docker: The same from inside a container on this machine.
        key: None: callers need none.
    """

    base: str
    docker: str
    model: str
    key: str | None = None

    def fill(self, text: str) -> str:
        """Fill it in."""
        kept = []
        for line in text.splitlines():
            sign, rest = line[:5], line[5:]
            if sign not in ("+key ", "-key "):
                kept.append(line)
            elif (sign == "+key ") == (self.key is not None):
                kept.append(rest)
        filled = "\n".join(kept)
        for name, value in (
            ("<BASE>", self.base),
            ("<V1>", f"{self.base}/v1"),
            ("<HOST>", self.base.removeprefix("http://")),
            ("<DOCKER>", self.docker),
            ("<MODEL>", self.model),
            ("<KEY>", self.key or NO_KEY),
        ):
            filled = filled.replace(name, value)
        return filled


@dataclass(frozen=True, slots=True)
class Block:
    """Something to copy: *where* it goes, and the text."""

    language: Language
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    One client.

    Args:
        aliases: Other names people give it, beside the title.
        notes: What one should know, one line each.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


LONG_CONTEXT: Final = (
    "Agents need a context of 32k tokens or more: OLLAMA_CONTEXT_LENGTH=65536 on the hosts."
)

_OLLAMA = Recipe(
    "ollama",
    "Ollama's own command line",
    (Block("sh", "shell", "export OLLAMA_HOST=<HOST>\nollama run <MODEL>"),),
    (
        "+key The ollama command sends no key: name this machine's network in auth.anonymous.",
        "Do not start `ollama serve` in that shell: it would listen where OLLAMA_HOST says.",
    ),
    ("cli", "ollama-cli"),
)
_OLLAMA_PYTHON = Recipe(
    "ollama-python",
    "ollama for Python",
    (
        Block(
            "python",
            "pip install ollama",
            """\
import ollama

client = ollama.Client(
    host="<BASE>",
+key     headers={"Authorization": "Bearer <KEY>"},
)
answer = client.chat(model="<MODEL>", messages=[{"role": "user", "content": "Hi"}])
print(answer.message.content)""",
        ),
    ),
    ("Without code: the variables OLLAMA_HOST=<HOST> and, for a key, OLLAMA_API_KEY.",),
)
_OLLAMA_JS = Recipe(
    "ollama-js",
    "ollama for JavaScript",
    (
        Block(
            "js",
            "npm install ollama",
            """\
import { Ollama } from "ollama"

const client = new Ollama({
  host: "<BASE>",
+key   headers: { Authorization: "Bearer <KEY>" },
})
const messages = [{ role: "user", content: "Hi" }]
const answer = await client.chat({ model: "<MODEL>", messages })
console.log(answer.message.content)""",
        ),
    ),
    aliases=("ollama-javascript", "ollama-node", "ollama-typescript"),
)
_OPENAI_PYTHON = Recipe(
    "openai-python",
    "OpenAI SDK for Python",
    (
        Block(
            "python",
            "pip install openai",
            """\
from openai import OpenAI

client = OpenAI(base_url="<V1>", api_key="<KEY>")
answer = client.chat.completions.create(
    model="<MODEL>", messages=[{"role": "user", "content": "Hi"}]
)
print(answer.choices[0].message.content)""",
        ),
    ),
    ("Without code: the variables OPENAI_BASE_URL=<V1> and OPENAI_API_KEY.",),
    ("openai",),
)
_OPENAI_JS = Recipe(
    "openai-js",
    "OpenAI SDK for JavaScript",
    (
        Block(
            "js",
            "npm install openai",
            """\
import OpenAI from "openai"

const client = new OpenAI({ baseURL: "<V1>", apiKey: "<KEY>" })
const messages = [{ role: "user", content: "Hi" }]
const answer = await client.chat.completions.create({ model: "<MODEL>", messages })
console.log(answer.choices[0].message.content)""",
        ),
    ),
    aliases=("openai-javascript", "openai-node", "openai-typescript"),
)
_ANTHROPIC_PYTHON = Recipe(
    "anthropic-python",
    "Anthropic SDK for Python",
    (
        Block(
            "python",
            "pip install anthropic",
            """\
import anthropic

client = anthropic.Anthropic(base_url="<BASE>", api_key="<KEY>")
answer = client.messages.create(
    model="<MODEL>", max_tokens=1000, messages=[{"role": "user", "content": "Hi"}]
)
print("".join(block.text for block in answer.content if block.type == "text"))""",
        ),
    ),
    ("The base URL ends without /v1.",),
    ("anthropic",),
)
_ANTHROPIC_JS = Recipe(
    "anthropic-js",
    "Anthropic SDK for JavaScript",
    (
        Block(
            "js",
            "npm install @anthropic-ai/sdk",
            """\
import Anthropic from "@anthropic-ai/sdk"

const client = new Anthropic({ baseURL: "<BASE>", apiKey: "<KEY>" })
const messages = [{ role: "user", content: "Hi" }]
const answer = await client.messages.create({ model: "<MODEL>", max_tokens: 1000, messages })
console.log(answer.content.filter((block) => block.type === "text"))""",
        ),
    ),
    ("The base URL ends without /v1.",),
    ("anthropic-javascript", "anthropic-node", "anthropic-typescript"),
)
_LANGCHAIN = Recipe(
    "langchain",
    "LangChain",
    (
        Block(
            "python",
            "pip install langchain-ollama",
            """\
from langchain_ollama import ChatOllama

model = ChatOllama(
    model="<MODEL>",
    base_url="<BASE>",
+key     client_kwargs={"headers": {"Authorization": "Bearer <KEY>"}},
)
print(model.invoke("Hi").content)""",
        ),
    ),
    aliases=("langchain-ollama",),
)
_LLAMA_INDEX = Recipe(
    "llama-index",
    "LlamaIndex",
    (
        Block(
            "python",
            "pip install llama-index-llms-ollama",
            """\
from llama_index.llms.ollama import Ollama

model = Ollama(
    model="<MODEL>",
    base_url="<BASE>",
    request_timeout=600.0,
    context_window=8192,
+key     headers={"Authorization": "Bearer <KEY>"},
)
print(model.complete("Hi"))""",
        ),
    ),
    ("Without context_window it asks for the model's longest, which takes much memory.",),
)
_LITELLM = Recipe(
    "litellm",
    "LiteLLM",
    (
        Block(
            "yaml",
            "config.yaml of its proxy",
            """\
model_list:
  - model_name: <MODEL>
    litellm_params:
      model: ollama_chat/<MODEL>
      api_base: <BASE>
+key       api_key: <KEY>""",
        ),
        Block(
            "python",
            "pip install litellm",
            """\
import litellm

answer = litellm.completion(
    model="ollama_chat/<MODEL>",
    api_base="<BASE>",
+key     api_key="<KEY>",
    messages=[{"role": "user", "content": "Hi"}],
)
print(answer.choices[0].message.content)""",
        ),
    ),
)
_OPEN_WEBUI = Recipe(
    "open-webui",
    "Open WebUI",
    (
        Block(
            "sh",
            "in Docker",
            """\
docker run -d --name open-webui -p 3000:8080 -v open-webui:/app/backend/data \\
  --add-host=host.docker.internal:host-gateway \\
  -e OLLAMA_BASE_URL=<DOCKER> \\
  ghcr.io/open-webui/open-webui:main""",
        ),
        Block("sh", "without Docker", "OLLAMA_BASE_URL=<BASE> open-webui serve"),
    ),
    (
        "What it has saved wins over the variable: Admin Settings, Connections, Ollama API.",
        "+key The key is entered there, too: authentication Bearer, <KEY>.",
        "One connection, to the balancer, is enough: remove those to the hosts themselves.",
    ),
    ("webui",),
)
_CLAUDE_CODE = Recipe(
    "claude-code",
    "Claude Code",
    (
        Block(
            "sh",
            "shell",
            """\
export ANTHROPIC_BASE_URL=<BASE>
export ANTHROPIC_AUTH_TOKEN=<KEY>
export ANTHROPIC_API_KEY=""
claude --model <MODEL>""",
        ),
    ),
    (LONG_CONTEXT, "The base URL ends without /v1."),
)
_CODEX = Recipe(
    "codex",
    "Codex CLI",
    (
        Block(
            "sh",
            "shell",
            "export CODEX_OSS_BASE_URL=<V1>\ncodex --oss --local-provider ollama -m <MODEL>",
        ),
        Block(
            "toml",
            "or for good, in ~/.codex/config.toml",
            """\
model = "<MODEL>"
model_provider = "balancer"

[model_providers.balancer]
name = "ollama-balancer"
base_url = "<V1>"
wire_api = "responses"
+key env_key = "BALANCER_KEY\"""",
        ),
    ),
    (
        LONG_CONTEXT,
        "+key With --oss it sends no key: take the second way, and export BALANCER_KEY=<KEY>.",
    ),
    ("codex-cli",),
)
_OPENCODE = Recipe(
    "opencode",
    "opencode",
    (
        Block(
            "json",
            "opencode.json, or ~/.config/opencode/opencode.json",
            """\
{
  "$schema": "https://opencode.ai/config.json",
  "model": "balancer/<MODEL>",
  "provider": {
    "balancer": {
      "npm": "@ai-sdk/openai-compatible",
      "name": "ollama-balancer",
      "options": {
+key         "apiKey": "<KEY>",
        "baseURL": "<V1>"
      },
      "models": { "<MODEL>": { "name": "<MODEL>" } }
    }
  }
}""",
        ),
    ),
    (LONG_CONTEXT,),
)
_CLINE = Recipe(
    "cline",
    "Cline",
    (
        Block(
            "text",
            "Settings, API Configuration",
            """\
API Provider         Ollama
Use custom base URL  <BASE>
+key Ollama API Key       <KEY>
Model                <MODEL>
Context Window       32768""",
        ),
    ),
    (LONG_CONTEXT,),
)
_ROO_CODE = Recipe(
    "roo-code",
    "Roo Code",
    (
        Block(
            "text",
            "Provider Settings",
            """\
API Provider    Ollama
Base URL        <BASE>
+key Ollama API Key  <KEY>
Model ID        <MODEL>""",
        ),
    ),
    (LONG_CONTEXT, "It lists only models that can call tools."),
    ("roo", "roo-cline"),
)
_CONTINUE = Recipe(
    "continue",
    "Continue",
    (
        Block(
            "yaml",
            "~/.continue/config.yaml",
            """\
name: balancer
version: 0.0.1
schema: v1
models:
  - name: <MODEL>
    provider: ollama
    model: <MODEL>
    apiBase: <BASE>
+key     apiKey: <KEY>""",
        ),
    ),
    aliases=("continue-dev",),
)
_ZED = Recipe(
    "zed",
    "Zed",
    (
        Block(
            "json",
            "settings.json (command palette: open settings)",
            '{\n  "language_models": { "ollama": { "api_url": "<BASE>" } }\n}',
        ),
    ),
    ("+key The key: Agent settings, LLM Providers, Ollama; or the variable OLLAMA_API_KEY=<KEY>.",),
)
_HOME_ASSISTANT = Recipe(
    "home-assistant",
    "Home Assistant",
    (
        Block(
            "text",
            "Settings, Devices & services, Add integration, Ollama",
            "URL      <BASE>\n+key API key  <KEY>\nModel    <MODEL>",
        ),
    ),
    (
        "Leave the models there in its list of downloaded ones; others it would pull.",
        "Its keep-alive of -1 pins a model to one host: set 300 seconds or so.",
    ),
    ("hass",),
)
_N8N = Recipe(
    "n8n",
    "n8n",
    (
        Block(
            "text",
            "Credentials, Create, Ollama",
            "Base URL  <BASE>\n+key API Key   <KEY>",
        ),
    ),
    ("Where n8n runs in a container, the base URL is <DOCKER>.",),
)
_DOCKER = Recipe(
    "docker",
    "any client in a container",
    (
        Block(
            "sh",
            "docker run",
            "docker run --add-host=host.docker.internal:host-gateway -e OLLAMA_HOST=<DOCKER> …",
        ),
        Block(
            "yaml",
            "compose.yaml",
            """\
services:
  client:
    environment:
      OLLAMA_HOST: <DOCKER>
+key       OLLAMA_API_KEY: <KEY>
    extra_hosts: ["host.docker.internal:host-gateway"]""",
        ),
    ),
    aliases=("container", "compose", "podman"),
)
_CURL = Recipe(
    "curl",
    "curl",
    (
        Block(
            "sh",
            "shell",
            """\
curl <BASE>/api/chat \\
+key   -H "Authorization: Bearer <KEY>" \\
  -d '{"model": "<MODEL>", "messages": [{"role": "user", "content": "Hi"}]}'""",
        ),
    ),
    aliases=("http", "rest"),
)

RECIPES: Final[tuple[Recipe, ...]] = (
    _OPEN_WEBUI,
    _CLAUDE_CODE,
    _CODEX,
    _OPENCODE,
    _CLINE,
    _ROO_CODE,
    _CONTINUE,
    _ZED,
    _HOME_ASSISTANT,
    _N8N,
    _LANGCHAIN,
    _LLAMA_INDEX,
    _LITELLM,
    _OLLAMA,
    _OLLAMA_PYTHON,
    _OLLAMA_JS,
    _OPENAI_PYTHON,
    _OPENAI_JS,
    _ANTHROPIC_PYTHON,
    _ANTHROPIC_JS,
    _CURL,
    _DOCKER,
)


def find(name: str) -> Recipe | None:
    """The recipe of that name, as people write it; None: none, or several."""
    wanted = _bare(name)
    by_name = _by_name()
    if wanted in by_name:
        return by_name[wanted]
    meant = {recipe.name: recipe for key, recipe in by_name.items() if key.startswith(wanted)}
    return next(iter(meant.values())) if wanted and len(meant) == 1 else None


def close(name: str) -> list[str]:
    """Names of clients that were perhaps meant, the likeliest first."""
    wanted, by_name = _bare(name), _by_name()
    keys = [key for key in by_name if wanted and key.startswith(wanted)]
    keys += get_close_matches(wanted, by_name, n=3, cutoff=0.6)
    return list(dict.fromkeys(by_name[key].name for key in keys))


def _by_name() -> dict[str, Recipe]:
    return {
        _bare(name): recipe
        for recipe in RECIPES
        for name in (recipe.name, recipe.title, *recipe.aliases)
    }


def _bare(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
