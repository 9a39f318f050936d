"""One thread for all WebSockets of a process: waits for any of their apps, or for a word from the gateways.

Rules of this module:

* The thread waits in one place, and never for one line alone; only the broker may keep it.
* One line's trouble is its own: whatever it raises ends that line, and its client hears of it.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import redis

from flaskbus_agent.inbound import LOOK
from flaskbus_agent.line import Line
from flaskbus_agent.outbox import push_together
from flaskbus_agent.wsgi import Cancelled

log = logging.getLogger("flaskbus.agent")

PULSE = 0.1
"""Seconds between two looks around for lines that are due."""

DUE = 20
"""Most lines that one such look asks the broker about: others wait meanwhile."""

MANY = 100
"""So many lines are each looked at every :data:`~flaskbus_agent.inbound.LOOK`, twice as many half as often."""


class Bridge:
    """Carries the messages of every :class:`~flaskbus_agent.line.Line`."""

    def __init__(self) -> None:
        self._selector: selectors.BaseSelector
        self._waker: socket.socket
        self._woken: socket.socket
        self._closed = False
        self._patience = 0.0  # seconds that apps have for their close, once the agent stops
        self._lines: dict[str, Line] = {}
        self._asked: deque[Callable[[], None]] = deque()
        self._called = False  # whether the thread was woken, and has not looked since
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._looked = 0.0

    # Any thread

    def add(self, line: Line) -> None:
        """Carry a line until its end. Raises :class:`OSError` or :class:`RuntimeError` where no thread can be begun."""
        with self._lock:
            if self._thread is None:
                self._start()
        self._ask(partial(self._open, line))

    def end(self, line: Line) -> None:
        """Let go of a line, whose app has answered without a WebSocket."""
        self._ask(partial(self._end, line))

    def leave(self, patience: float) -> None:
        """The agent stops: close every WebSocket, and those that still come. Apps have ``patience`` seconds."""
        self._patience = patience
        self._ask(self._leave)

    def close(self) -> None:
        """Close what is left, and end the thread."""
        self._closed = True
        self._ask(self._drop)
        if self._thread is not None:
            self._thread.join(1.0)

    def ring(self, request_id: str, element: bytes) -> None:
        """The gateway sent something, maybe this ``element``, or took something."""
        line = self._lines.get(request_id)
        if line is not None:
            self._ask(partial(self._guard, line, lambda line, now: line.rung(element, now)))

    @property
    def healthy(self) -> bool:
        """Whether the thread is there, where there has to be one."""
        return self._thread is None or self._thread.is_alive()

    def _start(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        thread = threading.Thread(target=self._run, name="flaskbus-websockets", daemon=True)
        thread.start()
        self._thread = thread

    def _ask(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            return
        self._asked.append(work)
        if not self._called:
            self._called = True
            with suppress(OSError):  # it has ended
                self._waker.send(b"\0")

    # The bridge's thread

    def _run(self) -> None:
        while self._lines or self._asked or not self._closed:
            ready: list[Line] = []
            for key, _ in self._selector.select(PULSE if self._lines else None):
                if key.data is None:
                    with suppress(BlockingIOError):
                        self._woken.recv(4096)
                    self._called = False  # before a look at what was asked: what comes later calls again
                else:
                    ready.append(key.data)
                    self._guard(key.data, Line.ready)
            self._send(ready)
            for _ in range(len(self._asked)):
                self._asked.popleft()()
            self._look_around()
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _send(self, lines: list[Line]) -> None:
        """What these apps wrote, in one round trip if they are several."""
        lines = [line for line in lines if line.has_to_send]
        if len(lines) > 1:
            try:
                push_together([line.outbox for line in lines if line.gather()])
            except Exception:
                log.exception("WebSockets could not send together")
        for line in lines:
            self._guard(line, Line.send)

    def _look_around(self) -> None:
        """Ask for what a lost ring would have told, and do not wait for apps for ever."""
        now = time.monotonic()
        if now - self._looked < PULSE:
            return
        self._looked = now
        lines = tuple(self._lines.values())
        period = LOOK * max(1.0, len(lines) / MANY)
        due = [line for line in lines if now - line.looked >= period]
        for line in due[:DUE]:
            line.looked = now
            self._guard(line, Line.look)
        for line in lines:
            if line.overdue(now):
                self._guard(line, Line.give_up)

    def _guard(self, line: Line, work: Callable[[Line, float], bool | None]) -> None:
        """Let a line do something now; again, when the others had their turn, if it says that there is more."""
        if line.over.is_set():
            return
        try:
            more = work(line, time.monotonic())
            if not line.ended:
                self._watch(line)
                if more:
                    self._ask(partial(self._guard, line, Line.look))
        except Cancelled:
            line.lost()
        except redis.exceptions.RedisError as error:
            log.error("the WebSocket %s ended, the broker refuses it: %s", line.outbox.request_id, error)
            line.break_off("the broker refused a part of it")
        except Exception:
            log.exception("the WebSocket %s ended", line.outbox.request_id)
            line.break_off("the agent made a mistake")
        if line.ended:
            self._end(line)

    def _open(self, line: Line) -> None:
        self._lines[line.outbox.request_id] = line
        self._guard(line, self._greet)

    def _greet(self, line: Line, now: float) -> None:
        if self._patience:
            line.leave(self._patience, now)

    def _leave(self) -> None:
        for line in tuple(self._lines.values()):
            self._guard(line, self._greet)

    def _drop(self) -> None:
        for line in tuple(self._lines.values()):
            line.lost()
            self._end(line)

    def _watch(self, line: Line) -> None:
        """Wait for what the line wants now."""
        wanted, watched = line.wanted, line.watched
        if wanted == watched:
            return
        if not wanted:
            self._selector.unregister(line.ours)
        elif watched:
            self._selector.modify(line.ours, wanted, line)
        else:
            self._selector.register(line.ours, wanted, line)
        line.watched = wanted

    def _end(self, line: Line) -> None:
        """Both ends have had their last word."""
        self._lines.pop(line.outbox.request_id, None)
        if line.watched:
            line.watched = 0
            self._selector.unregister(line.ours)
        line.hang_up()
        line.over.set()
