"""The connections of an agent process that read its request streams from a cluster.

XREADGROUP takes keys of one slot, and every mount has its own. So each stream has a connection with a read of its
own that blocks, and the leader watches all of them (docs/decisions/0013-clusters-by-hand.md).
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import hiredis
import redis
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from flaskbus.address import Address, Node, parse_url
from flaskbus.broker import Unavailable, raw_connection
from flaskbus.cluster import PAUSE, slot_of
from flaskbus.cluster_client import cluster_map
from flaskbus.connections import LOOK
from flaskbus_agent.channel import Argument, Channel, ClusterChannel, open_channel
from flaskbus_agent.reading import ANSWER, BLOCK_MS, Reader, read_command

LATE = 1.0
"""Seconds past BLOCK after which a node of a cluster is taken to be away, so that the others are read on."""

PROBE = 0.5
"""Seconds between two looks whether such a node is back."""


class _Read:
    """A blocking read of one stream, on a connection of its own to the node that has it."""

    def __init__(self, address: Address, name: str, stream: bytes) -> None:
        self._address, self._name = address, name
        self.stream = stream
        self.node: Node | None = None
        self.id = 0
        self.since = 0.0
        """When it was sent (monotonic seconds); 0 while nothing is read."""
        self.found_nothing = False
        """Whether the last read ended without an entry, so that it only has to be sent again."""
        self.lame = False
        """Whether its node does not answer, so that it is not tried."""
        self.connection: Any = None

    def send(self, node: Node, agent_id: str, count: int, *, asking: bool = False) -> None:
        if node != self.node:
            self.drop()
            self.node = node
            self.connection = raw_connection(
                self._address, timeout=BLOCK_MS / 1000 + LATE, name=self._name, node=node
            )
        connection = self.connection
        if not connection.is_connected:
            connection.connect()
            self.id = self._exchange("CLIENT", "ID")
        if asking:
            self._exchange("ASKING")
        self._say(*read_command(agent_id, (self.stream,), count, BLOCK_MS))
        self.since = time.monotonic()

    def _exchange(self, *command: Argument) -> Any:
        self._say(*command)
        return self.connection.read_response()

    def _say(self, *command: Argument) -> None:
        self.connection.send_packed_command([hiredis.pack_command(cast(Any, command))], check_health=False)

    def answer(self) -> Any:
        self.since = 0.0
        return self.connection.read_response()

    def elsewhere(self, error: AskError) -> Node:
        """Where a redirection leads; without a host, to another port of the same."""
        assert self.node is not None
        return error.host or self.node[0], error.port

    def is_late(self) -> bool:
        return bool(self.since) and time.monotonic() - self.since > BLOCK_MS / 1000 + LATE

    def drop(self) -> None:
        self.since = 0.0
        if self.connection is not None:
            self.connection.disconnect()


class ClusterReader(Reader):
    """Reads the streams of a cluster: one blocking read for each, which go on while another thread takes the lead.

    They go on only as long as somebody is about to watch them: :meth:`calm` ends them. A stream whose node does not
    answer is lame: the others are read on without it, and once it answers again everything is looked at anew.
    """

    def __init__(self, url: str, agent_id: str, channel: Channel) -> None:
        super().__init__(url, agent_id, channel)
        self._address = parse_url(url)
        self._channel = cast(ClusterChannel, channel)
        self._map = cluster_map(self._address)
        self._prober = open_channel(url, f"{channel.name}-prober", LOOK)
        self._probe_due = 0.0
        self._back = ""
        """The stream of a node that is back; empty if none is."""
        self._reads: dict[bytes, _Read] = {}
        self._may_unblock = True
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)

    converses = False  # each stream may be elsewhere

    def _read(self, stream: bytes) -> _Read:
        read = self._reads.get(stream)
        if read is None:
            read = self._reads[stream] = _Read(self._address, self.channel.name, stream)
        return read

    def begin(self) -> Any:
        return self.calm()

    def clock(self, stream: bytes) -> Any:
        return self._unless_lame(stream, lambda: self._channel.at(stream, "TIME"))

    def own(self, stream: bytes, after: bytes) -> Any:
        return self._unless_lame(stream, lambda: super(ClusterReader, self).own(stream, after))

    def now(self, stream: bytes, count: int) -> Any:
        read = self._read(stream)
        if read.since:
            # Else a stream that is never empty would keep it there for as long as it likes.
            return self._collect(read, count) if _ready((read.connection._sock.fileno(),), 0.0) else ()
        if read.found_nothing:
            read.found_nothing = False
            return ()  # it only has to be sent again, as a rule
        return self._unless_lame(stream, lambda: super(ClusterReader, self).now(stream, count))

    def _unless_lame(self, stream: bytes, ask: Callable[[], Any]) -> Any:
        read = self._read(stream)
        if read.lame or read.is_late():
            return ()
        try:
            return ask()
        except Unavailable:
            self._fail(read)
            raise

    def wait(self, streams: Sequence[bytes], count: int) -> Any:
        if self._back:
            back, self._back = self._back, ""
            raise redis.exceptions.ConnectionError(f"the node of {back} was away")
        for stream in streams:
            read = self._read(stream)
            if not (read.lame or read.since):
                self._send(read, count)
        # Those of a mount that was dropped meanwhile too.
        armed = {read.connection._sock.fileno(): read for read in self._reads.values() if read.since}
        entries: list[Any] = []
        for number in _ready((*armed, self._ear.fileno()), BLOCK_MS / 1000 + LATE):
            if number == self._ear.fileno():
                self._ear.recv(4096)
            else:
                entries += self._collect(armed[number], count) or ()
        for read in armed.values():
            if read.is_late():
                self._fail(read)
                raise redis.exceptions.TimeoutError(f"the node of {read.stream.decode()} does not answer")
        return entries

    def probe(self) -> None:
        lame = [read for read in tuple(self._reads.values()) if read.lame]
        if not lame or time.monotonic() < self._probe_due:
            return
        for read in lame:
            with suppress(*Unavailable, redis.exceptions.RedisError):
                self._prober.at(read.stream, "PING")
                read.lame, self._back = False, read.stream.decode()
                self.interrupt()
        self._probe_due = time.monotonic() + PROBE

    def _send(self, read: _Read, count: int) -> None:
        try:
            read.send(self._map.owner(slot_of(read.stream)), self.agent_id, count)
        except Unavailable:
            self._fail(read)
            raise

    def _fail(self, read: _Read) -> None:
        read.drop()
        read.lame = True
        self._map.doubt()

    def _collect(self, read: _Read, count: int) -> Any:
        """What a read brought; where its slot is on its way to another node, it is sent there."""
        read.found_nothing = False
        try:
            entries = read.answer()
            read.found_nothing = entries is None
            return entries
        except MovedError as error:
            self._map.moved(error.slot_id, read.elsewhere(error))
        except AskError as error:
            read.send(read.elsewhere(error), self.agent_id, count, asking=True)
        except (TryAgainError, ClusterDownError):
            self._map.doubt()
            time.sleep(PAUSE)
        except redis.exceptions.ResponseError as error:
            # A stream that leaves with its slot is gone for whoever waits for it.
            if not str(error).startswith("UNBLOCKED"):
                raise
        except Unavailable:
            self._fail(read)
            raise
        return None

    def calm(self, *, last: bool = True) -> Any:
        entries: list[Any] = []
        trouble: Exception | None = None
        for read in self._reads.values():
            if not read.since or read.node is None or not (last or self._may_unblock):
                continue
            try:
                try:
                    self._channel.to(read.node, "CLIENT", "UNBLOCK", read.id)
                except redis.exceptions.ResponseError:
                    self._may_unblock = False
                    if not last:
                        continue
                read.found_nothing = False
                with suppress(redis.exceptions.ResponseError):  # then nothing was delivered
                    entries += read.answer() or ()
            except Unavailable as error:
                self._fail(read)
                trouble = error
        if trouble is not None:
            raise trouble
        return entries

    def interrupt(self) -> None:
        with suppress(OSError):  # full: it will not be overheard
            self._mouth.send(b".")

    def close(self) -> None:
        for read in self._reads.values():
            read.drop()
        self._prober.close()
        self._ear.close()
        self._mouth.close()
        super().close()


def _ready(numbers: Sequence[int], seconds: float) -> list[int]:
    """Which of these files can be read from; select() cannot watch those above 1023."""
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    return [number for number, _ in poll.poll(seconds * 1000)]


def open_reader(url: str, agent_id: str, open_one: Callable[[str, float], Channel]) -> Reader:
    """The reader that the kind of this URL wants; ``open_one(purpose, timeout)`` opens its channel."""
    if parse_url(url).kind == "cluster":
        return ClusterReader(url, agent_id, open_one("reader", BLOCK_MS / 1000))
    return Reader(url, agent_id, open_one("reader", ANSWER + BLOCK_MS / 1000))
