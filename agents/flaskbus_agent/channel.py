"""One connection of one thread to the broker, for the commands on a request's path."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import redis

from flaskbus.address import Address, Node, parse_url
from flaskbus.broker import Unavailable, raw_connection, script_sha, script_source
from flaskbus.cluster import key_of
from flaskbus.cluster_client import NotSent, cluster_map, follow
from flaskbus.resp import buffers, pack

Argument = str | bytes | int

MOST_PIECES = 512
"""Buffers that one sendmsg() is given; the system takes 1,024 (IOV_MAX)."""


class _Told(NamedTuple):
    packed: list[bytes]
    answers: int
    heard: Callable[[list[Any]], None]


class Channel:
    """Sends a command and reads its answer; connects on first use and again after an error.

    ``timeout`` in seconds bounds each answer. Raises :data:`flaskbus.broker.Unavailable` where the broker is
    away (whether the command was carried out cannot be told), ``redis.ResponseError`` where it refuses.
    """

    __slots__ = ("_connection", "_told", "_transacts", "name")

    def __init__(self, address: Address, name: str, timeout: float) -> None:
        self.name = name
        self._transacts = True
        self._told: _Told | None = None
        # redis-py does not type its connections.
        self._connection: Any = raw_connection(address, timeout=timeout, name=name)

    def call(self, *command: Argument) -> Any:
        return self._exchange(buffers(command), None)

    def transaction(self, *commands: tuple[Argument, ...]) -> list[Any] | None:
        """MULTI, these commands and EXEC, in one round trip: their answers, some of which may be errors.

        ``None`` where nothing was carried out, because there are no transactions here, or the broker refused a command.
        """
        if not self._transacts:
            return None
        packed = [buffer for command in (("MULTI",), *commands, ("EXEC",)) for buffer in buffers(command)]
        *answers, last = self._exchange(packed, 2 + len(commands))
        if isinstance(last, list):
            return last
        if any(isinstance(answer, redis.exceptions.NoPermissionError) for answer in (*answers, last)):
            # A user of older rules. Where MULTI was refused, the commands were carried out one by one.
            self._transacts = False
            self._connection.disconnect()
        return None

    def say(self, packed: list[bytes]) -> Any:
        """As :meth:`call`, with a command that is packed already."""
        return self._exchange(packed, None)

    def tell(self, packed: list[bytes], count: int, heard: Callable[[list[Any]], None]) -> None:
        """Send so many packed commands together with the next one, which may block.

        ``heard`` is given their answers, errors among them, as soon as they are there; it is not called where the
        broker went away before. Not for a cluster, where each may have to go elsewhere.
        """
        self._told = _Told(packed, count, heard)

    def flush(self) -> None:
        """Send what was told and not sent."""
        if self._told is not None:
            self.call("PING")

    def _exchange(self, packed: list[bytes], answers: int | None) -> Any:
        """Send, and read the answer, or a list of so many with errors among them."""
        connection = self._connection
        told, self._told = self._told, None
        try:
            if not connection.is_connected:
                self._connect()
            _send(connection, packed if told is None else [*told.packed, *packed])
            if told is not None:
                told.heard([_answer_or_error(connection) for _ in range(told.answers)])
            if answers is None:
                return connection.read_response()
            return [_answer_or_error(connection) for _ in range(answers)]
        except Unavailable:
            connection.disconnect()
            raise
        except (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError) as error:
            # A master that has become a replica: nothing was carried out, and the new one is elsewhere.
            connection.disconnect()
            raise redis.exceptions.ConnectionError(f"the broker is a replica now: {error}") from None

    def _connect(self) -> None:
        self._connection.connect()

    def at(self, key: str | bytes, *command: Argument) -> Any:
        """Like :meth:`call`, for a command that names no key: ask the server that has this one."""
        return self.call(*command)

    def script(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """EVALSHA; the script is loaded first where the broker does not know it (any longer)."""
        try:
            return self.call("EVALSHA", script_sha(name), len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            self.call("SCRIPT", "LOAD", script_source(name))
            return self.call("EVALSHA", script_sha(name), len(keys), *keys, *args)

    def scripts(self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        """A script once for each of some keys and arguments, in one round trip: the answers, errors among them.

        A broker that does not know the script says so in each; :meth:`script` loads it.
        """
        sha = script_sha(name)
        commands = (("EVALSHA", sha, len(keys), *keys, *args) for keys, args in calls)
        packed = [buffer for command in commands for buffer in buffers(command)]
        answers: list[Any] = self._exchange(packed, len(calls))
        return answers

    def close(self) -> None:
        self._connection.disconnect()


class MovingChannel(Channel):
    """A channel to a broker whose place changes, which another thread can make it look for.

    All of a process go where the last of them that connected found the master: a script that has nothing to write
    is answered by a replica as well, and falsely.
    """

    __slots__ = ("__weakref__", "_address", "_since")

    master: ClassVar[dict[Address, Node]] = {}

    def __init__(self, address: Address, name: str, timeout: float) -> None:
        super().__init__(address, name, timeout)
        self._address = address
        self._since = 0.0
        """Since when it waits for an answer (monotonic seconds); 0 while it does not."""

    def _exchange(self, packed: list[bytes], answers: int | None) -> Any:
        connection = self._connection
        if connection.is_connected and self.master.get(self._address) != (connection.host, connection.port):
            connection.disconnect()
        self._since = time.monotonic()
        try:
            return super()._exchange(packed, answers)
        finally:
            self._since = 0.0

    def _connect(self) -> None:
        super()._connect()
        self.master[self._address] = (self._connection.host, self._connection.port)

    def waits(self, seconds: float) -> Node | None:
        """For whom it has been waiting for so long, if it has."""
        since = self._since
        if not since or time.monotonic() - since < seconds:
            return None
        return self._where()

    def _where(self) -> Node | None:
        connection = self._connection
        return (connection.host, connection.port) if connection.is_connected else None

    def hang_up(self) -> None:
        """From another thread: let what is waited for fail now."""
        hang_up(self._connection)


class ClusterChannel(MovingChannel):
    """A connection to each node that it has something to say to."""

    __slots__ = ("_connections", "_now", "_timeout", "map")

    def __init__(self, address: Address, name: str, timeout: float) -> None:
        super().__init__(address, name, timeout)
        self.map = cluster_map(address)
        self._timeout = timeout
        self._connections: dict[Node, Any] = {}
        self._now: Node | None = None

    def call(self, *command: Argument) -> Any:
        return self._follow(key_of(command), command)

    def transaction(self, *commands: tuple[Argument, ...]) -> list[Any] | None:
        return None  # a slot may move in the middle of it

    def scripts(self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        return [self.script(name, keys, args) for keys, args in calls]  # each may be elsewhere

    def at(self, key: str | bytes, *command: Argument) -> Any:
        return self._follow(key, command)

    def to(self, node: Node, *command: Argument) -> Any:
        """Ask this node, and follow no redirection."""
        try:
            return self._send(node, False, pack(command))
        finally:
            self._since, self._now = 0.0, None

    def script(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        command = ("EVALSHA", script_sha(name), len(keys), *keys, *args)
        return self._follow(
            keys[0],
            command,
            lambda node: self._send(node, False, pack(("SCRIPT", "LOAD", script_source(name)))),
        )

    def _follow(
        self,
        key: str | bytes | None,
        command: tuple[Argument, ...],
        teach: Callable[[Node], object] | None = None,
    ) -> Any:
        packed = pack(command)
        try:
            return follow(self.map, key, lambda node, asking: self._send(node, asking, packed), teach)
        finally:
            self._since, self._now = 0.0, None

    def _send(self, node: Node, asking: bool, packed: bytes) -> Any:
        self._now, self._since = node, time.monotonic()
        connection = self._connections.get(node)
        if connection is None:
            connection = self._connections[node] = raw_connection(
                self._address, timeout=self._timeout, name=self.name, node=node
            )
        try:
            if not connection.is_connected:
                connection.connect()
        except Unavailable as error:
            raise NotSent(str(error)) from error
        try:
            connection.send_packed_command([_ASKING, packed] if asking else [packed], check_health=False)
            if asking:
                connection.read_response()
            return connection.read_response()
        except Unavailable:
            connection.disconnect()
            raise

    def _where(self) -> Node | None:
        return self._now

    def hang_up(self) -> None:
        now = self._now
        if now is not None and (connection := self._connections.get(now)) is not None:
            hang_up(connection)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.disconnect()


_ASKING = pack(("ASKING",))


def _send(connection: Any, pieces: list[bytes]) -> None:
    """Send large commands without joining them, where the socket can do that: TLS cannot."""
    if isinstance(connection._sock, ssl.SSLSocket):
        pieces = [b"".join(pieces)]
    elif len(pieces) > 1:
        try:
            sent = connection._sock.sendmsg(pieces[:MOST_PIECES])
        except TimeoutError as error:
            raise redis.exceptions.TimeoutError("Timeout writing to socket") from error
        except OSError as error:
            raise redis.exceptions.ConnectionError(f"{error} while writing to socket") from error
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.pop(0))
        if pieces:
            pieces[0] = pieces[0][sent:]
    connection.send_packed_command(pieces, check_health=False)


def _answer_or_error(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.exceptions.ResponseError as error:
        return error


def hang_up(connection: Any) -> None:
    """Let a thread that reads from this connection find it closed."""
    sock = connection._sock
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def open_channel(url: str, name: str, timeout: float) -> Channel:
    """The channel that the kind of this URL wants."""
    address = parse_url(url)
    kinds = {"single": Channel, "sentinel": MovingChannel, "cluster": ClusterChannel}
    return kinds[address.kind](address, name, timeout)
