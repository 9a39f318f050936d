"""Whether a request is taken: from what was last seen of its queue and of the broker, and what was done since.

Rules of this module:

* What waits, what is open and what the broker has room for are bounded separately: long answers never close
  a queue, and one mount never takes all that a gateway can keep open.
* A queue is measured in time too. Its age is that of the request that waits at its head. What a newcomer would
  wait is its length over the rate at which it is served: as measured while something waits, and before that the
  number of threads over the time that a request takes. Either sheds at ``queue_age``, and where the work itself
  is long, later: whoever waits ten seconds for an answer waits some more for a free thread.
* Ids of entries are compared with each other and never with a clock. A request that waits was there at each
  look whose newest id was not below its own: that much time it has waited, whatever the broker's clock did.
* Time without agents is no age: after a hold it counts from the first agent's return, and what had gathered may
  take its time to be served.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from flaskbus import errors

WINDOW = 10.0
"""Seconds over which the drain of a queue is measured."""

EVIDENCE = 0.9
"""Seconds for which something must have waited before the drain is believed: from one regular look to the next."""

SPACING = 0.25
"""Seconds between two looks that are remembered; more would tell no more."""

CATCH_UP = 0.1
"""How much shorter the wait becomes in a second after a hold, at the least: agents that are nine tenths loaded."""

PATIENCE = 2.0
"""How many times as long as a request's work it may wait, beside ``queue_age``."""

LATEST = 0.2
"""Weight of the latest request in the mean time that requests take."""

LONGEST_RETRY = 30
"""Seconds; what happens in more than that, nobody can tell from a queue."""

SHARE = 3
"""How many times as many exchanges a mount may have open as are left to all (Choudhury and Hahne, "Dynamic queue
length thresholds", 1998): one mount alone gets three quarters of ``open_limit``, and another finds room."""

EntryId = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Look:
    """A stream and its group at one moment, as ``look.lua`` sees them.

    ``added`` counts the entries ever added, ``last`` is the newest id ever given, ``head`` that of the first
    entry which nobody has taken.
    """

    length: int
    pending: int
    added: int = 0
    last: EntryId = (0, 0)
    head: EntryId | None = None

    @property
    def waiting(self) -> int:
        return max(0, self.length - self.pending)


@dataclass(frozen=True, slots=True)
class _Mark:
    """One look that is remembered; ``gone`` counts the entries that have left the queue."""

    at: float
    last: EntryId
    gone: int


@dataclass(slots=True)
class Queue:
    """What waits for one mount, and what this process has open there."""

    open: int = 0
    """Exchanges of this process, also those whose body is still on its way."""
    age: float = 0.0
    """How long the head of the queue had waited for agents that are there, at the last look (seconds)."""
    drain: float | None = None
    """Requests that leave the queue in a second, while some wait; ``None`` where that was not seen."""
    threads: int = 0
    """Of all agents that are ready, at the last look."""
    work: float | None = None
    """Seconds that a request takes which finds a free thread; ``None`` where none was seen."""
    probe: object = None
    """The exchange that tells it next, and found a free thread at ``_probed`` (monotonic seconds)."""
    held: float = 0.0
    """Seconds for which requests had waited for agents, or for the broker, before it went on."""
    alive_since: float | None = None
    """Since when agents have taken requests (monotonic seconds); ``None`` while there are none."""
    _probed: float = 0.0
    _seen: int = 0  # what waited at the last look
    _sent: int = 0  # sent by this process, ever
    _started: int = 0  # of those, how many do not wait any more
    _since: int = 0  # _sent - _started, when the last look was under way
    _free: int = 0  # threads that had nothing to do then
    _marks: deque[_Mark] = field(default_factory=lambda: deque(maxlen=1000))

    @property
    def waiting(self) -> int:
        """Requests that wait: as of the last look, and what this process sent or saw started since."""
        return max(0, self._seen + self._sent - self._started - self._since - self._free)

    def sent(self, exchange: object, now: float) -> None:
        """The request of an exchange is on its way to the stream."""
        if self.probe is None and not self._seen and self._sent - self._started < self.threads:
            self.probe, self._probed = exchange, now
        self._sent += 1

    def started(self, exchange: object, took: float | None) -> None:
        """A request of this process waits no longer; where others wait, the thread that it had takes the next.

        It ``took`` so many seconds to the head of its reply, or there is none.
        """
        self._started += 1
        if exchange is self.probe:
            self.probe = None
            if took is not None:
                self.work = took if self.work is None else self.work + LATEST * (took - self.work)

    def goes_by(self, before: object, now: object) -> None:
        """An exchange goes by another name."""
        if self.probe is before:
            self.probe = now

    def goes_on(self, now: float, held: float) -> None:
        """Requests are taken again, or for the first time: until ``now``, they were not for ``held`` seconds."""
        self.alive_since, self.held, self.probe = now, held, None

    def pauses(self) -> None:
        """Nobody takes requests; what was sent before may wait long, and tells nothing of the work."""
        self.alive_since = self.probe = None

    def begin(self) -> int:
        """A look is sent now, behind everything that was sent before; for :meth:`look`."""
        return self._sent - self._started

    def look(self, begun: int, seen: Look, now: float) -> None:
        """What the look that began at ``begun`` saw; arrived at ``now`` (monotonic seconds)."""
        self._seen, self._since = seen.waiting, begun
        self._free = max(0, self.threads - seen.pending)
        self._remember(seen, now)
        self.age = 0.0
        if seen.head is not None and self.alive_since is not None:
            waits_since = next((mark.at for mark in self._marks if mark.last >= seen.head), now)
            self.age = now - max(waits_since, self.alive_since)

    def _remember(self, seen: Look, now: float) -> None:
        marks, gone = self._marks, seen.added - seen.waiting
        if seen.head is None or (marks and (seen.last < marks[-1].last or gone < marks[-1].gone)):
            marks.clear()  # nothing waits; or it is another stream, or another group
        if not marks or self.alive_since is None:
            self.drain = (
                None  # how fast it drains shows only while something waits, and somebody comes for it
            )
        if seen.head is None:
            return
        while marks and marks[0].at < now - WINDOW and marks[0].last < seen.head:
            marks.popleft()
        begin = now if self.alive_since is None else max(self.alive_since, now - WINDOW)
        first = next((mark for mark in marks if mark.at >= begin), None)
        if first is not None and now - first.at >= EVIDENCE:
            # One more than was counted: that none was seen to leave does not mean that none does.
            self.drain = (gone - first.gone + 1) / (now - first.at)
        if not marks or now - marks[-1].at >= SPACING:
            marks.append(_Mark(now, seen.last, gone))

    @property
    def wait(self) -> float:
        """Seconds that a newcomer would wait; 0 where there is no telling."""
        # Threads that share an interpreter take longer together; those who lost patience leave the queue as well.
        by_work = self.threads / self.work if self.work else 0.0
        rate = min(self.drain, by_work) if self.drain and by_work else self.drain or by_work
        return self.waiting / rate if rate else 0.0

    def too_old(self, limit: float, now: float) -> bool:
        """Whether what comes ``now`` would wait longer than ``limit`` seconds, or what came before does."""
        if self.alive_since is None:
            return False
        work = max(self.work or 0.0, 0.0 if self.probe is None else now - self._probed)
        catching_up = max(0.0, self.held - CATCH_UP * (now - self.alive_since))
        return max(self.age, self.wait) > limit + PATIENCE * work + catching_up

    def retry_after(self) -> int:
        """Whole seconds until what waits now may be served."""
        return max(1, min(LONGEST_RETRY, math.ceil(max(self.age, self.wait))))


@dataclass(slots=True)
class Admission:
    """The bounds of one gateway process, and how much of them is used.

    ``room`` is how many bytes the broker may still be given, as of the last look and less what was admitted
    since; infinite where it has no limit, or does not tell.
    """

    queue_limit: int
    queue_age: float
    open_limit: int
    open: int = 0
    room: float = math.inf

    def admit(self, queue: Queue, name: str, size: int, now: float) -> None:
        """Take a request of ``size`` bytes (as far as it says) for the mount ``name``, or refuse it.

        What was taken has to be closed. Raises :class:`~flaskbus.errors.QueueFull` or
        :class:`~flaskbus.errors.BrokerFull`.
        """
        if self.room <= 0:
            raise errors.BrokerFull("the broker's memory is nearly full", retry_after=5)
        self.check(queue, name, now)
        if queue.open >= SHARE * (self.open_limit - self.open):
            raise errors.QueueFull(
                f"{self.open} exchanges are open in this gateway, {queue.open} of them with {name}",
                retry_after=1,
            )
        self.room -= size
        self.open += 1
        queue.open += 1

    def check(self, queue: Queue, name: str, now: float) -> None:
        """Whether the queue has room; asked again when a body has come, which does not wait there before.

        Slow bodies would close the queue else, and all that came at a time would get past its limit.
        """
        waiting = queue.waiting
        if waiting >= self.queue_limit:
            raise errors.QueueFull(
                f"{waiting} requests are waiting for {name}; {self.queue_limit} may",
                retry_after=queue.retry_after(),
            )
        if waiting and queue.too_old(self.queue_age, now):
            raise errors.QueueFull(
                f"requests wait {max(queue.age, queue.wait):.1f} s for {name}; {self.queue_age:g} s are allowed",
                retry_after=queue.retry_after(),
            )

    def close(self, queue: Queue) -> None:
        """An exchange that was admitted has ended, or its body did not come."""
        self.open -= 1
        queue.open -= 1


def entry_id(text: bytes) -> EntryId:
    """``b"1700000000000-3"`` -> ``(1700000000000, 3)``."""
    millis, _, serial = text.partition(b"-")
    return int(millis), int(serial)
