"""What is measured, as plain values: deployments, metrics, samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deployment:
    """How much of an app runs. All systems get the same."""

    processes: int = 2
    """App processes on each host."""
    threads: int = 4
    """Requests that one process runs at a time."""
    hosts: int = 1
    """Servers of the app that know nothing of each other; all are this machine."""
    mounts: int = 0
    """0: the app on ``/``; n: on ``/m0`` to ``/m(n-1)``."""
    streams: int = 0
    """Exchanges without an end that one process has to hold beside its threads. Where it has no budget for them,
    it gets as many more threads."""
    nodes: int = 1
    """1: one broker; more: a cluster of so many."""
    partitions: int = 1
    """Queues of each mount."""
    settings: tuple[tuple[str, str], ...] = ()
    """Environment of flaskbus where a work cannot be done with its defaults: ``FLASKBUS_QUEUE_LIMIT``, ``20000``."""

    @property
    def at_once(self) -> int:
        """Threads of a process where a stream takes one of them."""
        return self.threads + self.streams


@dataclass(frozen=True, slots=True)
class Metric:
    """Something with a unit; ``higher`` says which way is better, None that neither is."""

    name: str
    unit: str
    higher: bool | None = None
    when: str = ""
    """Of a state that is looked at more than once: ``before``, ``peak``, ``after``."""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.when}" if self.when else self.name


THROUGHPUT = Metric("throughput", "requests/s", higher=True)
P50 = Metric("p50", "ms", higher=False)
P99 = Metric("p99", "ms", higher=False)
CPU = Metric("CPU of all processes", "µs/request", higher=False)
ERRORS = Metric("errors", "requests", higher=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value."""

    metric: Metric
    value: float
    variant: str = ""
    """Where one run gives figures of several: which of them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A figure, and where it comes from."""

    work: str
    variant: str
    system: str
    round: int
    metric: Metric
    value: float


@dataclass(frozen=True, slots=True)
class Gap:
    """What was not measured, and why."""

    work: str
    variant: str
    system: str
    reason: str


class Skip(Exception):
    """The system cannot do the work; the text says why."""


class Wrong(Exception):
    """An answer is not the one that the app gives: figures of it would mean nothing."""
