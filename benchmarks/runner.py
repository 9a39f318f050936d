"""Does the works on the systems: all that need the same deployment run beside each other and take turns.

Within a round each variant of each work goes over all systems before the next variant begins, and the order of the
systems moves on, so that a ratio compares runs that are seconds apart. The others only idle meanwhile. Each round
starts them anew.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from benchmarks import measure, wrk
from benchmarks.model import Deployment, Figure, Gap, Sample, Skip, Wrong
from benchmarks.processes import Children, StartFailed
from benchmarks.systems.base import Running, System
from benchmarks.works.base import Scale, Work
from flaskbus.guard import Guard

_WARM_UP = 1.0
_FAILURES = (
    Wrong,
    StartFailed,
    OSError,
    EOFError,
    ValueError,
    subprocess.CalledProcessError,
    redis.RedisError,
)
"""Of one run, which the others go on without; a connection that ends early is an EOFError."""


@dataclass
class Results:
    """What came of it."""

    samples: list[Sample] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def gap(self, work: str, variant: str, system: str, reason: str) -> bool:
        """Note what is not measured; whether that is new."""
        gap = Gap(work, variant, system, reason)
        new = gap not in self.gaps
        if new:
            self.gaps.append(gap)
        return new


Group = list[tuple[Work, str]]


def groups(works: Sequence[Work], scale: Scale) -> dict[Deployment, Group]:
    """The variants of the works by what has to run for them, in their order."""
    found: dict[Deployment, Group] = {}
    for work in works:
        for variant in work.variants(scale):
            found.setdefault(work.deployment(variant, scale), []).append((work, variant))
    return found


def turns(systems: Sequence[str], shift: int) -> list[str]:
    """The systems, from another one on each time."""
    start = shift % len(systems) if systems else 0
    return [*systems[start:], *systems[:start]]


@dataclass
class Bench:
    """The works to do and the systems to do them on; ``say`` shows progress."""

    works: Sequence[Work]
    systems: Sequence[System]
    scale: Scale
    directory: Path
    say: Callable[[str], None]
    results: Results = field(default_factory=Results)

    def run(self) -> None:
        """Fills ``results``, which hold what was measured also where this is interrupted."""
        self._began, self._done, self._starts = time.monotonic(), 0, 0
        plan = groups(self.works, self.scale)
        self._total = sum(
            work.rounds(self.scale) * len(self._able(work)) for group in plan.values() for work, _ in group
        )
        guard = Guard(self.directory)
        try:
            for deployment, group in plan.items():
                for turn in range(max(work.rounds(self.scale) for work, _ in group)):
                    self._round(deployment, group, turn, guard)
        finally:
            guard.close()

    def _able(self, work: Work) -> list[System]:
        return [system for system in self.systems if system.name in work.systems]

    def _round(self, deployment: Deployment, group: Group, turn: int, guard: Guard) -> None:
        due = [(work, variant) for work, variant in group if turn < work.rounds(self.scale)]
        wanted = {system.name for work, _ in due for system in self._able(work)}
        with ExitStack() as stack:
            running: dict[str, Running] = {}
            # All are started before the first is waited for.
            for system in self.systems:
                if system.name in wanted:
                    with self._missing(system, due):
                        running[system.name] = self._launch(system, deployment, guard, stack)
            for system in self.systems:
                if system.name in running:
                    each = running.pop(system.name)
                    with self._missing(system, due):
                        each.wait()
                        running[system.name] = each
            for each in running.values():
                self._warm_up(each)
            for place, (work, variant) in enumerate(due):
                names = [system.name for system in self._able(work) if system.name in running]
                for name in turns(names, turn + place):
                    self._measure(work, variant, running[name], turn)

    def _launch(self, system: System, deployment: Deployment, guard: Guard, stack: ExitStack) -> Running:
        self._starts += 1
        directory = self.directory / f"{self._starts}-{system.name}"
        return system.start(deployment, stack.enter_context(Children(directory, guard)))

    @contextmanager
    def _missing(self, system: System, due: Group) -> Iterator[None]:
        """Go on without a system that does not start."""
        try:
            yield
        except StartFailed as error:
            for work, variant in due:
                if system.name in work.systems:
                    self._miss(work, variant, system.name, f"did not start: {error}")

    def _warm_up(self, running: Running) -> None:
        if not running.port:
            return
        measure.settle(running)
        if program := shutil.which("wrk"):
            path = "/m0/hello" if running.deployment.mounts else "/hello"
            words = wrk.command(running.url + path, connections=32, seconds=_WARM_UP, program=program)
            subprocess.run(words, capture_output=True, check=False)

    def _measure(self, work: Work, variant: str, running: Running, turn: int) -> None:
        self._done += 1
        system, figures = running.system, []
        try:
            for figure in work.run(running, variant, self.scale):
                figures.append(figure)
                where = figure.variant or variant
                self.results.samples.append(
                    Sample(work.name, where, system, turn, figure.metric, figure.value)
                )
        except Skip as reason:
            self._miss(work, variant, system, str(reason))
            return
        except _FAILURES as error:
            self._miss(work, variant, system, f"failed: {error or repr(error)}")
            return
        self.say(
            f"{self._place()} {work.name}, {variant}, round {turn + 1}/{work.rounds(self.scale)}, "
            f"{system}: {shown(figures)}"
        )

    def _miss(self, work: Work, variant: str, system: str, reason: str) -> None:
        if self.results.gap(work.name, variant, system, reason):
            self.say(f"{self._place()} {work.name}, {variant}, {system}: skipped: {reason}")

    def _place(self) -> str:
        spent = time.monotonic() - self._began
        return f"[{self._done}/{self._total}, {int(spent // 60)}:{int(spent % 60):02}]"


def shown(figures: Sequence[Figure]) -> str:
    """The first figures of a run, for a line of progress."""
    return ", ".join(
        f"{each.metric.title} {each.value:,.6g} {each.metric.unit}".rstrip() for each in figures[:3]
    )
