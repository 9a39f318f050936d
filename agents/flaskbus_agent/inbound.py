"""What a client sends after its request: the inbound list, and the rest of a body as the app reads it."""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from flaskbus import wire
from flaskbus.inbox import Inbox
from flaskbus.messages import INBOUND, Chunk, End, Failure, Frame, Request
from flaskbus_agent.entry import Entry, Running
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.wsgi import Cancelled, ClientDisconnected

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BATCH = 8
"""Frames that one look at the list takes; as many handed on, and they are trimmed."""

CREDIT = 32 * 1024
"""Bytes handed on after which they are trimmed, however few frames they are. Half of the least window."""

LOOK = 1.0
"""Seconds after which the list is looked at although nobody rang."""

IDENTITY = 32
"""Bytes at the front of an element that tell it from every other one: its number is among them."""


class InboundList:
    """The inbound list of one request. Used by one thread."""

    def __init__(self, outbox: Outbox, key: str, is_signed: Callable[[bytes], bool] | None) -> None:
        self._outbox = outbox
        self._key = key
        self._inbox = Inbox(INBOUND, wire.max_frame(wire.MAX_CHUNK), is_signed)
        self.frames: deque[Frame] = self._inbox.frames
        self._seen: deque[bytes] = deque()  # how the elements begin that were seen and not trimmed
        self._owed = 0  # bytes handed on that were not trimmed

    def ring(self, element: bytes) -> bool:
        """An element came with the doorbell; whether it was the next one. If not, it is time to look."""
        if not self._inbox.take_rung(element):
            return False
        self._seen.append(element[:IDENTITY])
        return True

    def look(self) -> bool:
        """Read what is new on the list; whether there may be more."""
        while True:
            start = self._inbox.seen
            elements = self._outbox.read_inbound(self._key, start, BATCH)
            if self._inbox.take_listed(elements, start):
                break
            self._seen.clear()  # again, from its front
        self._seen.extend(element[:IDENTITY] for element in elements)
        if not self.frames and self._inbox.done >= BATCH:
            # All of it came before: one lies there twice, so that trims named others than the first, and did nothing.
            self._trim()
            return True  # that one too, maybe; from the front on, it is right
        return len(elements) == BATCH

    def handed_on(self, frames: int, size: int) -> None:
        """The app has these frames, of ``size`` bytes together: trim them, now or with later ones."""
        self._inbox.handed_over(frames)
        self._owed += size
        if self._inbox.done >= BATCH or self._owed >= CREDIT:
            self._trim()

    def call(self) -> None:
        """Tell the gateway who waits for more, and that may be an answer to a ring that was lost."""
        self._took(0, b"")

    def _trim(self) -> None:
        count = self._inbox.trimmed()
        first = self._seen[0]
        for _ in range(count):
            self._seen.popleft()
        self._owed = 0
        self._took(count, first)

    def _took(self, count: int, first: bytes) -> None:
        self._outbox.took(self._key, count, first)


class InboundBody(io.RawIOBase):
    """Reads the part of the body that came with the entry, then the frames of the inbound list.

    Raises :class:`ClientDisconnected` where the body breaks off.
    """

    def __init__(self, request: Request, entry: Entry, outbox: Outbox, running: Running) -> None:
        self._part = memoryview(request.body)
        self._outbox = outbox
        self._running = running
        self._list = InboundList(outbox, entry.served.keys.inbound(request.id), outbox.is_signed)
        self._bell = outbox.bell()
        self._known = False  # whether the gateway rings for us, as far as we know
        self._ended = False
        self._broken = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        while not self._part and len(view) and not self._ended:
            self._take(self._next())
        if self._broken and not self._part:
            raise ClientDisconnected(self._broken)
        size = min(len(self._part), len(view))
        view[:size] = self._part[:size]
        self._part = self._part[size:]
        return size

    def _next(self) -> Frame:
        """The next frame; waits for it, while the thread's place is lent to another request."""
        since, self._running.since = self._running.since, math.inf
        try:
            rang = False
            while not self._list.frames:
                self._look()
                self._known |= rang and bool(self._list.frames)
                if not self._list.frames:
                    rang = self._wait()
            frame = self._list.frames.popleft()
            self._list.handed_on(1, len(frame.data) if isinstance(frame, Chunk) else 0)
        except Cancelled:
            # An error that apps expect of what they read, and that their own handlers see.
            return Failure(INBOUND, 0, "client-gone", "nobody waits for the answer any more")
        finally:
            self._running.since = since
        return frame

    def _look(self) -> None:
        self._bell.elements.clear()  # what rang lies on the list as well
        while self._list.look() and not self._list.frames:
            pass

    def _wait(self) -> bool:
        """Until the gateway rings, or it is time to look; whether it rang."""
        self._outbox.become_stream()
        if not self._known:
            self._list.call()
        self._known = False  # a ring that brought nothing is one more reason to ask
        rang = self._bell.wait(LOOK)
        while self._bell.elements:
            self._known |= self._list.ring(self._bell.elements.popleft())
        return rang

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, Chunk):
            self._part = memoryview(frame.data)
            return
        self._ended = True
        if not isinstance(frame, End):
            self._broken = frame.detail if isinstance(frame, Failure) else "a frame that is no part of a body"
