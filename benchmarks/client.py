"""A client for what wrk cannot do: kinds of requests timed apart, thousands that are held.

As little HTTP/1.1 as these need: one request at a time on a connection, and bodies that say how long they are.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from benchmarks.systems.base import HOST

_LINGER = struct.pack("ii", 1, 0)
"""SO_LINGER of zero seconds: the port of a closed connection is free at once (RST), and thousands can be opened."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """A kept-alive connection to a system."""

    def __init__(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self._host = f"{HOST}:{port}"

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(port, *await asyncio.open_connection(HOST, port, limit=1 << 20))

    def send(self, path: str, headers: str = "") -> None:
        """Write a GET, without waiting; ``headers`` are whole lines."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n{headers}\r\n".encode())

    async def head(self) -> Answer:
        """Status and headers (names in lower case); the body is still to come."""
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.strip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return Answer(int(first.split()[1]), headers, b"")

    async def answer(self) -> Answer:
        """A whole answer."""
        head = await self.head()
        if "content-length" in head.headers:
            body = await self.reader.readexactly(int(head.headers["content-length"]))
        else:
            body = b"".join([chunk async for chunk in self.chunks(head)])
        return Answer(head.status, head.headers, body)

    async def chunks(self, head: Answer) -> AsyncIterator[bytes]:
        """The parts of a body that has no length, as they come."""
        if "chunked" in head.headers.get("transfer-encoding", ""):
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            while data := await self.reader.read(1 << 16):
                yield data

    async def get(self, path: str) -> Answer:
        self.send(path)
        return await self.answer()

    def close(self) -> None:
        raw: socket.socket | None = self.writer.get_extra_info("socket")
        if raw is not None:
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        self.writer.close()


# Requests that come when they come


@dataclass(frozen=True, slots=True)
class Timed:
    """A request of the mix. Latency in milliseconds from when it was due, so that none that waits is left out."""

    path: str
    status: int
    latency: float


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds from the start, as of many independent clients: a Poisson process of ``rate`` a second."""
    chance, now, due = random.Random(seed), 0.0, []
    while (now := now + chance.expovariate(rate)) < seconds:
        due.append(now)
    return due


async def mixed(port: int, requests: Sequence[tuple[float, str]]) -> list[Timed]:
    """Send each path when it is due, over as many connections as that takes, whatever became of the others."""
    idle: list[Connection] = []
    start = time.perf_counter()

    async def one(due: float, path: str) -> Timed:
        try:
            connection = idle.pop() if idle else await Connection.open(port)
            status = (await connection.get(path)).status
            idle.append(connection)
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        return Timed(path, status, (time.perf_counter() - start - due) * 1000)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for due, path in requests:
            await asyncio.sleep(start + due - time.perf_counter())
            tasks.append(group.create_task(one(due, path)))
    for connection in idle:
        connection.close()
    return [task.result() for task in tasks]


# Many at once


class Crowd:
    """Connections that have each sent one request and wait."""

    def __init__(self, port: int):
        self._port = port
        self._connections: list[Connection] = []
        self._answers: list[asyncio.Task[Answer]] = []

    async def grow(self, size: int, path: str) -> None:
        """Up to ``size`` of them, some hundred at a time."""
        while (missing := size - len(self._connections)) > 0:
            opened = await asyncio.gather(*(Connection.open(self._port) for _ in range(min(missing, 200))))
            for connection in opened:
                connection.send(path)
                self._answers.append(asyncio.create_task(connection.answer()))
            self._connections += opened

    def early(self) -> Answer | None:
        """An answer that has come although nobody should have one yet."""
        return next((task.result() for task in self._answers if task.done()), None)

    async def answers(self) -> list[Answer]:
        return list(await asyncio.gather(*self._answers))

    def close(self) -> None:
        for task in self._answers:
            task.cancel()
        for connection in self._connections:
            connection.close()
