"""A host's clock jumps by an hour under load, the broker's too: nothing expires early.

The broker runs under libfaketime, which leaves its monotonic clock alone. Gateways and agents get a ``time.time``
that reads its offset from a file: nothing else in them asks for the time of day (the interpreter's own waits are
on the monotonic clock, which libfaketime would upset).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from flaskbus.broker import Unavailable, connect
from flaskbus.routing import Mount
from tests.conftest import binary, free_port
from tests.faults.test_stopping import Stage, seen_by
from tests.integration.fleet import LEASE, Load, Program, eventually

CLOCK = """
import os, time
_file, _real = os.environ["CLOCK"], time.time

def jumped():
    with open(_file) as file:
        return _real() + float(file.read() or 0)

time.time = jumped
"""

HOUR = 3600
HEAD_TIMEOUT = 8.0
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)

needs_faketime = pytest.mark.skipif(
    LIBRARY is None, reason="libfaketime is not installed (apt-get install faketime)"
)


class Clocks(Stage):
    """A broker, a gateway and agents, each with a clock of its own.

    ``/fleet`` is served by an agent that is busy all the time, ``/stage`` by one with a single thread, and the agent
    of ``/held`` has left.
    """

    def __init__(self, directory: Path) -> None:
        for host in ("broker", "gateway", "agent"):
            (directory / host).write_text("+0\n")
        (directory / "clock").mkdir()
        (directory / "clock" / "sitecustomize.py").write_text(CLOCK)
        self.port = free_port()
        super().__init__(directory, f"redis://127.0.0.1:{self.port}/0")
        self.broker = subprocess.Popen(
            [str(binary("valkey")), "--port", str(self.port), "--save", "", "--dir", str(directory)],
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                **({"LD_PRELOAD": str(LIBRARY)} if LIBRARY else {}),
                "FAKETIME_TIMESTAMP_FILE": str(directory / "broker"),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "DONT_FAKE_MONOTONIC": "1",
            },
        )

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        self.broker.kill()
        self.broker.wait()

    def start(self, name: str, module: str, *options: str, **more: Any) -> Program:
        host = "gateway" if name == "gateway" else "agent"
        path = os.pathsep.join([str(self.directory / "clock"), os.environ.get("PYTHONPATH", "")])
        return super().start(
            name,
            module,
            *options,
            PYTHONPATH=path.rstrip(os.pathsep),
            CLOCK=str(self.directory / host),
            **more,
        )

    def raise_curtain(self, *agent_options: str, gateway_options: tuple[str, ...] = ()) -> None:
        eventually(self.answers, "the broker answers")
        self.front, self.url_ = self.gateway("--head-timeout", str(HEAD_TIMEOUT), *gateway_options)
        self.agent("busy")
        self.back = self.start(
            "one", "flaskbus_agent", "stopping:app=/stage", "--threads", "1", *agent_options
        )
        self.of_held().end()
        for mount in ("fleet", "stage"):
            eventually(lambda: httpx.get(f"{self.url_}/{mount}/hello").status_code == 200, mount)  # noqa: B023

    def answers(self) -> bool:
        with connect(self.url) as client:
            try:
                return bool(client.ping())
            except Unavailable:
                return False

    def of_held(self) -> Program:
        agent = self.start("held", "flaskbus_agent", "stopping:app=/held")
        eventually(lambda: self.registry.agents(Mount.parse("/held")), "the agent of /held")
        eventually(lambda: httpx.get(f"{self.url_}/held/hello").status_code == 200, "/held is known")
        return agent

    def jump(self, host: str, seconds: int) -> None:
        """Set a clock, and wait until its host has seen it, and for more heartbeats than a lease has."""
        (self.directory / host).write_text(f"{seconds:+d}\n")
        client: Any = self.registry.client
        if host == "broker":
            eventually(lambda: abs(client.time()[0] - time.time() - seconds) < 10, "the broker's clock")
        (before,) = (record.beat for record in self.registry.agents(Mount.parse("/stage")))

        def beat() -> bool:
            return any(record.beat > before + 5 for record in self.registry.agents(Mount.parse("/stage")))

        eventually(beat, "a lease has passed")


@pytest.fixture
def clocks(tmp_path: Path) -> Iterator[Clocks]:
    with Clocks(tmp_path) as clocks:
        yield clocks


@needs_faketime
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["forward", "back"])
@pytest.mark.parametrize("host", ["broker", "gateway", "agent"])
def test_nothing_expires_early(clocks: Clocks, host: str, seconds: int) -> None:
    clocks.raise_curtain()
    with ExitStack() as stack:
        load = stack.enter_context(Load([clocks.url_], methods=("GET", "POST")))
        load.more(20)
        streaming = stack.enter_context(clocks.open("/events", mount="stage"))
        streaming.read()
        running = stack.enter_context(clocks.open_later("/work", mount="stage"))
        eventually(lambda: clocks.marked("runs"), "it runs")
        queued = stack.enter_context(clocks.open_later("/work", "POST", mount="stage"))
        held = stack.enter_context(clocks.open_later("/hello", mount="held"))
        eventually(
            lambda: clocks.queue_length("/stage") == 3 and clocks.queue_length("/held") == 1, "all wait"
        )

        clocks.jump(host, seconds)
        load.more(20)
        new = stack.enter_context(clocks.open_later("/hello", mount="held"))
        eventually(lambda: clocks.queue_length("/held") == 2, "the mount is known, and another request waits")
        clocks.touch("go")
        assert seen_by(running) == seen_by(queued) == (200, b"done")
        assert (clocks.directory / "runs").read_text() == "GET\nPOST\n"
        clocks.of_held()
        assert seen_by(held)[0] == seen_by(new)[0] == 200
        known = streaming.body.count(b"id:")
        for _ in range(known, known + 20):
            assert streaming.read()
        assert load.good() > 0
    assert not load.bad()
    load.judge(clocks.runs())

    # Deadlines are what they were: one that is missed by the clock of the day is not missed.
    (clocks.directory / "go").unlink()
    with clocks.open_later("/work", mount="stage") as blocking:
        eventually(lambda: (clocks.directory / "runs").read_text().count("\n") == 3, "it runs")
        sent = time.monotonic()
        late = httpx.post(f"{clocks.url_}/stage/work", timeout=30)
        assert (late.status_code, late.json()["executed"]) == (503, "no")
        assert HEAD_TIMEOUT - 0.5 < time.monotonic() - sent < HEAD_TIMEOUT + 3
        clocks.touch("go")
        assert seen_by(blocking)[0] in (200, 504)
    for agent in (clocks.back, clocks.front):
        agent.end()


@needs_faketime
@pytest.mark.slow
@pytest.mark.parametrize("host", ["broker", "gateway", "agent"])
def test_a_jump_while_everything_stops_cuts_nothing_off(clocks: Clocks, host: str) -> None:
    clocks.raise_curtain()
    with clocks.open_later("/work", mount="stage") as running:
        eventually(lambda: clocks.marked("runs"), "it runs")
        clocks.front.signal(signal.SIGTERM)
        clocks.back.signal(signal.SIGTERM)
        eventually(lambda: "1 requests run" in clocks.back.log(), "the agent stops")
        eventually(lambda: "waiting up to" in clocks.front.log(), "the gateway stops")
        (clocks.directory / host).write_text(f"+{HOUR}\n")
        # Whoever went by this clock would end at its next look.
        stopped = time.monotonic()
        eventually(lambda: time.monotonic() - stopped > LEASE, "time for a look")
        clocks.touch("go")
        assert seen_by(running) == (200, b"done")
    assert clocks.front.process.wait(20) == clocks.back.process.wait(20) == 0
