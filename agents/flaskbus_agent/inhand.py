"""Which deliveries a process has in hand, and which it has done with. Pure, and safe to use from several threads.

A read whose answer was lost is repeated, and then names entries that this process has, or had: those that it runs,
those that it settled while the question was under way, and, from a broker that came back without its last
writes, those that it settled long before.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from threading import Lock

REMEMBERED = 16384
"""Settled deliveries that are remembered: some seconds of work at any rate that a process can reach."""


class Standing(Enum):
    """What a delivery is to this process."""

    NEW = "new"
    HELD = "held"
    DONE = "done"


class InHand:
    """Deliveries by their mark, which is any bytes that tell one from every other."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._held: set[bytes] = set()
        self._done: set[bytes] = set()
        self._order: deque[bytes] = deque()  # of those that are done
        self._over: set[bytes] = set()
        self._lock = Lock()

    def take(self, mark: bytes) -> Standing:
        """Hold a delivery, if it is new; what it was before that."""
        with self._lock:
            if mark in self._held:
                return Standing.HELD
            if mark in self._done or mark in self._over:
                return Standing.DONE
            self._held.add(mark)
            return Standing.NEW

    def settle(self, mark: bytes) -> None:
        """The broker has confirmed the end of a delivery."""
        with self._lock:
            self._held.discard(mark)
            self._over.discard(mark)
            if mark not in self._done:
                self._done.add(mark)
                self._order.append(mark)
                if len(self._order) > self._remembered:
                    self._done.discard(self._order.popleft())

    def abandon(self, mark: bytes) -> None:
        """A delivery has run, and the broker has not confirmed its end: remembered until it does."""
        with self._lock:
            self._held.discard(mark)
            self._over.add(mark)

    def release(self, mark: bytes) -> None:
        """Nothing came of a delivery: another look may find it as if it was new."""
        with self._lock:
            self._held.discard(mark)
