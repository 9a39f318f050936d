"""What a request costs the broker, and what an agent costs a host."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks import measure, wrk
from benchmarks.limits import limited
from benchmarks.model import P50, THROUGHPUT, Deployment, Figure, Metric
from benchmarks.processes import ROOT, Child
from benchmarks.systems.base import HOST, Running, answers
from benchmarks.systems.flaskbus import start_agent
from benchmarks.systems.gunicorn import start_gunicorn
from benchmarks.works.base import Scale, Work, check
from benchmarks.works.throughput import missing_wrk
from flaskbus.embedded import free_port

BROKER_CPU = Metric("CPU of the broker", "µs/request", higher=False)
BROKER_SHARE = Metric("CPU of the broker", "% of a core", higher=False)
BROKER_END = Metric("one core of the broker would end at", "requests/s", higher=True)
COMMANDS = Metric("commands", "/request", higher=False)
_SELDOM = 0.005
"""Commands that are sent less often per request are heartbeats and the like."""


class BrokerCost(Work):
    """hello, with the broker's own counters before and after. Commands within scripts count too."""

    name = "broker"
    title = "what a request costs in the broker, by connections"
    systems = ("flaskbus",)
    baseline = "flaskbus"
    main = BROKER_CPU

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1", "32", "128")

    def missing(self) -> list[str]:
        return missing_wrk()

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        check(running.port, "/hello")
        [before] = measure.broker_use(running.redis)
        outcome = wrk.run(wrk.command(running.url + "/hello", connections=int(variant), seconds=scale.short))
        [after] = measure.broker_use(running.redis)
        used = after - before
        yield Figure(BROKER_CPU, used.cpu / outcome.requests * 1e6)
        yield Figure(BROKER_SHARE, used.cpu / used.at * 100)
        yield Figure(BROKER_END, outcome.requests / used.cpu)
        yield Figure(COMMANDS, used.calls.total() / outcome.requests)
        for name, calls in used.calls.most_common():
            if calls / outcome.requests >= _SELDOM:
                yield Figure(Metric(f"of them {name}", "/request"), calls / outcome.requests)


BUSIEST = Metric("CPU of the busiest node", "µs/request", higher=False)
IDLEST = Metric("CPU of the idlest node", "µs/request", higher=False)
NODES = 3
SHARE = 0.05


class ClusterCost(Work):
    """hello over a cluster of three nodes that are slow: one queue is on one of them, partitions are on all."""

    name = "cluster"
    title = f"a mount on a cluster of {NODES} nodes with {SHARE:.0%} of a core each, by its partitions"
    systems = ("flaskbus",)
    baseline = "flaskbus"
    main = THROUGHPUT
    note = "--partitions; 32 connections"

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1", str(NODES))

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        return replace(scale.deployment, nodes=NODES, partitions=int(variant))

    def missing(self) -> list[str]:
        return missing_wrk()

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        check(running.port, "/hello")
        nodes = [child.pid for child in running.children.all if child.role == "broker"]
        with limited(nodes, SHARE):
            before = measure.broker_use(running.redis)
            outcome = wrk.run(wrk.command(running.url + "/hello", connections=32, seconds=scale.short))
            after = measure.broker_use(running.redis)
        used = sorted((each - was).cpu / outcome.requests for was, each in zip(before, after, strict=True))
        yield Figure(THROUGHPUT, outcome.rate)
        yield Figure(P50, outcome.p50)
        yield Figure(BUSIEST, used[-1] * 1e6)
        yield Figure(IDLEST, used[0] * 1e6)


START = Metric("from start to first answer", "s", higher=False)
MEMORY = Metric("memory (PSS)", "MiB", higher=False)


class Start(Work):
    """One process of four threads is started, and asked until it answers."""

    name = "start"
    title = "an agent's start and memory, over the bare app"
    systems = ("flaskbus", "gunicorn", "in-process")
    baseline = "in-process"
    main = START

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1 process",)

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        if running.system == "in-process":
            return self._bare()
        return self._server(running)

    def _server(self, running: Running) -> Iterable[Figure]:
        port = running.port
        began = time.perf_counter()
        if running.redis:
            mount = f"/start{time.monotonic_ns()}"
            child = start_agent(running, f"benchmarks.apps:app={mount}", "--threads", "4")
        else:
            mount, port = "", free_port()
            options = ["--worker-class", "gthread", "--threads", "4", "benchmarks.apps:app"]
            child = start_gunicorn(running.children, Deployment(processes=1), f"{HOST}:{port}", *options)
        try:
            running.children.wait(lambda: answers(port, f"{mount}/hello"), "the first answer")
            yield Figure(START, time.perf_counter() - began)
            yield Figure(MEMORY, _settled_memory(child))
        finally:
            running.children.stop(child)

    def _bare(self) -> Iterable[Figure]:
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.inprocess", "/hello", "0"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield Figure(START, time.perf_counter() - began)
            yield Figure(MEMORY, measure.pss([process.pid]) / 2**20)


def _settled_memory(child: Child) -> float:
    """MiB of a process and its children."""
    time.sleep(0.5)
    return measure.pss(measure.family([child.pid])) / 2**20


CALLS = Metric("calls", "/s of CPU", higher=True)


class Limit(Work):
    """The app's WSGI callable in a loop, in a process of its own."""

    name = "limit"
    title = "the app alone, called in process"
    systems = ("in-process",)
    baseline = "in-process"
    main = CALLS

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("hello", "10 KiB", "100 KiB")

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        path = {"hello": "/hello", "10 KiB": "/bytes/10240", "100 KiB": "/bytes/102400"}[variant]
        said = subprocess.run(
            [sys.executable, "-m", "benchmarks.inprocess", path, str(scale.short / 2)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        yield Figure(CALLS, float(said.stdout))
