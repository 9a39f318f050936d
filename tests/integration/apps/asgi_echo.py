"""The gateway's own server without the bus: an ASGI app that echoes on WebSockets. ``python -m … PORT``."""

from __future__ import annotations

import sys
from typing import Any

from flaskbus.settings import GatewaySettings
from flaskbus_gateway.http import Receive, Scope, Send
from flaskbus_gateway.server import serve


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            kept = {key: value for key, value in message.items() if key in ("text", "bytes")}
            await send({"type": "websocket.send", **kept})
    else:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def factory(settings: GatewaySettings) -> Any:
    return echo


if __name__ == "__main__":
    serve(GatewaySettings(port=int(sys.argv[1])), factory=factory)
