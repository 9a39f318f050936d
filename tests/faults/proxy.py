"""A proxy in front of the broker that can be told to be a bad network."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from tests.faults.http import RESET
from tests.faults.resp import Conversation, Message


@dataclass
class Cut:
    """Break a connection after ``after`` bytes of a message: the ``count``-th of those that are ``wanted``.

    What comes before those bytes arrives; of what follows nothing does, in either direction.
    """

    wanted: Callable[[Message], bool]
    after: int
    count: int = 1
    reset: bool = True
    message: Message | None = None
    """The message that was cut, once that is done."""


class Pipe:
    """One client's connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = Side(self, outward=True)
        self.broker = Side(self, outward=False)
        self.talk = Conversation()
        self.swallowing = False
        self.delayed: dict[bool, deque[bytes]] = {True: deque(), False: deque()}

    def arrived(self, data: bytes, outward: bool) -> None:
        if self.swallowing or self.proxy.swallowing:
            self.swallowing = True  # what is missing once can never be made up for
            return
        if self.proxy.delay or self.delayed[outward]:
            self.delayed[outward].append(data)  # nothing overtakes what came before
            asyncio.get_running_loop().call_later(self.proxy.delay, self.release, outward)
        else:
            self.relay(data, outward)

    def release(self, outward: bool) -> None:
        if not self.swallowing:
            self.relay(self.delayed[outward].popleft(), outward)

    def relay(self, data: bytes, outward: bool) -> None:
        other = self.broker if outward else self.client
        if not self.proxy.parsing:
            if self.proxy.budget is not None:
                self.proxy.budget -= len(data)
                if self.proxy.budget < 0:
                    other.write(data[: self.proxy.budget])
                    self.proxy.budget = None
                    self.end()
                    return
            other.write(data)
            return
        for message in self.talk.to_broker(data) if outward else self.talk.from_broker(data):
            self.proxy.messages.append(message)
            cut = self.proxy.cut
            if cut is not None and cut.message is None and cut.wanted(message):
                cut.count -= 1
                if not cut.count:
                    cut.message = message
                    other.write(message.data[: cut.after])
                    self.end(reset=cut.reset)
                    self.proxy.fired.set()
                    return
            other.write(message.data)

    def end(self, *, reset: bool = True) -> None:
        """Break both connections; what was relayed already still arrives, unless it is lost with a reset."""
        self.swallowing = True
        self.proxy.pipes.discard(self)
        # What is on its way to the broker has to reach it: bytes were passed on, and then the line broke.
        self.broker.close()
        if reset:
            self.client.reset()
        else:
            self.client.close()


class Side(asyncio.Protocol):
    """One of the two connections of a pipe."""

    def __init__(self, pipe: Pipe, *, outward: bool) -> None:
        self.pipe = pipe
        self.outward = outward
        self.transport: asyncio.Transport | None = None
        self.waiting: list[bytes] = []
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.outward:
            self.pipe.proxy.accepted(self.pipe)
        elif self.pipe not in self.pipe.proxy.pipes:
            self.transport.abort()  # it was broken while it was being made
        for data in self.waiting:
            self.transport.write(data)
        self.waiting.clear()

    def data_received(self, data: bytes) -> None:
        self.pipe.arrived(data, self.outward)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.pipe.swallowing:  # a line that swallows everything swallows this too
            self.pipe.end(reset=False)

    def write(self, data: bytes) -> None:
        if self.lost or (self.transport is not None and self.transport.is_closing()):
            return
        if self.transport is None:
            self.waiting.append(data)
        else:
            self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def reset(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.transport.abort()


class Proxy:
    """Listens on a port of its own; made and used in one event loop.

    ``delay`` (seconds) holds back every byte. ``swallowing``: connections stay, and nothing arrives any more,
    in either direction, also on new ones. ``budget``: break the connection that brings the byte after so
    many. ``parsing``: know which message a byte is of, which ``cut`` and ``messages`` need.
    """

    def __init__(self, port: int, *, parsing: bool = False) -> None:
        self.target = port
        self.parsing = parsing
        self.delay = 0.0
        self.swallowing = False
        self.budget: int | None = None
        self.cut: Cut | None = None
        self.fired = asyncio.Event()
        self.messages: list[Message] = []
        self.pipes: set[Pipe] = set()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Pipe(self).client, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()
        self.reset_all()
        for _ in range(3):  # a connection that is being accepted, then its end
            await asyncio.sleep(0)

    def accepted(self, pipe: Pipe) -> None:
        if self._closed:
            pipe.end()
            return
        self.pipes.add(pipe)
        if not self.swallowing:
            task = asyncio.get_running_loop().create_task(self._connect(pipe))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, pipe: Pipe) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: pipe.broker, "127.0.0.1", self.target)
        except OSError:
            pipe.end()

    def reset_all(self) -> None:
        for pipe in tuple(self.pipes):
            pipe.end()

    def mend(self) -> None:
        """Be a good network again; connections that lost something are broken."""
        self.delay, self.swallowing, self.budget = 0.0, False, None
        for pipe in tuple(self.pipes):
            if pipe.swallowing or pipe.broker.transport is None:
                pipe.end()
