"""What a system holds before, during and after a work: memory of each process, connections to the broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Self

import redis

from benchmarks import measure
from benchmarks.events import Audience
from benchmarks.model import Figure, Metric, Sample
from benchmarks.systems.base import Running

BEFORE, PEAK, AFTER = "before", "peak", "after"
CONNECTIONS = "connections to the broker"
MEMORY = "memory of "
"""How the names of all processes' memory begin."""
_FEW = 32
_EVERY = 0.25
"""Seconds between two looks: one costs some milliseconds."""
_PATIENCE = 15.0
"""Seconds until what is left counts as left."""


def processes(running: Running) -> dict[str, int]:
    """Process ids by names: ``gateway``, and its children ``gateway worker 1`` …"""
    found: dict[str, int] = {}
    for child in running.children.all:
        first, *others = measure.family([child.pid])
        found[child.role] = first
        found |= {f"{child.role} worker {number}": pid for number, pid in enumerate(others, 1)}
    return found


def acquaint(running: Running) -> None:
    """Some streams, before anything is counted: what a process opens once for all of them is opened then."""
    known = -1
    for _ in range(5):
        with closing(Audience()) as few:
            few.join(running.port, "/ticks/0/1000", _FEW)
            few.listen(5.0, enough=_FEW)
        if not running.redis:
            return
        now = measure.broker_connections(running.redis)
        if now == known:
            return
        known = now


class Watch:
    """Looks while the context lasts; the peak is the most that was seen."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._processes = processes(running)
        self._client = redis.Redis.from_url(running.redis) if running.redis else None
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._before = self._look()
        self._peak = dict(self._before)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self.look()

    def look(self) -> None:
        for name, value in self._look().items():
            self._peak[name] = max(self._peak[name], value)

    def _look(self) -> dict[str, int]:
        seen = {MEMORY + name: measure.private(pid) for name, pid in self._processes.items()}
        if self._client is not None:
            seen[CONNECTIONS] = int(self._client.info("clients")["connected_clients"]) - 1
        return seen

    def figures(self) -> Iterator[Figure]:
        """Of the three states; the last is waited for until the processes are at rest."""
        measure.settle(self._running, _PATIENCE)
        after = self._look()
        if self._client is not None:
            self._client.close()
        for name, before in self._before.items():
            for when, value in ((BEFORE, before), (PEAK, self._peak[name]), (AFTER, after[name])):
                unit, scale = ("", 1) if name == CONNECTIONS else ("MiB", 1 << 20)
                yield Figure(Metric(name, unit, when=when), value / scale)


def growth(
    samples: Sequence[Sample], work: str, system: str, *, of: str, variant: str = ""
) -> dict[int, float]:
    """Round -> by how much the process (or the count) ``of`` which there is most grew, from before to the peak.

    ``of`` is how its name begins; all variants where there is none.
    """
    states: dict[tuple[int, str, str], dict[str, float]] = {}
    for each in samples:
        here = (each.work, each.system) == (work, system) and variant in ("", each.variant)
        if here and each.metric.when and each.metric.name.startswith(of):
            key = (each.round, each.variant, each.metric.name)
            states.setdefault(key, {})[each.metric.when] = each.value
    grown: dict[int, float] = {}
    for (turn, _, _), state in states.items():
        more = state[PEAK] - state[BEFORE]
        grown[turn] = max(grown.get(turn, more), more)
    return grown
