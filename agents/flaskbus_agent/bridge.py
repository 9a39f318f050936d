"""Between the WebSockets that apps hold and the lists of their exchanges: one thread for all of a process.

    app ── pair of sockets ── Client (RFC 6455) ── frames ── inbound list, reply list

Rules of this module:

* The thread waits in one place: for any of the sockets, or for a word from another thread.
* While a window of frames waits for the real client, the app's socket is not read, and that stops the app.
* While bytes wait for the app, the inbound list is not read, and that stops the real client.
* The app's close is the last frame. The real client's close goes to the app, whose own ends the exchange.
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

import redis

from flaskbus import wire
from flaskbus.broker import Unavailable
from flaskbus.errors import WireError
from flaskbus.messages import Close, Frame, Headers, Message
from flaskbus_agent.inbound import LOOK, InboundList
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.websocket import Accepted, Client, Closed
from flaskbus_agent.websocket import Message as Part
from flaskbus_agent.wsgi import Cancelled

log = logging.getLogger("flaskbus.agent")

FAREWELL = 5.0
"""Seconds that an app has for its own close, after the client's."""

RECEIVE = 65536
"""Bytes that are read of a socket at once."""


class Line:
    """One WebSocket. ``key`` is its inbound list; ``offered`` are the subprotocols that the client offers."""

    def __init__(self, outbox: Outbox, key: str, offered: list[str], limit: int) -> None:
        self.outbox = outbox
        self.inbound = InboundList(outbox, key, outbox.is_signed)
        self.client = Client(offered, limit)
        self.ours, self.apps = socket.socketpair()
        self.ours.setblocking(False)
        self.to_app = bytearray()
        self.accepted = False
        self.over = threading.Event()
        """Set when the last frame was sent, or nobody waits for one any more."""
        self.paused = False  # the client is a window behind
        self.closing = 0.0  # until when the app may answer the client's close

    def spoke(self) -> bool:
        """Whether the app wrote to its socket: what else it answers is nothing for the client then."""
        if self.accepted or self.over.is_set():
            return True
        try:
            return self.ours.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False

    def end_app(self) -> None:
        """The app's code has ended: what it wrote is still read."""
        with suppress(OSError):
            self.apps.shutdown(socket.SHUT_RDWR)
        self.apps.close()


class Bridge:
    """Carries the messages of every :class:`Line`."""

    def __init__(self) -> None:
        self._selector: selectors.BaseSelector
        self._waker: socket.socket
        self._woken: socket.socket
        self._closed = False
        self._lines: dict[str, Line] = {}
        self._asked: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._looked = 0.0

    # Any thread

    def add(self, line: Line) -> None:
        with self._lock:
            if self._thread is None:
                self._selector = selectors.DefaultSelector()
                self._waker, self._woken = socket.socketpair()
                self._woken.setblocking(False)
                self._waker.setblocking(False)
                self._selector.register(self._woken, selectors.EVENT_READ)
                self._thread = threading.Thread(target=self._run, name="flaskbus-websockets", daemon=True)
                self._thread.start()
        self._ask(lambda: self._open(line))

    def drop(self, line: Line) -> None:
        """The app has answered without a WebSocket."""
        line.over.set()
        self._ask(lambda: self._end(line))

    def close(self) -> None:
        """End the thread, once no line is left."""
        self._closed = True
        if self._thread is not None:
            with suppress(OSError):  # it has ended, or is awake already
                self._waker.send(b"\0")
            self._thread.join(1.0)

    def ring(self, request_id: str, element: bytes) -> None:
        """The gateway sent something, maybe this ``element``, or took something."""
        if request_id in self._lines:
            self._ask(lambda: self._rung(request_id, element))

    def _ask(self, work: Callable[[], None]) -> None:
        self._asked.append(work)
        with suppress(BlockingIOError):  # it is awake already
            self._waker.send(b"\0")

    # The bridge's thread

    def _run(self) -> None:
        while self._lines or self._asked or not self._closed:
            for key, _ in self._selector.select(LOOK):
                if key.data is None:
                    with suppress(BlockingIOError):
                        self._woken.recv(4096)
                else:
                    self._guard(key.data, self._ready)
            while self._asked:
                self._asked.popleft()()
            now = time.monotonic()
            if now - self._looked >= LOOK:
                self._looked = now
                for line in tuple(self._lines.values()):
                    if line.closing and now > line.closing:
                        self._guard(line, _give_up)
                        self._end(line)
                    else:
                        self._guard(line, self._from_client)
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _guard(self, line: Line, work: Callable[[Line], None]) -> None:
        """One line's trouble is its own."""
        if line.over.is_set():
            return
        try:
            work(line)
        except Cancelled:
            self._end(line)
        except (*Unavailable, redis.exceptions.RedisError, WireError) as error:
            log.error("the WebSocket %s ended: %s", line.outbox.request_id, error)
            self._end(line)

    def _open(self, line: Line) -> None:
        self._lines[line.outbox.request_id] = line
        self._selector.register(line.ours, selectors.EVENT_READ, line)

    def _rung(self, request_id: str, element: bytes) -> None:
        line = self._lines.get(request_id)
        if line is not None:
            self._guard(
                line, self._from_ring if element and line.inbound.ring(element) else self._from_client
            )

    def _ready(self, line: Line) -> None:
        if line.to_app:
            self._from_ring(line)
        if not line.paused:
            self._from_app(line)

    def _from_app(self, line: Line) -> None:
        """Read what the app wrote, once, and send it to the client."""
        try:
            data = line.ours.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        frames: list[tuple[bool, bool, bytes]] = []
        for event in line.client.feed(data):
            if isinstance(event, Accepted):
                line.accepted = True
                line.outbox.accept(event.headers)
            elif isinstance(event, Closed):
                if line.accepted:
                    line.outbox.close(frames, event.code, event.reason)
                self._end(line)
                return
            else:
                frames.extend(_split(event))
        if frames:
            line.paused = not line.outbox.messages(frames)
        self._to_app(line)
        if not data and not line.over.is_set():
            if line.accepted:
                line.outbox.close([], 1006, "")
            self._end(line)

    def _from_client(self, line: Line) -> None:
        """Take what the client sent, unless the app has not read what came before."""
        if line.paused:
            line.paused = not line.outbox.has_room()
        if not line.to_app and line.inbound.look():
            self._ask(lambda: self._guard(line, self._from_client))
        self._from_ring(line)

    def _from_ring(self, line: Line) -> None:
        """Give the app what is in hand."""
        frames = line.inbound.frames
        self._to_app(line)
        while frames and not line.to_app:
            frame = frames.popleft()
            self._deliver(line, frame)
            self._to_app(line)
            line.inbound.handed_on(1, len(frame.data) if isinstance(frame, Message) else 0)

    def _deliver(self, line: Line, frame: Frame) -> None:
        if isinstance(frame, Message):
            line.client.send(frame.text, frame.last, frame.data)
            return
        code, reason = (frame.code, frame.reason) if isinstance(frame, Close) else (1006, "")
        line.client.close(code, reason)
        line.closing = time.monotonic() + FAREWELL

    def _to_app(self, line: Line) -> None:
        line.to_app += line.client.to_app()
        self._write(line)

    def _write(self, line: Line) -> None:
        try:
            while line.to_app:
                sent = line.ours.send(line.to_app)
                del line.to_app[:sent]
        except BlockingIOError:
            pass
        except OSError:
            line.to_app.clear()
        self._watch(line)

    def _watch(self, line: Line) -> None:
        if line.over.is_set():
            return
        wanted = (0 if line.paused else selectors.EVENT_READ) | (selectors.EVENT_WRITE if line.to_app else 0)
        registered = line.ours in self._selector.get_map()
        if registered and not wanted:
            self._selector.unregister(line.ours)
        elif registered:
            self._selector.modify(line.ours, wanted, line)
        elif wanted:
            self._selector.register(line.ours, wanted, line)

    def _end(self, line: Line) -> None:
        """Both ends have had their last word."""
        self._lines.pop(line.outbox.request_id, None)
        with suppress(KeyError):
            self._selector.unregister(line.ours)
        line.ours.close()
        line.over.set()


def _give_up(line: Line) -> None:
    """The client is gone, and the app has not said goodbye in its time."""
    if line.accepted:
        line.outbox.close([], 1006, "")


def _split(part: Part) -> list[tuple[bool, bool, bytes]]:
    """A part of a message in pieces that fit into frames: text, last, data."""
    pieces = [part.data[start : start + wire.MAX_CHUNK] for start in range(0, len(part.data), wire.MAX_CHUNK)]
    pieces = pieces or [b""]
    return [
        (part.text, part.last and number == len(pieces) - 1, piece) for number, piece in enumerate(pieces)
    ]


class LineSink:
    """What the app answers beside its WebSocket: nothing for the client, unless it never took the handshake."""

    def __init__(self, line: Line, bridge: Bridge, outbox: Outbox) -> None:
        self._line = line
        self._bridge = bridge
        self._outbox: Outbox | None = outbox
        self._decided = False

    def _sink(self) -> Outbox | None:
        if not self._decided:
            self._decided = True
            if self._line.spoke():
                self._outbox = None
            else:
                self._bridge.drop(self._line)
        return self._outbox

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        if sink := self._sink():
            sink.reply(status, headers, body)

    def head(self, status: int, headers: Headers, /) -> None:
        if sink := self._sink():
            sink.head(status, headers)

    def chunk(self, data: bytes, /) -> None:
        if sink := self._sink():
            sink.chunk(data)

    def end(self) -> None:
        if sink := self._sink():
            sink.end()

    def fail(self, code: str, detail: str, /) -> None:
        if sink := self._sink():
            sink.fail(code, detail)
