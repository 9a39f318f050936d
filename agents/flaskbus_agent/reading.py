"""The connection of an agent process that reads its request streams."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis

from flaskbus.broker import Unavailable
from flaskbus.keys import GROUP
from flaskbus_agent.channel import Argument, Channel, open_channel

BLOCK_MS = 2000
"""How long one read waits; a quiet agent ends it."""

ANSWER = 5.0
"""Seconds that the broker may take to answer."""


class Reader:
    """Reads the streams of one server. Used by one thread at a time, but for :meth:`interrupt`.

    Raises :data:`flaskbus.broker.Unavailable` where the broker is away, after which entries may have been
    delivered that nobody has seen: :meth:`begin`, then :meth:`own` find them.
    """

    def __init__(self, url: str, agent_id: str, channel: Channel) -> None:
        self.agent_id = agent_id
        self.channel = channel
        self._url = url
        self._id: int | None = None
        self._waker: Channel | None = None
        self._waking = threading.Lock()

    converses = True
    """Whether the channel can be told what is to go with the next question."""

    def begin(self) -> Any:
        """After a failure: end what may still be read there; entries that were delivered meanwhile."""
        before, self._id = self._id, None
        if before is not None:
            with suppress(redis.exceptions.ResponseError):
                # Half of a broken connection may live on there, and take what nobody would see.
                self.channel.call("CLIENT", "UNBLOCK", before)
        self._id = self.channel.call("CLIENT", "ID")
        return ()

    def clock(self, stream: bytes) -> Any:
        """The clock of the server that has a stream: seconds and microseconds (TIME), or nothing."""
        return self.channel.call("TIME")

    def own(self, stream: bytes, after: bytes) -> Any:
        """The next entries that the group says we hold, after this one."""
        return self.channel.call(
            "XREADGROUP", "GROUP", GROUP, self.agent_id, "COUNT", 100, "STREAMS", stream, after
        )

    def now(self, stream: bytes, count: int) -> Any:
        """New entries of one stream, if there are any; also what a read has brought that went on without us."""
        return self.channel.call(*read_command(self.agent_id, (stream,), count, None))

    def wait(self, streams: Sequence[bytes], count: int) -> Any:
        """New entries of some streams, ``count`` of each at most, as soon as one has any; nothing after a while."""
        return self.channel.call(*read_command(self.agent_id, streams, count, BLOCK_MS))

    def calm(self, *, last: bool = True) -> Any:
        """End every read that goes on without us; entries that were delivered meanwhile.

        Who may not (CLIENT UNBLOCK) waits for their end at the ``last`` time, and else lets them go on.
        """
        return ()

    def interrupt(self) -> None:
        """From any thread: end the wait that is under way."""
        reader = self._id  # the thread that reads may take it back at any moment
        if reader is None:
            return
        with self._waking:
            waker = self._waker = self._waker or open_channel(self._url, f"{self.channel.name}-waker", 1.0)
            with suppress(*Unavailable, redis.exceptions.RedisError):  # it ends by itself soon
                waker.call("CLIENT", "UNBLOCK", reader)

    def probe(self) -> None:
        """From another thread, often: see whether what does not answer is back."""

    def close(self) -> None:
        self.channel.close()
        if self._waker is not None:
            self._waker.close()


def read_command(
    agent_id: str, streams: Sequence[bytes], count: int, block: int | None
) -> Sequence[Argument]:
    """XREADGROUP for new entries; ``block`` in milliseconds."""
    waiting: tuple[Argument, ...] = () if block is None else ("BLOCK", block)
    return (
        "XREADGROUP", "GROUP", GROUP, agent_id, "COUNT", count, *waiting, "STREAMS", *streams,
        *([">"] * len(streams)),
    )  # fmt: skip
