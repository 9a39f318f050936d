"""One WebSocket between its app and its exchange, without the waiting: that is :mod:`flaskbus_agent.bridge`'s.

    app ── pair of sockets ── Client (RFC 6455) ── frames ── inbound list, reply list

Rules of this module:

* While a window of frames waits for the real client, the app's socket is not read, and that stops the app.
* While bytes wait for the app, the inbound list is not read, and that stops the real client.
* The app's close is the last frame. The real client's close goes to the app, whose own ends the exchange.
* Until the app takes the handshake, its thread may answer in another way; who of them speaks first, speaks.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import redis

from flaskbus import wire
from flaskbus.messages import Close, Frame, Headers
from flaskbus.messages import Message as Piece
from flaskbus_agent.inbound import InboundList
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.websocket import Accepted, Client, Closed, Message
from flaskbus_agent.wsgi import APP_ERROR, Cancelled

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

FAREWELL = 5.0
"""Seconds that an app has for its own close, after the client's."""

ASK = 15.0
"""Seconds after which the broker is asked whether a WebSocket that is silent is still ours."""

RECEIVE = 65536
"""Bytes that are read of a socket at once."""

AT_ONCE = 64
"""Most frames of one push; a script takes some thousands of arguments."""

LITTLE = 16 * 1024
"""Bytes that may go together with what other WebSockets send."""

STOPPING = (1001, "the agent stops")
"""Code and reason for both ends of what the agent closes."""

NO_HANDSHAKE = "the app wrote something to its socket that does not take the handshake"


class Line:
    """One WebSocket. ``key`` is its inbound list; ``offered`` are the subprotocols that the client offers.

    Methods that send raise :class:`~flaskbus_agent.wsgi.Cancelled` where nobody wants what the app sends any more,
    and redis-py's ``ResponseError`` where the broker refuses it for good.
    """

    def __init__(self, outbox: Outbox, key: str, offered: list[str], limit: int) -> None:
        self.outbox = outbox
        self.client = Client(offered, limit)
        self.ours, self.apps = socket.socketpair()
        self.ours.setblocking(False)
        self.apps.settimeout(None)  # whatever the app has for a default
        self.accepted = False
        self.ended = False
        """Whether the last frame was sent."""
        self.over = threading.Event()
        """Set when the bridge has let go of it."""
        self.looked = 0.0
        """When it was last looked at (monotonic seconds)."""
        self.watched = 0
        """What the bridge waits for, as :mod:`selectors` has it."""
        self._inbound = InboundList(outbox, key, outbox.is_signed)
        self._turn = threading.Lock()
        self._asked = 0.0  # when the broker last said that it is ours
        self._heard = False  # the app wrote something
        self._refused = False  # it answers otherwise
        self._deaf = False  # it writes nothing more
        self._to_app = bytearray()
        self._unsent: deque[tuple[bool, bool, bytes]] = deque()
        self._gathered = False  # the outbox has some of it
        self._behind = False  # more may lie on the inbound list than was read, as the app had no room
        self._paused = False  # the client is a window behind
        self._farewell: tuple[int, str] | None = None  # the app's own close
        self._patience = 0.0  # seconds that it has for that
        self._until = 0.0  # until when, once it was asked for
        self._client_left = False

    # The thread of the request

    def refuse(self) -> bool:
        """The app answers the handshake with a response; whether that is for the client.

        Not if it wrote to its socket before: it is a WebSocket's then, and what else it says is nobody's.
        """
        with self._turn:
            if self._refused:
                return True
            if self._heard or self.over.is_set():
                return False
            with suppress(OSError):  # it may have closed its end, or written nothing
                if self.ours.recv(1, socket.MSG_PEEK):
                    return False
            self._refused = True
            return True

    def quiet(self, app: WSGIApplication) -> WSGIApplication:
        """The app; that it leaves a server behind a WebSocket with a :class:`ConnectionError` is no trouble.

        So does python-engineio, where it finds werkzeug's socket.
        """

        def run(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            try:
                return app(environ, start_response)
            except ConnectionError:
                if self.refuse():
                    raise
                start_response("200 OK", [])
                return ()

        return run

    def end_app(self) -> None:
        """The app's code has ended: what it wrote is still read."""
        with suppress(OSError):
            self.apps.shutdown(socket.SHUT_RDWR)
        self.apps.close()

    # The bridge's thread

    @property
    def wanted(self) -> int:
        """What to wait for at :attr:`ours`."""
        wanted = selectors.EVENT_WRITE if self._to_app else 0
        if not (self._paused or self._deaf or self._refused):
            wanted |= selectors.EVENT_READ
        return wanted

    def ready(self, now: float) -> bool:
        """The app has read, or written; whether it is time to :meth:`look`."""
        if self._to_app:
            self._write()
            self._hand_over(now)
        if not self._paused:
            self._from_app(now)
        return self._behind and not self._to_app

    def gather(self) -> bool:
        """Make ready what can go together with what other lines send; whether that is anything."""
        is_little = sum(len(data) for _, _, data in self._unsent) <= LITTLE and len(self._unsent) <= AT_ONCE
        if self._unsent and is_little and not self._paused and self._farewell is None:
            self._gathered = True
            self.outbox.gather(self._batch())
        return self._gathered

    @property
    def has_to_send(self) -> bool:
        """Whether :meth:`send` would do something."""
        return bool(self._unsent or self._gathered or self._farewell is not None) and not self.ended

    def send(self, _: float) -> None:
        """Send what the app wrote, as far as there is room."""
        if self._gathered:
            self._gathered = False
            self._paused = not self.outbox.send_gathered()
        self._send()

    def look(self, now: float) -> bool:
        """Look at what the client took and sent; whether there may be more."""
        if not self.accepted:
            return False
        if self._paused:
            self._paused = not self.outbox.has_room()
            self._send()
        if self.ended:
            return False
        if self._to_app or now - self._asked >= ASK:
            self._asked = now
            self._inbound.call()  # or nobody would notice that the client is gone, or its gateway
        self._behind = bool(self._to_app) or self._inbound.look()
        self._hand_over(now)
        return self._behind and not self._to_app

    def rung(self, element: bytes, now: float) -> bool:
        """The gateway rang, maybe with this ``element``; whether to :meth:`look` again."""
        if element and self.accepted and self._inbound.ring(element):
            self._hand_over(now)
            return False
        return self.look(now)

    def leave(self, patience: float, now: float) -> None:
        """The agent stops: the app has ``patience`` seconds to end it, as soon as it is open."""
        self._patience = patience
        if self.accepted:
            self._say_goodbye(now)

    def overdue(self, now: float) -> bool:
        """Whether the app was asked for its close, and its time is up."""
        return 0.0 < self._until < now

    def give_up(self, _: float) -> None:
        """End it without the app."""
        self.ended = True
        self.outbox.close((), *self._last_word(1006, ""))

    def lost(self) -> None:
        """Nobody is there any more: let the app know, if it reads that at once."""
        self.client.close(1006, "")
        self.ended = True

    def break_off(self, detail: str) -> None:
        """It cannot go on."""
        self.client.close(1011, detail)
        self.ended = True
        with suppress(Cancelled, redis.exceptions.RedisError):
            self.outbox.fail(APP_ERROR, detail)

    def hang_up(self) -> None:
        """Close our end, with a last word."""
        with suppress(OSError):
            self.ours.send(self._to_app + self.client.to_app())
        self.ours.close()

    # From the app

    def _from_app(self, now: float) -> None:
        """Read what the app wrote, once, and send it to the client."""
        data = self._read()
        if data is None:
            return
        for event in self.client.feed(data):
            if isinstance(event, Accepted):
                self.outbox.accept(event.headers)
                self.accepted, self._asked = True, now
                if self._patience:
                    self._say_goodbye(now)
            elif isinstance(event, Closed):
                self._farewell = (event.code, event.reason)
            elif not self._client_left:
                self._unsent.extend(_split(event))
        self._write()

    def _read(self) -> bytes | None:
        """Empty at its end; ``None`` where there is nothing to read, or for nobody."""
        with self._turn:
            if self._refused:
                return None
            try:
                data = self.ours.recv(RECEIVE)
            except BlockingIOError:
                return None
            except OSError:
                data = b""
            self._deaf = not data
            self._heard = self._heard or bool(data)
            # A socket that was closed unused says nothing: the app may still answer otherwise.
            return data if self._heard else None

    def _send(self) -> None:
        """Send as much as there is room for, and the app's close when that was all."""
        while self._unsent:
            batch = list(self._batch())
            if self._farewell is not None and not self._unsent:
                self._close(batch)
                return
            if self._paused:
                self._unsent.extendleft(reversed(batch))
                return
            self._paused = not self.outbox.messages(batch)
        if self._farewell is not None:
            self._close([])

    def _batch(self) -> Iterator[tuple[bool, bool, bytes]]:
        size = 0
        for _ in range(min(AT_ONCE, len(self._unsent))):
            if size >= wire.MAX_CHUNK:
                return
            size += len(self._unsent[0][2])
            yield self._unsent.popleft()

    def _close(self, batch: list[tuple[bool, bool, bytes]]) -> None:
        assert self._farewell is not None
        self.ended = True
        if self.accepted:
            self.outbox.close(batch, *self._last_word(*self._farewell))
        else:
            self.outbox.fail(APP_ERROR, NO_HANDSHAKE)

    def _last_word(self, code: int, reason: str) -> tuple[int, str]:
        """What the client hears. An app that is asked to close may leave without its own close."""
        return STOPPING if code == 1006 and self._patience else (code, reason)

    # To the app

    def _hand_over(self, now: float) -> None:
        """Give the app what is in hand, as far as it reads."""
        frames = self._inbound.frames
        while frames and not self._to_app:
            frame = frames.popleft()
            self._deliver(frame, now)
            self._write()
            self._inbound.handed_on(1, len(frame.data) if isinstance(frame, Piece) else 0)

    def _deliver(self, frame: Frame, now: float) -> None:
        if isinstance(frame, Piece):
            self.client.send(frame.text, frame.last, frame.data)
            return
        code, reason = (frame.code, frame.reason) if isinstance(frame, Close) else (1006, "")
        self.client.close(code, reason)
        # Nobody reads what the app still sends, and it is not to wait for that.
        self._client_left, self._paused = True, False
        self._unsent.clear()
        self._until = self._until or now + FAREWELL

    def _say_goodbye(self, now: float) -> None:
        self.client.close(*STOPPING)
        self._until = self._until or now + self._patience
        self._write()

    def _write(self) -> None:
        self._to_app += self.client.to_app()
        try:
            while self._to_app:
                sent = self.ours.send(self._to_app)
                del self._to_app[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._to_app.clear()  # the app closed its end; what it wrote before is still read


def _split(part: Message) -> Iterator[tuple[bool, bool, bytes]]:
    """A part of a message in pieces that fit into frames: text, last, data."""
    for start in range(0, len(part.data) or 1, wire.MAX_CHUNK):
        end = start + wire.MAX_CHUNK
        yield part.text, part.last and end >= len(part.data), part.data[start:end]


class LineSink:
    """What the app answers beside its WebSocket: nothing for the client, unless it never took the handshake."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._sink: Outbox | None = None
        self._decided = False

    def _open(self) -> Outbox | None:
        if not self._decided:
            self._decided = True
            self._sink = self._line.outbox if self._line.refuse() else None
        return self._sink

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        if sink := self._open():
            sink.reply(status, headers, body)

    def head(self, status: int, headers: Headers, /) -> None:
        if sink := self._open():
            sink.head(status, headers)

    def chunk(self, data: bytes, /) -> None:
        if sink := self._open():
            sink.chunk(data)

    def end(self) -> None:
        if sink := self._open():
            sink.end()

    def fail(self, code: str, detail: str, /) -> None:
        if sink := self._open():
            sink.fail(code, detail)
