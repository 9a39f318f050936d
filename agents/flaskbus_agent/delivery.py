"""One entry of a request stream: decode -> deadline -> run -> outcome.

What becomes of an entry, outcome by outcome:

==================================  ===========================================================
the app answers                     finish: acked, deleted and replied to in one script
the app streams                     push for each chunk, finish for the end
the client is gone meanwhile        push says so; the app's iterable is closed, nothing is sent
it waited past its deadline         finish with a failure; the app is not called
it cannot be decoded                bury: a dead letter, and a failure to whoever waits
it is not signed as it should be    the same; that failure is not signed either
the broker is away at the end       the reply is kept, and sent as soon as the broker is back
==================================  ===========================================================
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import redis

from flaskbus import letters, wire
from flaskbus.acl import mend
from flaskbus.broker import Unavailable
from flaskbus.errors import WireError
from flaskbus.keys import DEAD_KEPT, DEAD_TTL_MS, GROUP, LIST_TTL_MS
from flaskbus.messages import NOT_RUN, Failure, Request
from flaskbus.settings import AgentSettings
from flaskbus.signing import Replays, SignatureError, opener, signature_of, worth_saying
from flaskbus_agent.channel import Channel
from flaskbus_agent.outbox import Credit, Entry, Outbox, Running, entry_time, signer
from flaskbus_agent.wsgi import Cancelled, build_environ, respond

log = logging.getLogger("flaskbus.agent")


class Runner:
    """Runs entries through their apps; shared by the threads of a process."""

    def __init__(self, settings: AgentSettings, agent_id: str, credit: Credit) -> None:
        self.settings = settings
        self.agent_id = agent_id
        self.credit = credit
        self.keeper = settings.keeper
        self.given_up = threading.Event()
        """Set when the process ends and replies that could not be sent are lost with it."""
        self.ending = threading.Event()
        """Set when streams of events are to end at their next event boundary."""
        self.stopping = threading.Event()
        """Set when nothing more is to be begun."""
        self._replays = Replays()
        self._refused = 0
        self.multiprocess = settings.workers > 1
        self.multithread = settings.threads > 1

    def decode(self, entry: Entry, channel: Channel) -> Request | None:
        """The request of an entry; an unreadable one is buried."""
        try:
            signature = self._check_signature(entry)
            request = wire.decode_request(entry.fields, max_body=self.settings.body_limit)
            if signature is not None:
                self._replays.admit(signature)
            return request
        except SignatureError as error:
            self._refused += 1
            if worth_saying(self._refused):
                stream = entry.served.keys.requests
                log.error("an entry on %s is refused (%d so far): %s", stream, self._refused, error)
            self._bury(entry, channel, str(error), signed=False)
            return None
        except WireError as error:
            log.error("an entry on %s is not ours: %s", entry.served.keys.requests, error)
            self._bury(entry, channel, str(error))
            return None

    def _check_signature(self, entry: Entry) -> bytes | None:
        """The signature of an entry, if there is to be one. Raises :class:`~flaskbus.signing.SignatureError`."""
        seals = entry.served.seals
        if seals:
            return opener(seals, entry.fields, time.time())[1]
        if signature_of(entry.fields) is not None:
            raise SignatureError("the request is signed, and this agent has no signing key")
        return None

    def run(
        self,
        entry: Entry,
        request: Request,
        channel: Channel,
        running: Running,
        on_stream: Callable[[], None],
    ) -> bool:
        """Run the app and send what it answers, unless there is a reason not to begin; raises nothing.

        Returns whether the broker has confirmed the end. If not, the entry is still pending as ours, and must
        not be run again.
        """
        outbox = Outbox(
            channel, entry, request, self.agent_id,
            window=self.settings.window, credit=self.credit, running=running,
            keeper=self.keeper, given_up=self.given_up, ending=self.ending, on_stream=on_stream,
        )  # fmt: skip
        try:
            reason = self._hand_back(entry, request, outbox)
            if reason:
                outbox.finish([Failure(request.attempt, 0, NOT_RUN, reason)])
                return outbox.settled
            environ = build_environ(
                request, errors=sys.stderr, multithread=self.multithread, multiprocess=self.multiprocess
            )
            respond(
                entry.served.app,
                environ,
                outbox,
                method=request.method,
                reply_limit=self.settings.reply_limit,
            )
        except Cancelled:
            pass
        except redis.exceptions.RedisError as error:
            text = str(error).rstrip(".")
            hint = mend(text, [entry.served.keys.mount])
            log.error("the reply to %s was refused by the broker: %s%s", request.id, text, hint)
        finally:
            self.credit.forget(request.id)
        return outbox.settled

    def forget(self, entry: Entry, channel: Channel) -> None:
        """Remove an entry that this process has run before. Nobody else has to be told: the reply was sent then."""
        keys = entry.served.keys
        try:
            channel.script("withdraw", [keys.requests], [GROUP, entry.entry_id])
        except (*Unavailable, redis.exceptions.RedisError) as error:
            log.error("an entry that was run before could not be removed: %s", error)

    def _hand_back(self, entry: Entry, request: Request, outbox: Outbox) -> str:
        """Why the request is not to be run here; its gateway then decides. Empty where it may run.

        An older gateway would not know what such an answer means, and keeps deadlines itself.
        """
        if request.version < 2:
            return ""
        if self.stopping.is_set():
            return "the agent stops"
        waited = (time.monotonic() - entry.read_at) * 1000
        if waited + entry.age <= request.ttl:
            return ""
        # The broker's clock is known as of some seconds ago; before anything is refused, it is asked.
        age = max(waited, outbox.broker_time() - entry_time(entry.entry_id))
        return "it waited past its deadline" if age > request.ttl else ""

    def _bury(self, entry: Entry, channel: Channel, reason: str, *, signed: bool = True) -> None:
        """Make a dead letter of an entry, and tell whoever waits for it, as far as that can be read.

        An entry that may be a stranger's must not lead to a ``signed`` word about a request of that id.
        """
        keys = entry.served.keys
        request_id = wire.peek_id(entry.fields) or ""
        sender, attempt = wire.peek_sender(entry.fields)
        channel_name = keys.doorbell(sender) if request_id and sender else ""
        name = wire.peek_record(entry.fields)
        record = (keys.idempotent(name),) if name else ()
        letter = letters.of_stranger(entry.fields, reason, at=datetime.now(UTC), entry=entry.entry_id)
        failure = Failure(attempt, 0, "agent-lost", f"unreadable request: {reason}")
        frame = wire.encode_frame(failure, signer(entry, request_id) if signed else None)
        try:
            channel.script(
                "bury",
                [keys.requests, keys.dead, keys.reply(request_id or "none"), *record],
                [
                    GROUP, entry.entry_id, self.agent_id, DEAD_TTL_MS, DEAD_KEPT, LIST_TTL_MS,
                    channel_name, request_id, frame, *letter,
                ],
            )  # fmt: skip
        except (*Unavailable, redis.exceptions.RedisError) as error:
            # It stays ours and pending, and is read again with the next look at what we hold.
            log.error("an entry that is not ours could not be buried: %s", error)
