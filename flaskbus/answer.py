"""The answer to a request that was sent straight through the bus, frame by frame; synchronous.

The same rules as in the gateway's exchange: a request is sent once; ``executed: "no"`` comes from a command
that was surely not sent or from the withdraw script; the list is the truth and a doorbell only a hint; the
list is trimmed after its frames were handed over. Only a gateway runs a request again: here it ends with its
agent.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import redis

from flaskbus import errors, wire
from flaskbus.broker import run_script
from flaskbus.keys import GROUP, MountKeys
from flaskbus.messages import FINAL_FRAMES, NOT_RUN, Chunk, End, Failure, Frame, Head, Headers, Reply, Request
from flaskbus.routing import Mount

if TYPE_CHECKING:
    from flaskbus.client import BusClient

BATCH = 16
"""Frames that one look at a list takes."""

POLL = 1.0
"""Seconds after which the list is looked at without a ring."""

Away = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)


class Answer:
    """A reply whose head is there; iterate for the bytes of its body, as they come.

    To be used with ``with``: whatever was not read to its end is withdrawn, and nothing is left behind.
    """

    def __init__(self, bus: BusClient, mount: Mount, request: Request, idle_timeout: float) -> None:
        self.mount = mount
        self.status = 0
        self.headers: Headers = ()
        self._bus = bus
        self._client = bus.client
        self._keys: MountKeys = bus.keys.of(mount.key)
        self._list = self._keys.reply(request.id)
        self._request = request
        self._idle_timeout = idle_timeout
        self._bell = Bell(bus.client, self._keys.doorbell(bus.process))
        self._max_frame = wire.max_frame(bus.settings.reply_limit)
        self._seal = bus.seal_of(mount.whole.key)
        self._is_signed = self._seal.frames(request.id).is_signed if self._seal else None
        self._forged = False
        self._entry_id: bytes | None = None
        self._sent = False
        self._agent = ""
        self._frames: deque[Frame] = deque()
        self._seq = 0
        self._seen = 0  # elements at the front of the list that were handed over
        self._body = b""
        self._ended = False

    def open(self, timeout: float) -> None:
        """Send, and wait for the head for ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self._bell.listen()
        self._send()
        while (frame := self._next(min(POLL, deadline - time.monotonic()))) is None:
            reason = self._hopeless()
            if reason or time.monotonic() >= deadline:
                frame = self._settle(reason, timeout)
                break
            if self._vanished():
                detail = self._distrust() or "the request is gone: its agent died, or the broker lost it"
                raise errors.AgentLost(detail)
        if isinstance(frame, Failure):
            if frame.code == NOT_RUN:
                raise errors.NoAgent(f"the agent handed the request back: {frame.detail}")
            raise errors.AgentLost(frame.detail)
        if not isinstance(frame, (Head, Reply)):
            raise errors.AgentLost("the agent sent a body without a head")
        self.status, self.headers = frame.status, frame.headers
        if isinstance(frame, Reply):
            self._body = frame.body
        else:
            self._agent = frame.agent

    def __iter__(self) -> Iterator[bytes]:
        """The body; raises :class:`~flaskbus.errors.BusError` where it broke off."""
        if self._body:
            yield self._body
        while not self._ended:
            frame = self._go_on()
            if isinstance(frame, Failure):
                raise errors.AgentLost(frame.detail)
            if isinstance(frame, Chunk):
                yield frame.data
            elif not isinstance(frame, End):
                raise errors.AgentLost("the agent sent a second head")

    def close(self) -> None:
        """Withdraw what has not ended, and remove what lies on the broker."""
        self._bell.close()
        if not self._sent:
            return
        with suppress(redis.exceptions.RedisError):
            if not self._ended:
                self._withdraw()
                if self._agent:
                    self._client.publish(self._keys.doorbell(self._agent), self._request.id)
            self._client.delete(self._list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    # Sending, and taking back

    def _send(self) -> None:
        flat = wire.encode_request(self._request)
        if self._seal is not None:
            flat = self._seal.sign_request(flat, math.ceil(time.time() + self._request.ttl / 1000))
        entry: dict[Any, Any] = dict(zip(flat[::2], flat[1::2], strict=True))
        self._sent = True
        try:
            # Where the stream is gone, a new one would have no group, and nobody to read it.
            self._entry_id = _bytes(self._client.xadd(self._keys.requests, entry, nomkstream=True))
        except Away:
            return  # it may be in the stream: the reply, or the deadline, will tell
        except redis.exceptions.ResponseError as error:
            self._sent = False
            if isinstance(error, redis.exceptions.OutOfMemoryError):
                raise errors.BrokerFull(str(error), retry_after=5) from None
            raise errors.BrokerUnavailable(str(error), retry_after=1) from None
        if self._entry_id is None:
            self._sent = False
            raise errors.NoAgent(f"{self.mount.name} has no queue; its agents make one when they beat next")

    def _hopeless(self) -> str:
        """Why no agent will take the request; empty where one may."""
        if self._agent:
            return ""
        try:
            records = self._bus.registry.agents(self.mount)
        except redis.exceptions.RedisError:
            return ""
        failed = [record.reason for record in records if record.state == "failed"]
        return failed[-1] if failed and all(one.state in ("failed", "stopping") for one in records) else ""

    def _settle(self, reason: str, timeout: float) -> Frame:
        """Take the request back and say what is certain; a frame, where one came at the last moment."""
        outcome = self._withdraw()
        if outcome == "finished":
            frame = self._next(0.0)
            if frame is not None:
                return frame
        name = self.mount.name
        if outcome == "undelivered":
            if reason:
                raise errors.NoAgent(f"the agents of {name} fail to start: {reason}")
            if not self._agents_listed():
                raise errors.NoAgent(f"no agent of {name} came within {timeout:g} s")
            raise errors.DeadlineBeforeStart(f"no agent of {name} was free within {timeout:g} s")
        raise errors.DeadlineAfterDelivery(
            f"{name} has not answered within {timeout:g} s"
            if outcome == "delivered"
            else f"what became of the request cannot be told ({outcome})"
        )

    def _distrust(self) -> str:
        """Why an answer that came was not believed; empty where none came."""
        return f"an answer came that was not signed with the key of {self.mount.name}" if self._forged else ""

    def _agents_listed(self) -> bool:
        with suppress(redis.exceptions.RedisError):
            return bool(self._bus.registry.agents(self.mount))
        return True

    def _withdraw(self) -> str:
        """An outcome of the withdraw script, or ``unreachable``."""
        try:
            entry_id = self._entry_id or self._locate()
            if entry_id is None:
                return "finished"
            outcome: bytes = run_script(self._client, "withdraw", [self._keys.requests], [GROUP, entry_id])
            return outcome.decode()
        except redis.exceptions.RedisError:
            return "unreachable"

    def _locate(self) -> bytes | None:
        """The entry of a request whose XADD was not answered, or ``None`` where it is not in the stream."""
        end = "+"
        while True:
            entries: Any = self._client.xrevrange(self._keys.requests, max=end, count=500)
            for entry_id, fields in entries:
                if fields.get(b"id") == self._request.id.encode():
                    return _bytes(entry_id)
            if len(entries) < 500:
                return None
            end = "(" + entries[-1][0].decode()

    # Receiving

    def _next(self, timeout: float) -> Frame | None:
        """The next frame, or ``None`` where none came within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not self._frames:
            if self._fetch():
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._bell.wait(min(left, POLL))
        frame = self._frames.popleft()
        self._ended = isinstance(frame, FINAL_FRAMES)
        return frame

    def _go_on(self) -> Frame:
        """The next frame of a stream; raises :class:`~flaskbus.errors.BusError` where none will come."""
        deadline = time.monotonic() + self._idle_timeout
        while (frame := self._next(min(POLL, deadline - time.monotonic()))) is None:
            if time.monotonic() >= deadline:
                raise errors.DeadlineAfterDelivery(f"the stream was silent for {self._idle_timeout:g} s")
            if self._vanished():
                raise errors.AgentLost("the stream broke off: its agent died, or the broker lost it")
        return frame

    def _vanished(self) -> bool:
        """Whether the entry is gone and nothing lies on the list: whoever ends a run does both in one script."""
        if self._entry_id is None:
            return False
        try:
            if self._client.xrange(self._keys.requests, self._entry_id, self._entry_id):
                return False
        except redis.exceptions.RedisError:
            return False
        return not self._fetch() and not self._frames

    def _fetch(self) -> bool:
        """Trim what was handed over, which gives the agent credit, and take what is new; was there anything?

        After a lost answer the list may still hold what was taken already; ``seq`` tells.
        """
        try:
            if self._seen:
                seen, self._seen = self._seen, 0
                self._client.ltrim(self._list, seen, -1)
                if self._agent:
                    self._client.publish(self._keys.doorbell(self._agent), self._request.id)
            elements: list[Any] = self._client.lrange(self._list, 0, BATCH - 1)
        except Away:
            return False
        for element in elements:
            self._take(element)
        self._seen = len(elements)
        return bool(elements)

    def _take(self, element: bytes) -> None:
        if self._is_signed is not None and not (len(element) <= self._max_frame and self._is_signed(element)):
            self._forged = True
            return
        try:
            frame = wire.decode_frame(element, max_size=self._max_frame)
        except errors.WireError as error:
            raise errors.AgentLost(f"a frame of the reply is not readable: {error}") from None
        if (frame.attempt, frame.seq) == (self._request.attempt, self._seq):
            self._seq += 1
            self._frames.append(frame)


def _bytes(value: Any) -> bytes | None:
    """redis-py's types allow text, which it gives only where it was asked to decode."""
    return value if isinstance(value, bytes) else None


class Bell:
    """Hears one doorbell on a connection of its own, and does without where that breaks."""

    def __init__(self, client: redis.Redis, channel: str) -> None:
        self._client = client
        self._channel = channel
        self._pubsub: redis.client.PubSub | None = None

    def listen(self) -> None:
        """Subscribe, and wait until the broker has confirmed it."""
        self._pubsub = self._client.pubsub()  # type: ignore[no-untyped-call]
        self._pubsub.subscribe(self._channel)
        self._pubsub.get_message(timeout=5.0)

    def wait(self, seconds: float) -> None:
        """Until it rings, or for some seconds."""
        try:
            if self._pubsub is None:
                self.listen()
            else:
                self._pubsub.get_message(timeout=seconds)
        except Away:
            self.close()
            time.sleep(min(seconds, 0.1))

    def close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
            self._pubsub = None
