"""WebSockets of a flask-sock app."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from benchmarks import measure
from benchmarks.model import Deployment, Figure, Metric
from benchmarks.stats import percentile
from benchmarks.systems.base import Running, packages
from benchmarks.watch import Watch, acquaint
from benchmarks.websocket import echoes, upgrade
from benchmarks.works.base import Scale, Work, check

ECHOES = Metric("round trips", "/s", higher=True)
ECHO_P50 = Metric("round trip, p50", "ms", higher=False)
ECHO_P99 = Metric("round trip, p99", "ms", higher=False)
CPU = Metric("CPU of all processes", "µs/round trip", higher=False)


class WebSocket(Work):
    """An app that echoes; each client sends its next message when it has the last one's echo."""

    name = "websocket"
    title = "WebSocket echo, by connections"
    systems = ("flaskbus", "gunicorn", "nginx-gthread")
    baseline = "gunicorn"
    main = ECHOES
    note = "flaskbus has its defaults. The others have 32 more threads in each process, as a WebSocket takes one."

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1", "32")

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        return replace(scale.deployment, streams=32)

    def missing(self) -> list[str]:
        return packages(["flask-sock"])

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        check(running.port, "/hello")
        acquaint(running)
        with Watch(running) as watch, ExitStack() as stack:
            sockets = [
                stack.enter_context(closing(upgrade(running.port, "/echo"))) for _ in range(int(variant))
            ]
            echoes(sockets, 0.2, b"hello, world")  # each app has begun
            used = measure.cpu(running)
            latencies = echoes(sockets, scale.short, b"hello, world")
            used = measure.cpu(running) - used
        yield Figure(ECHOES, len(latencies) / scale.short)
        yield Figure(ECHO_P50, percentile(latencies, 0.5))
        yield Figure(ECHO_P99, percentile(latencies, 0.99))
        yield Figure(CPU, used / max(1, len(latencies)) * 1e6)
        yield from watch.figures()
