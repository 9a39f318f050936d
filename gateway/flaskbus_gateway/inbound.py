"""What goes from a client to the agent after its request: inbound frames, at most a window ahead of the agent.

Neither this process nor the broker ever holds more of it. A frame stays on the request's inbound list until the
agent has received it; what a broken connection may have swallowed is pushed again, and dropped where it came twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial

from flaskbus import errors, wire
from flaskbus.keys import LIST_TTL_MS
from flaskbus.messages import INBOUND, Chunk, Close, End, Failure, Frame, Message
from flaskbus_gateway.http import Receive
from flaskbus_gateway.link import AnswerError, Link, LinkError

SLOWEST = 4096
"""Bytes a second that a client must keep up on the whole, beside the time that any body may take."""

IDENTITY = 32
"""Bytes at the front of an element that tell it from every other one: its number is among them."""

GONE = "client-gone"
"""The code of the failure that ends the inbound frames of a client that went away."""


class ClientLeft(Exception):
    """The client went away in the middle of what it had to send."""


class Inbound:
    """The inbound list of one request.

    ``window`` in bytes; ``ring`` tells an agent that something is new, and may bring it the element; ``sign`` is
    ``None`` where nobody signs.
    """

    def __init__(
        self,
        link: Link,
        key: str,
        *,
        window: int,
        ring: Callable[[str, bytes], None],
        sign: Callable[[bytes], bytes] | None,
    ) -> None:
        self.key = key
        self.first = b""
        """How the list began when nothing had been taken from it yet; empty while nothing was sent."""
        self.progress = link.loop.time()
        """When the agent last took something, or was given something that there was room for."""
        self._agent = ""  # who takes the frames, as soon as that is known
        self._link = link
        self._window = window
        self._ring = ring
        self._sign = sign
        self._seq = 0
        self._sizes: deque[int] = deque()
        self._waiting = 0
        self._credit = asyncio.Event()

    async def push(self, make: Callable[[int], Frame]) -> None:
        """Add the frame that ``make`` makes of its number, and wait until there is room for another."""
        element = wire.encode_frame(make(self._seq), self._sign)
        self.first = self.first or element[:IDENTITY]
        self._seq += 1
        while True:
            try:
                answer = self._link.call("RPUSH", self.key, element)
                if self._agent:
                    self._ring(self._agent, element if len(element) <= wire.MAX_RING_FRAME else b"")
                self._waiting = await answer
                break
            except LinkError:
                await self._link.up.wait()
            except AnswerError as error:
                if error.code != "OOM":
                    raise
                await asyncio.sleep(0.1)  # what is taken makes room
        if self._waiting == 1:
            self._link.tell("PEXPIRE", self.key, LIST_TTL_MS)
        self.progress = self._link.loop.time()
        self._sizes.append(len(element))
        await self._room()

    async def _room(self) -> None:
        while True:
            while len(self._sizes) > self._waiting:
                self._sizes.popleft()
                self.progress = self._link.loop.time()
            if sum(self._sizes) < self._window:
                return
            self._credit.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._credit.wait(), 1.0)
            with contextlib.suppress(LinkError, AnswerError):
                self._waiting = await self._link.call("LLEN", self.key)
                self._link.tell("PEXPIRE", self.key, LIST_TTL_MS)

    def taken(self, agent: str) -> None:
        """The agent rang: it took something, or waits for more, which it may not have heard of."""
        if agent != self._agent and self._seq:
            self._ring(agent, b"")
        self._agent = agent
        self._credit.set()

    async def push_body(self, receive: Receive, *, received: int, limit: int, timeout: float) -> None:
        """The rest of a request's body: what ``receive`` (ASGI) gives.

        ``received`` is how many bytes went before, in the entry; ``limit`` in bytes, ``timeout`` in seconds. Raises
        :class:`~flaskbus.errors.BodyTimeout`, :class:`~flaskbus.errors.BodyTooLarge` and :class:`ClientLeft`; for
        the agent the frames end with a failure then.
        """
        try:
            await self._pump(receive, received, limit, timeout)
        except (errors.BodyTimeout, errors.BodyTooLarge, ClientLeft) as error:
            code = error.code if isinstance(error, errors.BusError) else GONE
            detail = str(error)
            await self.push(partial(Failure, INBOUND, code=code, detail=detail))
            raise

    async def _pump(self, receive: Receive, received: int, limit: int, timeout: float) -> None:
        now = self._link.loop.time
        allowed, more = timeout, True
        while more:
            began = now()
            try:
                message = await asyncio.wait_for(receive(), allowed)
            except TimeoutError:
                raise errors.BodyTimeout(f"{received} bytes came, and then too little") from None
            allowed -= now() - began
            if message["type"] == "http.disconnect":
                raise ClientLeft("the client went away")
            data: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            received += len(data)
            if received > limit:
                raise errors.BodyTooLarge(f"more than {limit} bytes")
            allowed = min(allowed + len(data) / SLOWEST, timeout)
            for start in range(0, len(data), wire.MAX_CHUNK):
                part = data[start : start + wire.MAX_CHUNK]
                await self.push(partial(Chunk, INBOUND, data=part))
        await self.push(partial(End, INBOUND))

    async def push_messages(self, receive: Receive) -> None:
        """The messages of a WebSocket, until its client closes it or is gone."""
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                code, reason = message.get("code", 1005), message.get("reason") or ""
                await self.push(partial(Close, INBOUND, code=code, reason=reason))
                return
            text: str | None = message.get("text")
            data: bytes = text.encode() if text is not None else message.get("bytes") or b""
            for start in range(0, len(data) or 1, wire.MAX_CHUNK):
                part = data[start : start + wire.MAX_CHUNK]
                last = start + wire.MAX_CHUNK >= len(data)
                await self.push(partial(Message, INBOUND, text=text is not None, last=last, data=part))
