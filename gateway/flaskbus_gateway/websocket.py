"""A WebSocket as an exchange: its messages are frames, both ways."""

from __future__ import annotations

import asyncio
from typing import Any

from flaskbus import errors
from flaskbus.messages import Close, Head, Message, Reply
from flaskbus_gateway.exchange import Exchange
from flaskbus_gateway.http import Incoming, Receive, Send, relayed_headers
from flaskbus_gateway.inbound import Inbound

ABNORMAL = 1011
"""The close code for what is no fault of the client (RFC 6455 section 7.4.1)."""

FAREWELL = 7.0
"""Seconds that the app's close may take after the client's; the agent gives its app less."""

LONGEST_REASON = 123
"""Bytes of a close frame's reason (RFC 6455 section 5.5)."""


class Origins:
    """Whose pages may open a WebSocket: the host's own, and those of ``allowed``, as the setting writes them."""

    def __init__(self, allowed: str) -> None:
        self._allowed = {item.strip().lower() for item in allowed.split(",")}

    def check(self, incoming: Incoming) -> None:
        """Raises :class:`~flaskbus.errors.ForeignOrigin`. What has no Origin is no page in a browser.

        Browsers let every page open a WebSocket everywhere, and send cookies along: it is for servers to look (RFC
        6455 section 10.2). The scheme is not compared, as a proxy in front may take off TLS without a word.
        """
        origins = [value.decode("latin-1").lower() for name, value in incoming.headers if name == b"origin"]
        for origin in origins:
            scheme, _, host = origin.partition("://")
            own = scheme in ("http", "https") and host == incoming.host.lower()
            if not own and origin not in self._allowed and "*" not in self._allowed:
                raise errors.ForeignOrigin(
                    f"{origin} is not {incoming.host}, and not among websocket_origins"
                )


class WebSocket:
    """Relays one WebSocket between ASGI and an exchange. ``limit``: largest message of the app in bytes."""

    def __init__(self, exchange: Exchange, receive: Receive, send: Send, limit: int) -> None:
        self._exchange = exchange
        self._receive = receive
        self._send = send
        self._limit = limit
        self.accepted = False

    async def accept(self, head: Head) -> None:
        """The app took the handshake."""
        headers = relayed_headers(head.headers)
        self.accepted = True
        chosen = next((value for name, value in headers if name == b"sec-websocket-protocol"), None)
        await self._send(
            {
                "type": "websocket.accept",
                "subprotocol": chosen.decode("latin-1") if chosen else None,
                "headers": [pair for pair in headers if pair[0] != b"sec-websocket-protocol"],
            }
        )

    async def feed(self, inbound: Inbound) -> None:
        """Bring the app what the client sends, until its close; the app has some seconds for its own."""
        await inbound.push_messages(self._receive)
        if self.accepted:
            await asyncio.sleep(FAREWELL)
        self._exchange.abandon()

    async def relay(self) -> None:
        """Bring the client what the app sends, until the app ends it."""
        parts: list[bytes] = []
        size = 0
        exchange = self._exchange
        while True:
            frames = await exchange.messages()
            taken = 0
            for frame in frames:
                if isinstance(frame, Message):
                    taken += len(frame.data)
                    size += len(frame.data)
                    if size > self._limit:
                        await self._close(1009, "the app's message is too big")
                        return
                    parts.append(frame.data)
                    if frame.last:
                        await self._give(b"".join(parts), frame.text)
                        parts, size = [], 0
                elif isinstance(frame, Close):
                    await self._close(frame.code, frame.reason)
                    return
            exchange.handed_over(len(frames), taken)

    async def _give(self, data: bytes, text: bool) -> None:
        if not text:
            await self._send({"type": "websocket.send", "bytes": data})
            return
        try:
            await self._send({"type": "websocket.send", "text": data.decode()})
        except UnicodeDecodeError:
            raise errors.AgentLost("the app sent text that is not UTF-8") from None

    async def _close(self, code: int, reason: str) -> None:
        if code in (1005, 1006):  # never on the wire: it gave no code, or ended without a word
            code = 1000 if code == 1005 else ABNORMAL
        reason = reason.encode()[:LONGEST_REASON].decode(errors="ignore")
        await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def fail(self, detail: str) -> None:
        """The bus ends it."""
        await self._close(ABNORMAL, detail)


def denial(head: Reply | Head) -> dict[str, Any]:
    """The app's own answer to a handshake that it does not take (ASGI's WebSocket Denial Response)."""
    return {
        "type": "websocket.http.response.start",
        "status": head.status,
        "headers": relayed_headers(head.headers),
    }
