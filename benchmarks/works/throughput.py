"""wrk against one path: requests a second, latencies, and the CPU that a request costs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks import measure, wrk
from benchmarks.apps import MOUNTS
from benchmarks.model import CPU, ERRORS, P50, P99, THROUGHPUT, Deployment, Figure, Metric, Wrong
from benchmarks.systems.base import Running
from benchmarks.works.base import SERVERS, Scale, Work, check


@dataclass(frozen=True, slots=True)
class Case:
    """What one variant asks for; with a script, ``method`` and ``body`` say what it sends."""

    connections: int
    path: str
    script: str = ""
    method: str = "GET"
    body: bytes = b""


def missing_wrk() -> list[str]:
    return [] if shutil.which("wrk") else ["wrk (apt-get install wrk)"]


def put_load(running: Running, case: Case, seconds: float) -> Iterable[Figure]:
    """One run of wrk, between two checks of the answers."""
    size = check(running.port, case.path, case.method, case.body)
    before = measure.cpu(running)
    url = running.url if case.script == "mounts.lua" else running.url + case.path
    outcome = wrk.run(wrk.command(url, connections=case.connections, seconds=seconds, script=case.script))
    used = measure.cpu(running) - before
    if not outcome.requests:
        raise Wrong(f"no answer to {case.path} at {case.connections} connections")
    # wrk looks at no body, but it counts bytes; it prints three digits of them.
    if outcome.errors == 0 and outcome.read / outcome.requests < size * 0.98:
        raise Wrong(f"{case.path}: {outcome.read / outcome.requests:.0f} bytes an answer, not {size}")
    yield Figure(THROUGHPUT, outcome.rate)
    yield Figure(P50, outcome.p50)
    yield Figure(P99, outcome.p99)
    yield Figure(CPU, used / outcome.requests * 1e6)
    yield Figure(ERRORS, outcome.errors)


@dataclass
class Throughput(Work):
    """Cases that need the same deployment."""

    name: str
    title: str
    cases: Mapping[str, Case]
    long: bool = False
    mounts: int = 0
    baseline: str = "nginx-gthread"
    systems: tuple[str, ...] = SERVERS
    main: Metric = THROUGHPUT

    def rounds(self, scale: Scale) -> int:
        return scale.rounds if self.long else scale.few

    def variants(self, scale: Scale) -> Sequence[str]:
        return tuple(self.cases)

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        return replace(scale.deployment, mounts=self.mounts)

    def missing(self) -> list[str]:
        return missing_wrk()

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        return put_load(running, self.cases[variant], scale.seconds if self.long else scale.short)


HELLO = Throughput(
    "hello",
    "hello, JSON, by connections",
    {str(count): Case(count, "/hello") for count in (1, 32, 128, 512)},
    long=True,
)
BODIES = Throughput(
    "bodies",
    "10 and 100 KiB responses and a 10 KiB POST, 32 connections",
    {
        "10 KiB": Case(32, "/bytes/10240"),
        "100 KiB": Case(32, "/bytes/102400"),
        "POST 10 KiB": Case(32, "/length", "post.lua", "POST", b"flaskbus!\n" * 1024),
    },
)
IO = Throughput("io", "an app that waits 20 ms, 32 connections", {"32": Case(32, "/sleep/20")})
MANY_MOUNTS = Throughput(
    "mounts",
    "16 mounts in turn, 32 connections",
    {"32": Case(32, f"/m{MOUNTS - 1}/hello", "mounts.lua")},
    mounts=MOUNTS,
)


class Scaling(Work):
    """The app that waits, with more and more processes of two threads, and twice as many clients as threads."""

    name = "scaling"
    title = "an app that waits 20 ms, by agents of 2 threads"
    systems = ("flaskbus", "nginx-gthread")
    baseline = "nginx-gthread"
    main = THROUGHPUT

    def rounds(self, scale: Scale) -> int:
        return 1 if scale.quick else min(2, scale.rounds)

    def variants(self, scale: Scale) -> Sequence[str]:
        return ("1", "4", "16") if scale.quick else ("1", "2", "4", "8", "16", "32")

    def deployment(self, variant: str, scale: Scale) -> Deployment:
        return Deployment(processes=int(variant), threads=2)

    def missing(self) -> list[str]:
        return missing_wrk()

    def run(self, running: Running, variant: str, scale: Scale) -> Iterable[Figure]:
        return put_load(running, Case(4 * int(variant), "/sleep/20"), scale.short)
