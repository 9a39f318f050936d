"""The connection of an agent process on which it hears that a client took something, or went away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import redis

from flaskbus import wire
from flaskbus.broker import Unavailable, connect
from flaskbus.errors import WireError

LISTEN = 1.0
"""Seconds that one look lasts."""

UNHEARD = 3
"""Looks without a word after which it is heard elsewhere, where the broker is of a kind that moves."""


class Doorbell:
    """Hears some channels (SUBSCRIBE); connects on first use and again after an error. Used by one thread.

    What it hears is a hint: who waits for something also looks each second.
    """

    def __init__(self, url: str, name: str, channels: Sequence[str], *, moves: bool) -> None:
        self._url = url
        self._name = name
        self._channels = channels
        self._moves = moves
        self._client: redis.client.PubSub | None = None
        self._unheard = 0

    def listen(self) -> Iterable[tuple[str, bytes]]:
        """Wait a second for a ring: ids of requests, each with the element of its list that came along, if one did.

        Raises :data:`flaskbus.broker.Unavailable` or ``redis.RedisError``.
        """
        try:
            return self._listen()
        except (*Unavailable, redis.exceptions.RedisError):
            self._client = None
            raise

    def _listen(self) -> Iterable[tuple[str, bytes]]:
        client = self._client or self._subscribe()
        message = client.get_message(ignore_subscribe_messages=True, timeout=LISTEN)
        if message is not None:
            self._unheard = 0
            return _rung(message["data"])
        if self._moves:
            self._unheard += 1
            if self._unheard > UNHEARD:
                raise redis.exceptions.TimeoutError("nobody answers")
            client.ping()
        return ()

    def _subscribe(self) -> redis.client.PubSub:
        client: redis.client.PubSub = connect(self._url, name=self._name).pubsub()  # type: ignore[no-untyped-call]
        client.subscribe(*self._channels)
        self._client, self._unheard = client, 0
        return client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def _rung(message: bytes) -> Iterable[tuple[str, bytes]]:
    try:
        ring = wire.decode_ring(message)
    except WireError:
        return ()  # a stranger's
    return [(request_id, ring.frame or b"") for request_id in ring.ids]
