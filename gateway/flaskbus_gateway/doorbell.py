"""The connection that hears doorbells.

It has nothing else to do: after SUBSCRIBE a whole connection falls under the broker's output limit for
pub/sub, and one that also carried replies was cut off with 60 MiB of them unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import hiredis

from flaskbus.address import parse_url
from flaskbus_gateway.finding import finder_of
from flaskbus_gateway.link import NOTHING, Answer, NodeLink, log


class DoorbellLink(NodeLink):
    """The connection that hears doorbells: after SUBSCRIBE it can say nothing else.

    Of a cluster, any node will do: what is published on one is heard on all of them.
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
        address = parse_url(url)
        super().__init__(url, address, finder_of(address), name, on_up=on_up)
        self.on_ring = on_ring
        self._channels: dict[str, asyncio.Future[None]] = {}

    def _say(self, text: str, *args: object) -> None:
        log.debug(text, *args)  # the other link says the same

    def _prepare(self) -> list[asyncio.Future[Answer]]:
        return []

    async def _watch(self) -> None:
        if self._channels:
            self._write(("SUBSCRIBE", *self._channels))
        await super()._watch()

    def _ping(self) -> None:
        # In this mode PING is answered as a message of its own kind, and before SUBSCRIBE as any other.
        if self._channels:
            self._write(("PING",))
        else:
            self._heard = True

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
