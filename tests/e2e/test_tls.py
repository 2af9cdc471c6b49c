"""TLS to backends: who is believed, under which name, and what is told when nobody is."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from balancer.core.events import HealthFlipped
from balancer.sim.ollama import SimOllama
from tests.e2e.stage import CHAT, error_of, models
from tests.needs import program
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")
NAME = "gpu.example"


@dataclass(frozen=True, slots=True)
class Papers:
    """PEM files: a CA, a server's certificate for `NAME` and one for 127.0.0.1, a client's."""

    room: Path

    def __getattr__(self, name: str) -> str:
        return str(self.room / name.replace("_", "."))


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """Made once; they last a day."""
    room = tmp_path_factory.mktemp("papers")
    openssl = program("openssl")

    def run(*args: str) -> None:
        subprocess.run([openssl, *args], cwd=room, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for authority in ("ca", "other"):
        run("req", "-x509", *key, "-days", "1", "-subj", f"/CN={authority}", "-keyout",
            f"{authority}.key", "-out", f"{authority}.pem")  # fmt: skip
    for who, alt in (("named", f"DNS:{NAME}"), ("local", "IP:127.0.0.1"), ("client", "DNS:us")):
        (room / "ext").write_text(f"subjectAltName={alt}\n")
        run("req", *key, "-subj", f"/CN={who}", "-keyout", f"{who}.key", "-out", f"{who}.csr")
        run("x509", "-req", "-in", f"{who}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "1",
            "-CAcreateserial", "-extfile", "ext", "-out", f"{who}.pem")  # fmt: skip
    return Papers(room)


@asynccontextmanager
async def front(
    sim: SimOllama, papers: Papers, who: str, *, asks: bool = False
) -> AsyncIterator[str]:
    """A TLS door before a host, with that certificate; *asks*: it wants one of the caller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.room / f"{who}.pem", papers.room / f"{who}.key")
    if asks:
        context.load_verify_locations(papers.room / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", sim.port)
        await asyncio.gather(pump(reader, outer), pump(inner, writer))
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
            await outer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def behind(
    papers: Papers, who: str, tls: Mapping[str, Any], *, asks: bool = False
) -> AsyncIterator[Rig]:
    """A balancer whose only backend is behind TLS, reached with these settings."""
    async with (
        SimOllama(models(0.0, speed=100.0), name="far") as sim,
        front(sim, papers, who, asks=asks) as url,
        running(0, config={"health.timeout": "10s"}) as rig,
    ):
        rig.config["backends"] = [{"name": "far", "url": url, "tls": {**tls}}]
        rig.balancer.reload_now()
        await rig.events.until(lambda: bool(rig.events.of(HealthFlipped)), 30.0)
        yield rig


async def serves(rig: Rig) -> bool:
    """Whether a call is answered there."""
    pool = rig.balancer.pool
    if not pool.members["far"].health.up:
        return False
    await rig.events.until(lambda: bool(rig.balancer.catalog.listed("far")), 30.0)
    return (await rig.ask("POST", "/api/chat", CHAT)).status == 200


@pytest.mark.parametrize(
    ("who", "tls"),
    [
        ("local", {"ca_file": "ca.pem"}),
        ("named", {"ca_file": "ca.pem", "server_name": NAME}),
        ("named", {"verify": False}),
        ("local", {"verify": False, "ca_file": "other.pem"}),
    ],
)
async def test_a_backend_that_is_believed(papers: Papers, who: str, tls: dict[str, Any]) -> None:
    """By its authority and address, under another name, or because nobody looks."""
    told = {
        key: str(papers.room / value) if key == "ca_file" else value for key, value in tls.items()
    }
    async with behind(papers, who, told) as rig:
        assert await serves(rig)


@pytest.mark.parametrize(
    ("who", "tls", "text"),
    [
        ("local", {}, "certificate"),
        ("local", {"ca_file": "other.pem"}, "certificate"),
        ("named", {"ca_file": "ca.pem"}, "127.0.0.1"),
        ("named", {"ca_file": "ca.pem", "server_name": "gpu.other"}, "gpu.other"),
    ],
)
async def test_a_backend_that_is_not(
    papers: Papers, who: str, tls: dict[str, Any], text: str
) -> None:
    """It is down, and the reason is where people look: status, and the refusal of a call."""
    told = {
        key: str(papers.room / value) if key == "ca_file" else value for key, value in tls.items()
    }
    async with behind(papers, who, told) as rig:
        assert not await serves(rig)
        error = rig.balancer.pool.view("far").error
        assert "certificate" in error
        assert text in error
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert reply.status == 503
        assert "certificate" in error_of(reply)


async def test_a_backend_that_wants_to_know_us(papers: Papers) -> None:
    """It gets our certificate."""
    told = {"ca_file": papers.ca_pem, "client_cert_file": papers.client_pem,
            "client_key_file": papers.client_key}  # fmt: skip
    async with behind(papers, "local", told, asks=True) as rig:
        assert await serves(rig)


async def test_a_backend_that_does_not_know_us(papers: Papers) -> None:
    """Without it the check fails."""
    async with behind(papers, "local", {"ca_file": papers.ca_pem}, asks=True) as rig:
        assert not await serves(rig)
        assert rig.balancer.pool.view("far").error


async def test_plain_http_where_tls_is_expected(papers: Papers) -> None:
    """A host without TLS is no reason to hang; it is told in plain words."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n400 Bad Request")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server, running(0) as rig:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        rig.config["backends"] = [{"name": "far", "url": url, "tls": {"ca_file": papers.ca_pem}}]
        rig.balancer.reload_now()
        await rig.events.until(lambda: bool(rig.events.of(HealthFlipped)), 30.0)
        assert "does it speak TLS?" in rig.balancer.pool.view("far").error
