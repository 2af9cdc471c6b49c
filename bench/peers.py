"""The parties of the data plane benchmark: how each is built and configured."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine

HERE = Path(__file__).parent
WIRE = HERE / "wire"
BUILD = HERE / ".build"


class Missing(RuntimeError):
    """A party that cannot take part on this machine, and why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a proxy is to stand."""

    port: int
    origin_port: int
    directory: Path
    token: str  # every client's key


Command = Callable[[Place], list[str]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy that can be measured."""

    name: str
    about: str
    command: Command
    programs: tuple[str, ...] = ()  # that must be installed
    files: tuple[Path, ...] = ()  # that must be there

    def lacks(self) -> str:
        """What is missing for it, or ""."""
        programs = [f"{name} is not installed" for name in self.programs if not shutil.which(name)]
        files = [f"{path.relative_to(HERE)} is missing" for path in self.files if not path.exists()]
        return ", ".join(programs + files)

    def version(self) -> str:
        """What it says of itself."""
        return machine.version(*_VERSIONS[self.name]) if self.name in _VERSIONS else ""


# -- building ----------------------------------------------------------------------------------


def build(names: Iterable[str]) -> None:
    """
    Compile origin and generator, and those proxies that need it, where sources are newer.

    Raises:
        Missing: There is no compiler, or it refused.
    """
    BUILD.mkdir(exist_ok=True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Missing("a C compiler is needed: apt install gcc libc6-dev")
    for name in ("origin", "load"):
        source = WIRE / f"{name}.c"
        headers = WIRE.glob("*.h")
        _compile([compiler, "-O2", "-o", "{target}", str(source), "-lm"], name, [source, *headers])
    if "go" in names:
        source = WIRE / "proxy.go"
        _compile(["go", "build", "-o", "{target}", str(source)], "proxy", [source])


def _compile(argv: Sequence[str], name: str, sources: Sequence[Path]) -> None:
    target = BUILD / name
    if not sources[0].exists():
        raise Missing(f"{sources[0].relative_to(HERE)} is missing")
    if target.exists() and all(s.stat().st_mtime < target.stat().st_mtime for s in sources):
        return
    print(f"building {name} ...", file=sys.stderr)
    new = BUILD / f"{name}.{os.getpid()}"  # another run may be using the old one
    command = [word.format(target=new) for word in argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=WIRE)
    if done.returncode:
        raise Missing(f"{name} cannot be built:\n{done.stderr}")
    new.replace(target)


# -- proxies -----------------------------------------------------------------------------------


def _nginx(place: Place) -> list[str]:
    user = "user root;" if os.geteuid() == 0 else ""  # its temporary files are in our directory
    places = "\n".join(
        f"  {kind}_temp_path {place.directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = place.directory / "nginx.conf"
    config.write_text(f"""\
{user}
daemon off;
worker_processes 1;
pid {place.directory}/nginx.pid;
error_log {place.directory}/error.log;
events {{ worker_connections 16384; }}
http {{
{places}
  access_log {place.directory}/access.log combined buffer=64k flush=1s;
  client_body_buffer_size 128k;
  client_max_body_size 64m;
  keepalive_requests 100000000;
  keepalive_timeout 1h;
  upstream origin {{
    server 127.0.0.1:{place.origin_port} max_fails=0;
    keepalive 512;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{place.port} backlog=4096;
    location / {{
      proxy_pass http://origin;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 1h;
      proxy_send_timeout 1h;
    }}
  }}
}}
""")
    return ["nginx", "-p", str(place.directory), "-e", "error.log", "-c", str(config)]


def _haproxy(place: Place) -> list[str]:
    config = place.directory / "haproxy.cfg"
    config.write_text(f"""\
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  backlog 4096
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  option http-no-delay
  option abortonclose
  http-reuse always
frontend clients
  bind 127.0.0.1:{place.port}
  default_backend origin
backend origin
  server origin 127.0.0.1:{place.origin_port}
""")
    return ["haproxy", "-db", "-f", str(config)]


def _go(place: Place) -> list[str]:
    return _between("env", "GOMAXPROCS=1", str(BUILD / "proxy"))(place)


def _between(*argv: str) -> Command:
    """Make the command of a program that takes both ports."""
    return lambda place: [*argv, str(place.port), str(place.origin_port)]


def configure_ours(place: Place) -> Path:
    """Write our configuration: as shipped, with a key, and room for every scenario."""
    config = place.directory / "ollama-balancer.yaml"
    config.write_text(f"""\
version: 1
server: {{listen: ["127.0.0.1:{place.port}"], drain_timeout: 0}}
auth:
  keys: [{{name: bench, role: user, key: {place.token}}}]
  anonymous: never
backends: [{{name: origin, url: "http://127.0.0.1:{place.origin_port}", slots: 100000}}]
queue: {{max_depth: 10000, max_depth_per_model: 10000}}
logging: {{format: json}}
""")
    return config


def _ours(place: Place) -> list[str]:
    config = configure_ours(place)
    return [sys.executable, "-m", "balancer", "serve", "--config", str(config)]


_PLAIN = WIRE / "plain_proxy.py"
_BARE = WIRE / "bare.py"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("nginx", "one worker, unbuffered, keep-alive", _nginx, programs=("nginx",)),
        Peer("haproxy", "one thread, http-no-delay", _haproxy, programs=("haproxy",)),
        Peer("go", "net/http ReverseProxy", _go, programs=("go",), files=(WIRE / "proxy.go",)),
        Peer("aiohttp", "naive, asyncio", _between(sys.executable, str(_PLAIN)), files=(_PLAIN,)),
        Peer(
            "aiohttp-uvloop",
            "naive, uvloop",
            _between(sys.executable, str(_PLAIN), "--uvloop"),
            files=(_PLAIN,),
        ),
        Peer("ours", "as shipped: key, breakers, metrics, JSON log", _ours),
        Peer(
            "ours-bare",
            "our relay alone",
            _between(sys.executable, str(_BARE)),
            files=(_BARE,),
        ),
    )
}


def know_before(tree: Path) -> None:
    """Make a peer, "before", of the balancer in another source tree, to compare with."""
    if not (tree / "balancer").is_dir():
        raise Missing(f"{tree} holds no balancer")

    def command(place: Place) -> list[str]:
        return ["env", f"PYTHONPATH={tree.resolve()}", *_ours(place)]

    PEERS["before"] = Peer("before", str(tree), command)


USUAL = ("direct", *(name for name in PEERS if name != "aiohttp-uvloop"))
_PYTHON = "import {0}; print(*(f'{{m.__name__}} {{m.__version__}}' for m in [{0}]))"
_VERSIONS: Mapping[str, tuple[str, ...]] = {
    "nginx": ("nginx", "-v"),
    "haproxy": ("haproxy", "-v"),
    "go": ("go", "version"),
    "aiohttp": (sys.executable, "-c", _PYTHON.format("aiohttp")),
    "aiohttp-uvloop": (sys.executable, "-c", _PYTHON.format("aiohttp, uvloop")),
    "ours": (sys.executable, "-c", _PYTHON.format("balancer, aiohttp, httptools, uvloop")),
}
