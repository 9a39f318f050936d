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
from flaskbus.refusals import passing
from flaskbus_gateway.deadlines import Patience
from flaskbus_gateway.http import Receive
from flaskbus_gateway.link import AnswerError, Link, LinkError

LOOK = 1.0
"""Seconds after which the list is looked at although no agent rang."""

LOST = 0.05
"""Seconds between two looks whether a client that has to wait is still there."""

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
        self.is_lost: Callable[[], bool] = lambda: False
        """Whether the client's connection is; asked while there is no room, and it cannot say so itself."""
        self.progress = link.loop.time()
        """When the agent last took something, or was given something that there was room for."""
        self._agent = ""  # who takes the frames, as soon as that is known
        self._link = link
        self._window = window
        self._ring = ring
        self._sign = sign
        self._seq = 0
        self._sizes: deque[int] = deque()
        self._lies = 0  # their sum: many thousands where they are small
        self._waiting = 0
        self._credit = asyncio.Event()
        self._closed = False

    async def push(self, make: Callable[[int], Frame]) -> None:
        """Add the frame that ``make`` makes of its number, and wait until there is room for another.

        Raises :class:`ClientLeft` where the client goes away meanwhile, and
        :class:`~flaskbus_gateway.link.AnswerError` where the broker refuses the frame for good.
        """
        await self._add(make)
        await self._room()

    async def _add(self, make: Callable[[int], Frame]) -> None:
        element = wire.encode_frame(make(self._seq), self._sign)
        self.first = self.first or element[:IDENTITY]
        self._seq += 1
        while True:
            self._check_not_closed()
            # Before the broker is asked: a ring may be faster than its answer, and tell of room that this one misses.
            self._credit.clear()
            try:
                answer = self._link.call("RPUSH", self.key, element)
                # Each time: a list of which all was taken is none, and whoever begins it anew may end at any moment.
                self._link.tell("PEXPIRE", self.key, LIST_TTL_MS)
                if self._agent:
                    self._ring(self._agent, element if len(element) <= wire.MAX_RING_FRAME else b"")
                self._waiting = await answer
                break
            except LinkError:
                await self._link.up.wait()
            except AnswerError as error:
                if error.code != "OOM" and not passing(error.code):
                    raise
                await asyncio.sleep(0.1)  # what is taken makes room
        self.progress = self._link.loop.time()
        self._sizes.append(len(element))
        self._lies += len(element)

    async def _room(self) -> None:
        while True:
            while len(self._sizes) > self._waiting:
                self._lies -= self._sizes.popleft()
                self.progress = self._link.loop.time()
            if self._lies < self._window:
                return
            self._check_not_closed()
            if self.is_lost():
                raise ClientLeft("the client went away")
            await self._credit_or_loss()
            self._credit.clear()
            with contextlib.suppress(LinkError, AnswerError):
                self._waiting = await self._link.call("LLEN", self.key)
                self._link.tell("PEXPIRE", self.key, LIST_TTL_MS)

    async def _credit_or_loss(self) -> None:
        """Wait until the agent rings, the client is gone, or it is time to look."""
        now = self._link.loop.time
        end = now() + LOOK
        while (left := end - now()) > 0 and not self.is_lost():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._credit.wait(), min(left, LOST))
                return

    def taken(self, agent: str) -> None:
        """The agent rang: it took something, or waits for more, which it may not have heard of."""
        if agent != self._agent and self._seq:
            self._ring(agent, b"")
        self._agent = agent
        self._credit.set()

    def close(self) -> None:
        """Add nothing more: the list is about to be deleted.

        Whoever pushes is cancelled too, but CPython 3.11's wait_for() swallows that where a byte comes with it.
        """
        self._closed = True

    def _check_not_closed(self) -> None:
        if self._closed:
            raise asyncio.CancelledError

    def keep(self) -> None:
        """What the agent has received and not trimmed yet must not expire: it counts from there."""
        if self._seq:
            self._link.tell("PEXPIRE", self.key, LIST_TTL_MS)

    async def push_body(
        self,
        receive: Receive,
        *,
        received: int,
        limit: int,
        timeout: float,
        is_answering: Callable[[], bool],
    ) -> None:
        """The rest of a request's body: what ``receive`` (ASGI) gives.

        ``received`` is how many bytes went before, in the entry; ``limit`` in bytes, ``timeout`` in seconds. Who
        talks with an app that ``is_answering`` may wait for it: each part has the whole time then. Raises
        :class:`~flaskbus.errors.BodyTimeout`, :class:`~flaskbus.errors.BodyTooLarge` and :class:`ClientLeft`; the
        frames then have no end yet (:meth:`push_failure`).
        """
        now = self._link.loop.time
        patience, more = Patience(timeout), True
        while more:
            began, answering = now(), is_answering()
            if answering:
                patience.renew()
            try:
                message = await asyncio.wait_for(receive(), patience.left)
            except TimeoutError:
                if is_answering() and not answering:
                    continue
                raise errors.BodyTimeout(f"{received} bytes came, and then too little") from None
            if message["type"] == "http.disconnect":
                raise ClientLeft("the client went away")
            data: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            patience.spent(now() - began, len(data))
            received += len(data)
            if received > limit:
                raise errors.BodyTooLarge(f"more than {limit} bytes")
            for start in range(0, len(data), wire.MAX_CHUNK):
                part = data[start : start + wire.MAX_CHUNK]
                await self.push(partial(Chunk, INBOUND, data=part))
        await self._add(partial(End, INBOUND))

    async def push_failure(self, error: errors.BusError | ClientLeft) -> None:
        """The end of a body that is not whole, and why: the app's read of it fails."""
        code = error.code if isinstance(error, errors.BusError) else GONE
        await self._add(partial(Failure, INBOUND, code=code, detail=str(error)))

    async def push_messages(self, receive: Receive) -> tuple[int, str]:
        """The messages of a WebSocket, until its client closes it or is gone: the code and the reason.

        Raises :class:`ClientLeft` where it is gone while there is no room for what it said.
        """
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return message.get("code", 1005), message.get("reason") or ""
            text: str | None = message.get("text")
            data: bytes = text.encode() if text is not None else message.get("bytes") or b""
            for start in range(0, len(data) or 1, wire.MAX_CHUNK):
                part = data[start : start + wire.MAX_CHUNK]
                last = start + wire.MAX_CHUNK >= len(data)
                await self.push(partial(Message, INBOUND, text=text is not None, last=last, data=part))

    def call_off(self, agent: str) -> None:
        """Nobody waits for the app of a WebSocket any more: a ring says so, and nothing that lasts.

        Its agent would not ask by itself, as it may be silent for as long as it likes.
        """
        failure = Failure(INBOUND, self._seq, GONE, "nobody waits any more")
        self._ring(agent, wire.encode_frame(failure, self._sign))

    async def push_close(self, code: int, reason: str) -> None:
        """The end of the messages of a WebSocket."""
        await self._add(partial(Close, INBOUND, code=code, reason=reason))
