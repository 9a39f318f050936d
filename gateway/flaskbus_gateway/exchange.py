"""One exchange: from the XADD of its request to the last frame of its reply.

Rules of this module:

* An attempt is sent once. Whatever happens to the connection, it is never sent again.
* ``executed: "no"`` comes from a command that was surely not sent, from the withdraw script, or from an agent
  that ended the request without running it, and from nowhere else.
* What an agent says that it did not run is sent again, as the next attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flaskbus import errors, wire
from flaskbus.keys import GROUP
from flaskbus.messages import (
    FINAL_FRAMES,
    NOT_RUN,
    WEBSOCKET,
    Chunk,
    Close,
    End,
    Failure,
    Frame,
    Head,
    Message,
    Reply,
    Request,
)
from flaskbus_gateway.http import Receive
from flaskbus_gateway.inbound import ClientLeft, Inbound
from flaskbus_gateway.link import Answer, AnswerError, LinkError, LinkLost
from flaskbus_gateway.replies import ReplyList
from flaskbus_gateway.sending import send
from flaskbus_gateway.waiting import Waiter

if TYPE_CHECKING:
    from flaskbus_gateway.directory import MountState
    from flaskbus_gateway.switchboard import Switchboard


class ClientGone(Exception):
    """The client went away; nobody waits for an answer."""


class StreamEnded(Exception):
    """The response ends here, before the app ends it."""


class Exchange:
    """A request and its frames, owned by the task that serves the client.

    Every method that waits raises a :class:`~flaskbus.errors.BusError` where the bus ends the exchange, and
    :class:`ClientGone` after :meth:`abandon`.
    """

    __slots__ = (
        "_board",
        "_failure",
        "_pump",
        "_taker",
        "_waiter",
        "adrift",
        "agent",
        "doubtful",
        "earlier_runs",
        "ended",
        "entry_id",
        "given_up",
        "gone",
        "has_head",
        "holding",
        "inbound",
        "record",
        "replies",
        "request",
        "seal",
        "started",
        "state",
    )

    def __init__(self, board: Switchboard, state: MountState, request: Request) -> None:
        self._board = board
        self._waiter = Waiter(board.loop)
        self.state = state
        self.request = request
        self.started = board.now()
        self.entry_id: bytes | None = None
        self.agent = ""
        self.has_head = False
        self.ended = False
        self.gone = False
        self.holding = False
        self.adrift = False
        """Whether the answer to the XADD was lost, and it is not known yet if the broker has the request."""
        self.given_up = False
        """Whether nobody waits for its reply any more, and it is to be taken back."""
        self.earlier_runs = 0
        """How many attempts before this one may have run."""
        self.doubtful = False
        """Whether the broker was started anew since it was sent: what it says now may be what it knew before."""
        self.record = (state.keys.idempotent(request.idempotency),) if request.idempotency else ()
        """The key of the record of its Idempotency-Key, for the scripts that take one."""
        self.seal = state.seal.frames(request.id, request.idempotency) if state.seal else None
        """Signs what goes to the agent, and checks what comes from it."""
        self.replies = ReplyList(
            board.link,
            state.keys.reply(request.id),
            attempt=request.attempt,
            max_frame=board.max_frame,
            spawn=board.spawn,
            on_news=self._waiter.wake,
            is_signed=None if self.seal is None else self.seal.is_signed,
        )
        self.inbound: Inbound | None = None
        """What the client sends after its request."""
        self._taker = ""  # who asked for that before there was any
        self._pump: asyncio.Task[None] | None = None
        self._failure: errors.BusError | StreamEnded | None = None

    @property
    def attempt(self) -> int:
        """The attempt that counts now, from 1."""
        return self.replies.attempt

    @property
    def distrust(self) -> str:
        """Why answers that came were not believed; empty where none came, or all were."""
        if not self.replies.forged:
            return ""
        name = self.state.mount.whole.name
        return f"an answer came that was not signed as it should be; do the agents of {name} have the key of {name}?"

    # Sending

    async def send(self, begun: asyncio.Future[Answer] | None = None) -> None:
        """Put the request on the stream of its mount; what has ``begun`` already is the broker's answer to that."""
        try:
            sent = await send(self._board, self.state, self.request, begun)
        except LinkLost:
            # It may be in the stream: the reply, or a look at the stream, will tell.
            self.replies.dirty = self.adrift = True
        except errors.BusError:
            self.ended = True  # it is not there: there is nothing to take back
            raise
        else:
            if isinstance(sent, Reply):
                self.replies.frames.append(sent)
            else:
                self.entry_id = sent

    async def await_entry(self, sent: asyncio.Future[Answer]) -> None:
        """Wait until the broker has answered the request, or the link broke; not to be sent again."""
        await asyncio.wait((sent,))
        if not sent.cancelled() and sent.exception() is None:
            self.entry_id = self.entry_id or sent.result()
        else:
            self.replies.dirty = True  # it may be there, and answered

    # Receiving

    async def frame(self, timeout: float) -> Frame:
        """The next frame, within ``timeout`` seconds from now; :class:`TimeoutError` where none came."""
        if not self.replies.frames:
            await self._waiter.wait(timeout, self._is_there)
        return self._pop()

    def _pop(self) -> Frame:
        frame = self.replies.frames.popleft()
        self.ended = isinstance(frame, FINAL_FRAMES)
        return frame

    async def head(self) -> Head | Reply:
        """The reply's head, or the whole reply; settles the request's fate where none comes in time."""
        try:
            return await self._head()
        except errors.NotExecuted as error:
            # True of this attempt, which may not be the first.
            if self.earlier_runs or self.doubtful:
                error.executed = "unknown"
            raise

    async def _head(self) -> Head | Reply:
        settings = self._board.settings
        self.holding = not self.state.alive
        if self._is_hopeless:
            # An agent that starts may have come since the last look.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._board.directory.fresh(), self._board.SWEEP)
            self.holding = not self.state.alive
        while True:
            limit = settings.hold if self.holding else settings.head_timeout
            left = self._last_progress + limit - self._board.now()
            try:
                if self._is_hopeless:
                    raise TimeoutError
                frame = await self.frame(max(0.0, left))
            except TimeoutError:
                if not self._is_hopeless and self._last_progress + limit > self._board.now():
                    continue  # the body went on meanwhile
                if self.holding and self.state.alive:
                    self.holding = False
                    continue
                frame = await self._settle()
            if isinstance(frame, Failure) and frame.code == NOT_RUN:
                await self._send_again(frame.detail)
                continue
            if isinstance(frame, (Head, Reply)):
                self.has_head = True
                if isinstance(frame, Head):
                    self.agent = frame.agent
                    self.replies.took(1)
                return frame
            if isinstance(frame, Failure):
                raise errors.AgentLost(frame.detail)
            raise errors.AgentLost("the agent sent a body without a head")

    @property
    def _last_progress(self) -> float:
        """When the client or the app last did what the reply has to wait for (monotonic seconds)."""
        return self.started if self.inbound is None else max(self.started, self.inbound.progress)

    async def _send_again(self, reason: str) -> None:
        """An agent ended the request without running it: it stops, or found it too old.

        Too old by the broker's clock, which may have jumped; what counts is this process's own.
        """
        settings, name = self._board.settings, self.state.mount.whole.name
        waited = self._board.now() - self.started
        if waited >= (settings.head_timeout if self.state.alive else settings.hold):
            raise errors.DeadlineBeforeStart(
                f"no agent of {name} ran the request within {waited:.1f} s: {reason}", retry_after=1
            )
        self.ended, self.entry_id, self.adrift, self._failure = False, None, False, None
        self.replies.next_attempt()
        # Else its list would look as if an answer was on its way.
        self._board.link.tell("DEL", self.replies.key)
        ttl = math.ceil(1000 * (settings.longest_wait - waited))
        self.request = replace(self.request, attempt=self.attempt, ttl=ttl)
        self.holding = not self.state.alive
        await self.send()

    async def _settle(self) -> Frame:
        """The deadline has passed: take the request back, and say what is certain.

        Returns a frame where one came at the last moment.
        """
        name, waited = self.state.mount.whole.name, self._board.now() - self.started
        outcome = await self.withdraw()
        if outcome == "finished":
            await self.replies.fetch()
            if self.replies.frames:
                return self._pop()
        if outcome == "undelivered":
            if self.state.removed:
                raise errors.UnknownMount(f"{name} is no longer mounted")
            if self.state.failing and not self.state.alive:
                raise errors.NoAgent(
                    f"the agents of {name} fail to start: {self.state.failing}",
                    retry_after=5,
                )
            if self.holding:
                raise errors.NoAgent(f"no agent of {name} came within {waited:.1f} s", retry_after=5)
            raise errors.DeadlineBeforeStart(
                f"no agent of {name} was free within {waited:.1f} s", retry_after=1
            )
        raise errors.DeadlineAfterDelivery(
            f"{name} has not answered within {waited:.1f} s"
            if outcome == "delivered"
            else self.distrust or f"what became of the request cannot be told ({outcome})"
        )

    async def withdraw(self) -> str:
        """Take the request back: an outcome of the withdraw script, or ``"unreachable"``."""
        link, keys = self._board.link, self.state.keys
        try:
            entry_id = self.entry_id or await self._locate()
            if entry_id is None:
                return "finished"
            self.replies.dirty = True  # a reply may arrive until the script has run
            outcome: bytes = await asyncio.wait_for(
                link.script("withdraw", [keys.requests, *self.record], [GROUP, entry_id]),
                self._board.BROKER_WAIT,
            )
            return outcome.decode()
        except (LinkError, AnswerError, TimeoutError):
            return "unreachable"

    async def find_agent(self) -> None:
        """After :meth:`withdraw`: who took a WebSocket's handshake while its client left; nobody else says so."""
        if self.request.inbound != WEBSOCKET or self.agent:
            return
        await self.replies.fetch()
        self.agent = next((frame.agent for frame in self.replies.frames if isinstance(frame, Head)), "")

    def call_off(self) -> None:
        """After :meth:`withdraw`: let its agent know at once."""
        if self.inbound is not None and self.request.inbound == WEBSOCKET:
            self.inbound.call_off(self.agent)
        else:
            self._board.link.tell("PUBLISH", self.state.keys.doorbell(self.agent), self.request.id)

    async def _locate(self) -> bytes | None:
        """The entry of a request whose XADD was not answered, or ``None`` where it is not in the stream."""
        return await self._board.locator.find(self.state.keys, self.request.id)

    async def settle_adrift(self, entry_id: bytes | None) -> None:
        """The stream was looked at: the request has this entry, or none."""
        if not self.adrift:
            return  # that was settled meanwhile
        self.entry_id, self.adrift = entry_id, entry_id is None
        if self.adrift and not await self.has_news():
            self.fail(errors.AgentLost("the connection to the broker broke, and the request is not there"))

    # The rest of the body

    def send_rest(
        self, receive: Receive, received: int, is_lost: Callable[[], bool], then: Callable[[], None]
    ) -> None:
        """Begin to send what ``receive`` has left of the body; ``then`` is called when that was all of it.

        ``is_lost`` says whether the client's connection is.
        """
        inbound = self.open_inbound()
        inbound.is_lost = is_lost
        self.pump(lambda: self._send_rest(inbound, receive, received, then))

    def pump(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let ``work`` send what the client has, until the exchange is closed; that may be before it begins."""
        self._pump = self._board.spawn(self._pumped(work))

    async def _pumped(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except AnswerError as error:
            self.fail(errors.AgentLost(f"what the client sent could not be passed on: {error}"))

    def open_inbound(self) -> Inbound:
        """The list of what the client sends after its request."""
        link, keys, seal = self._board.link, self.state.keys, self.seal

        def ring(agent: str, element: bytes) -> None:
            link.tell("PUBLISH", keys.doorbell(agent), wire.encode_ring(self.request.id, element))

        self.inbound = Inbound(
            link,
            keys.inbound(self.request.id),
            window=self._board.settings.window,
            ring=ring,
            sign=None if seal is None else seal.sign,
        )
        if self._taker:
            self.inbound.taken(self._taker)
        return self.inbound

    async def _send_rest(
        self, inbound: Inbound, receive: Receive, received: int, then: Callable[[], None]
    ) -> None:
        settings = self._board.settings
        try:
            await inbound.push_body(
                receive,
                received=received,
                limit=settings.body_limit,
                timeout=settings.body_timeout,
                is_answering=lambda: self.has_head,
            )
        except ClientLeft as error:
            await inbound.push_failure(error)
            self.abandon()
        except errors.BusError as error:
            if self.has_head:
                # It is late to answer otherwise, and the app may not want the rest.
                await inbound.push_failure(error)
                then()
                return
            outcome = await self.withdraw()
            if outcome == "finished":
                self.look()  # the app did not wait for the rest, and its answer is there
                return
            if outcome == "delivered":
                # Not before: an app may answer that its read failed, and this is for the client to hear from us.
                await inbound.push_failure(error)
            if outcome != "undelivered" or self.earlier_runs or self.doubtful:
                error.executed = "unknown"
            self.fail(error)
        else:
            then()

    def taken(self, agent: str) -> None:
        """The agent that runs it has taken inbound frames, or waits for them."""
        if self.inbound is not None:
            self.inbound.taken(agent)
        else:
            self._taker = agent  # faster than the broker's answer to the request itself
        self.look()

    # What the switchboard calls

    def ring(self, frame: bytes | None) -> None:
        """The doorbell rang; see :meth:`ReplyList.ring`."""
        self.replies.ring(frame)

    def look(self) -> None:
        """Fetch what is new on the list."""
        if not self.gone:
            self.replies.look()

    def abandon(self) -> None:
        """The client is gone."""
        self.gone = True
        self._waiter.wake()

    def forget_request(self) -> None:
        """It is not sent again: what it holds may be large, and the broker long away."""
        self.request = replace(self.request, headers=(), body=b"")
        self.given_up = True

    def poke(self) -> None:
        """Let a held exchange look at its mount again."""
        if self._is_hopeless:
            self._waiter.wake()

    def runs_again(self, entry_id: bytes) -> None:
        """Another agent may take it: what the first one still sends is not for the client."""
        self.entry_id = entry_id
        self.earlier_runs += 1
        self.replies.next_attempt()
        # Its reply may be there already: what rings before we know of the attempt is not taken.
        self.look()

    def fail(self, error: errors.BusError | StreamEnded) -> None:
        """End the exchange, unless what already lies in hand does."""
        self._failure = error
        self._waiter.wake()

    async def has_news(self) -> bool:
        """Whether something lies in hand or on the list, or the exchange has ended."""
        return await self.replies.has_news() or self.ended

    # Inside

    def _is_there(self) -> bool:
        """Whether a frame is; raises where none is to be waited for."""
        if self.replies.frames:
            return True
        if self.gone:
            raise ClientGone
        if self._failure is not None:
            raise self._failure
        if self._is_hopeless and not self.has_head:
            raise TimeoutError
        return False

    @property
    def _is_hopeless(self) -> bool:
        """Whether no agent will come for what waits."""
        return self.state.removed or (self.holding and bool(self.state.failing))

    # Handing over

    def handed_over(self, frames: int, size: int) -> None:
        """The client's transport took these frames, of ``size`` bytes together: the agent has credit for them."""
        if self.replies.handed_over(frames, size) and self.agent:
            self._board.link.tell("PUBLISH", self.state.keys.doorbell(self.agent), self.request.id)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._pump is not None:
            self._pump.cancel()
        if self.inbound is not None:
            self.inbound.close()
            self._board.discard(self.state, self.state.keys.inbound(self.request.id))
        if self.replies.dirty or self.has_head:
            self._board.discard(self.state, self.replies.key)

    async def chunks(self) -> list[Frame]:
        """At least one further frame, and whatever else is in hand; raises where the stream broke.

        What came before it broke is given first: the client is to see as much as there was.
        """
        left = limit = self._board.settings.idle_timeout
        while True:
            try:
                frames: list[Frame] = [await self.frame(left)]
                break
            except TimeoutError:
                left = self._last_progress + limit - self._board.now()  # the app may read meanwhile
                if left <= 0.0:
                    raise errors.DeadlineAfterDelivery("the stream was silent for too long") from None
        while self.replies.frames and not self.ended and not isinstance(self.replies.frames[0], Failure):
            frames.append(self._pop())
        for frame in frames:
            if isinstance(frame, Failure):
                raise errors.AgentLost(frame.detail)
            if not isinstance(frame, (Chunk, End)):
                raise errors.AgentLost("the agent sent a second head")
        return frames

    async def messages(self) -> list[Frame]:
        """At least one further message of a WebSocket, or its close, and whatever else is in hand.

        It may be silent for as long as it likes.
        """
        while True:
            try:
                frames = [await self.frame(self._board.settings.idle_timeout)]
                break
            except TimeoutError:
                self.replies.tidy()
                if self.inbound is not None:
                    self.inbound.keep()
        while self.replies.frames and not self.ended:
            frames.append(self._pop())
        for frame in frames:
            if not isinstance(frame, (Message, Close)):
                raise errors.AgentLost(
                    frame.detail if isinstance(frame, Failure) else "no message of a WebSocket"
                )
        return frames
