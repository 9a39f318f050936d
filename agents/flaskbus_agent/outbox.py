"""What one run sends: frames of its response, as far as the client keeps up with them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import redis

from flaskbus import wire
from flaskbus.boundaries import Boundaries, boundaries
from flaskbus.broker import Unavailable, script_sha
from flaskbus.idempotency import Keeper
from flaskbus.keys import GROUP, LIST_TTL_MS, MountKeys
from flaskbus.messages import Chunk, Close, End, Failure, Frame, Head, Headers, Message, Reply, Request
from flaskbus.refusals import passing
from flaskbus.signing import FrameSeal, Seal, opener
from flaskbus_agent.channel import Argument, Channel
from flaskbus_agent.flow import Window
from flaskbus_agent.gatherer import LIMIT, Gatherer
from flaskbus_agent.pool import ChannelPool
from flaskbus_agent.wsgi import Cancelled

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("flaskbus.agent")

QUICK = 0.001
"""Seconds: an app that yields the next part sooner does not wait until the broker has taken the last one."""

LARGE = 32 * 1024
"""Bytes of frames from which on they are pushed without a script."""

HURRIED = 3
"""Quick yields in a row after which that begins. Most responses are over by then, and need no second thread."""


@dataclass(frozen=True, slots=True)
class Served:
    """An app on its mount."""

    app: WSGIApplication
    keys: MountKeys
    seals: tuple[Seal, ...] = ()
    """What its requests may be signed with; empty where nobody signs."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one XREADGROUP delivered, at ``read_at`` (monotonic seconds).

    ``age`` is how many milliseconds it had waited then, by the broker's own clock; 0 where that is not known.
    ``done``: this process has run it before, and a broker that lost its last writes does not know that.
    """

    served: Served
    entry_id: bytes
    fields: Sequence[bytes]
    read_at: float
    age: float = 0.0
    done: bool = False


def seal_of(entry: Entry, request_id: str) -> FrameSeal | None:
    """What signs the frames of a request that was signed right: the same key. ``None`` where nobody signs."""
    seals = entry.served.seals
    if not seals:
        return None
    seal = seals[0] if len(seals) == 1 else opener(seals, entry.fields, 0)[0]
    return seal.frames(request_id, wire.peek_record(entry.fields))


def entry_time(entry_id: bytes) -> int:
    """When an entry was added, in milliseconds of the broker's clock. A hint: it may lie in the future."""
    return int(entry_id.partition(b"-")[0])


@dataclass(slots=True)
class Running:
    """A request that a thread runs now.

    ``since`` is when the app's code last got control (monotonic seconds); infinite while the thread waits for
    a client or for the broker, which is nothing that the app could be blamed for, and in an event stream, whose
    next event may be long in coming.
    """

    thread_id: int
    request_id: str
    method: str
    target: str
    since: float
    events: Outbox | None = None
    """Where its response is a stream of events that is on its way."""
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.since


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
        bells: Bells,
        running: Running,
        keeper: Keeper,
        given_up: threading.Event,
        ending: threading.Event,
        on_stream: Callable[[], ChannelPool | None],
    ) -> None:
        self._channel: Channel | ChannelPool = channel
        self._entry = entry
        self._request = request
        self.agent = agent
        self._window = Window(window)
        self._bells = bells
        self._running = running
        self._keeper = keeper
        self._given_up = given_up
        self._ending = ending
        self._on_stream = on_stream
        self._seal = seal_of(entry, request.id)
        self._sign = self._seal.sign if self._seal else None
        self._seq = 0
        self._head: Head | None = None
        self._streaming = False
        self._is_extra = False  # its thread is none of those for short requests
        self._unsent: list[bytes] = []  # frames that the broker had no memory for
        self._gatherer: Gatherer | None = None
        self._resumed = 0.0  # when the app last got control (monotonic seconds)
        self._quick = 0  # how often in a row it yielded soon after that
        self._boundaries: Boundaries | None = None
        self._turn = threading.Lock()
        """Held while frames of an event stream are sent, which another thread may end."""
        self._over = False  # it has
        self.settled = False
        """Whether the broker has confirmed the end: the entry is not ours any more, and is not pending."""

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

    def end_events(self, channel: ChannelPool) -> None:
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
                if isinstance(self._channel, Channel):
                    self._channel = ChannelPool([self._channel])  # for two threads
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
        if self._ending.is_set() and isinstance(self._channel, ChannelPool):
            self.end_events(self._channel)

    def _take_seq(self) -> int:
        seq = self._seq
        self._seq += 1
        return seq

    def _chunk(self, data: bytes) -> Chunk:
        return Chunk(self._request.attempt, self._take_seq(), data)

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
        """The clock of the broker that has the entry, in milliseconds (TIME)."""
        requests = self._entry.served.keys.requests
        seconds, microseconds = self._again(lambda: self._channel.at(requests, "TIME"))
        return int(seconds) * 1000 + int(microseconds) // 1000

    def finish(self, frames: list[Frame], channel: Channel | ChannelPool | None = None) -> None:
        """Send the last frames; raises :class:`Cancelled` where nobody may send them any more.

        The ``channel`` is that of the calling thread, where it is not the one that runs the app.
        """
        self._running.since = math.inf
        encoded = [*self._unsent, *(wire.encode_frame(frame, self._sign) for frame in frames)]
        record, fate = self._remember(frames, sum(map(len, encoded)))
        arguments = [*self._arguments(), wire.MAX_RING_FRAME, *fate, *encoded]
        outcome = self._insist("finish", arguments, channel, record)
        self.settled = True
        if self._gatherer is not None:
            self._gatherer.close()
        if outcome != b"done":
            self._not_wanted(outcome)
        self._running.since = time.monotonic()

    def _push(self, frames: list[Frame]) -> int:
        """Send further frames; how many lie on the list now."""
        if not self._streaming:
            self.bell()
        encoded = [wire.encode_frame(frame, self._sign) for frame in frames]
        while (on_list := self._try_to_push(encoded)) is None:
            # Go on when the client has taken what lies there.
            if self._given_up.is_set():
                raise Cancelled
            self.bell().wait_for_credit(1.0)
        return on_list

    def _try_to_push(self, encoded: list[bytes]) -> int | None:
        """The same; ``None`` where the broker is out of memory."""
        outcome = self._push_large(encoded) if self._streaming else None
        if outcome is None:
            outcome = self._insist("push", [*self._arguments(), wire.MAX_RING_FRAME, *encoded])
        if outcome == b"full":
            return None
        if isinstance(outcome, bytes):
            self.settled = True
            if self._request.idempotency:
                self.finish([End(self._request.attempt, self._seq)])  # its record learns that it ran
            self._not_wanted(outcome)
        self._window.pushed(map(len, encoded))
        self.become_stream()
        return outcome

    def _push_large(self, encoded: list[bytes]) -> int | bytes | None:
        """Push large frames without a script that copies them: its outcome, or ``None`` where it has to be a script."""
        if sum(map(len, encoded)) < LARGE:
            return None
        keys = self._entry.served.keys
        names = (keys.requests, keys.reply(self._request.id))
        arguments = (*self._arguments(), len(encoded))
        answers = self._again(
            lambda: self._channel.transaction(
                ("RPUSH", names[1], *encoded),
                ("EVALSHA", script_sha("pushed"), len(names), *names, *arguments),
            )
        )
        if answers is None or isinstance(answers[0], Exception):
            return None
        if isinstance(answers[1], redis.exceptions.NoScriptError):
            return self._insist("pushed", [*arguments])
        if isinstance(answers[1], Exception):
            raise answers[1]
        outcome: int | bytes = answers[1]
        return outcome

    def become_stream(self) -> bool:
        """It may last: its thread and its connection are not needed for short requests any more; whether there
        was room for one more of that kind.
        """
        if not self._streaming:
            self._streaming = True
            shared = self._on_stream()
            self._is_extra = shared is not None
            self._channel = shared or self._channel
        return self._is_extra

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

    # Inbound frames

    @property
    def is_signed(self) -> Callable[[bytes], bool] | None:
        """Says of an inbound element whether it is signed right; ``None`` where nobody signs."""
        return None if self._seal is None else self._seal.is_signed

    def bell(self) -> Bell:
        return self._bells.of(self._request.id)

    def read_inbound(self, key: str, start: int, count: int) -> list[bytes]:
        """Up to ``count`` elements of the inbound list at ``key``; they stay on it."""
        elements: list[bytes] = self._again(
            lambda: self._channel.call("LRANGE", key, start, start + count - 1)
        )
        return elements

    def took(self, key: str, count: int, first: bytes) -> None:
        """Remove elements from the front of the list, of which ``first`` is how it begins; let the gateway go on.

        Raises :class:`Cancelled` where the request is not ours any more.
        """
        keys, request = self._entry.served.keys, self._request
        names = [keys.requests, key]
        args: list[Argument] = [
            GROUP, self._entry.entry_id, self.agent, keys.doorbell(request.gateway),
            wire.encode_taken(request.id, self.agent), count, first,
        ]  # fmt: skip
        outcome = self._again(lambda: self._channel.script("took", names, args))
        if outcome != b"done":
            self.settled = True
            self._not_wanted(outcome)

    def _pause(self, on_list: int) -> None:
        """Wait while the client is a whole window behind."""
        self._window.left(on_list)
        # A gateway of wire version 1 leaves one frame on the list until the next one has come.
        while self._window.room <= 0 and self._window.elements > 1:
            self.bell().wait_for_credit(1.0)
            # Nothing there: taken, or nobody wants it, and the next push will tell.
            self._window.left(self._insist_call("LLEN", self._entry.served.keys.reply(self._request.id)))

    def _not_wanted(self, outcome: object) -> NoReturn:
        log.debug("request %s is not ours any more (%s)", self._request.id, outcome)
        raise Cancelled

    def _remember(self, frames: list[Frame], size: int) -> tuple[tuple[str, ...], tuple[Argument, ...]]:
        """The key of the record of the request's Idempotency-Key, and what becomes of it; nothing without one."""
        request = self._request
        if not request.idempotency:
            return (), ()
        fate = self._keeper.fate(request.headers, frames, size)
        return (self._entry.served.keys.idempotent(request.idempotency),), (self._keeper.life, fate)

    def _insist(
        self,
        script: str,
        args: list[Argument],
        channel: Channel | ChannelPool | None = None,
        record: tuple[str, ...] = (),
    ) -> int | bytes:
        """Run a script, again after each lost answer: a second run of any of them changes nothing.

        Raises redis-py's ``ResponseError`` for a refusal that does not pass.
        """
        keys = self._entry.served.keys
        names = [keys.requests, keys.reply(self._request.id), *record]
        answer: int | bytes = self._again(lambda: (channel or self._channel).script(script, names, args))
        return answer

    def _insist_call(self, *command: Argument) -> int:
        answer = self._again(lambda: self._channel.call(*command))
        return answer if isinstance(answer, int) else 0

    def _again(self, send: Callable[[], Any]) -> Any:
        delay, told = 0.02, False
        while True:
            try:
                return send()
            except Unavailable as error:
                trouble: Exception = error
            except redis.exceptions.ResponseError as error:
                # redis-py takes the codes that it knows away from the text.
                if not passing(error.status_code or str(error)):
                    raise
                trouble = error
                if not told:
                    log.warning("the reply to %s waits, the broker refuses it: %s", self._request.id, error)
                    told = True
            # As long as this process lives: whether the reply is still wanted, only the broker can tell.
            if self._given_up.wait(delay):
                log.error("the reply to %s could not be sent: %s", self._request.id, trouble)
                raise Cancelled
            delay = min(delay * 2, 1.0)


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
