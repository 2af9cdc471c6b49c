"""
A naive reverse proxy in aiohttp, written as anybody would: ``plain_proxy.py PORT ORIGIN_PORT``.

With ``--uvloop`` on that loop. It reads the body and the model, and does nothing with it.
"""

import argparse
import json

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

MAX_BODY_BYTES = 64 * 1024 * 1024
DROPPED = ("Connection", "Transfer-Encoding", "Content-Length", "Host", "Keep-Alive")


class Proxy:
    """Passes every call to one origin."""

    def __init__(self, origin_port: int) -> None:
        self._origin = f"http://127.0.0.1:{origin_port}"
        self._session: ClientSession

    async def open(self, _: web.Application) -> None:
        """Open the session, in the loop that serves."""
        self._session = ClientSession(
            connector=TCPConnector(limit=0),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
        )

    async def close(self, _: web.Application) -> None:
        """Close it."""
        await self._session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one call on."""
        body = await request.read()
        if body:
            json.loads(body).get("model")
        headers = {name: text for name, text in request.headers.items() if name not in DROPPED}
        url = self._origin + request.path_qs
        async with self._session.request(
            request.method, url, headers=headers, data=body or None
        ) as answer:
            reply = web.StreamResponse(status=answer.status)
            reply.content_type = answer.content_type
            if answer.content_length is not None:
                reply.content_length = answer.content_length
            await reply.prepare(request)
            async for data in answer.content.iter_any():
                await reply.write(data)
            await reply.write_eof()
            return reply


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("origin_port", type=int)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    if options.uvloop:
        import uvloop  # noqa: PLC0415 - not on every platform

        uvloop.install()
    proxy = Proxy(options.origin_port)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.on_startup.append(proxy.open)
    app.on_cleanup.append(proxy.close)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(
        app,
        host="127.0.0.1",
        port=options.port,
        backlog=4096,
        access_log=None,
        handler_cancellation=True,
        print=None,
    )


if __name__ == "__main__":
    main()
