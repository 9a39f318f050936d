"""Cuts at a certain byte: one connection to the broker breaks there, and the request must be judged all the same.

All through one running bus: the processes live on, only connections break.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flaskbus.broker import connect
from flaskbus.keys import GROUP, Keys
from flaskbus.registry import Registry
from tests.conftest import free_port
from tests.faults.contents import work
from tests.faults.http import Connection
from tests.faults.load import Ask, see
from tests.faults.oracle import Ending, Seen, Tally, parse_ledger
from tests.faults.proxy import Cut, Proxy
from tests.faults.report import Report, Row
from tests.faults.resp import Message
from tests.faults.site import MOUNT, REPOSITORY, Broker
from tests.integration.fleet import Program, eventually

QUICK = ("--set=flaskbus_gateway.switchboard:Switchboard.SWEEP=0.05",)
"""The rounds in which a gateway looks for what it may have missed, shorter than in real life."""

BACKGROUND = frozenset(
    {"PING", "PONG", "pong", "INFO", "TIME", "HELLO", "CLIENT ID", "CLIENT SETNAME", "CLIENT SETINFO", "SCRIPT LOAD",
     "SUBSCRIBE", "subscribe", "SMEMBERS", "HGET", "HMGET", "HGETALL", "XLEN", "XPENDING", "claim", "enlist", "look"}
)  # fmt: skip
"""What goes over the wire without any request too, and when a connection is made."""


EVERY = 1000
"""Bytes from the front of a message that are all cut; beyond, it is one in a hundred and the last hundred."""


class Place(NamedTuple):
    """A kind of message in the life of a kind of request, and how large it is."""

    life: str
    connection: str
    label: str
    outward: bool
    size: int

    def __str__(self) -> str:
        way = "to" if self.outward else "from"
        return f"{self.life}: {self.connection}, {self.label} {way} the broker"


LIVES = ("get", "post", "stream", "cancelled", "again")
"""A small reply; an upload; a reply that is streamed; a client that leaves while its handler runs; a request after
all connections broke and while they are made again."""


def make_ask(life: str, token: str) -> Ask:
    match life:
        case "get" | "again":
            return Ask(token, "GET", "small", 0, False, None)
        case "post":
            return Ask(token, "POST", "small", 100, False, None)
        case "stream":
            return Ask(token, "POST", "trickle", 0, False, None)
    return Ask(token, "POST", "small", 0, False, 0.03)


@dataclass
class Bench:
    """A gateway and an agent, in a namespace of their own, behind a proxy that knows every message."""

    directory: Path
    port: int
    """Where the broker listens."""
    namespace: str = "cuts"
    seed: int = 1
    tally: Tally = field(default_factory=Tally)
    fired: int = 0
    complaints: list[str] = field(default_factory=list)
    """What was not as it should be, and after which cut."""
    _connection: Connection | None = None
    _serials: Iterator[int] = field(default_factory=itertools.count)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Bench]:
        self.proxy = Proxy(self.port, parsing=True)
        await self.proxy.start()
        self.client: Any = connect(f"redis://127.0.0.1:{self.port}/0")
        self.keys = Keys(self.namespace).of(MOUNT.key)
        self.ledger = self.directory / f"{self.namespace}.ledger"
        self.ledger.touch()
        self.http = ("127.0.0.1", free_port())
        programs = [
            self._program("flaskbus_gateway", "--port", str(self.http[1])),
            self._program("flaskbus_agent", "tests.faults.app:app", "--prefix", "/soak", "--threads", "2"),
        ]
        try:
            await asyncio.to_thread(eventually, self._served, "the mount is served")
            yield self
        finally:
            if self._connection is not None:
                self._connection.close()
                await self._connection.ended.wait()
            for program in programs:
                await asyncio.to_thread(program.kill)
            await self.proxy.close()
            self.client.close()

    def _program(self, module: str, *options: str) -> Program:
        return Program(
            self.directory / f"{self.namespace}-{module}.log",
            "tests.faults.points",
            *QUICK, module, "--namespace", self.namespace, "--lease", "8", *options,
            LEDGER=str(self.ledger),
            FLASKBUS_REDIS_URL=f"redis://127.0.0.1:{self.proxy.port}/0",
            PYTHONPATH=str(REPOSITORY),
        )  # fmt: skip

    def _served(self) -> bool:
        registry = Registry(self.client, Keys(self.namespace))
        routed = any(MOUNT.key in gateway.get("mounts", ()) for gateway in registry.gateways().values())
        return routed and any(agent.state == "ready" for agent in registry.agents(MOUNT))

    # One request

    def ask(self, life: str) -> Ask:
        """A request with a token of its own; one that is cancelled has a handler that takes long."""
        while True:
            ask = make_ask(life, f"{self.seed}.{life}.{next(self._serials)}")
            if life != "cancelled" or work(ask.token) >= 0.1:
                return ask

    async def request(self, ask: Ask) -> Seen:
        if self._connection is None or self._connection.closed:
            self._connection = await Connection.open(self.http)
        return await see(ask, self._connection)

    async def _live(self, life: str) -> Seen:
        if life == "again":
            self.proxy.messages.clear()
            self.proxy.reset_all()
            # Not before the gateway knows: what it writes into a broken connection is lost, and says nothing of this.
            async with asyncio.timeout(10.0):
                while not any(message.connection == "gateway link" for message in self.proxy.messages):
                    await asyncio.sleep(0.001)
        return await self.request(self.ask(life))

    def left(self) -> dict[str, Any]:
        """What is left of requests, on the broker."""
        left = {
            "entries": self.client.xrange(self.keys.requests),
            "lists": list(self.client.scan_iter(self.keys.reply("*"), count=1000)),
            "pending": self.client.xpending(self.keys.requests, GROUP)["pending"],
        }
        return {name: value for name, value in left.items() if value}

    async def rest(self, seconds: float = 10.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return left

    # Cuts

    async def lives(self) -> list[Place]:
        """What goes over the wire in one life of each kind, in either direction."""
        places: dict[tuple[str, str, str, bool], int] = {}
        for life in LIVES:
            for _ in range(3):
                self.proxy.messages.clear()
                await self._live(life)
                assert not await self.rest()
                await asyncio.sleep(0.1)
                for message in self.proxy.messages:
                    if life == "again" or message.label not in BACKGROUND:
                        key = (life, message.connection, message.label, message.outward)
                        places[key] = max(places.get(key, 0), len(message.data))
        return [Place(*key, size) for key, size in places.items()]

    async def cut(self, place: Place, after: int) -> None:
        """Cut there; a message that did not come gets another request or two to come with."""
        for _ in range(3):
            if await self._cut(place, after):
                self.fired += 1
                break

    async def _cut(self, place: Place, after: int) -> bool:
        """Cut there, and judge: this request and the next, and what they leave; whether there was a cut."""
        self.proxy.messages.clear()
        self.proxy.fired.clear()
        cut = Cut(place_of(place), after, reset=bool(after % 2))
        self.proxy.cut = cut
        seen = await self._live(place.life)
        with contextlib.suppress(TimeoutError):
            # What is cleaned up afterwards comes a little later.
            await asyncio.wait_for(self.proxy.fired.wait(), 0.3)
        self.proxy.cut = None
        # The next may still be sent on the connection that breaks.
        then = [await self.request(self.ask("get"))]
        if not then[-1].right:
            then.append(await self.request(self.ask("get")))
        left = await self.rest()
        runs = parse_ledger(self.ledger.read_text())
        before = len(self.tally.bad)
        for each in (seen, *then):
            self.tally.add(each, runs.get(each.token, ()))
        where = f"{place}, after {after} of {place.size} bytes"
        self.complaints += [
            f"{where}: {what}"
            for what, bad in {
                f"{self.tally.bad[before:]}": len(self.tally.bad) > before,
                f"the next request: {then}": not then[-1].right,
                f"the client's connection: {seen}": seen.ending is Ending.CUT and place.life != "stream",
                f"left: {left}": bool(left),
                "bytes that nobody asked for": self._connection is not None and bool(self._connection.stray),
            }.items()
            if bad
        ]
        return cut.message is not None


def place_of(place: Place) -> Any:
    def wanted(message: Message) -> bool:
        return (message.connection, message.label, message.outward) == place[1:4]

    return wanted


def sampled(places: Iterable[Place], step: int, dice: random.Random) -> list[tuple[Place, int]]:
    """Each place cut at every ``step``-th byte, from a random one on, and at both of its ends; in a random order."""
    cuts: list[tuple[Place, int]] = []
    for place in places:
        offsets = {0, place.size, *range(dice.randrange(step), place.size, step)}
        # What is larger is a script's source or the INFO of the broker, and much like itself all over.
        kept = (
            offset for offset in offsets if offset <= EVERY or place.size - offset < 100 or offset % 101 == 0
        )
        cuts += [(place, offset) for offset in kept]
    cuts.sort(key=lambda cut: (cut[0], cut[1]))
    dice.shuffle(cuts)
    return cuts


async def cut_all(bench: Bench, step: int, dice: random.Random, limit: int | None = None) -> int:
    """Learn the lives, and cut every ``step``-th byte of them, or ``limit`` of those; how many cuts that were."""
    async with bench.running():
        cuts = sampled(await bench.lives(), step, dice)[:limit]
        for number, (place, after) in enumerate(cuts):
            if number % 500 == 0:
                print(f"{number} of {len(cuts)} cuts", flush=True)
            await bench.cut(place, after)
    return len(cuts)


def run(directory: Path, *, seed: int) -> Report:
    """Every byte, on a broker of its own."""
    began = time.monotonic()
    with Broker(directory, sync="everysec") as broker:
        bench = Bench(directory, broker.port, seed=seed)
        asyncio.run(cut_all(bench, 1, random.Random(seed)))
    left = {"complaints": bench.complaints} if bench.complaints else {}
    return Report({"cuts": Row(bench.fired, 0.0, bench.tally)}, left, 0, time.monotonic() - began)
