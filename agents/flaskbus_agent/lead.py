"""Who reads: one thread of a process at a time has the lead.

The leader reads for itself and for all threads that wait. While it runs something itself it may keep the lead, and
leave what it has done to be sent with its next question. Where that something lasts longer than :data:`STALL`, a
thread that waits, the deputy, takes the lead and all that goes with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from threading import Condition, Lock, get_ident
from typing import Generic, TypeVar

T = TypeVar("T")

STALL = 0.002
"""Seconds that what was read, and what is done, may wait for one run."""

CALM = 3
"""Looks of the deputy at a leader that runs nothing, after which it waits until it is called."""


class Lead(Generic[T]):
    """The lead, and what its holder leaves to be sent, which is of type ``T``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = Lock()
        self._free = Condition(self._mutex)
        self._watch = Condition(self._mutex)
        self._leader = 0
        self._since = math.inf  # when the leader began to run what it runs now
        self._begun = 0
        self._has_deputy = False
        self._asleep = False  # the deputy waits until it is called
        self._left: list[T] = []
        self._left_at = 0.0  # when the first of them was left
        self.waiting = 0
        """Threads that wait for the lead."""

    def is_reading(self) -> bool:
        """Whether a thread has the lead, and runs nothing."""
        return self._leader != 0 and self._since == math.inf

    def take(self) -> None:
        """Wait for the lead."""
        with self._mutex:
            self.waiting += 1
            while not self._may_be_taken():
                if self._has_deputy:
                    self._free.wait()
                else:
                    self._be_deputy()
            self.waiting -= 1
            self._leader, self._since = get_ident(), math.inf
            if not self._has_deputy:
                self._free.notify()

    def _may_be_taken(self) -> bool:
        return not self._leader or self._clock() - self._since >= STALL

    def _be_deputy(self) -> None:
        self._has_deputy = True
        seen, calm = self._begun, 0
        while not self._may_be_taken():
            self._asleep = calm >= CALM
            self._watch.wait(None if self._asleep else STALL)
            calm = 0 if self._asleep or self._begun != seen or self._since < math.inf else calm + 1
            seen = self._begun
        self._has_deputy = self._asleep = False

    def release(self) -> None:
        """Leave the lead to another, if the calling thread still has it."""
        with self._mutex:
            if self._leader == get_ident():
                self._leader, self._since = 0, math.inf
                if self.waiting > self._has_deputy:
                    self._free.notify()
                else:
                    self._watch.notify()

    def begin(self) -> None:
        """The leader runs something, and keeps the lead if that is soon over."""
        with self._mutex:
            self._since = self._clock()
            self._begun += 1
            if self._asleep:
                self._asleep = False
                self._watch.notify()

    def end(self) -> bool:
        """That is over; whether the calling thread has the lead still."""
        with self._mutex:
            if self._leader != get_ident():
                return False
            self._since = math.inf
            return True

    def takes(self) -> bool:
        """Whether :meth:`leave` is likely to take something."""
        return self._leader == get_ident() and self.waiting > 0

    def leave(self, thing: T) -> bool:
        """Leave something to be sent by whoever has the lead next.

        False where the calling thread has lost it, or where nobody waits who could take it should this run go on.
        """
        with self._mutex:
            if not self.takes():
                return False
            if not self._left:
                self._left_at = self._clock()
            self._left.append(thing)
            return True

    @property
    def has_left(self) -> bool:
        """Whether something was left, and nobody has taken it."""
        return bool(self._left)

    def is_due(self) -> bool:
        """Whether the leader has to send what was left before it runs anything more."""
        return bool(self._left) and (not self.waiting or self._clock() - self._left_at >= STALL)

    def collect(self) -> list[T]:
        """The leader takes what was left."""
        with self._mutex:
            left, self._left = self._left, []
            return left
