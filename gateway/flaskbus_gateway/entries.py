"""Entries of a mount's request stream, as the gateway that adds them sees them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection

from flaskbus import errors, wire
from flaskbus.keys import MountKeys
from flaskbus.messages import Request
from flaskbus.signing import Field, Seal
from flaskbus_gateway.link import Answer, AnswerError, Link


def encode(request: Request, seal: Seal | None) -> list[Field]:
    """The fields and values of a request's entry; signed, where this gateway signs, and valid for its ``ttl``."""
    plain = wire.encode_request(request)
    if seal is None:
        return plain
    return seal.sign_request(plain, math.ceil(time.time() + request.ttl / 1000))


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
