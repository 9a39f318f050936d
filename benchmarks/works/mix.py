"""95 % fast and 5 % slow requests over two app hosts: do the fast ones wait behind slow ones while a thread is free?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence

import uvloop

from benchmarks.client import arrivals, mixed
from benchmarks.model import ERRORS, Deployment, Figure, Metric
from benchmarks.stats import percentile
from benchmarks.systems.base import Running
from benchmarks.works.base import Scale, Work, check

FAST, SLOW = "/hello", "/sleep/200"
SHARE = 0.05
FAST_P50 = Metric("p50 of the fast", "ms", higher=False)
FAST_P99 = Metric("p99 of the fast", "ms", higher=False)
SLOW_P50 = Metric("p50 of the slow", "ms", higher=False)


class Mix(Work):
    """Requests come at random, as of many clients, at half and at three quarters of what eight threads can do.

    A request takes about 11 ms of a thread on average, so eight can do some 700 a second.
    """

    name = "mix"
    title = "95 % fast, 5 % of 200 ms, over two app hosts, by load"
    main = FAST_P99

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("350/s", "525/s")

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        return Deployment(processes=1, threads=4, hosts=2)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        check(running.port, FAST)
        check(running.port, SLOW)
        # The same requests at the same times for every system.
        due = arrivals(float(variant.removesuffix("/s")), scale.seconds, seed=1)
        chance = random.Random(2)
        requests = [(at, SLOW if chance.random() < SHARE else FAST) for at in due]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            seen = runner.run(mixed(running.port, requests))
        fast = [each.latency for each in seen if each.path == FAST and each.status == 200]
        slow = [each.latency for each in seen if each.path == SLOW and each.status == 200]
        yield Figure(FAST_P50, percentile(fast, 0.5))
        yield Figure(FAST_P99, percentile(fast, 0.99))
        yield Figure(SLOW_P50, percentile(slow, 0.5))
        yield Figure(ERRORS, len(seen) - len(fast) - len(slow))
