"""One run and the broker: frames are pushed, again after each lost answer, and what the client sends is read."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import redis

from flaskbus import wire
from flaskbus.broker import Unavailable, script_sha
from flaskbus.idempotency import Keeper
from flaskbus.keys import GROUP, LIST_TTL_MS
from flaskbus.messages import End, Frame, Request
from flaskbus.refusals import passing
from flaskbus_agent.bells import Bell, Bells
from flaskbus_agent.channel import Argument, Channel
from flaskbus_agent.entry import Entry, Running, seal_of
from flaskbus_agent.flow import Window
from flaskbus_agent.pool import ChannelPool, OnStream
from flaskbus_agent.wsgi import Cancelled

log = logging.getLogger("flaskbus.agent")

LARGE = 32 * 1024
"""Bytes of frames from which on they are pushed without a script."""


class Sender:
    """What the broker hears of one run: frames, and how it ended; what the client sends, it reads."""

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
        on_stream: OnStream,
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
        self._streaming = False
        self._is_extra = False  # its thread is none of those for short requests
        self._unsent: list[bytes] = []  # frames that the broker had no memory for
        self._turn = threading.Lock()
        """Held while frames of an event stream are sent, which another thread may end."""
        self._own = threading.Lock()
        """Held while a command uses a channel that this run's thread has to itself. An app may read what its client
        sends in another thread than the one that answers, and go on with that when the run is over."""
        self._retired = False  # the run is over, and with it the right to that channel
        self.settled = False
        """Whether the broker has confirmed the end: the entry is not ours any more, and is not pending."""

    @property
    def mount(self) -> str:
        """The canonical name of the mount."""
        return self._entry.served.keys.mount

    def retire(self) -> None:
        """The run is over: its channel is the next one's, whatever threads the app has left behind."""
        with self._own:
            self._retired = True

    # Sending

    def _take_seq(self) -> int:
        seq = self._seq
        self._seq += 1
        return seq

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
            with self._own:
                self._check_not_retired()
                if not self._streaming:
                    shared = self._on_stream()
                    self._is_extra = shared is not None
                    self._channel = shared or self._channel
                    self._streaming = True
        return self._is_extra

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

    # Inside

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

    def _carry_out(self, send: Callable[[], Any]) -> Any:
        if isinstance(self._channel, ChannelPool):
            return send()
        with self._own:
            self._check_not_retired()
            return send()

    def _check_not_retired(self) -> None:
        if self._retired:
            raise Cancelled

    def _again(self, send: Callable[[], Any]) -> Any:
        delay, told = 0.02, False
        while True:
            try:
                return self._carry_out(send)
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
