"""Bodies without an end or of any size: server-sent events, downloads, uploads, WebSockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import uvloop

from benchmarks import measure, transfer
from benchmarks.client import Connection, echoes, upgrade
from benchmarks.model import Figure, Metric, Skip, Wrong
from benchmarks.stats import percentile
from benchmarks.systems.base import Running, packages
from benchmarks.works.base import Scale, Work, check

T = TypeVar("T")

FIRST_P50 = Metric("first event after, p50", "ms", higher=False)
FIRST_P99 = Metric("first event after, p99", "ms", higher=False)
EVENT_P50 = Metric("from yield to client, p50", "ms", higher=False)
EVENT_P99 = Metric("from yield to client, p99", "ms", higher=False)


def run_async(main: Callable[[], Awaitable[T]]) -> T:
    async def call() -> T:
        return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(call())


class Events(Work):
    """Streams of server-sent events, one after the other: each event says when the app yielded it."""

    name = "sse"
    title = "server-sent events, one stream at a time"
    main = FIRST_P50

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1",)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        streams = 10 if scale.quick else 30
        return run_async(lambda: self._listen(running.port, streams))

    async def _listen(self, port: int, streams: int) -> list[Figure]:
        first, later = [], []
        for _ in range(streams):
            connection = await Connection.open(port)
            began = time.monotonic_ns()
            connection.send("/events/5/10")
            head = await connection.head()
            if head.status != 200:
                raise Skip(f"answered {head.status}")
            count = 0
            async for chunk in connection.chunks(head):
                now = time.monotonic_ns()
                for line in chunk.split():
                    if line != b"data:":
                        count += 1
                        later.append((now - int(line)) / 1e6)
                if len(later) and count == 1:
                    first.append((now - began) / 1e6)
                if count == 5:
                    break
            connection.close()
            if count != 5:
                raise Wrong(f"{count} of 5 events")
        return [
            Figure(FIRST_P50, percentile(first, 0.5)),
            Figure(FIRST_P99, percentile(first, 0.99)),
            Figure(EVENT_P50, percentile(later, 0.5)),
            Figure(EVENT_P99, percentile(later, 0.99)),
        ]


OPEN = Metric("streams that had an event in time", "", higher=True)
ALL_FIRST = Metric("their first event after, p99", "ms", higher=False)
CONNECTIONS = Metric("connections to the broker", "", higher=False)
STREAM_MEMORY = Metric("memory of all processes", "KiB/stream", higher=False)


class ManyEvents(Work):
    """Open streams of one app, each with an event every half second."""

    name = "sse-many"
    title = "open streams of server-sent events of one app at once"
    main = OPEN

    def rounds(self, scale: Scale) -> int:
        return 1

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("500",)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        return run_async(lambda: self._open(running, int(variant), patience=5.0))

    async def _open(self, running: Running, wanted: int, patience: float) -> list[Figure]:
        pids = [pid for group in measure.roles(running).values() for pid in group]
        before = measure.pss(pids)
        # Long enough to look at, and then it ends by itself, also where the server did not see us leave.
        path = f"/events/{int(patience * 2) + 6}/500"

        async def one() -> tuple[Connection, float | None]:
            connection = await Connection.open(running.port)
            began = time.perf_counter()
            connection.send(path)
            try:
                async with asyncio.timeout(patience):
                    head = await connection.head()
                    if head.status != 200:
                        return connection, None
                    async for _ in connection.chunks(head):
                        return connection, (time.perf_counter() - began) * 1000
            except (TimeoutError, asyncio.IncompleteReadError, OSError):
                pass
            return connection, None

        opened = await asyncio.gather(*(one() for _ in range(wanted)))
        firsts = [first for _, first in opened if first is not None]
        figures = [Figure(OPEN, len(firsts))]
        if firsts:
            used = measure.pss([pid for group in measure.roles(running).values() for pid in group])
            figures.append(Figure(ALL_FIRST, percentile(firsts, 0.99)))
            figures.append(Figure(STREAM_MEMORY, max(0, used - before) / len(firsts) / 1024))
        if running.redis:
            figures.append(Figure(CONNECTIONS, measure.broker_connections(running.redis)))
        for connection, _ in opened:
            connection.close()
        await _idle(running.port)
        return figures


async def _idle(port: int) -> None:
    """Until the app answers at once again: those behind are not to pay for the streams."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        connection = await Connection.open(port)
        began = time.monotonic()
        try:
            async with asyncio.timeout(5):
                await connection.get("/hello")
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            continue
        finally:
            connection.close()
        if time.monotonic() - began < 0.2:
            return
        await asyncio.sleep(0.1)


SPEED = Metric("speed", "MB/s", higher=True)


class Transfer(Work):
    """One large body at a time, with the memory (RSS) of each role before it, at its highest, and after it."""

    main = SPEED

    def __init__(self, name: str, move: Callable[[int, int], float]):
        self.name = name
        self.title = f"{name} of one large body"
        self._move = move

    def rounds(self, scale: Scale) -> int:
        return min(2, scale.few)

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("64 MiB",) if scale.quick else ("1 GiB",)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        size = 64 << 20 if scale.quick else 1 << 30
        check(running.port, "/hello")
        with measure.MemoryWatch(running) as watch:
            seconds = self._move(running.port, size)
        yield Figure(SPEED, size / seconds / 1e6)
        time.sleep(0.3)
        after = {role: measure.rss(pids) for role, pids in measure.roles(running).items()}
        for role, before in watch.before.items():
            for when, used in (("before", before), ("peak", watch.peak[role]), ("after", after[role])):
                yield Figure(Metric(f"memory (RSS) of {role}, {when}", "MiB"), used / 2**20)


ECHOES = Metric("round trips", "/s", higher=True)


class WebSocket(Work):
    """A flask-sock app that echoes; each client sends its next message when it has the last one's echo."""

    name = "websocket"
    title = "WebSocket echo, by connections"
    systems = ("flaskbus", "gunicorn", "nginx-gthread")
    baseline = "gunicorn"
    main = ECHOES

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1", "4")

    def missing(self) -> list[str]:
        return packages(["flask-sock"])

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        count = run_async(lambda: self._echo(running.port, int(variant), scale.short))
        yield Figure(ECHOES, count / scale.short)

    async def _echo(self, port: int, connections: int, seconds: float) -> int:
        opened = []
        try:
            for _ in range(connections):
                connection, answer = await upgrade(port, "/echo")
                opened.append(connection)
                if answer.status != 101:
                    raise Skip(f"the upgrade was answered {answer.status}")
            return sum(await asyncio.gather(*(echoes(each, seconds, b"hello, world") for each in opened)))
        finally:
            for connection in opened:
                connection.close()


DOWNLOAD = Transfer("download", transfer.download)
UPLOAD = Transfer("upload", transfer.upload)
