"""Clients that ask all the time, and write down what they saw."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.faults.contents import LARGE, SHAPES, SMALL, content, reply_size
from tests.faults.http import Address, BrokenError, Connection, Response
from tests.faults.oracle import Ending, Seen

PATIENCE = 40.0
"""Seconds after which a client says that no answer came; more than every deadline of the bus together."""

RENEW = 200
"""Requests after which a client connects anew, so that it comes back to its own gateway."""


class Ask(NamedTuple):
    """A request; the app's handler and its content follow from the token."""

    token: str
    method: str
    shape: str
    upload: int
    chunked: bool
    leaves: float | None
    """Seconds after which the client goes away."""

    def pieces(self) -> list[bytes]:
        head = f"{self.method} /soak/{self.shape}/{self.upload}/{self.token} HTTP/1.1\r\nHost: bus\r\n"
        body = content(self.token, "request", self.upload)
        if self.chunked:
            step = max(1, self.upload // 4)
            parts = [body[start : start + step] for start in range(0, self.upload, step)]
            chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
            return [f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *chunks, b"0\r\n\r\n"]
        length = f"Content-Length: {self.upload}\r\n" if self.upload or self.method != "GET" else ""
        return [f"{head}{length}\r\n".encode() + body]

    def right(self, body: bytes) -> bool:
        size = reply_size(self.shape)
        return len(body) == size and body == content(self.token, "reply", size)

    def right_so_far(self, body: bytes) -> bool:
        """Whether these may be the first bytes of the body."""
        return content(self.token, "reply", reply_size(self.shape)).startswith(body)


def draw(dice: random.Random, token: str, leavers: float) -> Ask:
    """Mostly small ones, of which two in three compute and do not wait; one in twelve large in either direction."""
    method = dice.choice(("GET", "GET", "POST", "POST", "PUT"))
    luck = dice.random()
    shape = "quick" if luck < 0.62 else "small" if luck < 0.92 else dice.choice(SHAPES[1:])
    upload = 0
    if method != "GET":
        upload = dice.choice((0, SMALL, SMALL)) if dice.random() < 0.92 else LARGE
    chunked = bool(upload) and dice.random() < 0.2
    leaves = dice.expovariate(200.0) if dice.random() < leavers else None
    return Ask(token, method, shape, upload, chunked, leaves)


@dataclass
class Load:
    """``clients`` at a time, spread over gateways; a client whose connection is refused turns to the next.

    Everything that is random comes from ``seed``. ``log`` grows while :meth:`run` runs, until :meth:`stop`.
    """

    addresses: Sequence[Address]
    clients: int = 32
    seed: int = 1
    leavers: float = 0.01
    log: list[Seen] = field(default_factory=list)
    stray: list[bytes] = field(default_factory=list)
    _done: bool = False

    async def run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(self.clients)))

    def stop(self) -> None:
        self._done = True

    async def _client(self, number: int) -> None:
        dice = random.Random(f"{self.seed}-{number}")
        connection, gateway = None, 0
        for serial in itertools.count():
            if self._done:
                break
            ask = draw(dice, f"{self.seed}.{number}.{serial}", self.leavers)
            if connection is None or connection.closed or serial % RENEW == 0:
                if connection is not None:
                    connection.close()
                connection, gateway = await self._connect(number)
            self.log.append(await see(ask, connection, gateway))
            if connection.stray:
                self.stray.append(connection.stray)
        if connection is not None:
            connection.close()

    async def _connect(self, number: int) -> tuple[Connection, int]:
        """A connection to a client's own gateway, or to the first that listens."""
        for attempt in itertools.count():
            gateway = (number + attempt) % len(self.addresses)
            try:
                return await Connection.open(self.addresses[gateway]), gateway
            except OSError:
                await asyncio.sleep(0.01)
        raise AssertionError("not reached")


async def see(ask: Ask, connection: Connection, gateway: int = 0) -> Seen:
    """Send one request, and say how it ended; a connection that was left or is silent is closed."""
    sent = time.monotonic()

    def saw(ending: Ending) -> Seen:
        return Seen(ask.token, ask.method, sent, time.monotonic(), ending, gateway=gateway)

    try:
        async with asyncio.timeout(PATIENCE if ask.leaves is None else ask.leaves):
            response = await connection.ask(ask.pieces())
    except BrokenError as error:
        return saw(Ending.CUT if error.begun else Ending.BROKEN)
    except TimeoutError:
        connection.close(reset=len(ask.token) % 2 == 0)
        return saw(Ending.SILENT if ask.leaves is None else Ending.LEFT)
    executed, detail = verdict_of(response)
    right = response.status == 200 and ask.right(response.body)
    return saw(Ending.ANSWERED)._replace(
        status=response.status, executed=executed, right=right, detail=detail
    )


def verdict_of(response: Response) -> tuple[str, str]:
    """What a response says of its request's fate, and why."""
    if response.headers.get(b"content-type") != b"application/problem+json":
        return "yes", ""
    document = json.loads(response.body)
    return document["executed"], document["detail"]
