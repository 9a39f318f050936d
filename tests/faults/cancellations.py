"""Clients that go away at random moments, by the hundred thousand, and others that watch what they get.

A cancelled request is a connection that is closed before, during or after its answer. Between them, clients with
connections of their own ask and check every byte: nothing that was meant for another may reach one.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from tests.faults.load import Ask, Load
from tests.faults.oracle import IDEMPOTENT, Ending, Seen, Verdict, judge, parse_ledger
from tests.faults.report import Report, Row
from tests.faults.site import Broker, Site

METHODS = ("GET", "POST", "GET", "PUT")
MOMENTS = (0.0, 0.0, 0.001, 0.003, 0.01, 0.03, None)
"""Seconds after sending at which a client leaves; ``None`` for when its answer begins."""
HALF = 0.02
"""How many clients send only a part of their request."""
BUSY = 0.005
"""Seconds before a client comes again that found too many others waiting."""


@dataclass
class Cancellers:
    """``count`` requests to the Unix sockets of gateways, ``abreast`` at a time; nobody waits for the answers."""

    addresses: list[str]
    count: int
    seed: int
    abreast: int = 64
    done: int = 0
    stopped: bool = False
    answered: int = 0
    """How many had an answer, or a part of one, before they were gone."""
    foreign: list[Seen] = field(default_factory=list)
    """Those that had what was not theirs."""

    async def run(self) -> None:
        """Until all are sent, or somebody presses Ctrl-C."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.stop)
        numbers = iter(range(self.count))
        await asyncio.gather(*(self._cancel_some(numbers) for _ in range(self.abreast)))

    def stop(self) -> None:
        self.stopped = True

    async def _cancel_some(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            if self.stopped:
                return
            dice = random.Random(f"{self.seed}-{number}")
            ask = Ask(f"x{number}", METHODS[number % len(METHODS)], "quick", 0, False, None)
            while not await self._cancel(ask, dice, self.addresses[number % len(self.addresses)]):
                await asyncio.sleep(BUSY)
            self.done += 1

    async def _cancel(self, ask: Ask, dice: random.Random, address: str) -> bool:
        """Whether the request was sent, and left to itself."""
        (data,) = ask.pieces()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(address)
            except OSError:
                return False  # as many as the kernel lets wait are waiting
            sock.send(data if dice.random() >= HALF else data[: dice.randrange(len(data))])
            moment = dice.choice(MOMENTS)
            try:
                if moment is None:
                    async with asyncio.timeout(1.0):
                        got = await asyncio.get_running_loop().sock_recv(sock, dice.randrange(1, 400))
                else:
                    await asyncio.sleep(moment)
                    got = sock.recv(65536)
            except (OSError, TimeoutError):
                return True
        if got:
            self.answered += 1
            body = got.partition(b"\r\n\r\n")[2]
            if not ask.right_so_far(body) and b"problem+json" not in got:
                now = time.monotonic()
                self.foreign.append(
                    Seen(ask.token, ask.method, now, now, Ending.ANSWERED, detail=repr(got[:300]))
                )
        return True


def ran_twice(ledger: str) -> list[str]:
    """Cancelled requests that ran more often than they may."""
    lines = Counter(line.rpartition(" ")[0] for line in ledger.split("\n") if line.startswith("x"))
    found = [line for line, count in lines.items() if count > 1]
    attempts = Counter(line.partition(" ")[0] for line in lines)
    for token, count in attempts.items():
        if count > 1 and METHODS[int(token[1:]) % len(METHODS)] not in IDEMPOTENT:
            found.append(token)
    return found


def run(directory: Path, *, count: int, seed: int, checkers: int = 8) -> Report:
    """So many cancellations on a site of its own, and what came of them and of those who checked."""
    began = time.monotonic()
    with (
        Broker(directory, sync="everysec") as broker,
        Site(directory, broker.url, agents=1, workers=1, unix=True) as site,
    ):
        site.await_whole()
        baseline = site.keys()
        addresses = [address for address in site.addresses if isinstance(address, str)]
        cancellers = Cancellers(addresses, count, seed)
        load = Load(addresses, clients=checkers, seed=seed, leavers=0.0)
        uvloop.run(_both(cancellers, load))
        left = site.await_rest(baseline)
        if load.stray:
            left["bytes that nobody asked for"] = load.stray
        ledger = site.ledger.read_text()
    tally = judge(
        load.log,
        parse_ledger("\n".join(line for line in ledger.split("\n") if not line.startswith("x"))),
    )
    tally.counts[Verdict.LEFT] += cancellers.done
    for seen in cancellers.foreign:
        tally.add(seen, ())
    for token in ran_twice(ledger):
        twice = Seen(token, "", 0.0, 0.0, Ending.LEFT)
        tally.bad.append((Verdict.DUPLICATE, twice, ()))
        tally.counts[Verdict.DUPLICATE] += 1
    print(f"{cancellers.answered} had an answer, or a part of one; {ledger.count(chr(10))} runs")
    return Report({"cancellations": Row(1, 0.0, tally)}, left, 0, time.monotonic() - began)


async def _both(cancellers: Cancellers, load: Load) -> None:
    checking = asyncio.create_task(load.run())
    telling = asyncio.create_task(_tell(cancellers, load))
    await cancellers.run()
    load.stop()
    await checking
    telling.cancel()


async def _tell(cancellers: Cancellers, load: Load) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(10.0)
        seconds = time.monotonic() - began
        print(
            f"{seconds:7.1f} s  {cancellers.done:8d} cancelled, {cancellers.done / seconds:.0f} a second; "
            f"{len(load.log)} checked",
            flush=True,
        )
