"""Server-sent events: one stream, and many at once."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from statistics import median

from benchmarks import measure
from benchmarks.events import Audience, Caller, Listener
from benchmarks.model import ERRORS, Deployment, Figure, Metric, Skip, Wrong
from benchmarks.stats import percentile
from benchmarks.systems.base import HOST, Running
from benchmarks.watch import Watch, acquaint
from benchmarks.works.base import Scale, Work, check

FIRST_P50 = Metric("first event after, p50", "ms", higher=False)
FIRST_P99 = Metric("first event after, p99", "ms", higher=False)
EVENT_P50 = Metric("from yield to client, p50", "ms", higher=False)
EVENT_P99 = Metric("from yield to client, p99", "ms", higher=False)


class Events(Work):
    """Streams of server-sent events, one after the other: each event says when the app yielded it."""

    name = "sse"
    title = "server-sent events, one stream at a time"
    main = FIRST_P50

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1",)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        first: list[float] = []
        later: list[float] = []
        for _ in range(30 if scale.quick else 200):
            with closing(Listener(running.port, "/events/3/5")) as listener:
                while listener.events < 3:
                    seen = listener.read()
                    now = time.monotonic_ns()
                    if listener.ended:
                        raise Wrong(f"{listener.events} of 3 events, status {listener.status}")
                    if seen and listener.events == len(seen):
                        first.append((now - listener.began) / 1e6)
                    later += [(now - made) / 1e6 for made in seen]
        yield Figure(FIRST_P50, percentile(first, 0.5))
        yield Figure(FIRST_P99, percentile(first, 0.99))
        yield Figure(EVENT_P50, percentile(later, 0.5))
        yield Figure(EVENT_P99, percentile(later, 0.99))


OPEN = Metric("streams that are open", "", higher=True)
ALL_P50 = Metric("an event is with half after", "ms", higher=False)
ALL_LAST = Metric("an event is with all after", "ms", higher=False)
OTHERS_BEFORE = Metric("other requests before, p50", "ms", higher=False)
OTHERS_P50 = Metric("other requests meanwhile, p50", "ms", higher=False)
OTHERS_P99 = Metric("other requests meanwhile, p99", "ms", higher=False)
CPU = Metric("CPU of all processes", "µs/event", higher=False)
BACK = Metric("answers at once again, when all have left, after", "s", higher=False)

_GAP = 0.02
"""Seconds between two other requests."""
_BACK = 30.0
_AT_ONCE = 0.2
"""Seconds."""


class ManyEvents(Work):
    """Open streams of one app, whose events are due at the same moments; and another client beside them."""

    name = "sse-many"
    title = "open streams of server-sent events of one app at once"
    main = ALL_LAST
    note = (
        "Each process can hold them all: flaskbus by its setting `--streams`, which is 100 by default; the others have "
        "as many more threads, as a stream takes one. All else is as it is by default."
    )

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("100",) if scale.quick else ("500",)

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        # All of them in each process: which one a stream goes to is for the systems to decide.
        return replace(scale.deployment, streams=int(variant))

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        wanted, half = int(variant), 2.0 if scale.quick else 5.0  # seconds
        check(running.port, "/hello")
        with closing(Caller(running.port, "/hello", _GAP)) as caller:
            with closing(Audience()) as nobody:
                nobody.listen(1.0, caller=caller)
            yield Figure(OTHERS_BEFORE, percentile(caller.latencies, 0.5))
            caller.latencies.clear()
            acquaint(running)
            with Watch(running) as watch, closing(Audience()) as audience:
                # More events than we wait for: it ends by itself where the server does not see us leave.
                audience.join(running.port, f"/ticks/{2 * half + 20:.0f}/1000", wanted)
                audience.listen(10.0, enough=wanted)
                audience.later.clear()
                used = measure.cpu(running)
                audience.listen(half)
                used = measure.cpu(running) - used
                heard = sum(map(len, audience.later.values()))
                audience.listen(half, caller=caller)
                yield from _heard(audience, caller)
                yield Figure(CPU, used / max(1, heard) * 1e6)
        yield Figure(BACK, _recover(running.port))
        yield from watch.figures()


def _heard(audience: Audience, caller: Caller) -> Iterator[Figure]:
    yield Figure(OPEN, audience.open)
    if not audience.firsts:
        raise Skip(f"no stream had an event; answered {sorted({each.status for each in audience.listeners})}")
    if whole := audience.whole():
        yield Figure(ALL_P50, median(percentile(each, 0.5) for each in whole))
        yield Figure(ALL_LAST, median(max(each) for each in whole))
    yield Figure(OTHERS_P50, percentile(caller.latencies, 0.5))
    yield Figure(OTHERS_P99, percentile(caller.latencies, 0.99))
    yield Figure(FIRST_P50, percentile(audience.firsts, 0.5))
    yield Figure(FIRST_P99, percentile(audience.firsts, 0.99))
    yield Figure(ERRORS, caller.errors)


def _recover(port: int) -> float:
    """Seconds until the app answers at once; those behind are not to pay for the streams. Raises Wrong after 30."""
    began = time.monotonic()
    while (now := time.monotonic()) - began < _BACK:
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
        try:
            connection.request("GET", "/hello")
            if connection.getresponse().status == 200 and time.monotonic() - now < _AT_ONCE:
                return time.monotonic() - began
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    raise Wrong(f"not answered at once within {_BACK:g} s after the streams were left")
