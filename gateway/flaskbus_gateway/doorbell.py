"""The connection that hears doorbells.

It has nothing else to do: after SUBSCRIBE a whole connection falls under the broker's output limit for
pub/sub, and one that also carried replies was cut off with 60 MiB of them unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import hiredis

from flaskbus_gateway.link import NOTHING, STALL, Answer, Link, log


class DoorbellLink(Link):
    """The connection that hears doorbells: after SUBSCRIBE it can say nothing else.

    ``on_ring(channel, message)`` is called for each message. Channels are subscribed anew after every
    reconnection.
    """

    def __init__(
        self,
        url: str,
        name: str,
        on_ring: Callable[[bytes, bytes], None],
        *,
        on_up: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(url, name, on_up=on_up)
        self.on_ring = on_ring
        self._channels: dict[str, asyncio.Future[None]] = {}

    def _say(self, text: str, *args: object) -> None:
        log.debug(text, *args)  # the other link says the same

    def _greet(self) -> list[asyncio.Future[Answer]]:
        return []

    async def _watch(self) -> None:
        """Like a link's, but PING is answered as a message of its own kind in this mode."""
        assert self._lost is not None
        if self._channels:
            self._write(("SUBSCRIBE", *self._channels))
        while not self._lost.done():
            if not self._channels:
                await asyncio.wait((self._lost,), timeout=0.2)
                continue
            self._heard = False
            self._write(("PING",))
            await asyncio.wait((self._lost,), timeout=STALL)
            if not self._heard and not self._lost.done():
                self.abort()
                return

    def subscribe(self, channel: str) -> asyncio.Future[None]:
        """Listen to a channel; the future is done once the broker has confirmed it."""
        future = self._channels.get(channel)
        if future is None:
            future = self._channels[channel] = self.loop.create_future()
            if self.up.is_set():
                self._write(("SUBSCRIBE", channel))
        return future

    def unsubscribe(self, channel: str) -> None:
        if self._channels.pop(channel, None) is not None and self.up.is_set():
            self._write(("UNSUBSCRIBE", channel))

    def data_received(self, data: bytes) -> None:
        if self._waiting:  # the greeting is still being answered
            super().data_received(data)
            return
        self._heard = True
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not NOTHING:
                if type(answer) is not list or not answer:
                    continue
                if answer[0] == b"message":
                    self.on_ring(answer[1], answer[2])
                elif answer[0] == b"subscribe":
                    future = self._channels.get(answer[1].decode())
                    if future is not None and not future.done():
                        future.set_result(None)
        except hiredis.ProtocolError:
            self.abort()
