"""The reading side of an agent process: leader and followers.

One thread at a time, the leader, reads the streams of all mounts, for as many requests as threads are idle.
With what it read it hands the lead to the next idle thread and becomes a worker itself, so that no request
is passed from thread to thread, and none waits behind a busy one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import redis

from flaskbus import wire
from flaskbus.acl import mend
from flaskbus.broker import Unavailable, connect
from flaskbus.errors import WireError
from flaskbus.keys import Keys
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.signing import parse_keys, seals_of
from flaskbus_agent.bells import Bells
from flaskbus_agent.channel import Channel, open_channel
from flaskbus_agent.cluster_reading import open_reader
from flaskbus_agent.delivery import Ending, Runner
from flaskbus_agent.entry import Entry, Running, Served, entry_time
from flaskbus_agent.inhand import InHand, Standing
from flaskbus_agent.line import FAREWELL
from flaskbus_agent.moves import Moves
from flaskbus_agent.pool import ChannelPool
from flaskbus_agent.reading import ANSWER
from flaskbus_agent.wsgi import Cancelled

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

CLOCK = 5.0
"""Seconds for which the broker's clock is taken to run as fast as ours."""

SHARED = 2
"""Connections that all streams of a process share."""

AGAIN = 1.0
"""Seconds until we look again at what we hold, after a write about it was refused."""

ENDING = 2.0
"""Seconds at the end of ``graceful_timeout`` in which event streams end; half of it, if that is less."""


UNHEARD = 3
"""Seconds of silence after which doorbells are heard elsewhere, where the broker is of a kind that moves."""


class Consumer:
    """Reads requests for the apps of one process and runs them in ``settings.threads`` threads."""

    def __init__(
        self,
        settings: AgentSettings,
        agent_id: str,
        apps: Mapping[Mount, WSGIApplication],
        log: logging.Logger | None = None,
    ) -> None:
        self.settings = settings
        self.agent_id = agent_id
        self.log = log or logging.getLogger("flaskbus.agent")
        keys = Keys(settings.namespace)
        seals = seals_of(parse_keys(settings.signing_key), [mount.key for mount in apps])
        self._served = {
            mount: Served(app, keys.of(mount.key), seals.get(mount.key, ())) for mount, app in apps.items()
        }
        self._by_stream = {served.keys.requests.encode(): served for served in self._served.values()}
        # A read that is under way when a mount is dropped may still deliver to it.
        self._ever_served = dict(self._by_stream)
        self._turn = threading.Lock()
        self._backlog: deque[Entry] = deque()
        self._in_hand = InHand()
        self._reread_at = 0.0  # monotonic seconds
        self._asked_at = 0.0  # since when the leader waits (monotonic seconds)
        self._quiet = threading.Event()
        self._running: dict[int, Running] = {}
        self._threads: set[threading.Thread] = set()
        self._threads_lock = threading.Lock()
        self._streams = 0
        self._rotation = 0
        self._moves = Moves(settings.redis)
        self._reader = open_reader(settings.redis, agent_id, self._channel)
        self._shared = ChannelPool([self._channel(f"streams-{n}", ANSWER) for n in range(SHARED)])
        self._trouble = ""
        self._clocks: dict[bytes, float] = {}
        """Of the broker that has a stream, in milliseconds, when our monotonic clock was at 0; as far as known."""
        self._clock_due = 0.0
        self.bells = Bells()
        self._runner = Runner(settings, agent_id, self.bells, self._look_again)
        self._bell = threading.Thread(target=self._listen, name="flaskbus-doorbell", daemon=True)
        self.served = 0

    def _channel(self, purpose: str, timeout: float) -> Channel:
        channel = open_channel(self.settings.redis, f"flaskbus-agent-{self.agent_id}-{purpose}", timeout)
        self._moves.add(channel, max(0.0, timeout - ANSWER))
        return channel

    # Life

    def start(self) -> None:
        self._bell.start()
        for _ in range(self.settings.threads):
            self._spawn()

    def quiet(self) -> None:
        """Read nothing more; what is running goes on, and what was read and not begun is handed back."""
        self._runner.stopping.set()
        self._quiet.set()
        self._runner.bridge.leave(max(min(FAREWELL, self.settings.graceful_timeout / 2), 0.1))

    def drop(self, mount: Mount) -> None:
        """Stop reading one mount, which now belongs to another app."""
        served = self._served.pop(mount, None)
        if served is not None:
            self._by_stream.pop(served.keys.requests.encode(), None)
            self._reader.interrupt()
        if not self._served:
            self.quiet()

    def join(self, timeout: float) -> bool:
        """Wait until a quiet consumer has run all that it read; whether ``timeout`` seconds were enough."""
        deadline = time.monotonic() + timeout
        if self._quiet.is_set() and self._backlog:
            self._spawn()  # the others may be busy, and what they have not begun is handed back at once
        while threads := self._alive():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._quiet.is_set() and self._turn.locked():
                self._reader.interrupt()
            threads[0].join(min(left, 0.05))
        return True

    def end_events(self) -> None:
        """Let every stream of events end at its next event boundary. Returns at once.

        That is now, where the app has the next event to make; its generator is closed when it yields that.
        """
        self._runner.ending.set()
        threading.Thread(target=self._end_events, name="flaskbus-ending", daemon=True).start()

    def _end_events(self) -> None:
        for running in self.running():
            if running.events is not None:
                with suppress(Cancelled, redis.exceptions.RedisError):
                    running.events.end_events(self._shared)

    def close(self) -> None:
        """Give up replies that cannot be sent, and hang up."""
        self.quiet()
        self._runner.given_up.set()
        self._runner.bridge.close()
        self._reader.close()
        self._shared.close()

    def running(self) -> list[Running]:
        return list(self._running.values())

    def healthy(self) -> bool:
        """Whether every thread is there; one that ended unexpectedly is not replaced here."""
        return self._quiet.is_set() or (
            len(self._threads) >= self.settings.threads and self._runner.bridge.healthy
        )

    # Threads

    def _spawn(self, channel: Channel | None = None) -> None:
        channel = channel or self._channel("writer", ANSWER)
        thread = threading.Thread(target=self._serve, args=(channel,), name="flaskbus-request", daemon=True)
        with self._threads_lock:  # who joins sees it begun, and it cannot end unlisted
            thread.start()
            self._threads.add(thread)

    def _alive(self) -> tuple[threading.Thread, ...]:
        with self._threads_lock:
            return tuple(self._threads)

    def _serve(self, channel: Channel) -> None:
        """The life of a request thread."""
        streamed = False

        def on_stream() -> ChannelPool | None:
            nonlocal streamed
            if not streamed:
                streamed = self._lend(channel)
            return self._shared if streamed else None

        try:
            while (entry := self._next()) is not None:
                try:
                    self._run(entry, channel, on_stream)
                except Exception:
                    self.log.exception("an entry could not be handled")
                if streamed:
                    return  # its place was taken while it streamed
        finally:
            if not streamed:
                channel.close()
            with self._threads_lock:
                if streamed:
                    self._streams -= 1
                self._threads.discard(threading.current_thread())

    def _lend(self, channel: Channel) -> bool:
        """A request became a stream: give its place among the request threads, and its connection, to a new
        thread, if there is room in the budget for streams.
        """
        with self._threads_lock:
            if self._streams >= self.settings.streams or self._quiet.is_set():
                return False
            self._streams += 1
        try:
            self._spawn(channel)
        except RuntimeError as error:  # no thread can be started: this one goes on as it is
            self.log.error("a stream keeps its request thread: %s", error)
            with self._threads_lock:
                self._streams -= 1
            return False
        return True

    def _run(self, entry: Entry, channel: Channel, on_stream: Any) -> None:
        mark = entry.served.keys.requests.encode() + entry.entry_id
        if entry.done:
            if self._runner.forget(entry, channel):
                self._in_hand.settle(mark)
            return
        me = threading.get_ident()
        ending = Ending.RAN
        try:
            request = self._runner.decode(entry, channel)
            if request is None:
                ending = Ending.UNTOUCHED  # if it could not be buried, it is looked at again
                return
            running = Running(me, request.id, request.method, request.target, time.monotonic())
            self._running[me] = running
            ending = self._runner.run(entry, request, channel, running, on_stream)
        finally:
            self._running.pop(me, None)
            if ending is Ending.SETTLED:
                self._in_hand.settle(mark)
            elif ending is Ending.RAN:
                self._in_hand.abandon(mark)
                self._look_again()
            else:
                self._in_hand.release(mark)
            self.served += 1

    # Reading

    def _next(self) -> Entry | None:
        """The next entry to run, or ``None`` when this thread should end."""
        with self._turn:
            while not self._backlog:
                self._asked_at = time.monotonic()
                try:
                    if self._quiet.is_set():
                        self._take(self._reader.calm())
                        if not self._backlog:
                            return None
                    else:
                        self._read()
                except Unavailable as error:
                    self._stumble(f"the broker is away: {error}")
                except redis.exceptions.ResponseError as error:
                    self._stumble(f"the broker refuses to let us read: {self._explained(error)}")
            return self._backlog.popleft()

    def _explained(self, error: Exception) -> str:
        text = str(error).rstrip(".")
        return text + mend(text, [mount.name for mount in self._served])

    def _stumble(self, trouble: str) -> None:
        """After a failed read: its answer may be lost, so the next look compares what we hold with the group."""
        self._reread_at = 0.0
        self._clock_due = 0.0
        if not self._trouble:
            self.log.warning("%s; trying again", trouble)
        self._trouble = trouble
        self._quiet.wait(0.1)

    def _look_again(self) -> None:
        """Soon, look at what we hold: an entry of which the broker took no end is still among it."""
        self._reread_at = min(self._reread_at, time.monotonic() + AGAIN)

    def _read(self) -> None:
        idle = max(1, self.settings.threads + self._streams - len(self._running))
        if time.monotonic() >= self._clock_due:
            self._read_clock()
        if time.monotonic() >= self._reread_at:
            self._read_own()
            return
        streams = tuple(self._by_stream)
        if len(streams) == 1:
            self._deliver(self._reader.wait(streams, idle))
        elif not streams:
            self._quiet.wait(0.1)
        else:
            self._read_several(streams, idle)
        if self._trouble:
            self.log.info("reading again")
            self._trouble = ""

    def _read_several(self, streams: tuple[bytes, ...], idle: int) -> None:
        """COUNT holds for each stream and not in all: ask one after the other, each time another one first."""
        self._rotation = (self._rotation + 1) % len(streams)
        ordered = streams[self._rotation :] + streams[: self._rotation]
        for stream in ordered:
            if idle > len(self._backlog):
                self._deliver(self._reader.now(stream, idle - len(self._backlog)))
        if not self._backlog:
            # Whoever gets the first entry ends the wait; it is rare that two streams do in one instant.
            self._deliver(self._reader.wait(ordered, 1))
        if idle <= len(self._backlog):
            # Nobody is left to watch reads that go on; what they bring at the last moment runs next.
            self._deliver(self._reader.calm(last=False))

    def _read_clock(self) -> None:
        """What the brokers' clocks say, for the age of entries; without the permission to ask they have none."""
        for stream in tuple(self._by_stream):
            try:
                answer = self._reader.clock(stream)
            except redis.exceptions.NoPermissionError:
                self._clocks.clear()
                break
            if answer:
                now = int(answer[0]) * 1000 + int(answer[1]) / 1000
                self._clocks[stream] = now - time.monotonic() * 1000
        self._clock_due = time.monotonic() + CLOCK

    def _age(self, stream: bytes, entry_id: bytes, now: float) -> float:
        """How many milliseconds an entry has waited at ``now`` (monotonic seconds); 0 where that is not known."""
        clock = self._clocks.get(stream)
        return 0.0 if clock is None else max(0.0, clock + now * 1000 - entry_time(entry_id))

    def _read_own(self) -> None:
        """Take what the group says that we hold, and we do not: the answer that brought it was lost."""
        self._reread_at = math.inf  # a failed read makes it due at once
        self._take(self._reader.begin())
        for stream in tuple(self._by_stream):
            after = b"0"
            while True:
                answer = self._reader.own(stream, after)
                entries = answer[0][1] if answer else []
                if not entries:
                    break
                self._take(answer)
                after = entries[-1][0]

    def _deliver(self, answer: Any) -> None:
        """Take what came of a read for new entries.

        Who was frozen while it waited may have been taken for dead, and what was delivered to it meanwhile given to
        others. So of what comes late only that counts which the group, when it is asked, says is ours still.
        """
        if answer and time.monotonic() - self._asked_at > self.settings.lease / 2:
            self._reread_at = 0.0
        else:
            self._take(answer)

    def _take(self, answer: Any) -> None:
        """Entries as XREADGROUP gives them."""
        now = time.monotonic()
        for stream, entries in answer or ():
            served = self._ever_served.get(stream)
            for entry_id, fields in entries:
                if served is None or fields is None:
                    continue
                standing = self._in_hand.take(stream + entry_id)
                if standing is Standing.NEW:
                    age = self._age(stream, entry_id, now)
                    self._backlog.append(Entry(served, entry_id, fields, now, age))
                elif standing is Standing.DONE:
                    self._backlog.append(Entry(served, entry_id, fields, now, done=True))

    # Doorbell

    def _listen(self) -> None:
        """Hear when a client took something, or went away. A hint: who waits also looks each second."""
        client: redis.client.PubSub | None = None
        unheard, told = 0, False
        while not self._quiet.is_set() or self._threads:
            try:
                if client is None:
                    client, unheard = self._subscribe(), 0
                message = client.get_message(ignore_subscribe_messages=True, timeout=1.0)
                if message is not None:
                    unheard = 0
                    self._heard(message["data"])
                elif self._moves.possible:
                    unheard += 1
                    if unheard > UNHEARD:
                        raise redis.exceptions.TimeoutError("nobody answers")
                    client.ping()
            except (*Unavailable, redis.exceptions.RedisError) as error:
                client = None
                if isinstance(error, redis.exceptions.NoPermissionError) and not told:
                    told = True
                    self.log.error("the broker refuses to let us hear doorbells: %s", self._explained(error))
                self._quiet.wait(0.5)
            self._moves.look()
            self._reader.probe()
        if client is not None:
            client.close()

    def _heard(self, message: bytes) -> None:
        with suppress(WireError):  # a stranger's
            ring = wire.decode_ring(message)
            for request_id in ring.ids:
                self.bells.ring(request_id, ring.frame or b"")
                self._runner.bridge.ring(request_id, ring.frame or b"")

    def _subscribe(self) -> redis.client.PubSub:
        client = connect(self.settings.redis, name=f"flaskbus-agent-{self.agent_id}-doorbell")
        pubsub: redis.client.PubSub = client.pubsub()  # type: ignore[no-untyped-call]
        pubsub.subscribe(*(served.keys.doorbell(self.agent_id) for served in self._served.values()))
        return pubsub
