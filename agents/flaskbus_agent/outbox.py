"""What one run answers, as frames, as far as the client keeps up with them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import redis

from flaskbus import wire
from flaskbus.boundaries import Boundaries, boundaries
from flaskbus.broker import Unavailable
from flaskbus.messages import Chunk, Close, End, Failure, Frame, Head, Headers, Message, Reply
from flaskbus_agent.channel import Argument, Channel
from flaskbus_agent.gatherer import LIMIT, Gatherer
from flaskbus_agent.pool import ChannelPool
from flaskbus_agent.sender import Sender
from flaskbus_agent.wsgi import Cancelled

QUICK = 0.001
"""Seconds: an app that yields the next part sooner does not wait until the broker has taken the last one."""

HURRIED = 3
"""Quick yields in a row after which that begins. Most responses are over by then, and need no second thread."""


class Outbox(Sender):
    """The sink of one run: turns what the app answers into frames, and sends them."""

    _head: Head | None = None  # not sent yet
    _gatherer: Gatherer | None = None
    _resumed = 0.0  # when the app last got control (monotonic seconds)
    _quick = 0  # how often in a row it yielded soon after that
    _boundaries: Boundaries | None = None
    _over = False  # another thread has ended it

    def finish(self, frames: list[Frame], channel: Channel | ChannelPool | None = None) -> None:
        """As :meth:`Sender.finish`."""
        try:
            super().finish(frames, channel)
        finally:
            if self.settled and self._gatherer is not None:
                self._gatherer.close()

    # Sink

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        self.finish([Reply(self._request.attempt, 0, status, headers, body)])

    def head(self, status: int, headers: Headers, /) -> None:
        # It leaves together with the first chunk, which the app has ready.
        self._head = Head(self._request.attempt, self._take_seq(), status, headers, self.agent)
        self._boundaries = boundaries(headers)

    def chunk(self, data: bytes, /) -> None:
        is_quick = time.monotonic() - self._resumed < QUICK
        self._quick = self._quick + 1 if is_quick else 0
        self._running.since = math.inf
        if self._boundaries is not None:
            self._send_events(data, self._boundaries)
            self._resumed = time.monotonic()
            return
        try:
            self._wait(self._send(data))
        finally:
            self._resumed = self._running.since = time.monotonic()

    def end(self) -> None:
        self._drain()
        self.finish([*self._unsent_head(), End(self._request.attempt, self._take_seq())])

    def fail(self, code: str, detail: str, /) -> None:
        with suppress(redis.exceptions.RedisError):  # then it is that which is confessed
            self._drain()
        self.finish([*self._unsent_head(), Failure(self._request.attempt, self._take_seq(), code, detail)])

    # Events

    def _send_events(self, data: bytes, found: Boundaries) -> None:
        if self._ending.is_set():
            self._drain()
        with self._turn:
            if self._over:
                raise Cancelled
            kept = found.cut(data) if self._ending.is_set() else None
            if kept is not None:
                last = [self._chunk(kept)] if kept else []
                self.finish([*self._unsent_head(), *last, End(self._request.attempt, self._take_seq())])
                raise Cancelled  # the app's iterable is closed
            found.advance(data)
            on_list = self._send(data)
            self._running.events = self
        self._wait(on_list)

    def end_events(self, channel: Channel | ChannelPool) -> None:
        """End the response now if it is at an event boundary: another thread's way, while the app's code goes on.

        What is still being sent ends it afterwards. Raises :class:`Cancelled` as :meth:`finish` does.
        """
        with self._turn:
            if self._over or self.settled or (self._gatherer is not None and not self._gatherer.idle):
                return
            if self._boundaries and self._boundaries.complete:
                self._over = True
                self.finish([End(self._request.attempt, self._take_seq())], channel)
                self._running.since = math.inf

    # Sending

    def _send(self, data: bytes) -> int | None:
        """Send a part now; how many frames lie on the list then. ``None`` where it is on its way."""
        gatherer = self._gatherer
        if gatherer is None or gatherer.idle:
            if self._quick < HURRIED:
                return self._push([*self._unsent_head(), self._chunk(data)])
            if gatherer is None:
                limit = min(LIMIT, self._window.size)
                gatherer = self._gatherer = Gatherer(self._send_gathered, self._rest, limit)
        gatherer.add(data)
        return None

    def _wait(self, on_list: int | None) -> None:
        """Until the app may yield more."""
        if on_list is not None:
            self._pause(on_list)
        elif self._gatherer is not None:
            self._gatherer.wait()

    def _drain(self) -> None:
        """Wait until all was sent that the app has yielded. Raises what sending it raised."""
        if self._gatherer is not None:
            self._running.since = math.inf
            self._gatherer.drain()

    def _send_gathered(self, chunks: list[bytes]) -> int:
        """The gatherer's way: send, wait while the client is a whole window behind; the room for more in bytes."""
        self._pause(self._push([self._chunk(data) for data in chunks]))
        return self._window.room

    def _rest(self) -> None:
        """All was sent."""
        if self._ending.is_set():
            self.end_events(self._channel)

    def _chunk(self, data: bytes) -> Chunk:
        return Chunk(self._request.attempt, self._take_seq(), data)

    def _unsent_head(self) -> list[Frame]:
        head, self._head = self._head, None
        return [head] if head is not None else []

    # WebSockets

    @property
    def request_id(self) -> str:
        return self._request.id

    def accept(self, headers: Headers) -> None:
        """The app took the handshake of a WebSocket. What its code does from now on takes as long as it likes."""
        self._running.since = math.inf
        self._push([Head(self._request.attempt, self._take_seq(), 101, headers, self.agent)])

    def messages(self, parts: Iterable[tuple[bool, bool, bytes]]) -> bool:
        """Send parts of messages (text, last, data); whether there is room for more. Never waits for that."""
        self.gather(parts)
        return self.send_gathered()

    def gather(self, parts: Iterable[tuple[bool, bool, bytes]]) -> None:
        """Parts of messages for :meth:`send_gathered`, or :func:`push_together` before that."""
        self._unsent += [wire.encode_frame(self._message(*part), self._sign) for part in parts]

    def send_gathered(self) -> bool:
        """Send what was gathered and not sent; whether there is room for more."""
        if not self._unsent:
            return self._window.room > 0
        on_list = self._try_to_push(self._unsent)
        if on_list is None:
            return False
        self._unsent = []
        return self._has_room(on_list)

    def _message(self, text: bool, last: bool, data: bytes) -> Message:
        return Message(self._request.attempt, self._take_seq(), text, last, data)

    def has_room(self) -> bool:
        """Whether the client has taken enough of what was sent."""
        if self._unsent:
            return self.messages(())
        return self._has_room(self._insist_call("LLEN", self._entry.served.keys.reply(self._request.id)))

    @property
    def _push_call(self) -> tuple[list[str], list[Argument]]:
        """Keys and arguments that push what was gathered."""
        keys = self._entry.served.keys
        names = [keys.requests, keys.reply(self._request.id)]
        return names, [*self._arguments(), wire.MAX_RING_FRAME, *self._unsent]

    def _has_room(self, on_list: int) -> bool:
        self._window.left(on_list)
        return self._window.room > 0

    def close(self, parts: Iterable[tuple[bool, bool, bytes]], code: int, reason: str) -> None:
        """The last messages of the app, and how it ended the WebSocket."""
        last: list[Frame] = [self._message(*part) for part in parts]
        try:
            self.finish([*last, Close(self._request.attempt, self._take_seq(), code, reason)])
        finally:
            self._running.since = math.inf  # as before: its code may be about to end


def push_together(outboxes: Sequence[Outbox]) -> None:
    """Send what each of these WebSockets has gathered, in one round trip, as far as that works.

    What did not work stays where it is: :meth:`Outbox.send_gathered` tries again, and tells what is the matter.
    """
    if not outboxes:
        return
    with suppress(*Unavailable, redis.exceptions.RedisError):
        answers = outboxes[0]._channel.scripts("push", [outbox._push_call for outbox in outboxes])
        for outbox, on_list in zip(outboxes, answers, strict=True):
            if isinstance(on_list, int):
                outbox._window.pushed(map(len, outbox._unsent))
                outbox._window.left(on_list)
                outbox._unsent = []
