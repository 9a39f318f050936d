"""What one run sends: frames of its response, as far as the client keeps up with them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import redis

from flaskbus import wire
from flaskbus.broker import Unavailable
from flaskbus.keys import GROUP, LIST_TTL_MS, MountKeys
from flaskbus.messages import Chunk, End, Failure, Frame, Head, Headers, Reply, Request
from flaskbus_agent.channel import Argument, Channel
from flaskbus_agent.wsgi import Cancelled

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("flaskbus.agent")


@dataclass(frozen=True, slots=True)
class Served:
    """An app on its mount."""

    app: WSGIApplication
    keys: MountKeys


@dataclass(frozen=True, slots=True)
class Entry:
    """What one XREADGROUP delivered, at ``read_at`` (monotonic seconds).

    ``age`` is how many milliseconds it had waited then, by the broker's own clock; 0 where that is not known.
    """

    served: Served
    entry_id: bytes
    fields: Sequence[bytes]
    read_at: float
    age: float = 0.0


def entry_time(entry_id: bytes) -> int:
    """When an entry was added, in milliseconds of the broker's clock. A hint: it may lie in the future."""
    return int(entry_id.partition(b"-")[0])


@dataclass(slots=True)
class Running:
    """A request that a thread runs now.

    ``since`` is when the app's code last got control (monotonic seconds); infinite while the thread waits for
    a client or for the broker, which is nothing that the app could be blamed for.
    """

    thread_id: int
    request_id: str
    method: str
    target: str
    since: float


class Credit:
    """Who waits for a client to take what was sent: request id -> event."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    def wait(self, request_id: str, timeout: float) -> None:
        """Until the doorbell rings for this request, or ``timeout`` seconds."""
        event = self._events.setdefault(request_id, threading.Event())
        event.wait(timeout)
        event.clear()

    def ring(self, request_id: str) -> None:
        event = self._events.get(request_id)
        if event is not None:
            event.set()

    def forget(self, request_id: str) -> None:
        self._events.pop(request_id, None)


class Outbox:
    """The sink of one run: turns what the app answers into frames, and sends them."""

    def __init__(
        self,
        channel: Channel,
        entry: Entry,
        request: Request,
        agent: str,
        *,
        window: int,
        credit: Credit,
        running: Running,
        given_up: threading.Event,
        on_stream: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._entry = entry
        self._request = request
        self.agent = agent
        self._window = window
        self._credit = credit
        self._running = running
        self._given_up = given_up
        self._on_stream = on_stream
        self._seq = 0
        self._head: Head | None = None
        self._streaming = False
        self._sizes: deque[int] = deque()
        self.settled = False
        """Whether the broker has confirmed the end: the entry is not ours any more, and is not pending."""

    # Sink

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        self.finish([Reply(self._request.attempt, 0, status, headers, body)])

    def head(self, status: int, headers: Headers, /) -> None:
        # It leaves together with the first chunk, which the app has ready.
        self._head = Head(self._request.attempt, self._take_seq(), status, headers, self.agent)

    def chunk(self, data: bytes, /) -> None:
        self._push([*self._unsent_head(), Chunk(self._request.attempt, self._take_seq(), data)])

    def end(self) -> None:
        self.finish([*self._unsent_head(), End(self._request.attempt, self._take_seq())])

    def fail(self, code: str, detail: str, /) -> None:
        self.finish([*self._unsent_head(), Failure(self._request.attempt, self._take_seq(), code, detail)])

    # Sending

    def _take_seq(self) -> int:
        seq = self._seq
        self._seq += 1
        return seq

    def _unsent_head(self) -> list[Frame]:
        head, self._head = self._head, None
        return [head] if head is not None else []

    def _arguments(self) -> list[Argument]:
        keys = self._entry.served.keys
        return [
            GROUP,
            self._entry.entry_id,
            self.agent,
            LIST_TTL_MS,
            keys.doorbell(self._request.gateway),
            self._request.id,
        ]

    def broker_time(self) -> int:
        """The broker's clock in milliseconds (TIME)."""
        seconds, microseconds = self._again(lambda: self._channel.call("TIME"))
        return int(seconds) * 1000 + int(microseconds) // 1000

    def finish(self, frames: list[Frame]) -> None:
        """Send the last frames; raises :class:`Cancelled` where nobody may send them any more."""
        self._running.since = math.inf
        encoded = [wire.encode_frame(frame) for frame in frames]
        outcome = self._insist("finish", [*self._arguments(), wire.MAX_RING_FRAME, *encoded])
        self.settled = True
        if outcome != b"done":
            self._not_wanted(outcome)
        self._running.since = time.monotonic()

    def _push(self, frames: list[Frame]) -> None:
        self._running.since = math.inf
        try:
            self._push_and_wait(frames)
        finally:
            self._running.since = time.monotonic()

    def _push_and_wait(self, frames: list[Frame]) -> None:
        encoded = [wire.encode_frame(frame) for frame in frames]
        try:
            outcome = self._insist("push", [*self._arguments(), *encoded])
        except redis.exceptions.OutOfMemoryError as error:
            self.finish([Failure(self._request.attempt, self._seq - len(frames), "broker-full", str(error))])
            raise Cancelled from None
        if isinstance(outcome, bytes):
            self.settled = True
            self._not_wanted(outcome)
        self._sizes.extend(len(element) for element in encoded)
        if not self._streaming:
            self._streaming = True
            self._on_stream()
        self._pause(outcome)

    def _pause(self, on_list: int) -> None:
        """Wait while the client is a whole window behind."""
        while True:
            while len(self._sizes) > on_list:
                self._sizes.popleft()
            if sum(self._sizes) < self._window:
                return
            self._credit.wait(self._request.id, 1.0)
            on_list = self._insist_call("LLEN", self._entry.served.keys.reply(self._request.id))
            if on_list == 0:
                self._sizes.clear()  # taken, or nobody wants it: the next push will tell

    def _not_wanted(self, outcome: object) -> NoReturn:
        log.debug("request %s is not ours any more (%s)", self._request.id, outcome)
        raise Cancelled

    def _insist(self, script: str, args: list[Argument]) -> int | bytes:
        """Run a script, again after each lost answer: a second run of any of them changes nothing."""
        keys = self._entry.served.keys
        names = [keys.requests, keys.reply(self._request.id)]
        answer: int | bytes = self._again(lambda: self._channel.script(script, names, args))
        return answer

    def _insist_call(self, *command: Argument) -> int:
        answer = self._again(lambda: self._channel.call(*command))
        return answer if isinstance(answer, int) else 0

    def _again(self, send: Callable[[], Any]) -> Any:
        delay = 0.02
        while True:
            try:
                return send()
            except Unavailable as error:
                # As long as this process lives: whether the reply is still wanted, only the broker can tell.
                if self._given_up.wait(delay):
                    log.error("the reply to %s could not be sent: %s", self._request.id, error)
                    raise Cancelled from None
                delay = min(delay * 2, 1.0)
