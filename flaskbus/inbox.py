"""Frames of one list of an exchange, put in order. Pure.

What its reader knows of the list, from its front:

    | done: may be trimmed | seen: in hand, or being handed on | not seen yet |

Frames are taken in the order of ``seq`` of one attempt. A frame that came before, or that belongs to another
attempt, is dropped; one that comes too early says that a part was lost, which ends them. A frame may also come
with the doorbell: it is taken if it is the next one, and if not, the list will tell. Where frames are signed,
one that is not signed right is dropped before all else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from flaskbus import wire
from flaskbus.errors import WireError
from flaskbus.messages import Failure, Frame


class Inbox:
    """The frames that came and were not handed over yet.

    ``max_frame``: largest list element in bytes; ``is_signed`` says of an element whether it is, ``None`` where
    nobody signs.
    """

    __slots__ = ("_is_signed", "_max_frame", "_next_seq", "attempt", "done", "forged", "frames", "seen")

    def __init__(
        self, attempt: int, max_frame: int, is_signed: Callable[[bytes], bool] | None = None
    ) -> None:
        self.attempt = attempt
        self.frames: deque[Frame] = deque()
        self.seen = 0
        """Elements at the front of the list that were read."""
        self.done = 0
        """How many of those are not needed on the list any more."""
        self.forged = 0
        """Elements that were not signed right."""
        self._next_seq = 0
        self._max_frame = max_frame
        self._is_signed = is_signed

    def take_listed(self, elements: list[bytes], start: int = 0) -> bool:
        """Elements of the list, read from place ``start`` on, which was :attr:`seen` when it was asked for.

        Whether all fitted. If not, the list is to be read again from its front: a trim that was sent on a
        connection which broke was carried out late, or not, so nobody knows what lies where. Frames say it.
        """
        for element in elements:
            self.seen += 1
            frame = self._decode(element)
            if start and frame is not None and self._is_early(frame):
                self.seen = self.done = 0
                return False
            if not self._take(frame):
                self.done += 1
        return True

    def take_rung(self, element: bytes) -> bool:
        """An element that came with the doorbell, and lies on the list as well; whether it was the next one.

        Not while the list is being read: nobody knows then what it is behind.
        """
        frame = self._decode(element)
        if frame is None or self._is_early(frame) or not self._take(frame):
            return False
        # Whatever lies before it on the list was dropped, or will be: no more is trimmed than was taken.
        self.seen += 1
        return True

    def handed_over(self, frames: int) -> None:
        """The client's transport has taken so many frames."""
        self.done = min(self.seen, self.done + frames)

    def trimmed(self) -> int:
        """How many elements to trim from the list now; they count as trimmed."""
        count, self.done = self.done, 0
        self.seen -= count
        return count

    def next_attempt(self) -> None:
        """Another run begins with a list of its own."""
        self.attempt += 1
        self.frames.clear()
        self.seen = self.done = self._next_seq = 0

    def _take(self, frame: Frame | None) -> bool:
        if frame is None:
            return False
        if self._is_early(frame):
            frame = Failure(self.attempt, self._next_seq, "agent-lost", "a part was lost")
        if frame.attempt != self.attempt or frame.seq != self._next_seq:
            return False
        self._next_seq += 1
        self.frames.append(frame)
        return True

    def _is_early(self, frame: Frame) -> bool:
        return frame.attempt == self.attempt and frame.seq > self._next_seq

    def _decode(self, element: bytes) -> Frame | None:
        """``None`` for one that is not signed right; one that cannot be read ends the reply."""
        if self._is_signed is not None and (len(element) > self._max_frame or not self._is_signed(element)):
            self.forged += 1
            return None
        try:
            return wire.decode_frame(element, max_size=self._max_frame)
        except WireError as error:
            return Failure(self.attempt, self._next_seq, "agent-lost", f"unreadable frame: {error}")
