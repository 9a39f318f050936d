"""Servers that fall silent while their successor is there already: nobody waits for them any longer.

A host that dies sends no farewell. A thread that waits for its answer would do so until its time-out, long after
the sentinels, or the other nodes of the cluster, have chosen another one.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import redis

from flaskbus.address import Node, parse_url
from flaskbus.cluster_client import cluster_map
from flaskbus.connections import Unavailable, sentinels

SILENCE = 1.0
"""Seconds past what an answer may take, after which it is asked whether the server is still the right one."""


@runtime_checkable
class Waiting(Protocol):
    """Whoever waits for answers, and can be told by another thread to give up."""

    def waits(self, seconds: float) -> Node | None:
        """For whom it has been waiting for so long, if it has."""

    def hang_up(self) -> None: ...


class Moves:
    """Looks after those of a process who wait for answers, if the broker is of a kind that moves."""

    def __init__(self, url: str) -> None:
        self._address = parse_url(url)
        self.possible = self._address.kind != "single"
        self._waiting: WeakKeyDictionary[Waiting, float] = WeakKeyDictionary()
        self._due = 0.0

    def add(self, waiting: object, blocking: float = 0.0) -> None:
        """Look after one, if it is of those; ``blocking`` is how long its answers may take, in seconds."""
        if self.possible and isinstance(waiting, Waiting):
            self._waiting[waiting] = blocking + SILENCE

    def look(self) -> None:
        """Hang up on every server that is silent and is not the right one any more; to be called often.

        It does so once a second at most, and may take some seconds.
        """
        if not self.possible or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + SILENCE
        silent = [
            (each, node)
            for each, patience in tuple(self._waiting.items())
            if (node := each.waits(patience)) is not None
        ]
        if not silent:
            return
        left = {node: self._left(node) for node in {node for _, node in silent}}
        for each, node in silent:
            if left[node]:
                each.hang_up()

    def _left(self, node: Node) -> bool:
        if self._address.kind == "sentinel":
            return sentinels(self._address).left(node)
        nodes = cluster_map(self._address)
        nodes.doubt()
        with suppress(*Unavailable, redis.exceptions.RedisError):
            return node not in nodes.primaries()
        return False
