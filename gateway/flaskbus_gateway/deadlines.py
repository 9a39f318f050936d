"""Deadlines of clients. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

SLOWEST = 4096
"""Bytes a second that a client must keep up on the whole, beside the time that any body may take."""


class Patience:
    """How long a client is waited for that sends a body of whatever size.

    It begins with ``seconds``, and never has more. What the client takes is gone; what it sends brings some of it
    back, at :data:`SLOWEST` bytes a second. So who stops is given up after that time, and who drips not much later.
    """

    __slots__ = ("_most", "left")

    def __init__(self, seconds: float) -> None:
        self.left = self._most = seconds
        """Seconds for the next part."""

    def spent(self, seconds: float, size: int) -> None:
        """The client took so many seconds for a part of ``size`` bytes."""
        self.left = min(self.left - seconds + size / SLOWEST, self._most)

    def renew(self) -> None:
        """The client has as long as at the beginning."""
        self.left = self._most


class Deadlines(Generic[T]):
    """Many deadlines without a timer each: things that have ``span`` seconds each.

    The span is the same for all, so the order of insertion is the order of expiry, and a look costs only what
    is due. It may be shortened later.
    """

    __slots__ = ("_since", "span")

    def __init__(self, span: float) -> None:
        self.span = span
        self._since: dict[T, float] = {}

    def __contains__(self, item: T) -> bool:
        return item in self._since

    def start(self, item: T, now: float) -> None:
        """No effect on one whose time runs already."""
        self._since.setdefault(item, now)

    def stop(self, item: T) -> None:
        self._since.pop(item, None)

    def take_due(self, now: float) -> list[T]:
        """Those whose time is over; they are not held any longer."""
        due = []
        for item, since in self._since.items():
            if since + self.span > now:
                break
            due.append(item)
        for item in due:
            del self._since[item]
        return due
