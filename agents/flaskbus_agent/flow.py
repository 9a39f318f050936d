"""How much of a response is on its way, and in which pieces. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from flaskbus.wire import MAX_CHUNK

MOST_PIECES = 4096
"""Pieces that are gathered at most, however small: each costs more than its bytes."""


class Pieces:
    """What an app has yielded and nobody has sent. ``limit``: bytes from which on it is enough."""

    __slots__ = ("_limit", "_pieces", "size")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: deque[bytes] = deque()
        self.size = 0
        """Bytes."""

    @property
    def enough(self) -> bool:
        return self.size >= self._limit or len(self._pieces) >= MOST_PIECES

    def add(self, data: bytes) -> None:
        """``data``: 1 to :data:`~flaskbus.wire.MAX_CHUNK` bytes."""
        self._pieces.append(data)
        self.size += len(data)

    def take(self, most: int) -> list[bytes]:
        """Chunks of up to ``MAX_CHUNK`` bytes: at least one, and as many as have ``most`` bytes together."""
        chunks: list[bytes] = []
        taken = 0
        while self._pieces and (not chunks or taken + len(self._pieces[0]) <= most):
            chunks.append(self._take_one(max(most - taken, 1)))
            taken += len(chunks[-1])
        self.size -= taken
        return chunks

    def _take_one(self, most: int) -> bytes:
        pieces = self._pieces
        first = pieces.popleft()
        size, limit = len(first), min(most, MAX_CHUNK)
        if not pieces or size + len(pieces[0]) > limit:
            return first  # not copied
        joined = [first]
        while pieces and (size := size + len(pieces[0])) <= limit:
            joined.append(pieces.popleft())
        return b"".join(joined)

    def clear(self) -> None:
        self._pieces.clear()
        self.size = 0


class Window:
    """What lies on a list, by the sizes of its elements; ``size``: how many bytes may lie there."""

    __slots__ = ("_elements", "_lies", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._elements: deque[int] = deque()
        self._lies = 0

    def pushed(self, sizes: Iterable[int]) -> None:
        """Elements of these sizes, in bytes, were added."""
        for size in sizes:
            self._elements.append(size)
            self._lies += size

    def left(self, on_list: int) -> None:
        """So many elements lie there now; it is the oldest that are gone."""
        while len(self._elements) > on_list:
            self._lies -= self._elements.popleft()

    @property
    def room(self) -> int:
        """Bytes that may be added; 0 or less where it is full."""
        return self.size - self._lies

    @property
    def elements(self) -> int:
        """How many elements lie there."""
        return len(self._elements)
