"""One exchange: from the XADD of its request to the last frame of its reply.

Rules of this module:

* A request is sent once. Whatever happens to the connection, it is never sent again.
* ``executed: "no"`` comes from a command that was surely not sent, or from the withdraw script, and from
  nowhere else.
* The list is the truth. A doorbell only says when to look at it; a ring that carries a frame saves that look.
* The list is trimmed after its frames were handed over, never before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from flaskbus import errors, wire
from flaskbus.keys import GROUP, MountKeys
from flaskbus.messages import Chunk, End, Failure, Frame, Head, Reply, Request
from flaskbus_gateway.inbox import Inbox
from flaskbus_gateway.link import Answer, AnswerError, Link, LinkDown, LinkError, LinkLost

if TYPE_CHECKING:
    from flaskbus_gateway.directory import MountState
    from flaskbus_gateway.switchboard import Switchboard

BATCH = 16
"""Frames that one look at a list takes."""


class ClientGone(Exception):
    """The client went away; nobody waits for an answer."""


class Exchange:
    """A request and its frames, owned by the task that serves the client.

    Every method that waits raises a :class:`~flaskbus.errors.BusError` where the bus ends the exchange, and
    :class:`ClientGone` after :meth:`abandon`.
    """

    __slots__ = (
        "_board",
        "_dirty",
        "_expired",
        "_failure",
        "_fetching",
        "_inbox",
        "_look_again",
        "_waiter",
        "adrift",
        "agent",
        "ended",
        "entry_id",
        "gone",
        "has_head",
        "holding",
        "request",
        "started",
        "state",
    )

    def __init__(self, board: Switchboard, state: MountState, request: Request) -> None:
        self._board = board
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
        self._inbox = Inbox(request.attempt, board.max_frame)
        self._waiter: asyncio.Future[None] | None = None
        self._failure: errors.BusError | None = None
        self._dirty = False  # something may lie on the list
        self._fetching = False
        self._look_again = False
        self._expired = False

    @property
    def attempt(self) -> int:
        return self._inbox.attempt

    # Sending

    async def send(self) -> None:
        """Put the request on the stream of its mount."""
        # A stream without its group would take requests that nobody can read.
        command = ("XADD", self.state.keys.requests, "NOMKSTREAM", "*", *wire.encode_request(self.request))
        board = self._board
        deadline = self.started + board.BROKER_WAIT
        while True:
            try:
                self.entry_id = await board.link.call(*command)
            except LinkLost:
                # It may be in the stream: the reply, or a look at the stream, will tell.
                self._dirty = self.adrift = True
                return
            except LinkDown as error:
                if board.now() > deadline:
                    raise errors.BrokerUnavailable(str(error), retry_after=1) from None
                await board.link_up()
                continue
            except AnswerError as error:
                raise _refused(error) from None
            if self.entry_id is not None:
                return
            # The stream is gone: forgotten by everybody, or by a broker that lost its data and hears of it soon.
            if board.now() > deadline:
                raise errors.UnknownMount(f"{self.state.mount.name} is no longer mounted")
            await board.directory.fresh()
            if self.state.mount not in board.directory.states:
                raise errors.UnknownMount(f"{self.state.mount.name} is no longer mounted")

    # Receiving

    async def frame(self, timeout: float) -> Frame:
        """The next frame, within ``timeout`` seconds from now; :class:`TimeoutError` where none came."""
        if not self._inbox.frames:
            await self._wait(timeout)
        return self._pop()

    def _pop(self) -> Frame:
        frame = self._inbox.frames.popleft()
        self.ended = isinstance(frame, (Reply, End, Failure))
        return frame

    async def head(self) -> Head | Reply:
        """The reply's head, or the whole reply; settles the request's fate where none comes in time."""
        settings = self._board.settings
        self.holding = not self.state.alive
        if self.holding and self.state.failing:
            # An agent that starts may have come since the last look.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._board.directory.fresh(), self._board.SWEEP)
            self.holding = not self.state.alive
        while True:
            limit = settings.hold if self.holding else settings.head_timeout
            try:
                if self.holding and self.state.failing:
                    raise TimeoutError
                frame = await self.frame(max(0.0, self.started + limit - self._board.now()))
            except TimeoutError:
                if self.holding and self.state.alive:
                    self.holding = False
                    continue
                frame = await self._settle()
            if isinstance(frame, (Head, Reply)):
                self.has_head = True
                if isinstance(frame, Head):
                    self.agent = frame.agent
                return frame
            if isinstance(frame, Failure):
                raise errors.AgentLost(frame.detail)
            raise errors.AgentLost("the agent sent a body without a head")

    async def _settle(self) -> Frame:
        """The deadline has passed: take the request back, and say what is certain.

        Returns a frame where one came at the last moment.
        """
        waited = self._board.now() - self.started
        outcome = await self.withdraw()
        if outcome == "finished":
            await self._fetch()
            if self._inbox.frames:
                return self._pop()
        if outcome == "undelivered":
            if self.state.failing and not self.state.alive:
                raise errors.NoAgent(
                    f"the agents of {self.state.mount.name} fail to start: {self.state.failing}",
                    retry_after=5,
                )
            if self.holding:
                raise errors.NoAgent(
                    f"no agent of {self.state.mount.name} came within {waited:.1f} s", retry_after=5
                )
            raise errors.DeadlineBeforeStart(
                f"no agent of {self.state.mount.name} was free within {waited:.1f} s", retry_after=1
            )
        raise errors.DeadlineAfterDelivery(
            f"{self.state.mount.name} has not answered within {waited:.1f} s"
            if outcome == "delivered"
            else f"what became of the request cannot be told ({outcome})"
        )

    async def withdraw(self) -> str:
        """Take the request back: an outcome of the withdraw script, or ``"unreachable"``."""
        link, keys = self._board.link, self.state.keys
        try:
            entry_id = self.entry_id or await self._locate()
            if entry_id is None:
                return "finished"
            self._dirty = True  # a reply may arrive until the script has run
            outcome: bytes = await asyncio.wait_for(
                link.script("withdraw", [keys.requests], [GROUP, entry_id]), self._board.BROKER_WAIT
            )
            return outcome.decode()
        except (LinkError, AnswerError, TimeoutError):
            return "unreachable"

    async def _locate(self) -> bytes | None:
        """The entry of a request whose XADD was not answered, or ``None`` where it is not in the stream."""
        return (await locate(self._board.link, self.state.keys, {self.request.id})).get(self.request.id)

    async def settle_adrift(self, entry_id: bytes | None) -> None:
        """The stream was looked at: the request has this entry, or none."""
        self.entry_id, self.adrift = entry_id, entry_id is None
        if self.adrift and not await self.has_news():
            self.fail(errors.AgentLost("the connection to the broker broke, and the request is not there"))

    # What the switchboard calls

    def ring(self, frame: bytes | None) -> None:
        """The doorbell rang; ``frame`` is the complete reply, where it was small enough."""
        self._dirty = True
        if frame is not None and not self._fetching:
            self._inbox.take_rung(frame)
            self._wake()
        else:
            self.look()

    def look(self) -> None:
        """Fetch what is new on the list, once the client has taken what was fetched before."""
        if self._fetching:
            self._look_again = True
        elif not self.gone:
            self._fetching = True
            self._board.spawn(self._look())

    def abandon(self) -> None:
        """The client is gone."""
        self.gone = True
        self._wake()

    def poke(self) -> None:
        """Let a held exchange look at its mount again."""
        if self.holding and self.state.failing:
            self._wake()

    def runs_again(self, entry_id: bytes) -> None:
        """Another agent may take it: what the first one still sends is not for the client."""
        self.entry_id = entry_id
        self._inbox.next_attempt()
        # Its reply may be there already: what rings before we know of the attempt is not taken.
        self.look()

    def fail(self, error: errors.BusError) -> None:
        """End the exchange, unless what already lies in hand does."""
        self._failure = error
        self._wake()

    async def has_news(self) -> bool:
        """Whether something lies in hand or on the list."""
        self._dirty = True
        if not self._inbox.frames and not self._fetching:
            await self._fetch()
            self._wake()
        # Where the link broke meanwhile, nothing was seen.
        return bool(self._inbox.frames) or self._fetching or self.ended or not self._board.link.up.is_set()

    # Inside

    async def _wait(self, timeout: float) -> None:
        """Until a frame is there."""
        loop = self._board.loop
        timer = None
        try:
            while not self._inbox.frames:
                if self.gone:
                    raise ClientGone
                if self._failure is not None:
                    raise self._failure
                if self.holding and self.state.failing:
                    raise TimeoutError
                if timer is None:
                    self._expired = False
                    timer = loop.call_later(timeout, self._expire)
                elif self._expired:
                    raise TimeoutError
                self._waiter = loop.create_future()
                await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _look(self) -> None:
        try:
            await self._fetch()
        finally:
            self._fetching = False
            self._wake()
        self._look_on()

    def _look_on(self) -> None:
        """There was more than one look could take, or the bell rang meanwhile."""
        if self._look_again and not self._fetching and len(self._inbox.frames) < BATCH:
            self._look_again = False
            self.look()

    async def _fetch(self) -> None:
        link, key = self._board.link, self.state.keys.reply(self.request.id)
        start, attempt = self._inbox.seen, self.attempt
        try:
            elements: list[bytes] = await link.call("LRANGE", key, start, start + BATCH - 1)
        except (LinkError, AnswerError):
            return  # the sweep looks again
        if attempt != self.attempt:
            self._look_again = True  # it was another run's list
            return
        self._inbox.take_listed(elements)
        if len(elements) == BATCH:
            self._look_again = True

    # Handing over

    def handed_over(self, frames: int) -> None:
        """The client's transport took these frames: trim them, and give the agent credit for them."""
        link, keys, inbox = self._board.link, self.state.keys, self._inbox
        inbox.handed_over(frames)
        if inbox.done >= BATCH // 2 or not inbox.frames:
            link.tell("LTRIM", keys.reply(self.request.id), inbox.trimmed(), -1)
            if self.agent:
                link.tell("PUBLISH", keys.doorbell(self.agent), self.request.id)
        self._look_on()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._dirty or self.has_head:
            self._board.discard(self.state, self.state.keys.reply(self.request.id))

    async def chunks(self) -> list[Frame]:
        """At least one further frame, and whatever else is in hand; raises where the stream broke.

        What came before it broke is given first: the client is to see as much as there was.
        """
        try:
            frames: list[Frame] = [await self.frame(self._board.settings.idle_timeout)]
        except TimeoutError:
            raise errors.DeadlineAfterDelivery("the stream was silent for too long") from None
        while self._inbox.frames and not self.ended and not isinstance(self._inbox.frames[0], Failure):
            frames.append(self._pop())
        for frame in frames:
            if isinstance(frame, Failure):
                raise errors.AgentLost(frame.detail)
            if not isinstance(frame, (Chunk, End)):
                raise errors.AgentLost("the agent sent a second head")
        return frames


async def locate(link: Link, keys: MountKeys, wanted: Collection[str]) -> dict[str, bytes]:
    """The entries of requests by their correlation ids, as far as they are in the stream."""
    found: dict[str, bytes] = {}
    end = "+"
    while True:
        entries: list[Answer] = await link.call("XREVRANGE", keys.requests, end, "-", "COUNT", 500)
        for entry_id, fields in entries:
            request_id = wire.peek_id(fields)
            if request_id is not None and request_id in wanted:
                found[request_id] = bytes(entry_id)
        if len(entries) < 500 or len(found) == len(wanted):
            return found
        end = "(" + entries[-1][0].decode()


def _refused(error: AnswerError) -> errors.BusError:
    """An XADD that the broker answered with an error was not carried out."""
    if error.code == "OOM":
        return errors.BrokerFull(str(error), retry_after=5)
    return errors.BrokerUnavailable(str(error), retry_after=1)
