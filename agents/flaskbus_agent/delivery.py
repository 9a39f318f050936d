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
it refuses the reply for a moment   the same
it refuses the reply for good       finish with a failure; refused too, it is withdrawn with a later look
it refuses a hand-back for good     it is looked at again: nothing ran
==================================  ===========================================================
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

import redis

from flaskbus import wire
from flaskbus.broker import Unavailable
from flaskbus.errors import WireError
from flaskbus.keys import GROUP
from flaskbus.messages import BODY, NOT_RUN, WEBSOCKET, Failure, Request
from flaskbus.refusals import passing
from flaskbus.settings import AgentSettings
from flaskbus.signing import Replays, SignatureError, opener, signature_of, worth_saying
from flaskbus_agent.bells import Bells
from flaskbus_agent.bridge import Bridge
from flaskbus_agent.burial import bury
from flaskbus_agent.channel import Channel
from flaskbus_agent.entry import Entry, Running, entry_time
from flaskbus_agent.environ import build_environ, plain_environ
from flaskbus_agent.inbound import InboundBody
from flaskbus_agent.lead import Lead
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.pool import OnStream
from flaskbus_agent.post import Post
from flaskbus_agent.prompt import Prompt
from flaskbus_agent.upgrade import refuse, upgrade
from flaskbus_agent.wsgi import Cancelled, respond

log = logging.getLogger("flaskbus.agent")


class Ending(Enum):
    """What has become of an entry."""

    SETTLED = "settled"
    """The broker has confirmed its end."""
    RAN = "ran"
    """It is still pending as ours, and must not be run again."""
    UNTOUCHED = "untouched"
    """It is still pending as ours, and the app was not called."""
    LEFT = "left"
    """Its reply is left for the leader to send."""


class Runner:
    """Runs entries through their apps; shared by the threads of a process.

    ``look_again`` is called where the broker refuses to take an entry from us: what we hold is to be read again.
    ``explained`` makes words of what it said, with what would mend that.
    """

    def __init__(
        self,
        settings: AgentSettings,
        agent_id: str,
        bells: Bells,
        look_again: Callable[[], None],
        explained: Callable[[Exception], str],
    ) -> None:
        self.settings = settings
        self.agent_id = agent_id
        self.bells = bells
        self.keeper = settings.keeper
        self.given_up = threading.Event()
        """Set when the process ends and replies that could not be sent are lost with it."""
        self.ending = threading.Event()
        """Set when streams of events are to end at their next event boundary."""
        self.stopping = threading.Event()
        """Set when nothing more is to be begun."""
        self.bridge = Bridge()
        self._replays = Replays()
        self._refused = 0
        self._look_again = look_again
        self._explained = explained
        self._kept: Counter[str] = Counter()
        self.multiprocess = settings.workers > 1
        self.multithread = settings.threads > 1

    def decode(self, entry: Entry, channel: Channel) -> Request | None:
        """The request of an entry; an unreadable one is buried."""
        try:
            signature = self._check_signature(entry)
            request = wire.decode_request(entry.fields, max_body=wire.MAX_BODY)
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
            self._bury_unreadable(entry, channel, error)
            return None

    def _bury_unreadable(self, entry: Entry, channel: Channel, error: WireError) -> None:
        if self._bury(entry, channel, str(error)):
            log.error("an entry on %s is not ours: %s", entry.served.keys.requests, error)

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
        on_stream: OnStream,
    ) -> Ending:
        """Run the app and send what it answers, unless there is a reason not to begin; raises nothing."""
        outbox = self._outbox(entry, request, channel, running, on_stream)
        ran = False
        try:
            reason = self._hand_back(entry, request, outbox)
            if reason:
                outbox.finish([Failure(request.attempt, 0, NOT_RUN, reason)])
                return Ending.SETTLED
            if request.inbound == WEBSOCKET and not outbox.become_stream():
                refuse(request, outbox, f"it has as many as it takes ({self.settings.streams})")
                return Ending.SETTLED
            ran = True
            environ = build_environ(
                request, errors=sys.stderr, multithread=self.multithread, multiprocess=self.multiprocess
            )
            if request.inbound == BODY:
                environ["wsgi.input"] = io.BufferedReader(
                    InboundBody(request, entry, outbox, running), wire.MAX_CHUNK
                )
            if request.inbound == WEBSOCKET:
                upgrade(entry, request, outbox, environ, self.bridge, self.settings.message_limit)
            else:
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
            self._refused_by_broker(error, outbox, ran=ran)
        finally:
            outbox.retire()
            self.bells.forget(request.id)
        if outbox.settled:
            return Ending.SETTLED
        if ran:
            return Ending.RAN
        if (signature := signature_of(entry.fields)) is not None:
            self._replays.forgive(signature)
        return Ending.UNTOUCHED

    def plain(self, entry: Entry) -> wire.Plain | None:
        """An entry that :meth:`run_with_lead` may run; for any other there is :meth:`decode` and :meth:`run`."""
        if entry.done or entry.served.seals or self.stopping.is_set():
            return None
        plain = wire.peek_plain(entry.fields)
        if plain is None or (time.monotonic() - entry.read_at) * 1000 + entry.age > plain.ttl:
            return None
        return plain

    def run_with_lead(
        self,
        entry: Entry,
        plain: wire.Plain,
        channel: Channel,
        running: Running,
        on_stream: OnStream,
        lead: Lead[Post],
    ) -> Ending:
        """Run the app in the thread that has the lead, which it may lose meanwhile; raises nothing."""
        try:
            environ = plain_environ(
                plain, errors=sys.stderr, multithread=self.multithread, multiprocess=self.multiprocess
            )
        except WireError as error:
            self._bury_unreadable(entry, channel, error)
            return Ending.UNTOUCHED

        def open_outbox() -> Outbox:
            request = wire.decode_request(entry.fields, max_body=wire.MAX_BODY)
            return self._outbox(entry, request, channel, running, on_stream)

        sink = Prompt(entry, plain, self.agent_id, running, lead, open_outbox)
        try:
            respond(
                entry.served.app, environ, sink, method=plain.method, reply_limit=self.settings.reply_limit
            )
        except Cancelled:
            pass
        except redis.exceptions.RedisError as error:
            assert sink.outbox is not None
            self._refused_by_broker(error, sink.outbox, ran=True)
        finally:
            if sink.outbox is not None:
                sink.outbox.retire()
                self.bells.forget(plain.id)
        if sink.is_left:
            return Ending.LEFT
        return Ending.SETTLED if sink.outbox is not None and sink.outbox.settled else Ending.RAN

    def hand_in(self, post: Post, request: Request, channel: Channel, running: Running) -> Ending:
        """Send a whole reply that the broker did not take, again until it does; raises nothing."""
        outbox = self._outbox(post.entry, request, channel, running, lambda: None)
        try:
            error = post.error
            if isinstance(error, redis.exceptions.ResponseError) and not (
                isinstance(error, redis.exceptions.NoScriptError) or passing(error.status_code or str(error))
            ):
                raise error  # it may have been carried out in part: the answer to another try would be another
            outbox.finish([post.reply])
        except Cancelled:
            pass
        except redis.exceptions.RedisError as error:
            self._refused_by_broker(error, outbox, ran=True)
        return Ending.SETTLED if outbox.settled else Ending.RAN

    def _outbox(
        self,
        entry: Entry,
        request: Request,
        channel: Channel,
        running: Running,
        on_stream: OnStream,
    ) -> Outbox:
        return Outbox(
            channel, entry, request, self.agent_id,
            window=self.settings.window, bells=self.bells, running=running,
            keeper=self.keeper, given_up=self.given_up, ending=self.ending, on_stream=on_stream,
        )  # fmt: skip

    def _refused_by_broker(self, error: redis.exceptions.RedisError, outbox: Outbox, *, ran: bool) -> None:
        said = self._explained(error)
        if ran:
            log.error("the reply to %s was refused by the broker: %s", outbox.request_id, said)
            self._confess(outbox)
        else:
            self._keep("a request could not be handed back: %s", said)

    def _confess(self, outbox: Outbox) -> None:
        """What the broker refuses for good may be the reply and not its end: nobody is to wait for nothing."""
        with suppress(Cancelled, redis.exceptions.RedisError):
            outbox.fail("agent-lost", "it ran, and the broker refused its reply")

    def _keep(self, message: str, *details: object) -> None:
        """An entry stays ours and pending, and is looked at again: say so, and not each time."""
        self._kept[message] += 1
        if worth_saying(self._kept[message]):
            log.error(message, *details)
        self._look_again()

    def forget(self, entry: Entry, channel: Channel) -> bool:
        """Remove an entry that this process has run before.

        Nobody has to be told: its reply was sent then, or its gateway sees that the entry is gone.
        """
        keys = entry.served.keys
        try:
            channel.script("withdraw", [keys.requests], [GROUP, entry.entry_id])
        except (*Unavailable, redis.exceptions.RedisError) as error:
            self._keep("an entry that was run before could not be removed: %s", error)
            return False
        return True

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
        age = waited
        with suppress(redis.exceptions.NoPermissionError):
            age = max(waited, outbox.broker_time() - entry_time(entry.entry_id))
        return "it waited past its deadline" if age > request.ttl else ""

    def _bury(self, entry: Entry, channel: Channel, reason: str, *, signed: bool = True) -> bool:
        """As :func:`bury`; whether it is."""
        try:
            bury(entry, channel, self.agent_id, reason, signed=signed)
        except (*Unavailable, redis.exceptions.RedisError) as error:
            self._keep("an entry that is not ours could not be buried: %s", error)
            return False
        return True
