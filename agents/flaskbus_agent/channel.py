"""One connection of one thread to the broker, for the commands on a request's path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import hiredis
import redis

from flaskbus.broker import Unavailable, raw_connection, script_sha, script_source

Argument = str | bytes | int


class Channel:
    """Sends a command and reads its answer; connects on first use and again after an error.

    ``timeout`` in seconds bounds each answer. Raises :data:`flaskbus.broker.Unavailable` where the broker is
    away (whether the command was carried out cannot be told), ``redis.ResponseError`` where it refuses.
    """

    __slots__ = ("_connection", "name")

    def __init__(self, url: str, name: str, timeout: float) -> None:
        self.name = name
        # redis-py does not type its connections.
        self._connection: Any = raw_connection(url, timeout=timeout, name=name)

    def call(self, *command: Argument) -> Any:
        connection = self._connection
        try:
            connection.send_packed_command([hiredis.pack_command(cast(Any, command))], check_health=False)
            return connection.read_response()
        except Unavailable:
            connection.disconnect()
            raise

    def script(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """EVALSHA; the script is loaded first where the broker does not know it (any longer)."""
        try:
            return self.call("EVALSHA", script_sha(name), len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            self.call("SCRIPT", "LOAD", script_source(name))
            return self.call("EVALSHA", script_sha(name), len(keys), *keys, *args)

    def close(self) -> None:
        self._connection.disconnect()
