"""Commands around the service: install, healthcheck."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from balancer.cli.exits import CommandError, ExitCode

PANEL: Final = "Set up"
PROGRAM: Final = "/opt/ollama-balancer/bin/ollama-balancer"  # as the units name it
HOMES: Final = ("home", "root", "run/user")  # what ProtectHome=yes hides
ANYWHERE: Final = ("", "*", "0.0.0.0", "[::]")


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command(rich_help_panel=PANEL)(install)
    app.command(rich_help_panel=PANEL)(healthcheck)


# -- install -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """
    A file to be written.

    Args:
        keep: It belongs to the user from then on and is never overwritten.
    """

    path: Path
    text: str
    mode: int = 0o644
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Files, and what to do when they are there."""

    files: tuple[Planned, ...]
    next: str


def install(
    system: Annotated[bool, typer.Option("--system", help="A systemd service of all.")] = False,
    user: Annotated[bool, typer.Option("--user", help="One of your own, without root.")] = False,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="A systemd unit for one Ollama per GPU.")
    ] = False,
    docker: Annotated[bool, typer.Option("--docker", help="A Dockerfile, here.")] = False,
    compose: Annotated[
        bool, typer.Option("--compose", help="A compose file with what belongs to it, here.")
    ] = False,
    takeover: Annotated[
        bool,
        typer.Option("--takeover", help="Tell how to take Ollama's port 11434; changes nothing."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Show the files instead of writing them.")
    ] = False,
    root: Annotated[
        str, typer.Option(metavar="DIR", help="Write below this folder, as for a package.")
    ] = "",
) -> int:
    """Write the files of a service; what is yours is never overwritten, nothing is started."""
    plans = {
        _system: system,
        _user: user,
        _ollama: ollama,
        _docker: docker,
        _compose: compose,
        _takeover: takeover,
    }
    chosen = [make for make, wanted in plans.items() if wanted] or ([_system] if show else [])
    if len(chosen) != 1:
        told = "Say which: --system, --user, --ollama, --docker, --compose or --takeover"
        raise CommandError(f"{told}; with --print to look first.", code=ExitCode.USAGE)
    root = root.rstrip("/")
    plan = chosen[0](root)
    if show or takeover:
        for file in plan.files:
            print(f"# -- {file.path}\n{file.text}")
    else:
        _write(plan, root)
    print(plan.next)
    return ExitCode.OK


def packaged(name: str) -> str:
    """
    A file of ``deploy/``, or ``config.example.yaml``.

    Raises:
        CommandError: This installation came without it.
    """
    package = Path(__file__).resolve().parents[1]
    # From a wheel, and from a checkout that is installed as it stands.
    for place in (package / "deploy", package.parent / "deploy", package.parent):
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8")
    raise CommandError(f"This installation lacks {name}. Reinstall.", code=ExitCode.FAILURE)


def _system(root: str) -> Plan:
    program = _program(root)
    interpreter = os.path.realpath(sys.executable)
    for each in (program.partition(" ")[0], interpreter):
        if not root and any(Path(each).is_relative_to(f"/{home}") for home in HOMES):
            raise CommandError(
                f"The service may not look into homes, and {each} is in one. Install the program "
                "elsewhere (deploy/install.sh uses /opt), or a service of your own: --user",
                code=ExitCode.FAILURE,
            )
    units, etc = Path("/etc/systemd/system"), Path("/etc")
    unit = packaged("ollama-balancer.service").replace(PROGRAM, program)
    config, environment = etc / "ollama-balancer/config.yaml", etc / "default/ollama-balancer"
    files = (
        Planned(units / "ollama-balancer.service", unit),
        Planned(units / "ollama-balancer.socket", packaged("ollama-balancer.socket")),
        Planned(environment, packaged("ollama-balancer.default"), 0o600, keep=True),
        Planned(config, packaged("config.example.yaml"), keep=True),
    )
    return Plan(
        files,
        f"""
Next:
  Name your hosts under backends: in {config}
  {program} check {config} --contact
  systemctl daemon-reload && systemctl enable --now ollama-balancer
  systemctl status ollama-balancer; journalctl -u ollama-balancer -f
After an upgrade: systemctl daemon-reload && systemctl restart ollama-balancer
Away with it: systemctl disable --now ollama-balancer, and remove the files above.""",
    )


def _user(root: str) -> Plan:
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    unit = packaged("ollama-balancer-user.service").replace(PROGRAM, _program(root))
    config = base / "ollama-balancer/config.yaml"
    files = (
        Planned(base / "systemd/user/ollama-balancer.service", unit),
        Planned(config, packaged("config.example.yaml"), 0o600, keep=True),
    )
    return Plan(
        files,
        f"""
Next:
  Name your hosts under backends: in {config}
  systemctl --user daemon-reload && systemctl --user enable --now ollama-balancer
  loginctl enable-linger          # so that it runs while you are logged out
  journalctl --user -u ollama-balancer -f
Away with it: systemctl --user disable --now ollama-balancer, and remove the files above.""",
    )


def _ollama(_: str) -> Plan:
    file = Planned(Path("/etc/systemd/system/ollama@.service"), packaged("ollama@.service"))
    return Plan(
        (Planned(file.path, file.text, keep=True),),
        """
Next, for two GPUs:
  systemctl disable --now ollama
  systemctl daemon-reload && systemctl enable --now ollama@0 ollama@1
  and in the balancer's configuration  backends: ["127.0.0.1:11440", "127.0.0.1:11441"]""",
    )


def _docker(_: str) -> Plan:
    return Plan(
        (Planned(Path.cwd() / "Dockerfile", packaged("Dockerfile"), keep=True),),
        """
Next, in a checkout of ollama-balancer:
  docker build -f Dockerfile -t ollama-balancer .
  docker run -p 11434:11434 -e BALANCER_BACKENDS=gpu1,gpu2 \\
    -e BALANCER_API_KEY="$(openssl rand -hex 32)" --read-only --stop-timeout 330 ollama-balancer""",
    )


def _compose(_: str) -> Plan:
    names = ("compose.yaml", "alerts.yaml", "dashboard.json")
    files = tuple(Planned(Path.cwd() / name, packaged(name), keep=True) for name in names)
    return Plan(
        files,
        """
Next, with the image built (ollama-balancer install --docker tells how):
  echo "BALANCER_API_KEY=$(openssl rand -hex 32)" >> .env
  docker compose up -d            # and: --profile webui, --profile obs""",
    )


def _takeover(_: str) -> Plan:
    units = Path("/etc/systemd/system")
    files = (
        Planned(
            units / "ollama.service.d/balancer.conf",
            "[Service]\nEnvironment=OLLAMA_HOST=127.0.0.1:11440\n",
        ),
        Planned(
            units / "ollama-balancer.service.d/takeover.conf",
            "[Unit]\nAfter=ollama.service\n\n"
            "[Service]\nEnvironment=BALANCER_LISTEN=127.0.0.1:11434\n",
        ),
    )
    return Plan(
        files,
        """\
Nothing was changed. With these two files Ollama moves to port 11440 and the balancer takes 11434,
so that every client finds it where Ollama was. Then:
  name the host under backends: in /etc/ollama-balancer/config.yaml   ["127.0.0.1:11440"]
  systemctl daemon-reload
  systemctl restart ollama && systemctl restart ollama-balancer
  OLLAMA_HOST=127.0.0.1:11434 ollama list
Back again: remove both files, daemon-reload, restart the balancer first.
If Ollama served other machines (OLLAMA_HOST=0.0.0.0), let the balancer do so: BALANCER_LISTEN=
0.0.0.0:11434 with a key or auth.anonymous.""",
    )


def _program(root: str) -> str:
    """What starts this very installation, as seen from below *root*."""
    beside = Path(sys.executable).parent / "ollama-balancer"
    command = str(beside) if beside.exists() else f"{sys.executable} -m balancer"
    return command.removeprefix(str(Path(root).absolute())) if root else command


def _write(plan: Plan, root: str) -> None:
    for file in plan.files:
        path = Path(f"{root}{file.path}") if root else file.path
        try:
            told = _put(path, file)
        except OSError as error:
            raise CommandError(
                f"Cannot write {path}: {error.strerror}. As root: sudo; to look only: --print",
                code=ExitCode.FAILURE,
            ) from None
        print(f"{told:9} {path}")


def _put(path: Path, file: Planned) -> str:
    """Write one file whole or not at all; what became of it."""
    there = path.read_bytes() if path.exists() else None  # it need not be a text
    if there == file.text.encode():
        return "unchanged"
    if there is not None and file.keep:
        return "kept"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=0o600)
    new.write_text(file.text, encoding="utf-8")
    new.chmod(file.mode)
    new.replace(path)
    return "written" if there is None else "replaced"


# -- healthcheck -------------------------------------------------------------------------------


def healthcheck(
    ready: Annotated[
        bool, typer.Option("--ready", help="Could a call be served? 1 if not, or while draining.")
    ] = False,
    live: Annotated[bool, typer.Option("--live", help="Is it there? The default.")] = False,
    admin: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The balancer; default: where BALANCER_LISTEN says."),
    ] = None,
) -> int:
    """Is the balancer well? For Docker's HEALTHCHECK and scripts: 0, 1 or 6, and one line."""
    from balancer.cli import client

    if ready and live:
        raise CommandError("Either --ready or --live.", code=ExitCode.USAGE)
    where = admin or _listening(os.environ)
    # A file that was spoilt since takes nothing from a balancer that runs; these pages need no key.
    balancer = client.Admin(client.find(where, None, guess=True).url)
    what = "ready" if ready else "live"
    status, told = balancer.ask("GET", f"/_balancer/{what}", good=what)
    if status != 200:
        reason = told.get("reason") or f"it answers {status}"
        raise CommandError(f"{balancer.url}: {reason}", code=ExitCode.FAILURE)
    print(what)
    return ExitCode.OK


def _listening(env: Mapping[str, str]) -> str | None:
    """Where the environment lets it listen, so that nobody has to read a configuration for it."""
    first = env.get("BALANCER_LISTEN", "").replace(";", ",").partition(",")[0].strip()
    if not first or first.startswith("fd:"):
        return None
    if first.startswith("unix:"):
        return first
    host, colon, port = first.rpartition(":")
    return f"127.0.0.1:{port}" if colon and host in ANYWHERE else first
