"""A gateway process whose ASGI app is a small one that shows what reaches it: ``probe_server.py SETTINGS.json``.

=================  ================================================================================
path               answer
=================  ================================================================================
/wait              nothing until the file named by the query exists; the log says how it ended
/stream            64 pieces, each as many bytes as the query says
/early             413 with nothing of the body read
/open              the head and a piece of a response, and the rest once the client has gone
/watch             at once; whether receive() then says http.disconnect is logged
/half              the head and a piece of a response, and no more
/fail              an exception
/status            the status that the query says
anything else      the scope and the body as JSON
=================  ================================================================================

A WebSocket is accepted and echoes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from flaskbus.errors import OperatorError
from flaskbus.settings import GatewaySettings, build
from flaskbus_gateway.server import serve

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("flaskbus.gateway")


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "websocket":
        await websocket(receive, send)
    else:
        await http(scope, receive, send)


async def lifespan(receive: Receive, send: Send) -> None:
    await receive()
    if reason := os.environ.get("PROBE_FAILS"):
        await send({"type": "lifespan.startup.failed", "message": reason})
        return
    await send({"type": "lifespan.startup.complete"})
    log.info("probe ready in %d", os.getpid())
    await receive()
    log.info("probe lifespan shutdown")
    await send({"type": "lifespan.shutdown.complete"})


async def websocket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})
    log.info("probe websocket closed with %s", message["code"])


async def http(scope: Message, receive: Receive, send: Send) -> None:
    query = scope["query_string"].decode()
    match scope["path"]:
        case "/wait":
            await answer(send, 200, (await waited(Path(query), receive)).encode())
        case "/stream":
            await start(send, 200, [(b"x-by", b"probe")])
            piece = b"x" * int(query)
            for _ in range(64):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})
            log.info("probe stream over")
        case "/early":
            await answer(send, 413, b"too large")
        case "/open":
            await start(send, 200, [])
            await send({"type": "http.response.body", "body": b"open", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.body"})
        case "/watch":
            await answer(send, 200, b"")
            background.add(asyncio.ensure_future(watch(receive)))
        case "/half":
            await start(send, 200, [(b"content-length", b"10")])
            await send({"type": "http.response.body", "body": b"half.", "more_body": True})
        case "/fail":
            raise RuntimeError("a bug")
        case "/status":
            await answer(send, int(query), b"")
        case _:
            body = await whole(receive)
            shown = {
                key: scope[key] for key in ("method", "scheme", "path", "http_version", "client", "server")
            }
            shown["raw_path"] = scope["raw_path"].decode("latin-1")
            shown["query"] = query
            shown["headers"] = [
                [name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]
            ]
            shown["body"] = body.decode("latin-1")
            shown["pid"] = os.getpid()
            await answer(send, 200, json.dumps(shown).encode())


background: set[asyncio.Future[None]] = set()


async def watch(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    log.info("probe heard the end of the response")


async def waited(path: Path, receive: Receive) -> str:
    """Until the file exists or the client is gone, whichever is first."""
    await whole(receive)
    path.with_suffix(".begun").touch()
    gone = asyncio.ensure_future(receive())
    while not path.exists() and not gone.done():
        await asyncio.wait([gone], timeout=0.02)
    if gone.done():
        # Longer than gunicorn's grace: whoever cancels the app loses what it has to put in order.
        await asyncio.sleep(1.5)
        log.info("probe heard %s", gone.result()["type"])
        return "gone"
    gone.cancel()
    return "waited"


async def whole(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


async def start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(send: Send, status: int, body: bytes) -> None:
    await start(send, status, [(b"content-length", b"%d" % len(body))])
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    file = Path(sys.argv[1])

    def read() -> GatewaySettings:
        return build(GatewaySettings, json.loads(file.read_text()))

    try:
        serve(read(), factory=lambda _: app, reread=read, watch=[file])
    except OperatorError as error:
        print(f"probe: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
