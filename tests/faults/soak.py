"""``python -m tests.faults.soak``: load, faults, and a verdict on every single request.

Exit code 1 if anything is wrong, duplicate, lost or falsely said not to have run, or if something is left
behind when all is over. See docs/howto/soak.md.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import uvloop

from tests.faults import cancellations, cuts
from tests.faults.injections import FAULTS, NEEDS_HOST, Scene
from tests.faults.load import Load
from tests.faults.oracle import Run, Seen, judge, parse_ledger, recovery
from tests.faults.partition import Host, available
from tests.faults.proxy import Proxy
from tests.faults.report import Report, Row, counted
from tests.faults.site import Broker, Site
from tests.integration.fleet import eventually

SLOW = 2.0
"""Seconds: who waits longer is told of."""

SETTLE = 0.5
"""Seconds of peace after each fault."""


class LoopThread:
    """An event loop of its own thread, for what has to go on while the main thread breaks things."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10.0)
        self.loop.close()

    def start(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the loop, and wait for it."""

        async def work() -> Any:
            return function()

        return self.start(work()).result(10.0)


class Round(NamedTuple):
    """One fault; monotonic seconds."""

    fault: str
    began: float
    since: float
    ended: float


class Soak:
    """A site under load; :meth:`round` injects one fault, :meth:`finish` judges all of it."""

    def __init__(self, directory: Path, seed: int, *, clients: int = 32) -> None:
        self.began = time.monotonic()
        self.dice = random.Random(seed)
        self.rounds: list[Round] = []
        with ExitStack() as stack:
            thread = stack.enter_context(LoopThread())
            host = stack.enter_context(Host()) if available() else None
            broker = stack.enter_context(Broker(directory, addresses=[host.address] if host else []))
            proxy = thread.call(lambda: Proxy(broker.port))
            thread.start(proxy.start()).result(10.0)
            stack.callback(lambda: thread.start(proxy.close()).result(10.0))
            detour = f"redis://127.0.0.1:{proxy.port}/0"
            self.site = stack.enter_context(Site(directory, broker.url, detour=detour, host=host))
            self.scene = Scene(self.site, broker, proxy, thread.call, self.dice, host)
            self.site.await_whole()
            self.baseline = self.site.keys()
            self.load = Load(self.site.addresses, clients=clients, seed=seed)
            self._running = thread.start(self.load.run())
            stack.callback(self._running.cancel)
            self.await_good(time.monotonic())
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def await_good(self, since: float, seconds: float = 30.0) -> float:
        """Until every gateway has answered a request that was sent after ``since``; how long that took."""
        gateways = range(len(self.site.addresses))

        def recovered() -> bool:
            self.site.tend()
            if self._running.done():
                self._running.result()
            return recovery(self._latest(since), since, gateways) < float("inf")

        eventually(recovered, "every gateway answers again", seconds)
        return recovery(self._latest(since), since, gateways)

    def _latest(self, since: float) -> Sequence[Seen]:
        log = self.load.log
        return log[bisect.bisect_left(log, since, key=lambda seen: seen.ended) :]

    def round(self, name: str) -> Round:
        began = time.monotonic()
        since = FAULTS[name](self.scene)
        self.site.await_whole()
        self.await_good(since)
        time.sleep(SETTLE)
        done = Round(name, began, since, time.monotonic())
        self.rounds.append(done)
        return done

    def finish(self) -> Report:
        """Stop the load, wait until all is at rest, and judge."""
        self.load.stop()
        self._running.result(60.0)
        left = self.site.await_rest(self.baseline)
        if self.load.stray:
            left["bytes that nobody asked for"] = self.load.stray
        runs = parse_ledger(self.site.ledger.read_text())
        return Report(self._rows(runs), left, self.scene.killed, time.monotonic() - self.began)

    def _rows(self, runs: dict[str, list[Run]]) -> dict[str, Row]:
        log = [self._excused(seen) for seen in self.load.log]
        rows = {name: Row() for name in dict.fromkeys(item.fault for item in self.rounds)}
        ends = [item.ended for item in self.rounds]
        parts: dict[str, list[Seen]] = {name: [] for name in rows}
        for seen in log:
            place = min(bisect.bisect_left(ends, seen.ended), len(ends) - 1)
            parts[self.rounds[place].fault].append(seen)
        for name, row in rows.items():
            row.tally = judge(parts[name], runs, strangers=False)
        for item in self.rounds:
            rows[item.fault].rounds += 1
            taken = recovery(self._latest(item.since), item.since, range(len(self.site.addresses)))
            rows[item.fault].recovery = max(rows[item.fault].recovery, taken)
        return rows

    def _excused(self, seen: Seen) -> Seen:
        hurt = any(
            number == seen.gateway and seen.sent <= until and seen.ended >= since
            for number, since, until in self.scene.hurt
        )
        return seen._replace(excused=hurt)


def drawn(names: Sequence[str], dice: random.Random) -> Iterable[str]:
    """Every fault once in each turn, each turn in another order."""
    while True:
        yield from dice.sample(names, len(names))


def soak(arguments: argparse.Namespace, directory: Path) -> Report:
    """Faults one after the other, until there were enough of everything."""
    names = arguments.fault or [name for name in FAULTS if name not in NEEDS_HOST or available()]
    with Soak(directory, arguments.seed, clients=arguments.clients) as soak:
        until = time.monotonic() + arguments.seconds
        for number, name in enumerate(drawn(names, soak.dice), 1):
            done = soak.round(name)
            print(
                f"{time.monotonic() - soak.began:7.1f} s  {number:4d} {name:24s} "
                f"{len(soak.load.log):8d} requests",
                flush=True,
            )
            if done.ended > until and number >= arguments.rounds and len(soak.load.log) >= arguments.requests:
                break
        return soak.finish()


def run(arguments: argparse.Namespace, directory: Path) -> Report:
    match arguments.fault:
        case ["cancellations"]:
            return cancellations.run(directory, count=arguments.requests or 100_000, seed=arguments.seed)
        case ["cuts"]:
            return cuts.run(directory, seed=arguments.seed)
    return soak(arguments, directory)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, at least")
    parser.add_argument("--rounds", type=int, default=0, help="how many faults, at least")
    parser.add_argument("--requests", type=int, default=0, help="how many requests, at least")
    parser.add_argument("--seed", type=int, default=1, help="what decides all that is random")
    parser.add_argument("--clients", type=int, default=32, help="clients at a time")
    parser.add_argument(
        "--fault", action="append", choices=[*FAULTS, "cuts", "cancellations"],
        help="only this; may be repeated, but for the last two, which are runs of their own",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if len(arguments.fault or ()) > 1 and {"cuts", "cancellations"} & {*arguments.fault}:
        parser.error("cuts and cancellations are runs of their own")
    for name, least in (("seconds", 0), ("rounds", 0), ("requests", 0), ("clients", 1)):
        if not getattr(arguments, name) >= least:
            parser.error(f"--{name} must be at least {least}")
    directory = Path(tempfile.mkdtemp(prefix="flaskbus-soak-"))
    report = run(arguments, directory)
    tally = report.total.tally
    print(f"\n{report.table()}\n")
    print(
        f"{counted(report.killed, 'kill')}, {report.seconds:.0f} s, seed {arguments.seed}; "
        f"logs and ledger: {directory}"
    )
    for reason, count in tally.reasons.most_common(20):
        print(f"  {count:6d} {reason}")
    for name, row in report.rows.items():
        if (slow := row.tally.slowest) is not None and slow.waited > SLOW:
            print(f"  {slow.waited:6.2f} s, {name}: {slow.method} {slow.token} {slow.status} {slow.detail}")
    for bad in tally.bad[:20]:
        print("BAD", *bad)
    for name, value in report.left.items():
        print("LEFT", name, value)
    print("good" if report.good else "NOT GOOD")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
