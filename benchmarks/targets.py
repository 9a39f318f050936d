"""What flaskbus has to reach, as ratios within one run: the least, and what is aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.model import P50, THROUGHPUT, Metric, Sample
from benchmarks.stats import Summary, ratio, summarize, values
from benchmarks.watch import CONNECTIONS as TO_BROKER
from benchmarks.watch import MEMORY, growth
from benchmarks.works.events import OPEN
from benchmarks.works.held import CONNECTIONS, PER_REQUEST
from benchmarks.works.mix import FAST_P99

Samples = Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Target:
    """``floor`` and ``aim`` are the least where ``higher``, else the most."""

    title: str
    floor: float
    aim: float
    higher: bool
    measured: Callable[[Samples], Summary | None]

    def verdict(self, summary: Summary | None) -> str:
        """In words: of the median."""
        if summary is None:
            return "not measured"
        sign = 1 if self.higher else -1
        if sign * summary.median >= sign * self.aim:
            return "as aimed at"
        return "reached" if sign * summary.median >= sign * self.floor else "**missed**"


def _against(work: str, variant: str, system: str, metric: Metric) -> Callable[[Samples], Summary | None]:
    def measured(samples: Samples) -> Summary | None:
        ours = values(samples, work, variant, "flaskbus", metric)
        return ratio(ours, values(samples, work, variant, system, metric))

    return measured


def _against_itself(work: str, variant: str, other: str) -> Callable[[Samples], Summary | None]:
    def measured(samples: Samples) -> Summary | None:
        ours = values(samples, work, variant, "flaskbus", THROUGHPUT)
        return ratio(ours, values(samples, work, other, "flaskbus", THROUGHPUT))

    return measured


def _plain(work: str, variant: str, metric: Metric) -> Callable[[Samples], Summary | None]:
    return lambda samples: summarize(values(samples, work, variant, "flaskbus", metric).values())


def _more_connections(samples: Samples) -> Summary | None:
    few = values(samples, "held", "100", "flaskbus", CONNECTIONS)
    many = values(samples, "held", "10,000", "flaskbus", CONNECTIONS)
    return summarize(many[key] - few[key] for key in few.keys() & many.keys())


def _grown(work: str, variant: str, of: str) -> Callable[[Samples], Summary | None]:
    return lambda samples: summarize(growth(samples, work, "flaskbus", of=of, variant=variant).values())


_PEERS = (("nginx-gthread", 1.3, 2.0), ("nginx-granian", 0.75, 1.0), ("uwsgi", 0.75, 1.0))

TARGETS = (
    *(
        Target(
            f"hello, {count} connections, requests/s against {peer}",
            floor,
            aim,
            True,
            _against("hello", count, peer, THROUGHPUT),
        )
        for peer, floor, aim in _PEERS
        for count in ("32", "128")
    ),
    Target(
        "hello, 512 connections, requests/s against itself at 128",
        0.95, 1.0, True, _against_itself("hello", "512", "128"),
    ),
    Target(
        "hello, 1 connection, p50 against nginx-gthread",
        1.6, 1.0, False, _against("hello", "1", "nginx-gthread", P50),
    ),
    *(
        Target(
            f"mix at {rate}, p99 of the fast against nginx-gthread",
            0.6, 0.3, False, _against("mix", rate, "nginx-gthread", FAST_P99),
        )
        for rate in ("350/s", "525/s")
    ),
    Target(
        "an app that waits, 32 agents against 1",
        28.0, 31.0, True, _against_itself("scaling", "32", "1"),
    ),
    Target(
        "10,000 in flight, KiB each in the gateway",
        28.0, 20.0, False, _plain("held", "10,000", PER_REQUEST),
    ),
    Target(
        "10,000 in flight, connections to the broker more than with 100",
        0.0, 0.0, False, _more_connections,
    ),
    Target("500 streams of events, how many are open", 500.0, 500.0, True, _plain("sse-many", "500", OPEN)),
    *(
        Target(
            f"{title}, connections to the broker more than before",
            0.0, 0.0, False, _grown(work, variant, TO_BROKER),
        )
        for title, work, variant in (
            ("500 streams of events", "sse-many", "500"),
            ("32 WebSockets", "websocket", "32"),
        )
    ),
    Target(
        "upload of 2 GiB, MiB by which the process that grows most does",
        16.0, 8.0, False, _grown("upload-large", "2 GiB", MEMORY),
    ),
)  # fmt: skip
