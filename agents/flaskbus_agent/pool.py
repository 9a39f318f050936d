"""A few channels that many threads share, so that a thousand streams need no thousand connections."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flaskbus_agent.channel import Argument, Channel


class ChannelPool:
    """Looks like one :class:`~flaskbus_agent.channel.Channel`; each command has one of a few for as long as it runs.

    The commands of one thread are carried out in their order, because it waits for each answer. None of them may
    block in the broker.
    """

    def __init__(self, channels: Iterable[Channel]) -> None:
        self._free: queue.LifoQueue[Channel] = queue.LifoQueue()
        for channel in channels:
            self._free.put(channel)

    @contextmanager
    def _one(self) -> Iterator[Channel]:
        channel = self._free.get()
        try:
            yield channel
        finally:
            self._free.put(channel)

    def call(self, *command: Argument) -> Any:
        """As :meth:`Channel.call`."""
        with self._one() as channel:
            return channel.call(*command)

    def at(self, key: str | bytes, *command: Argument) -> Any:
        """As :meth:`Channel.at`."""
        with self._one() as channel:
            return channel.at(key, *command)

    def script(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """As :meth:`Channel.script`."""
        with self._one() as channel:
            return channel.script(name, keys, args)

    def scripts(self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        """As :meth:`Channel.scripts`."""
        with self._one() as channel:
            return channel.scripts(name, calls)

    def transaction(self, *commands: tuple[Argument, ...]) -> list[Any] | None:
        """As :meth:`Channel.transaction`."""
        with self._one() as channel:
            return channel.transaction(*commands)

    def close(self) -> None:
        """Hang up those that nobody uses now; a process that ends has no time for the others."""
        while not self._free.empty():
            self._free.get().close()


OnStream = Callable[[], ChannelPool | None]
"""Asked by a run that becomes a stream: the channels that it uses from then on; ``None`` where it keeps its own."""
