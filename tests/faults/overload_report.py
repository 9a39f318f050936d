"""What becomes of a mount that gets more than its app can do: ``python -m tests.faults.overload_report``.

An app of known capacity, and load at half of it up to five times as much, from clients that go after some
seconds. Prints goodput (answers of the app while its client was there), how fast the rest was refused, and the
goodput at the most load as a share of the best.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from tests.conftest import start_broker, stop_broker
from tests.faults.flood import Flood, flood
from tests.integration.fleet import Fleet, eventually

APP = """
import time

def app(environ, start_response):
    time.sleep(float(environ["PATH_INFO"].strip("/")))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"done"]
"""

HEADER = "   load  offered/s  goodput/s      p50      p99  refused/s      p50      p99  gone/s  Retry-After"


say = partial(print, file=sys.stdout, flush=True)


def line(factor: float, offered: float, found: Flood) -> str:
    retries = sorted(each.retry_after for each in found.answers if each.retry_after is not None)
    return (
        f"{factor:6.1f}x {offered:10.0f} {found.rate(200):10.1f}"
        f" {1000 * found.percentile(200, 0.5):5.0f} ms {1000 * found.percentile(200, 0.99):5.0f} ms"
        f" {found.rate(503):10.1f} {1000 * found.percentile(503, 0.5):5.1f} ms"
        f" {1000 * found.percentile(503, 0.99):5.1f} ms {found.rate(0):7.1f}"
        + (f"  {retries[0]} to {retries[-1]} s" if retries else "")
    )


def report(options: argparse.Namespace, directory: Path) -> float:
    capacity = options.agents * options.threads / options.work
    (directory / "overloaded.py").write_text(APP)
    broker = start_broker("valkey", directory)
    try:
        with Fleet(directory, broker.url) as fleet:
            for number in range(options.agents):
                fleet.start(
                    f"agent{number}",
                    "flaskbus_agent",
                    "overloaded:app=/app",
                    "--threads",
                    str(options.threads),
                )
            _, url = fleet.gateway("--lease", "10", *options.gateway)
            eventually(lambda: asyncio.run(flood(url, ["/app/0"], 10, 1.0)).rate(200) >= 10, "the agents")
            say(
                f"{options.agents} agents with {options.threads} threads, {1000 * options.work:g} ms of work: "
                f"{capacity:.0f}/s can be done; clients go after {options.patience:g} s; {options.seconds:g} s each"
            )
            # A queue is not called too old before agents were there for as long.
            asyncio.run(flood(url, [f"/app/{options.work}"], capacity / 2, options.warm_up))
            say(HEADER)
            good = []
            for factor in options.factors:
                offered = capacity * factor
                found = asyncio.run(
                    flood(url, [f"/app/{options.work}"], offered, options.seconds, patience=options.patience)
                )
                say(line(factor, offered, found))
                good.append(found.rate(200))
            say(f"goodput at {options.factors[-1]:g}x: {good[-1] / max(good):.0%} of the best")
            return good[-1] / max(good)
    finally:
        stop_broker(broker)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--work", type=float, default=0.02, help="seconds that a request takes")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each load lasts")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds until a client goes")
    parser.add_argument("--warm-up", type=float, default=12.0)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 2, 5])
    parser.add_argument("gateway", nargs="*", help="options of the gateway, after --")
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):  # without the logs
        return int(report(parser.parse_args(), Path(directory)) < 0.9)


if __name__ == "__main__":
    sys.exit(main())
