"""Every kind of address that can be listened on."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import Start
from tests.sim.wire import Wire

REQUEST = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
BODY = b'{"model":"llama3.2","prompt":"x","stream":false}'


def has_ipv6() -> bool:
    """Whether this machine can listen on ::1."""
    try:
        with closing(socket.create_server(("::1", 0), family=socket.AF_INET6)):
            return True
    except OSError:
        return False


async def test_a_unix_socket_is_this_machine(start: Start, tmp_path: Path) -> None:
    """Whoever may open the file is local; backends are told so."""
    path = tmp_path / "olb.sock"
    rig = await start(1, config={"server.listen": ["127.0.0.1:0", f"unix:{path}"]})
    wire = Wire(*await asyncio.open_unix_connection(str(path)))
    wire.writer.write(REQUEST % (len(BODY), BODY))
    assert (await wire.reply()).status == 200
    wire.close()
    assert dict(rig.forwarded()[-1].headers)["X-Forwarded-For"] == "127.0.0.1"
    assert rig.balancer.addresses[1] == f"unix:{path}"


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
async def test_ipv6(start: Start) -> None:
    """With the brackets where they belong."""
    rig = await start(1, config={"server.listen": ["127.0.0.1:0", "[::1]:0"]})
    port = int(rig.balancer.addresses[1].rpartition(":")[2])
    assert rig.balancer.addresses[1] == f"http://[::1]:{port}"
    wire = Wire(*await asyncio.open_connection("::1", port))
    wire.writer.write(REQUEST % (len(BODY), BODY))
    assert (await wire.reply()).status == 200
    wire.close()
    assert dict(rig.forwarded()[-1].headers)["X-Forwarded-For"] == "::1"
