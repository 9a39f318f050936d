"""Entries of a mount's request stream, as the gateway that adds them sees them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection

from flaskbus import errors, wire
from flaskbus.keys import MountKeys
from flaskbus.messages import Request
from flaskbus.signing import Field, Seal
from flaskbus_gateway.link import Answer, AnswerError, Link, LinkError


def encode(request: Request, seal: Seal | None) -> list[Field]:
    """The fields and values of a request's entry; signed, where this gateway signs, and valid for its ``ttl``."""
    plain = wire.encode_request(request)
    if seal is None:
        return plain
    return seal.sign_request(plain, math.ceil(time.time() + request.ttl / 1000))


COLLECT = 0.01
"""Seconds in which requests that are looked for are gathered: a look reads the whole stream."""


class Locator:
    """Finds entries by correlation id, many with one look."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._wanted: dict[str, dict[str, asyncio.Future[bytes | None]]] = {}
        self._looks: set[asyncio.Task[None]] = set()

    async def find(self, keys: MountKeys, request_id: str) -> bytes | None:
        """The entry of a request, or ``None`` where it is not in the stream."""
        wanted = self._wanted.get(keys.requests)
        if wanted is None:
            wanted = self._wanted[keys.requests] = {}
            look = self._link.loop.create_task(self._look(keys, wanted))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)
        future = wanted.get(request_id)
        if future is None:
            future = wanted[request_id] = self._link.loop.create_future()
        return await asyncio.shield(future)

    async def _look(self, keys: MountKeys, wanted: dict[str, asyncio.Future[bytes | None]]) -> None:
        await asyncio.sleep(COLLECT)
        del self._wanted[keys.requests]
        try:
            found = await locate(self._link, keys, wanted)
        except (LinkError, AnswerError) as error:
            for future in wanted.values():
                future.set_exception(error)
                future.exception()  # whoever wanted to know may be gone
        else:
            for request_id, future in wanted.items():
                future.set_result(found.get(request_id))


async def locate(link: Link, keys: MountKeys, wanted: Collection[str]) -> dict[str, bytes]:
    """The entries of requests by their correlation ids, as far as they are in the stream."""
    found: dict[str, bytes] = {}
    end = "+"
    while True:
        entries: list[Answer] = await link.call("XREVRANGE", keys.requests, end, "-", "COUNT", 500)
        for entry_id, members in entries:
            request_id = wire.peek_id(members)
            if request_id is not None and request_id in wanted:
                found[request_id] = bytes(entry_id)
        if len(entries) < 500 or len(found) == len(wanted):
            return found
        end = "(" + entries[-1][0].decode()


def refused(error: AnswerError) -> errors.BusError:
    """An XADD that the broker answered with an error was not carried out."""
    if error.code == "OOM":
        return errors.BrokerFull(str(error), retry_after=5)
    return errors.BrokerUnavailable(str(error), retry_after=1)
