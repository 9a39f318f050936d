"""Requests in flight that nobody answers yet: what each costs in memory, and how many connections to the broker."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterable, Sequence

import redis
import uvloop

from benchmarks import measure
from benchmarks.client import Crowd
from benchmarks.model import ERRORS, Deployment, Figure, Metric, Skip
from benchmarks.systems.base import Running
from benchmarks.works.base import Scale, Work

PER_REQUEST = Metric("memory of the server's process", "KiB/request", higher=False)
BROKER = Metric("memory of the broker (used_memory)", "KiB/request", higher=False)
CONNECTIONS = Metric("connections to the broker", "", higher=False)
RELEASE = Metric("all are answered after", "s", higher=False)
_SETTLE = 1.0
_SPARE = 500
"""File descriptors for everything else."""


class Held(Work):
    """Up to 10,000 at one gateway process; the same at gunicorn's ASGI worker, which has no bus behind it."""

    name = "held"
    title = "requests in flight at one server process"
    systems = ("flaskbus", "gunicorn-asgi")
    baseline = "gunicorn-asgi"
    main = PER_REQUEST

    def rounds(self, scale: Scale) -> int:
        return 1

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("100 to 2,000",) if scale.quick else ("100 to 10,000",)

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        # By default a gateway refuses what would wait that long, behind that many.
        settings = {
            "FLASKBUS_QUEUE_LIMIT": "20000",
            "FLASKBUS_QUEUE_AGE": "10000h",
            "FLASKBUS_HEAD_TIMEOUT": "10m",
        }
        return Deployment(processes=1, settings=tuple(settings.items()))

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        levels = (100, 500, 2000) if scale.quick else (100, 1000, 10000)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < levels[-1] + _SPARE:
            if hard != resource.RLIM_INFINITY and hard < levels[-1] + _SPARE:
                raise Skip(f"only {hard} open files are allowed (ulimit -Hn)")
            resource.setrlimit(resource.RLIMIT_NOFILE, (levels[-1] + _SPARE, hard))
        running.gate.unlink(missing_ok=True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_hold(running, levels))


async def _hold(running: Running, levels: Sequence[int]) -> list[Figure]:
    role = "gateway" if running.redis else "app"
    pids = measure.roles(running)[role]
    figures: list[Figure] = []
    crowd = Crowd(running.port)
    memory, broker = measure.pss(pids), _used_memory(running)
    try:
        for level in levels:
            await crowd.grow(level, "/held")
            await _settled(running, level)
            if early := crowd.early():
                raise Skip(f"{early.status} before {level:,} were in flight: {early.body[:200]!r}")
            held = f"{level:,}"
            figures.append(Figure(PER_REQUEST, (measure.pss(pids) - memory) / level / 1024, held))
            if running.redis:
                figures.append(Figure(BROKER, (_used_memory(running) - broker) / level / 1024, held))
                connections = measure.broker_connections(running.redis)
                figures.append(Figure(CONNECTIONS, connections, held))
        running.gate.touch()
        start = time.perf_counter()
        answers = await crowd.answers()
        figures.append(Figure(RELEASE, time.perf_counter() - start, held))
        figures.append(Figure(ERRORS, sum(answer.status != 200 for answer in answers), held))
    finally:
        running.gate.touch()
        crowd.close()
    return figures


async def _settled(running: Running, level: int) -> None:
    """Until the bus has them all, where there is one to ask; then a moment more."""
    deadline = time.monotonic() + 30
    while running.redis and _queued(running) < level and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    await asyncio.sleep(_SETTLE)


def _queued(running: Running) -> int:
    with redis.Redis.from_url(running.redis) as client:
        return sum(int(client.xlen(key)) for key in client.scan_iter(match="flaskbus:*:requests", count=1000))


def _used_memory(running: Running) -> int:
    if not running.redis:
        return 0
    with redis.Redis.from_url(running.redis) as client:
        return int(client.info("memory")["used_memory"])
