"""What an agent process reads from the streams of all its mounts, and what it holds of that.

Used by the thread that has the lead, but for what says otherwise.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis

from flaskbus.acl import mend
from flaskbus.broker import Unavailable, script_source
from flaskbus.routing import Mount
from flaskbus_agent.channel import Channel
from flaskbus_agent.entry import Entry, Served, entry_time
from flaskbus_agent.inhand import InHand, Standing
from flaskbus_agent.post import Post
from flaskbus_agent.reading import Reader

CLOCK = 5.0
"""Seconds for which the broker's clock is taken to run as fast as ours."""

AGAIN = 1.0
"""Seconds until we look again at what we hold, after a write about it was refused."""


class Intake:
    """Asks for entries, with what is to be handed in, and keeps the account of what this process holds.

    ``lease`` in seconds. Once ``quiet`` is set, nothing new is read.
    """

    def __init__(
        self,
        reader: Reader,
        served: Mapping[Mount, Served],
        lease: float,
        quiet: threading.Event,
        log: logging.Logger,
    ) -> None:
        self.reader = reader
        self._served = dict(served)
        self._by_stream = {each.keys.requests.encode(): each for each in served.values()}
        # A read that is under way when a mount is dropped may still deliver to it.
        self._ever_served = dict(self._by_stream)
        self._lease = lease
        self._quiet = quiet
        self._log = log
        self.backlog: deque[Entry | Post] = deque()
        """What came of the reads and was not begun, and replies that the broker did not take."""
        self.unheard = 0
        """Replies that are on their way."""
        self._in_hand = InHand()
        self._reread_at = 0.0  # monotonic seconds
        self._asked_at = 0.0  # since when an answer is waited for (monotonic seconds)
        self._rotation = 0
        self._trouble = ""
        self._clocks: dict[bytes, float] = {}
        """Of the broker that has a stream, in milliseconds, when our monotonic clock was at 0; as far as known."""
        self._clock_due = 0.0

    def drop(self, mount: Mount) -> bool:
        """From any thread: read this mount no more; whether others are left."""
        served = self._served.pop(mount, None)
        if served is not None:
            self._by_stream.pop(served.keys.requests.encode(), None)
            self.reader.interrupt()
        return bool(self._served)

    def explained(self, error: Exception) -> str:
        """What the broker said, and what would mend it."""
        text = str(error).rstrip(".")
        return text + mend(text, [mount.name for mount in self._served])

    # What is held; from any thread

    def settle(self, entry: Entry) -> None:
        """The broker has confirmed its end."""
        self._in_hand.settle(entry.mark)

    def abandon(self, entry: Entry) -> None:
        """It has run, and the broker has not confirmed its end."""
        self._in_hand.abandon(entry.mark)
        self.look_again()

    def release(self, entry: Entry) -> None:
        """Nothing came of it."""
        self._in_hand.release(entry.mark)

    def look_again(self) -> None:
        """Soon, look at what we hold: an entry of which the broker took no end is still among it."""
        self._reread_at = min(self._reread_at, time.monotonic() + AGAIN)

    # Reading

    def next(self) -> Entry | Post | None:
        """What is to be done next; ``None`` where nothing is there.

        Who was frozen meanwhile may have been taken for dead, and what it holds given to others. So what lies here
        for long is begun only if the group, when it is asked, says that it is ours still.
        """
        while self.backlog:
            item = self.backlog.popleft()
            if isinstance(item, Post) or self._quiet.is_set() or not self._is_old(item.read_at):
                return item
            self.release(item)
            self._reread_at = 0.0
        return None

    def _is_old(self, since: float) -> bool:
        return time.monotonic() - since > self._lease / 2

    def fill(self, most: int, posts: Sequence[Post], channel: Channel) -> None:
        """Hand these in, and wait a while for up to ``most`` entries; none may have come, and none is waited for if
        that is 0.

        What the broker did not take, or perhaps not, is in the backlog then. The ``channel`` is the calling thread's.
        """
        self.unheard = len(posts)

        def heard(answers: list[Any]) -> None:
            refused = False
            for post, answer in zip(posts, _again(posts, answers, channel), strict=True):
                if isinstance(answer, bytes):
                    self.settle(post.entry)  # also where it was not ours to answer any more
                else:
                    refused = True
                    self.backlog.append(replace(post, error=answer))
            self.unheard = 0
            if refused and most:
                self.reader.interrupt()  # else it would lie there while we wait for entries

        if posts:
            self.reader.channel.tell([piece for post in posts for piece in post.packed], len(posts), heard)
        self._asked_at = time.monotonic()
        try:
            if self._quiet.is_set():
                self._take(self.reader.calm())
                if time.monotonic() >= self._reread_at:
                    self._read_own()  # it is handed back
            elif most:
                self._read(most)
            self.reader.channel.flush()
        except Unavailable as error:
            self._stumble(f"the broker is away: {error}")
        except redis.exceptions.ResponseError as error:
            self._stumble(f"the broker refuses to let us read: {self.explained(error)}")
        finally:
            if self.unheard:
                self.backlog.extend(posts)
                self.unheard = 0

    def _stumble(self, trouble: str) -> None:
        """After a failed read: its answer may be lost, so the next look compares what we hold with the group."""
        self._reread_at = 0.0
        self._clock_due = 0.0
        if not self._trouble:
            self._log.warning("%s; trying again", trouble)
        self._trouble = trouble
        self._quiet.wait(0.1)

    def _read(self, most: int) -> None:
        if time.monotonic() >= self._clock_due:
            self._read_clock()
            if self.backlog:
                return
        if time.monotonic() >= self._reread_at:
            self._read_own()
            return
        streams = tuple(self._by_stream)
        if len(streams) == 1:
            self._deliver(self.reader.wait(streams, most))
        elif not streams:
            self._quiet.wait(0.1)
        else:
            self._read_several(streams, most)
        if self._trouble:
            self._log.info("reading again")
            self._trouble = ""

    def _read_several(self, streams: tuple[bytes, ...], most: int) -> None:
        """COUNT holds for each stream and not in all: ask one after the other, each time another one first."""
        self._rotation = (self._rotation + 1) % len(streams)
        ordered = streams[self._rotation :] + streams[: self._rotation]
        for stream in ordered:
            if most > len(self.backlog):
                self._deliver(self.reader.now(stream, most - len(self.backlog)))
        if not self.backlog:
            # Whoever gets the first entry ends the wait; it is rare that two streams do in one instant.
            self._deliver(self.reader.wait(ordered, 1))
        if most <= len(self.backlog):
            # Nobody is left to watch reads that go on; what they bring at the last moment runs next.
            self._deliver(self.reader.calm(last=False))

    def _read_clock(self) -> None:
        """What the brokers' clocks say, for the age of entries; without the permission to ask they have none."""
        for stream in tuple(self._by_stream):
            try:
                answer = self.reader.clock(stream)
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
        self._take(self.reader.begin())
        for stream in self._ever_served:
            after = b"0"
            while True:
                answer = self._own(stream, after)
                entries = answer[0][1] if answer else []
                if not entries:
                    break
                if self._take(answer):
                    # It would grow old while the others are asked; what was taken is no news the next time.
                    self._reread_at = 0.0
                    return
                after = entries[-1][0]

    def _own(self, stream: bytes, after: bytes) -> Any:
        """The next entries that the group says we hold. Of a mount that was dropped we need not be told."""
        try:
            return self.reader.own(stream, after)
        except redis.exceptions.ResponseError:
            if stream in self._by_stream:
                raise
            return ()

    def _deliver(self, answer: Any) -> None:
        """Take what came of a read for new entries.

        So of what comes late only that counts which the group, when it is asked, says is ours still.
        """
        if answer and self._is_old(self._asked_at):
            self._reread_at = 0.0
        else:
            self._take(answer)

    def _take(self, answer: Any) -> bool:
        """Entries as XREADGROUP gives them; whether one of them is new to us."""
        now, news = time.monotonic(), False
        for stream, entries in answer or ():
            served = self._ever_served.get(stream)
            for entry_id, fields in entries:
                if served is None or fields is None:
                    continue
                mark = stream + entry_id
                standing = self._in_hand.take(mark)
                if standing is Standing.NEW:
                    news = True
                    age = self._age(stream, entry_id, now)
                    self.backlog.append(Entry(served, entry_id, fields, mark, now, age))
                elif standing is Standing.DONE:
                    self.backlog.append(Entry(served, entry_id, fields, mark, now, done=True))
        return news


def _again(posts: Sequence[Post], answers: list[Any], channel: Channel) -> list[Any]:
    """What the broker answers in the end: where it has forgotten the script, it is told that once more."""
    if not any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
        return answers
    try:
        channel.call("SCRIPT", "LOAD", script_source("finish"))
        return [
            _say(post, channel) if isinstance(answer, redis.exceptions.NoScriptError) else answer
            for post, answer in zip(posts, answers, strict=True)
        ]
    except (*Unavailable, redis.exceptions.RedisError) as error:
        return [error if isinstance(answer, redis.exceptions.NoScriptError) else answer for answer in answers]


def _say(post: Post, channel: Channel) -> Any:
    try:
        return channel.say(post.packed)
    except redis.exceptions.ResponseError as error:
        return error
