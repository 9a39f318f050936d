"""Handshakes of WebSockets, for apps that find a socket where werkzeug's server puts one."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from flaskbus.errors import StreamsFull
from flaskbus.messages import Request
from flaskbus_agent.bridge import Bridge
from flaskbus_agent.entry import Entry
from flaskbus_agent.line import Line, LineSink
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.wsgi import respond

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger("flaskbus.agent")


def upgrade(
    entry: Entry,
    request: Request,
    outbox: Outbox,
    environ: WSGIEnvironment,
    bridge: Bridge,
    message_limit: int,
) -> None:
    """Run an app that may take the handshake, until the WebSocket is over. ``message_limit`` in bytes."""
    offered = environ.get("HTTP_SEC_WEBSOCKET_PROTOCOL", "")
    names = [name for item in offered.split(",") if (name := item.strip())]
    line: Line | None = None
    try:
        line = Line(outbox, entry.served.keys.inbound(request.id), names, message_limit)
        bridge.add(line)
    except (OSError, RuntimeError) as error:
        if line is not None:
            line.end_app()
            line.hang_up()
        log.error("no room for a WebSocket: %s", error)
        refuse(request, outbox, f"there is no file or no thread for it: {error}")
        return
    environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)  # they are the client's with the gateway
    environ |= {
        "HTTP_CONNECTION": "Upgrade",
        "HTTP_UPGRADE": "websocket",
        "HTTP_SEC_WEBSOCKET_KEY": line.client.key,
        "werkzeug.socket": line.apps,
    }
    try:
        respond(line.quiet(entry.served.app), environ, LineSink(line), method=request.method)
    finally:
        line.end_app()
        if line.refuse():
            bridge.end(line)
        line.over.wait()


def refuse(request: Request, outbox: Outbox, why: str) -> None:
    """A WebSocket is one too many. It would keep a request thread for as long as it likes."""
    error = StreamsFull(
        f"this agent process takes no more streams and WebSockets: {why}",
        retry_after=5,
        executed="unknown" if request.attempt > 1 else None,
    )
    headers = ((b"Content-Type", b"application/problem+json"), (b"Retry-After", b"%d" % 5))
    outbox.reply(error.status, headers, json.dumps(error.problem(request.id)).encode())
