"""A WebSocket as an exchange: its messages are frames, both ways."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from flaskbus import errors
from flaskbus.messages import Close, Head, Message, Reply
from flaskbus_gateway.exchange import Exchange
from flaskbus_gateway.http import IS_LOST, Incoming, Receive, Scope, Send, relayed_headers
from flaskbus_gateway.inbound import ClientLeft, Inbound

ABNORMAL = 1011
"""The close code for what is no fault of the client (RFC 6455 section 7.4.1)."""

FAREWELL = 7.0
"""Seconds that the app's close may take after the client's; the agent gives its app less."""

LONGEST_REASON = 123
"""Bytes of a close frame's reason (RFC 6455 section 5.5)."""

NO_CODE, GONE = 1005, 1006
"""Codes that say how a WebSocket ended, without one and without a word (RFC 6455 section 7.4.1)."""

ANSWER_BODY = "websocket.http.response.body"
"""The ASGI message with a part of the answer to a handshake that is not taken."""

_PORTS = {"http": ":80", "https": ":443"}


class Origins:
    """Whose pages may open a WebSocket: the host's own, and those of ``allowed``, as the setting writes them."""

    def __init__(self, allowed: str) -> None:
        items = [item.strip().lower() for item in allowed.split(",") if item.strip()]
        self._any = "*" in items
        self._allowed = {_split(item) for item in items if item != "*"}

    def check(self, incoming: Incoming) -> None:
        """Raises :class:`~flaskbus.errors.ForeignOrigin`. What has no Origin is no page in a browser.

        Browsers let every page open a WebSocket everywhere, and send cookies along: it is for servers to look (RFC
        6455 section 10.2). The scheme is not compared with our own, as a proxy in front may take off TLS without a
        word; a default port is the same as none (RFC 6454 section 4).
        """
        for name, value in incoming.headers:
            if name != b"origin" or self._any:
                continue
            origin = value.decode("latin-1").lower()
            scheme, host = _split(origin)
            own = scheme in _PORTS and host == incoming.host.lower().removesuffix(_PORTS[scheme])
            if not own and (scheme, host) not in self._allowed:
                raise errors.ForeignOrigin(
                    f"{origin} is not {incoming.host}, and not among websocket_origins"
                )


def _split(origin: str) -> tuple[str, str]:
    """Scheme, and host with its port unless that is the scheme's own."""
    scheme, _, host = origin.partition("://")
    return scheme, host.removesuffix(_PORTS.get(scheme, ""))


def as_request(scope: Scope) -> Scope:
    """A handshake's scope, as that of the request that it is."""
    headers = list(scope["headers"])
    if scope.get("subprotocols") and not any(name == _PROTOCOL for name, _ in headers):
        # Some servers take the header for themselves.
        headers.append((_PROTOCOL, ", ".join(scope["subprotocols"]).encode("latin-1")))
    return {**scope, "method": "GET", "headers": headers}


class WebSocket:
    """Relays one WebSocket between ASGI and an exchange. ``limit``: largest message of the app in bytes."""

    def __init__(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._exchange = exchange
        self._extensions = scope.get("extensions") or {}
        self._receive = receive
        self._send = send
        self._limit = limit
        self.accepted = False
        self._left = False  # the client takes nothing any more

    async def accept(self, head: Head) -> None:
        """The app took the handshake."""
        headers = relayed_headers(head.headers)
        self.accepted = True
        chosen = next((value for name, value in headers if name.lower() == _PROTOCOL), None)
        await self._send(
            {
                "type": "websocket.accept",
                "subprotocol": chosen.decode("latin-1") if chosen else None,
                "headers": [pair for pair in headers if pair[0].lower() not in _OURS],
            }
        )

    async def answer(self, head: Reply | Head) -> None:
        """The app did not take it: begin its own answer. Raises OSError where the server can send none but 403."""
        if head.status < 200:
            raise errors.AgentLost(f"the agent answered a handshake with status {head.status}, and no more")
        await begin_answer(self._extensions, self._send, head.status, relayed_headers(head.headers))

    async def feed(self, inbound: Inbound) -> None:
        """Bring the app what the client sends, until its close; the app has some seconds for its own."""
        inbound.is_lost = self._extensions.get(IS_LOST, inbound.is_lost)
        try:
            code, reason = await inbound.push_messages(self._receive)
        except ClientLeft:
            code, reason = GONE, ""
        self._left = True
        if self.accepted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    if code != NO_CODE:
                        code, reason = _written(code, reason, instead=GONE)
                    await inbound.push_close(code, reason)
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
            if not self._left:  # a client that is gone makes no room
                exchange.handed_over(len(frames), taken)

    async def _give(self, data: bytes, text: bool) -> None:
        try:
            content: dict[str, Any] = {"text": data.decode()} if text else {"bytes": data}
        except UnicodeDecodeError:
            raise errors.AgentLost("the app sent text that is not UTF-8") from None
        if not self._left:
            # The app may not know yet that the client left, and has to hear all that it said before.
            with contextlib.suppress(OSError):
                await self._send({"type": "websocket.send", **content})

    async def _close(self, code: int, reason: str) -> None:
        if not self._left:
            code, reason = _written(1000 if code == NO_CODE else code, reason, instead=ABNORMAL)
            await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def fail(self, detail: str) -> None:
        """The bus ends it."""
        await self._close(ABNORMAL, detail)


_PROTOCOL = b"sec-websocket-protocol"

_OURS = frozenset({_PROTOCOL, b"sec-websocket-accept", b"sec-websocket-extensions", b"content-length"})
"""Headers of an accepted handshake that are between the client and the gateway."""


def _written(code: int, reason: str, *, instead: int) -> tuple[int, str]:
    """Code and reason as they may be written (RFC 6455 section 7.4); ``instead`` of a code that may not."""
    if not ((1000 <= code <= 1014 and code not in (1004, NO_CODE, GONE)) or 3000 <= code <= 4999):
        code = instead
    return code, reason.encode()[:LONGEST_REASON].decode(errors="ignore")


async def begin_answer(
    extensions: Mapping[str, Any], send: Send, status: int, headers: list[tuple[bytes, bytes]]
) -> None:
    """The head of an answer to a handshake that is not taken (ASGI's WebSocket Denial Response).

    Raises OSError where the server knows of no such thing: it answers 403 then.
    """
    if "websocket.http.response" not in extensions:
        await send({"type": "websocket.close"})
        raise OSError("the server takes no answer")
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
