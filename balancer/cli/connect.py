"""The command that tells clients where the balancer is: connect."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from balancer.cli.completing import client_names
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import ConfigFile

if TYPE_CHECKING:
    from balancer.cli.client import Admin
    from balancer.cli.recipes import Place, Recipe

PANEL: Final = "Set up"
CONNECT_VERSION: Final = 1
MODEL: Final = "llama3.2"
CONTAINER_HOST: Final = "host.docker.internal"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
IN_CONTAINER: Final = (
    "On Linux a container does not reach its host's 127.0.0.1: let the balancer listen for it, "
    "--listen 127.0.0.1:{port} --listen 172.17.0.1:{port}, and let it in with a key or "
    'auth.anonymous: [127.0.0.0/8, "::1/128", 172.16.0.0/12].'
)


def add_to(app: typer.Typer) -> None:
    """Declare the command."""
    app.command(rich_help_panel=PANEL)(connect)


def connect(
    client: Annotated[
        str | None,
        typer.Argument(
            help="The client; without it, the list of them.", autocompletion=client_names
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where clients reach the balancer; default: where it listens."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The API key, or a word to stand for it.")
    ] = None,
    docker: Annotated[
        bool, typer.Option("--docker", help="The client runs in a container on this machine.")
    ] = False,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> int:
    """Settings of a client to copy and paste, with a model that is there."""
    from balancer.cli import recipes

    if client is None:
        _list(as_json=as_json)
        return ExitCode.OK
    recipe = recipes.find(client)
    if recipe is None:
        raise CommandError(*_unknown(client), code=ExitCode.USAGE)
    place, notes = _place(recipe, base_url, key, config, docker=docker)
    doc = _document(recipe, place, notes)
    print(json.dumps(doc, indent=2, ensure_ascii=False) if as_json else "\n".join(_told(doc)))
    return ExitCode.OK


def _list(*, as_json: bool) -> None:
    from balancer.cli.recipes import RECIPES
    from balancer.cli.screen import table

    if as_json:
        clients = [{"name": recipe.name, "title": recipe.title} for recipe in RECIPES]
        print(json.dumps({"connect_version": CONNECT_VERSION, "clients": clients}, indent=2))
        return
    print(*table([("CLIENT", ""), *((r.name, r.title) for r in RECIPES)]), sep="\n")
    print("\nSettings of one: ollama-balancer connect CLIENT")
    print(
        "Any other Ollama client: its base URL or OLLAMA_HOST; OpenAI clients: the same with /v1."
    )


def _unknown(name: str) -> list[str]:
    from balancer.cli import recipes

    meant = " or ".join(recipes.close(name))
    known = ", ".join(recipe.name for recipe in recipes.RECIPES)
    hint = f" Did you mean {meant}?" if meant else ""
    return [f"No recipe for {name!r}.{hint}", f"Known: {known}."]


# -- what is filled in -------------------------------------------------------------------------


def _place(
    recipe: Recipe, base_url: str | None, key: str | None, config: str | None, *, docker: bool
) -> tuple[Place, list[str]]:
    from balancer.cli.client import find
    from balancer.cli.recipes import Place

    notes = list(recipe.notes)
    balancer = find(base_url, config, option="--base-url")
    base = base_of(balancer.url)
    model = _model(base, balancer)
    if model is None:
        notes.append(f"No balancer tells its models at {base}: {MODEL} is an example.")
    inside = from_container(base)
    uses = docker or any("<DOCKER>" in block.text for block in recipe.blocks)
    if uses and inside != base:
        notes.append(IN_CONTAINER.format(port=urlsplit(base).port))
    return Place(inside if docker else base, inside, model or MODEL, key), notes


def base_of(url: str) -> str:
    """The URL for clients, without what they add; clients do not speak over unix sockets."""
    from balancer.cli.client import DEFAULT_PORT

    if url.startswith("unix:"):
        return f"http://127.0.0.1:{DEFAULT_PORT}"
    return url.rstrip("/").removesuffix("/v1").removesuffix("/api").rstrip("/")


def from_container(base: str) -> str:
    """The same, from inside a container on this machine."""
    parts = urlsplit(base)
    if parts.hostname not in LOOPBACK:
        return base
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=CONTAINER_HOST + port).geturl()


def _model(base: str, balancer: Admin) -> str | None:
    """A model that can chat; None: nobody says."""
    from balancer.cli.client import Admin

    url = balancer.url if balancer.url.startswith("unix:") else base
    try:
        status, told = Admin(url, balancer.key, limit_s=2.0).ask("GET", "/api/tags")
    except CommandError:
        return None
    rows = told.get("models") if status == 200 else None
    names = [row["name"] for row in rows or () if isinstance(row, dict) and _chats(row)]
    return str(names[0]).removesuffix(":latest") if names else None


def _chats(row: dict[str, Any]) -> bool:
    can = row.get("capabilities")
    name = row.get("name")  # it is put into commands: it must not be one
    plain = isinstance(name, str) and _NAME.fullmatch(name) is not None
    return plain and (not can or "completion" in can)


# -- telling -----------------------------------------------------------------------------------


def _document(recipe: Recipe, place: Place, notes: list[str]) -> dict[str, Any]:
    return {
        "connect_version": CONNECT_VERSION,
        "client": recipe.name,
        "title": recipe.title,
        "base_url": place.base,
        "model": place.model,
        "blocks": [
            {"where": block.where, "language": block.language, "text": place.fill(block.text)}
            for block in recipe.blocks
        ],
        "notes": [filled for note in notes if (filled := place.fill(note))],
    }


def _told(doc: dict[str, Any]) -> list[str]:
    from balancer.cli.screen import plain

    lines = [f"# {doc['title']}"]
    for block in doc["blocks"]:
        lines += ["", f"# {block['where']}", *map(plain, block["text"].splitlines())]
    return [*lines, "", *(f"# {plain(note)}" for note in doc["notes"])]
