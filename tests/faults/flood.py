"""Load that does not wait for answers: so many requests a second, from clients that lose their patience and go."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` 0 is a client that went away after its patience was over; ``ended`` in monotonic seconds."""

    status: int
    seconds: float
    ended: float
    retry_after: int | None = None
    body: bytes = b""


@dataclass(slots=True)
class Flood:
    """What came of a load that ``began`` then and lasted so many ``seconds``."""

    began: float
    seconds: float
    answers: list[Answer] = field(default_factory=list)

    def rate(self, status: int) -> float:
        """Answers a second while the load lasted; what came afterwards does not count."""
        end = self.began + self.seconds
        return sum(each.status == status and each.ended <= end for each in self.answers) / self.seconds

    def counts(self) -> Counter[int]:
        return Counter(each.status for each in self.answers)

    def times(self, status: int) -> list[float]:
        return sorted(each.seconds for each in self.answers if each.status == status)

    def percentile(self, status: int, share: float) -> float:
        """Seconds; not a number where there is none."""
        times = self.times(status)
        return times[min(len(times) - 1, int(len(times) * share))] if times else float("nan")


class Client:
    """HTTP/1.1 with kept connections; as little of it as the gateway's answers need, to be fast."""

    def __init__(self, host: str, port: int, patience: float) -> None:
        self.host, self.port, self.patience = host, port, patience
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, target: str) -> Answer:
        began = time.monotonic()
        connection = None
        try:
            async with asyncio.timeout(self.patience):
                connection = self._idle.pop() if self._idle else None
                if connection is None:
                    connection = await asyncio.open_connection(self.host, self.port)
                status, retry_after, body = await self._exchange(*connection, target)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            if connection is not None:
                connection[1].transport.abort()
            status, retry_after, body = 0, None, b""
        else:
            self._idle.append(connection)
        ended = time.monotonic()
        return Answer(status, ended - began, ended, retry_after, body)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str
    ) -> tuple[int, int | None, bytes]:
        writer.write(f"GET {target} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        body = await reader.readexactly(int(headers[b"content-length"]))
        retry = headers.get(b"retry-after")
        return int(head.split(b" ", 2)[1]), None if retry is None else int(retry), body

    def close(self) -> None:
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()


async def flood(
    url: str, targets: Sequence[str], rate: float, seconds: float, *, patience: float = 5.0
) -> Flood:
    """``rate`` requests a second for so many ``seconds``, whatever becomes of them.

    The targets take turns. Returns when every client has its answer, or went.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    client = Client(host, int(port), patience)
    began, sent = time.monotonic(), 0
    result = Flood(began, seconds)
    tasks: set[asyncio.Task[Answer]] = set()

    def ended(task: asyncio.Task[Answer]) -> None:
        tasks.discard(task)
        result.answers.append(task.result())

    while (now := time.monotonic() - began) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(client.get(targets[sent % len(targets)]))
            tasks.add(task)
            task.add_done_callback(ended)
            sent += 1
        await asyncio.sleep(0.002)
    while tasks:
        await asyncio.wait(tasks)
    client.close()
    return result
