"""A WebSocket whose client goes away at a moment that only a transport of the test's own can choose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast
from unittest.mock import Mock

import pytest

from flaskbus_gateway.websocket_protocol import WebSocketProtocol

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Transport:
    """As uvloop's: what is written to it once it is closed is a RuntimeError."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None:
        if self.closed:
            raise RuntimeError("unable to perform operation; the handler is closed")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    "late",
    [
        {"type": "websocket.accept"},
        {"type": "websocket.send", "text": "x"},
        {"type": "websocket.close", "code": 1000},
        {"type": "websocket.http.response.start", "status": 404, "headers": [(b"content-length", b"0")]},
    ],
)
def test_a_client_that_is_gone_is_no_error_of_the_gateways(late: dict[str, Any]) -> None:
    log, answers = Mock(), Mock()

    async def serve() -> None:
        transport = Transport()

        async def app(_: dict[str, Any], receive: Receive, send: Send) -> None:
            await receive()
            if late["type"] in ("websocket.send", "websocket.close"):
                await send({"type": "websocket.accept"})
            transport.closed = True
            protocol.feed_eof()  # and nobody has had a turn to read it
            await send(late)
            await receive()

        async def drain() -> None: ...

        scope = {"type": "websocket", "headers": [(b"sec-websocket-key", b"AAAAAAAAAAAAAAAAAAAAAA==")]}
        protocol = WebSocketProtocol(
            cast(asyncio.Transport, transport), scope, app, log,
            limit=1 << 20, drain=drain, respond=answers, hang_up=Mock(),
        )  # fmt: skip
        await asyncio.wait_for(protocol.run(), 10)

    asyncio.run(serve())
    log.exception.assert_not_called()
