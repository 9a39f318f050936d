"""The reply list of one exchange, as its gateway reads it.

The list is the truth. A doorbell only says when to look at it; a ring that carries a frame saves that look.
The list is trimmed after its frames were handed over, never before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from flaskbus.inbox import Inbox
from flaskbus.messages import Frame
from flaskbus_gateway.link import AnswerError, Link, LinkError

BATCH = 16
"""Frames that one look at a list takes; half as many handed over, and they are trimmed."""

CREDIT = 32 * 1024
"""Bytes handed over after which they are trimmed, however few frames they are. Half of the least window."""


class ReplyList:
    """Frames of one exchange, in their order.

    ``key`` is the list; ``spawn`` runs a coroutine beside the exchange; ``on_news`` is called when frames may
    have come; ``max_frame`` is the size of the largest frame in bytes; ``is_signed`` is an inbox's.
    """

    __slots__ = (
        "_fetching", "_inbox", "_link", "_look_again", "_on_news", "_owed", "_spawn", "dirty", "frames", "key",
    )  # fmt: skip

    def __init__(
        self,
        link: Link,
        key: str,
        *,
        attempt: int,
        max_frame: int,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_news: Callable[[], None],
        is_signed: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.key = key
        self._link = link
        self._spawn = spawn
        self._on_news = on_news
        self._inbox = Inbox(attempt, max_frame, is_signed)
        self.frames: deque[Frame] = self._inbox.frames
        self.dirty = False
        """Whether something may lie on the list."""
        self._fetching = False
        self._look_again = False
        self._owed = 0  # bytes handed over that were not trimmed

    @property
    def attempt(self) -> int:
        """The run whose frames are taken; others' are dropped."""
        return self._inbox.attempt

    @property
    def forged(self) -> int:
        """How many elements were dropped because they were not signed right."""
        return self._inbox.forged

    def next_attempt(self) -> None:
        """Another agent may run it: what the one before still sends is not for the client."""
        self._inbox.next_attempt()

    def ring(self, frame: bytes | None) -> None:
        """The doorbell rang; ``frame`` is the complete reply, where it was small enough."""
        self.dirty = True
        if frame is not None and not self._fetching and self._inbox.take_rung(frame):
            self._on_news()
        else:
            self.look()

    def look(self) -> None:
        """Fetch what is new. There is never more of it than the window."""
        if self._fetching:
            self._look_again = True
        else:
            self._fetching = True
            self._spawn(self._look())

    async def _look(self) -> None:
        try:
            await self.fetch()
        finally:
            self._fetching = False
            self._on_news()
        self._look_on()

    def _look_on(self) -> None:
        """There was more than one look could take, or the bell rang meanwhile."""
        if self._look_again and not self._fetching and len(self.frames) < BATCH:
            self._look_again = False
            self.look()

    async def fetch(self) -> None:
        """Read the list now; where the broker cannot be asked, the sweep looks again."""
        start, attempt = self._inbox.seen, self.attempt
        try:
            elements: list[bytes] = await self._link.call("LRANGE", self.key, start, start + BATCH - 1)
        except (LinkError, AnswerError):
            return
        self.dirty = self.dirty or bool(elements)
        if attempt != self.attempt:
            self._look_again = True  # it was another run's list
            return
        if not self._inbox.take_listed(elements, start):
            self._look_again = True
        if self.forged and not self.frames:
            # Else a stranger's word would look, for as long as it lies there, as if an answer was on its way.
            self._link.tell("LTRIM", self.key, self._inbox.trimmed(), -1)
        if len(elements) == BATCH:
            self._look_again = True
        if not elements:
            self.tidy()  # while the broker is out of memory, an agent waits for just that

    async def has_news(self) -> bool:
        """Whether something lies in hand or on the list, or that cannot be told now."""
        self.dirty = True
        if not self.frames and not self._fetching:
            await self.fetch()
            self._on_news()
        # Where the link broke meanwhile, nothing was seen.
        return bool(self.frames) or self._fetching or not self._link.up.is_set()

    def took(self, frames: int) -> None:
        """These frames are not needed on the list any more; they are trimmed together with later ones."""
        self._inbox.handed_over(frames)

    def handed_over(self, frames: int, size: int) -> bool:
        """The client's transport took these frames, of ``size`` bytes together: trim them, now or with later
        ones; whether it was now.
        """
        inbox = self._inbox
        inbox.handed_over(frames)
        self._owed += size
        trim = inbox.done >= BATCH // 2 or self._owed >= CREDIT
        if trim:
            self.tidy()
        self._look_on()
        return trim

    def tidy(self) -> None:
        """Trim what was handed over, however little.

        A list to which nobody writes for long expires, and the next frames would lie where nobody looks for them.
        """
        self._owed = 0
        if count := self._inbox.trimmed():
            self._link.tell("LTRIM", self.key, count, -1)
