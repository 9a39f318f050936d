"""Whom the doorbell of an agent process wakes."""

from __future__ import annotations

import threading
from collections import deque


class Bell:
    """Rings for one request: its client took something, sent something, or went away."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._credit = threading.Event()
        self.elements: deque[bytes] = deque(maxlen=256)
        """Elements of the inbound list that came with the rings; the list has them too."""

    def ring(self, element: bytes) -> None:
        if element:
            self.elements.append(element)
        self._event.set()
        self._credit.set()

    def wait(self, timeout: float) -> bool:
        """Until it rings, or ``timeout`` seconds; whether it rang."""
        rang = self._event.wait(timeout)
        self._event.clear()
        return rang

    def wait_for_credit(self, timeout: float) -> None:
        """The same, for whoever sends, which may be another thread than the one that reads."""
        self._credit.wait(timeout)
        self._credit.clear()


class Bells:
    """Who listens to the doorbell: request id -> bell."""

    def __init__(self) -> None:
        self._bells: dict[str, Bell] = {}

    def of(self, request_id: str) -> Bell:
        """From now on a ring is not lost, also if nobody waits for it yet."""
        return self._bells.setdefault(request_id, Bell())

    def ring(self, request_id: str, element: bytes = b"") -> None:
        bell = self._bells.get(request_id)
        if bell is not None:
            bell.ring(element)

    def forget(self, request_id: str) -> None:
        self._bells.pop(request_id, None)
