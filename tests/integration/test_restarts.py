"""Everything is restarted while requests come in: agents and gateways cost no request, the broker few.

Each request is a POST, which must not run twice, unless a test says otherwise.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from flaskbus.broker import connect
from flaskbus.keys import GROUP, Keys
from tests.conftest import Broker, binary, free_port
from tests.integration.fleet import LEASE, MOUNT, Fleet, Load, Program, eventually
from tests.integration.procs import alive

RECOVERY = 2.0
SLACK = 2.0
"""Seconds that a machine with much else to do may add to what is promised."""


@pytest.fixture
def fleet(broker: Broker, tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, broker.url) as fleet:
        yield fleet


def workers_replaced(fleet: Fleet, agent: Program, old: list[int], count: int) -> bool:
    ready = fleet.ready(agent)
    return len(ready) == count and not set(ready) & set(old) and not alive(old)


def all_good(load: Load, fleet: Fleet) -> None:
    assert not load.bad()
    runs = fleet.runs()
    load.judge(runs)
    assert set(runs.values()) == {1}
    fleet.at_rest()


# Agents


def test_agents_reload_grow_and_shrink(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    agent = fleet.agent("one", "--workers", "2", "--threads", "2")
    with Load([url]) as load:
        for _ in range(2):
            old = fleet.ready(agent)
            agent.signal(signal.SIGHUP)
            eventually(lambda: workers_replaced(fleet, agent, old, 2), "new workers")  # noqa: B023
            load.more(30)
        agent.signal(signal.SIGTTIN)
        eventually(lambda: len(fleet.ready(agent)) == 3, "a third worker")
        load.more(30)
        for count in (2, 1):
            agent.signal(signal.SIGTTOU)
            eventually(lambda: len(fleet.ready(agent)) == count, f"{count} workers")  # noqa: B023
            load.more(30)
    all_good(load, fleet)


def test_agents_are_replaced_one_by_one(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    agents = [fleet.agent("a", "--threads", "2"), fleet.agent("b", "--threads", "2")]
    with Load([url]) as load:
        for name in "cde":
            agents.append(fleet.agent(name, "--threads", "2"))
            agents.pop(0).end()
            load.more(30, lambda seen: seen.agent == name)  # noqa: B023
    all_good(load, fleet)


def test_the_only_agent_ends_and_another_starts(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    first = fleet.agent("first")
    with Load([url]) as load:
        load.more(30)
        first.end()
        assert not fleet.records()
        fleet.agent("second")
        load.more(30, lambda seen: seen.agent == "second")
    all_good(load, fleet)


def test_workers_that_have_served_enough(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    fleet.agent("one", "--max-requests", "50")
    with Load([url]) as load:
        eventually(lambda: len({seen.worker for seen in load.seen}) >= 4, "three replacements")
    all_good(load, fleet)


# Gateways


def test_a_gateway_reloads(fleet: Fleet) -> None:
    gateway, url = fleet.gateway("--workers", "2")
    fleet.agent("one")
    with Load([url], keep=False) as load:
        for _ in range(3):
            old = gateway.workers()
            gateway.signal(signal.SIGHUP)
            eventually(lambda: not alive(old), "the old workers are gone")  # noqa: B023
            load.more(30)
    all_good(load, fleet)


def test_two_gateways_are_restarted_in_turn(fleet: Fleet) -> None:
    gateways = [fleet.gateway(), fleet.gateway()]
    fleet.agent("one")
    with Load([url for _, url in gateways], keep=False) as load:
        for gateway, url in gateways:
            load.more(30)
            gateway.end()
            load.more(30)
            fleet.gateway(port=int(url.rpartition(":")[2]))
            load.more(30)
    all_good(load, fleet)


# The broker


class OwnBroker:
    """A broker on a port of its own that writes down what it has, and can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> float:
        """Returns when it answered (monotonic seconds)."""
        self.process = subprocess.Popen(
            [str(binary("valkey")), "--port", str(self.port), "--save", "", "--appendonly", "yes",
             "--dir", str(self.directory)],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(self.answers, "the broker answers")
        return time.monotonic()

    def answers(self) -> bool:
        with closing(connect(self.url)) as client:
            try:
                return bool(client.ping())
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
                return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OwnBroker]:
    (tmp_path / "broker").mkdir()
    own = OwnBroker(tmp_path / "broker")
    yield own
    own.kill()


@pytest.fixture
def own_fleet(own: OwnBroker, tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, own.url) as fleet:
        yield fleet


def serving_again(load: Load, since: float) -> float:
    """Seconds from ``since`` until both agents had given a good answer."""

    def ends() -> dict[str, float]:
        good = [seen for seen in tuple(load.seen) if seen.status == 200 and seen.ended > since]
        return {seen.agent: seen.ended for seen in reversed(good)}

    eventually(lambda: len(ends()) == 2, "both agents serve")
    return max(ends().values()) - since


def only(load: Load, *kinds: tuple[int, str]) -> None:
    """Whatever went wrong is of these kinds: status and ``executed``."""
    strange = [seen for seen in load.bad() if (seen.status, seen.executed) not in kinds]
    assert not strange


def test_a_broker_that_is_killed_and_comes_back(own: OwnBroker, own_fleet: Fleet) -> None:
    _, url = own_fleet.gateway()
    agents = [own_fleet.agent("a"), own_fleet.agent("b")]
    with Load([url]) as load:
        for _ in range(2):
            load.more(50)
            own.kill()
            back = own.start()
            assert serving_again(load, back) < RECOVERY + SLACK
            load.more(50)
    only(load, (503, "no"), (504, "unknown"), (502, "unknown"))
    load.judge(own_fleet.runs())
    assert len(load.bad()) <= 2 * load.threads
    # Nothing waits for its deadline of 30 s.
    assert all(seen.ended - seen.sent < 10 for seen in load.bad()), load.bad()
    assert all(agent.process.poll() is None for agent in agents)
    # The DEL of a list goes unheard when the broker dies at that moment.
    own_fleet.at_rest(lists=2 * load.threads)


def test_a_broker_that_stays_away_is_said_to(own: OwnBroker, own_fleet: Fleet) -> None:
    _, url = own_fleet.gateway("--head-timeout", "4")
    own_fleet.agent("a")
    own_fleet.agent("b")
    with Load([url]) as load:
        load.more(50)
        own.kill()
        gone = time.monotonic()
        eventually(lambda: sum(seen.sent > gone for seen in load.bad()) >= 6, "answers without a broker")
        back = own.start()
        assert serving_again(load, back) < RECOVERY + SLACK
        load.more(50)
    only(load, (503, "no"), (504, "unknown"), (502, "unknown"))
    assert all(seen.ended - seen.sent < 10 for seen in load.bad()), load.bad()
    load.judge(own_fleet.runs())
    # The DEL of a list goes unheard when the broker dies at that moment.
    own_fleet.at_rest(lists=2 * load.threads)


def test_a_broker_that_lost_all_it_had(own: OwnBroker, own_fleet: Fleet) -> None:
    _, url = own_fleet.gateway()
    own_fleet.agent("a")
    own_fleet.agent("b")
    with Load([url]) as load:
        load.more(50)
        own_fleet.registry.client.flushall()
        lost = time.monotonic()
        assert serving_again(load, lost) < LEASE + SLACK
        load.more(50)
    only(load, (404, "no"), (503, "no"), (502, "unknown"))
    # What was on its way is noticed by the gateway, not left to its deadline.
    assert all(seen.ended - seen.sent < LEASE + SLACK for seen in load.bad())
    assert sum(seen.executed == "unknown" for seen in load.bad()) <= 6
    load.judge(own_fleet.runs())
    own_fleet.at_rest()


def test_a_group_that_is_destroyed(own: OwnBroker, own_fleet: Fleet) -> None:
    _, url = own_fleet.gateway()
    own_fleet.agent("a", "--threads", "2")
    own_fleet.agent("b", "--threads", "2")
    client: Any = own_fleet.registry.client
    with Load([url], threads=12) as load:
        load.more(50)
        client.xgroup_destroy(Keys().of(MOUNT.key).requests, GROUP)
        lost = time.monotonic()
        assert serving_again(load, lost) < LEASE + SLACK
        load.more(50)
    only(load, (502, "unknown"))
    assert all(seen.ended - seen.sent < LEASE + SLACK for seen in load.bad())
    assert len(load.bad()) <= 12
    load.judge(own_fleet.runs())
    own_fleet.at_rest()
