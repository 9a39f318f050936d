"""Whether the requests of an app compute, as far as its latest ones show. Pure."""

from __future__ import annotations

import random

SAMPLE = 8
"""Of how many requests that the leader runs one is measured, on average: the question costs a microsecond or two."""

PROBE = 32
"""Of how many requests of an app that waits the leader runs one all the same, on average."""

WEIGHT = 0.25
"""Of what was measured last, in the estimate."""


class Pace:
    """Of one app in one process. Several threads may use it at once: it is an estimate.

    Requests that compute gain nothing from a thread each, as the interpreter runs one of them at a time. Those that
    wait, for a database or a disk, or that are long, are run beside each other. The distances between two samples are
    random, so that no rhythm of the traffic hides from them.
    """

    __slots__ = ("_until_sample", "_waits")

    def __init__(self) -> None:
        self._waits = 0.0
        self._until_sample = 0

    def is_for_leader(self) -> bool:
        """Whether the leader runs the next request itself."""
        return self._waits < 0.5 or self._count(PROBE)

    def is_sample(self) -> bool:
        """Whether such a request is to be measured."""
        return self._waits >= 0.5 or self._count(SAMPLE)

    def _count(self, distance: int) -> bool:
        self._until_sample -= 1
        if self._until_sample >= 0:
            return False
        self._until_sample = random.randrange(2 * distance)
        return True

    def measured(self, took: float, computed: float, limit: float) -> None:
        """A request that the leader ran took so long, and so much of the processor, in seconds.

        Longer than ``limit`` is long.
        """
        waited = took > limit or took > 2 * computed
        self._waits += WEIGHT * (waited - self._waits)
