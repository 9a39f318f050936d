"""The request threads of an agent process: leader and followers.

One thread at a time, the leader, reads the streams of all mounts, for as many requests as threads wait. What
computes it runs itself, one after the other, and hands in the replies with its next question; as soon as one of them
lasts, another thread takes the lead. With what waits for something it leaves the lead to another thread at once. So no
request is passed from thread to thread without need, and none waits behind a slow one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import redis

from flaskbus import wire
from flaskbus.broker import Unavailable
from flaskbus.keys import Keys
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.signing import parse_keys, seals_of
from flaskbus_agent.bells import Bells
from flaskbus_agent.channel import Channel, open_channel
from flaskbus_agent.cluster_reading import open_reader
from flaskbus_agent.delivery import Ending, Runner
from flaskbus_agent.doorbell import Doorbell
from flaskbus_agent.entry import Entry, Running, Served
from flaskbus_agent.intake import Intake
from flaskbus_agent.lead import STALL, Lead
from flaskbus_agent.line import FAREWELL
from flaskbus_agent.moves import Moves
from flaskbus_agent.pool import ChannelPool, OnStream
from flaskbus_agent.post import Post
from flaskbus_agent.reading import ANSWER
from flaskbus_agent.wsgi import Cancelled

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

SHARED = 2
"""Connections that all streams of a process share."""

ENDING = 2.0
"""Seconds at the end of ``graceful_timeout`` in which event streams end; half of it, if that is less."""


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
        seals = seals_of(parse_keys(settings.signing_key), [mount.whole.key for mount in apps])
        served = {
            mount: Served(app, keys.of(mount.key), seals.get(mount.whole.key, ()))
            for mount, app in apps.items()
        }
        self._quiet = threading.Event()
        self._running: dict[int, Running] = {}
        self._threads: set[threading.Thread] = set()
        self._threads_lock = threading.Lock()
        self._streams = 0
        self._moves = Moves(settings.redis)
        self._reader = open_reader(settings.redis, agent_id, self._channel)
        self._lead: Lead[Post] = Lead()
        self._intake = Intake(self._reader, served, settings.lease, self._quiet, self.log)
        self._shared = ChannelPool([self._channel(f"streams-{n}", ANSWER) for n in range(SHARED)])
        self.bells = Bells()
        self._runner = Runner(settings, agent_id, self.bells, self._intake.look_again, self._intake.explained)
        self._doorbell = Doorbell(
            settings.redis,
            f"flaskbus-agent-{agent_id}-doorbell",
            [each.keys.doorbell(agent_id) for each in served.values()],
            moves=self._moves.possible,
        )
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
        if not self._intake.drop(mount):
            self.quiet()

    def join(self, timeout: float) -> bool:
        """Wait until a quiet consumer has run all that it read; whether ``timeout`` seconds were enough."""
        deadline = time.monotonic() + timeout
        if self._quiet.is_set() and self._intake.backlog:
            self._spawn()  # the others may be busy, and what they have not begun is handed back at once
        while threads := self._alive():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._quiet.is_set() and self._lead.is_reading():
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

    @property
    def owes(self) -> bool:
        """Whether replies of what ran before are still to be taken by the broker."""
        items = tuple(self._intake.backlog)
        return self._lead.has_left or bool(self._intake.unheard) or any(isinstance(i, Post) for i in items)

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
            while self._take_part(channel, on_stream):
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

    def _take_part(self, channel: Channel, on_stream: OnStream) -> bool:
        """Have the lead for as long as that goes, then run what needs no lead; whether there may be more to do."""
        self._lead.take()
        try:
            while True:
                if self._lead.is_due():
                    self._intake.fill(0, self._lead.collect(), channel)
                item = self._intake.next()
                if item is None:
                    self._intake.fill(1 + self._lead.waiting, self._lead.collect(), channel)
                    if not self._intake.backlog and self._quiet.is_set():
                        return False
                    continue
                plain = self._plain(item)
                if plain is None or isinstance(item, Post):
                    break
                if not self._run_leading(item, plain, channel, on_stream):
                    return True
        finally:
            self._lead.release()
        try:
            if isinstance(item, Post):
                self._hand_in(item, channel)
            else:
                self._run(item, channel, on_stream)
        except Exception:
            self.log.exception("an entry could not be handled")
        return True

    def _plain(self, item: Entry | Post) -> wire.Plain | None:
        """What the leader runs itself, as far as it is known to be of that kind."""
        if isinstance(item, Post) or not self._reader.converses or not item.served.pace.is_for_leader():
            return None
        return self._runner.plain(item)

    def _run_leading(self, entry: Entry, plain: wire.Plain, channel: Channel, on_stream: OnStream) -> bool:
        """Run what is short, as a rule; whether this thread goes on with the lead then."""
        pace, running = entry.served.pace, self._begin(plain.id, plain.method, plain.target)
        computed = time.thread_time() if (is_sample := pace.is_sample()) else 0.0
        ending = Ending.RAN
        self._lead.begin()
        try:
            ending = self._runner.run_with_lead(entry, plain, channel, running, on_stream, self._lead)
        except Exception:
            self.log.exception("an entry could not be handled")
        finally:
            self._over(entry, ending)
        if is_sample:
            pace.measured(time.monotonic() - running.begun, time.thread_time() - computed, STALL)
        # Not after a stream: what it left, a thread or a connection, may be another's now.
        return self._lead.end() and ending is Ending.LEFT

    def _run(self, entry: Entry, channel: Channel, on_stream: OnStream) -> None:
        if entry.done:
            if self._runner.forget(entry, channel):
                self._intake.settle(entry)
            return
        ending = Ending.RAN
        try:
            request = self._runner.decode(entry, channel)
            if request is None:
                ending = Ending.UNTOUCHED  # if it could not be buried, it is looked at again
                return
            running = self._begin(request.id, request.method, request.target)
            ending = self._runner.run(entry, request, channel, running, on_stream)
        finally:
            self._over(entry, ending)

    def _hand_in(self, post: Post, channel: Channel) -> None:
        """The broker did not take a reply, or perhaps not."""
        ending = Ending.RAN
        try:
            request = wire.decode_request(post.entry.fields, max_body=wire.MAX_BODY)
            running = self._begin(request.id, request.method, request.target)
            ending = self._runner.hand_in(post, request, channel, running)
        finally:
            self._running.pop(threading.get_ident(), None)
            self._account(post.entry, ending)

    def _begin(self, request_id: str, method: str, target: str) -> Running:
        me = threading.get_ident()
        running = self._running[me] = Running(me, request_id, method, target, time.monotonic())
        return running

    def _over(self, entry: Entry, ending: Ending) -> None:
        self._running.pop(threading.get_ident(), None)
        self._account(entry, ending)
        self.served += 1

    def _account(self, entry: Entry, ending: Ending) -> None:
        if ending is Ending.SETTLED:
            self._intake.settle(entry)
        elif ending is Ending.RAN:
            self._intake.abandon(entry)
        elif ending is Ending.UNTOUCHED:
            self._intake.release(entry)

    # Doorbell

    def _listen(self) -> None:
        """Wake whoever has something to hear of its client."""
        told = False
        while not self._quiet.is_set() or self._threads:
            try:
                for request_id, element in self._doorbell.listen():
                    self.bells.ring(request_id, element)
                    self._runner.bridge.ring(request_id, element)
            except (*Unavailable, redis.exceptions.RedisError) as error:
                if isinstance(error, redis.exceptions.NoPermissionError) and not told:
                    told = True
                    self.log.error(
                        "the broker refuses to let us hear doorbells: %s", self._intake.explained(error)
                    )
                self._quiet.wait(0.5)
            self._moves.look()
            self._reader.probe()
        self._doorbell.close()
