"""SIGKILL at named points in agent and gateway: what becomes of a request, point by point."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flaskbus.keys import GROUP, Keys
from flaskbus.registry import Registry
from tests.conftest import Broker, free_port
from tests.faults.contents import work
from tests.faults.http import Connection
from tests.faults.load import Ask, see
from tests.faults.oracle import Ending, Run, Seen, Verdict, classify, parse_ledger
from tests.faults.points import POINTS
from tests.faults.site import MOUNT, REPOSITORY, M
from tests.integration.fleet import Program, eventually
from tests.integration.procs import alive

LEASE = 1.0


class Fate(NamedTuple):
    """What becomes of a GET and of a POST: the verdict, and how often it ran."""

    get: tuple[Verdict, int]
    post: tuple[Verdict, int]


OK, UNKNOWN, GONE = Verdict.OK, Verdict.UNKNOWN, Verdict.GONE

FATES = {
    # A GET runs again unless it was answered; what a POST did, nobody knows.
    "agent: read, not begun": Fate((OK, 1), (UNKNOWN, 0)),
    "agent: in the handler": Fate((OK, 2), (UNKNOWN, 1)),
    "agent: reply made, not sent": Fate((OK, 2), (UNKNOWN, 1)),
    "agent: finish not sent": Fate((OK, 2), (UNKNOWN, 1)),
    "agent: finish sent, not answered": Fate((OK, 1), (OK, 1)),
    # Its gateway is dead: nobody can be told, and nothing may be left.
    "gateway: XADD not sent": Fate((GONE, 0), (GONE, 0)),
    "gateway: XADD sent, not answered": Fate((GONE, 1), (GONE, 1)),
    "gateway: waiting": Fate((GONE, 1), (GONE, 1)),
    "gateway: reply taken from the bell": Fate((GONE, 1), (GONE, 1)),
    "gateway: list not deleted": Fate((OK, 1), (OK, 1)),
}
"""A small reply, complete at once."""

STREAM_FATES = {
    # The head went out with the first push: what follows would be another run's.
    "agent: first push sent, not answered": (UNKNOWN, 1),
    "agent: between two pushes": (UNKNOWN, 1),
    "agent: finish not sent": (UNKNOWN, 1),
    "gateway: reply taken from its list": (GONE, 1),
}


class Stage:
    """A gateway and an agent, one of which is going to kill itself; and another of its kind afterwards."""

    def __init__(self, directory: Path, broker: Broker) -> None:
        self.directory = directory
        self.broker = broker
        self.ledger = directory / "ledger"
        self.ledger.touch()
        self.flag = directory / "killed"
        self.programs: list[Program] = []
        self.address = ("127.0.0.1", 0)

    def start(self, module: str, *options: str, kill: str = "") -> Program:
        suicide = ["--kill", kill, "--flag", str(self.flag)] if kill else []
        program = Program(
            self.directory / f"{len(self.programs)}-{module}.log",
            "tests.faults.points",
            *suicide, module, "--lease", str(LEASE), *options,
            LEDGER=str(self.ledger),
            FLASKBUS_REDIS_URL=self.broker.url,
            PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        )  # fmt: skip
        self.programs.append(program)
        return program

    def gateway(self, kill: str = "") -> Program:
        self.address = ("127.0.0.1", free_port())
        program = self.start("flaskbus_gateway", "--port", str(self.address[1]), kill=kill)
        eventually(lambda: "listening on" in program.log(), "the gateway listens")
        return program

    def agent(self, kill: str = "", workers: int = 1) -> Program:
        options = ("tests.faults.app:app", "--prefix", "/soak", "--threads", "2", "--workers", str(workers))
        program = self.start("flaskbus_agent", *options, kill=kill)
        eventually(lambda: len(self.ready(program)) == workers, "the agent is ready")
        return program

    def ready(self, program: Program) -> list[int]:
        with self.broker.client() as client:
            records = Registry(client, Keys()).agents(MOUNT)
        return [each.pid for each in records if each.supervisor == program.pid and each.state == "ready"]

    def routed(self) -> bool:
        with self.broker.client() as client:
            gateways = Registry(client, Keys()).gateways().values()
        return any(MOUNT.key in each.get("mounts", ()) for each in gateways)

    def replaced(self) -> bool:
        """Whether the process that killed itself is gone, and an agent is ready that is another."""
        killed = self.flag.read_text()
        if not killed or alive([int(killed)]):
            return False
        with self.broker.client() as client:
            records = Registry(client, Keys()).agents(MOUNT)
        return any(each.state == "ready" for each in records) and all(
            each.pid != int(killed) for each in records
        )

    def ask(self, ask: Ask) -> Seen:
        return asyncio.run(self.ask_here(ask))

    async def ask_here(self, ask: Ask) -> Seen:
        connection = await Connection.open(self.address)
        seen = await see(ask, connection)
        connection.close()
        await connection.ended.wait()
        return seen

    def runs(self, token: str) -> list[Run]:
        return parse_ledger(self.ledger.read_text()).get(token, [])

    def at_rest(self) -> None:
        with self.broker.client() as broker_client:
            client: Any = broker_client

            def left() -> tuple[Any, ...]:
                return (
                    client.xlen(M.requests),
                    client.xpending(M.requests, GROUP)["pending"],
                    list(client.scan_iter("*:reply:*")),
                )

            eventually(lambda: left() == (0, 0, []), "the broker is at rest", 15)


@pytest.fixture
def stage(tmp_path: Path, broker: Broker) -> Iterator[Stage]:
    stage = Stage(tmp_path, broker)
    with killed_at_last(stage.programs):
        yield stage


@contextmanager
def killed_at_last(programs: list[Program]) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            if program.process.poll() is None:
                program.kill()
            print(program.log())


def fate_of(stage: Stage, point: str, ask: Ask) -> tuple[Verdict, int]:
    """Let a process die there, and judge what came of the request once all is at rest."""
    stage.gateway(point if point.startswith("gateway") else "")
    stage.agent(point if point.startswith("agent") else "")
    eventually(stage.routed)
    seen = stage.ask(ask)
    eventually(stage.flag.exists, f"killed at {point}")
    eventually(stage.replaced, f"replaced after {point}")
    if point.startswith("gateway"):
        seen = seen._replace(excused=True)
    # Both are there again: the arbiter and the supervisor have replaced what died.
    stage.at_rest()
    after = stage.ask(Ask(f"{ask.token}.after", "POST", "small", 100, False, None))
    assert classify(after, stage.runs(after.token)) is OK
    runs = stage.runs(ask.token)
    return classify(seen, runs), len(runs)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("point", "method"),
    [
        pytest.param(point, method, marks=() if point == "agent: in the handler" else SLOW)
        for point in FATES
        for method in ("GET", "POST")
    ],
)
def test_a_small_reply(stage: Stage, point: str, method: str) -> None:
    fate = FATES[point]
    ask = Ask("1.2.3", method, "small", 0, False, None)
    assert work(ask.token) < 0.1
    assert fate_of(stage, point, ask) == (fate.get if method == "GET" else fate.post)


@SLOW
@pytest.mark.parametrize("point", STREAM_FATES)
def test_a_streamed_reply(stage: Stage, point: str) -> None:
    assert fate_of(stage, point, Ask("1.2.3", "GET", "stream", 0, False, None)) == STREAM_FATES[point]


@SLOW
def test_a_reply_that_is_out_but_for_its_end(stage: Stage) -> None:
    """The client has all that was announced, and its next request comes on the same connection."""
    stage.gateway()
    stage.agent("agent: finish not sent")
    eventually(stage.routed)

    async def two() -> list[Seen]:
        connection = await Connection.open(stage.address)
        asks = [Ask(token, "POST", "large", 0, False, None) for token in ("1", "2")]
        seen = [await see(ask, connection) for ask in asks]
        connection.close()
        await connection.ended.wait()
        return seen

    assert [seen.right for seen in asyncio.run(two())] == [True, True]
    assert stage.flag.exists()
    assert [len(stage.runs(token)) for token in ("1", "2")] == [1, 1]
    stage.at_rest()


@SLOW
def test_an_agent_that_dies_while_it_leaves(stage: Stage) -> None:
    stage.gateway()
    agent = stage.agent("agent: leaving")
    eventually(stage.routed)
    assert stage.ask(Ask("1", "GET", "small", 0, False, None)).right
    agent.signal(signal.SIGTERM)
    eventually(stage.flag.exists)
    other = stage.agent()
    for number in range(10):
        assert stage.ask(Ask(f"2.{number}", "POST", "small", 0, False, None)).right
    with stage.broker.client() as client:
        registry = Registry(client, Keys())
        eventually(lambda: {each.supervisor for each in registry.agents(MOUNT)} == {other.pid})
        consumers: Any = client
        eventually(lambda: len(consumers.xinfo_consumers(M.requests, GROUP)) == 1)
    stage.at_rest()


@SLOW
def test_a_supervisor_dies_alone(stage: Stage) -> None:
    """Its workers finish what they have, and the next agent takes over."""
    stage.gateway()
    agent = stage.agent(workers=2)
    eventually(stage.routed)
    os.kill(agent.pid, signal.SIGKILL)
    for number in range(10):
        seen = stage.ask(Ask(f"1.{number}", "POST", "small", 0, False, None))
        assert seen.right
        if number == 4:
            stage.agent()
    stage.at_rest()


@SLOW
def test_an_arbiter_dies_alone(stage: Stage) -> None:
    """Its workers end by themselves, and answer first what they have."""
    gateway = stage.gateway()
    stage.agent()
    eventually(stage.routed)
    workers = gateway.workers()
    slow = next(token for token in map(str, range(10**6)) if work(token) >= 0.1)

    async def both() -> Seen:
        answer = asyncio.create_task(stage.ask_here(Ask(slow, "POST", "small", 0, False, None)))
        while not stage.runs(slow):
            await asyncio.sleep(0.005)
        os.kill(gateway.pid, signal.SIGKILL)
        return await answer

    seen = asyncio.run(both())
    assert (seen.ending, seen.right) == (Ending.ANSWERED, True)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers end", 40)
    stage.gateway()
    eventually(stage.routed)
    assert stage.ask(Ask("after", "POST", "small", 0, False, None)).right
    stage.at_rest()


def test_every_point_is_in_a_table() -> None:
    assert {*FATES, *STREAM_FATES, "agent: leaving"} == set(POINTS)
