"""A second thread for a response whose app is faster than the broker answers.

While one push is under way the app goes on, and whatever it yields meanwhile goes with the next push. Nothing is kept
back: what was added leaves at once if no push is under way, and else as soon as that is answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from flaskbus_agent.flow import Pieces

LIMIT = 256 * 1024
"""Bytes that may gather while a push is under way; then the app waits."""

IDLE = 1.0
"""Seconds without work after which the thread ends."""


class Gatherer:
    """Sends the parts of one response in their order. All methods are for the thread that runs the app.

    ``send`` sends chunks and returns how many bytes the next ones may have, when there is room for them; what it
    raises ends the thread, and is raised by every method from then on. ``on_rest`` is called in the
    thread whenever all was sent.
    """

    def __init__(self, send: Callable[[list[bytes]], int], on_rest: Callable[[], None], limit: int) -> None:
        self._send = send
        self._on_rest = on_rest
        self._room = limit
        self._pieces = Pieces(limit)
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._asleep = False
        self._busy = False
        self._closed = False
        self._error: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is left to send, no push is under way, and none has failed."""
        # Without the lock: what is taken from the pieces is busy before, so they are looked at first.
        return not self._pieces.size and not self._busy and self._error is None

    def add(self, data: bytes) -> None:
        """Send it as soon as possible. Does not wait."""
        with self._changed:
            self._raise()
            self._pieces.add(data)
            if self._asleep:
                self._asleep = False
                self._changed.notify_all()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flaskbus-gatherer", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until more may be added."""
        if self._pieces.enough or self._error is not None:
            self._wait(lambda: not self._pieces.enough)

    def drain(self) -> None:
        """Until all was sent."""
        self._wait(lambda: self.idle)

    def close(self) -> None:
        """Nothing more is added."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or condition())
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # The thread

    def _run(self) -> None:
        try:
            while chunks := self._next():
                self._room = self._send(chunks)
                with self._changed:
                    self._busy = False
                    rests = not self._pieces.size
                    if rests:
                        self._changed.notify_all()
                if rests:
                    self._on_rest()
        except BaseException as error:  # noqa: BLE001 - it is the app's thread that it ends
            with self._changed:
                self._error, self._thread = error, None
                self._pieces.clear()
                self._changed.notify_all()

    def _next(self) -> list[bytes]:
        """What is to be sent next; nothing where the thread is to end."""
        with self._changed:
            while not self._pieces.size:
                self._asleep = not self._closed
                woken = not self._closed and self._changed.wait(IDLE)
                self._asleep = False
                if not woken and not self._pieces.size:
                    self._thread = None
                    return []
            self._busy = True
            chunks = self._pieces.take(self._room)
            self._changed.notify_all()  # there is room
            return chunks
