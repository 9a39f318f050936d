"""More than an app can do: as much as it can is done, the rest is refused at once, and nobody else notices.

``python -m tests.faults.overload_report`` measures the same for longer and prints a table.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import flask
import httpx
import pytest

from flaskbus.testing import running_bus
from tests.conftest import Broker
from tests.faults.flood import Flood, flood
from tests.faults.overload_report import APP
from tests.integration.fleet import Fleet, Program, eventually
from tests.integration.test_promises import Gate, at_rest, counts, problem

THREADS = 4
WORK = 0.1
CAPACITY = THREADS / WORK


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def fleet(tmp_path: Path, broker: Broker) -> Iterator[Fleet]:
    (tmp_path / "overloaded.py").write_text(APP)
    with Fleet(tmp_path, broker.url) as fleet:
        yield fleet


def agent(fleet: Fleet, *prefixes: str) -> Program:
    apps = [f"overloaded:app={prefix}" for prefix in prefixes]
    return fleet.start("agent", "flaskbus_agent", *apps, "--threads", str(THREADS))


def served(url: str, *prefixes: str) -> None:
    def all_are() -> bool:
        return all(httpx.get(f"{url}{prefix}/0").status_code == 200 for prefix in prefixes)

    eventually(all_are, "the apps are there")


def show(name: str, found: Flood) -> None:
    for status, count in sorted(found.counts().items()):
        median, high = (1000 * found.percentile(status, share) for share in (0.5, 0.99))
        print(f"{name}: {count} answers {status}, p50 {median:.1f} ms, p99 {high:.1f} ms")


@pytest.mark.slow
def test_five_times_as_much_as_can_be_done(fleet: Fleet) -> None:
    agent(fleet, "/app")
    _, url = fleet.gateway()
    served(url, "/app")
    asyncio.run(flood(url, [f"/app/{WORK}"], CAPACITY / 2, 3))
    found = asyncio.run(flood(url, [f"/app/{WORK}"], 5 * CAPACITY, 12))
    show("5x", found)
    # Clients that wait five seconds at most; nobody of them went without an answer.
    assert set(found.counts()) == {200, 503}
    assert found.rate(200) > 0.7 * CAPACITY  # generously, for a machine with much else to do
    assert found.percentile(503, 0.5) < 0.25
    assert all(1 <= (each.retry_after or 0) <= 30 for each in found.answers if each.status == 503)


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True], ids=["agents of their own", "one agent for both"])
def test_the_flood_of_one_mount_is_not_felt_on_another(fleet: Fleet, together: bool) -> None:
    if together:
        agent(fleet, "/flooded", "/calm")
    else:
        agent(fleet, "/flooded")
        agent(fleet, "/calm")
    _, url = fleet.gateway()
    served(url, "/flooded", "/calm")

    async def both() -> tuple[Flood, Flood]:
        return await asyncio.gather(
            flood(url, [f"/flooded/{WORK}"], 5 * CAPACITY, 8),
            flood(url, ["/calm/0.01"], 5, 8),
        )

    flooded, calm = asyncio.run(both())
    show("flooded", flooded)
    show("calm", calm)
    assert set(calm.counts()) == {200}
    assert flooded.counts()[503] > 0


def test_what_runs_does_not_count_as_waiting(broker: Broker, gate: Gate, pool: ThreadPoolExecutor) -> None:
    with running_bus(broker.url, queue_limit=10) as bus, bus.mount(gate.app, "/shop", threads=30) as url:
        running = [pool.submit(httpx.get, f"{url}/wait/{number}", timeout=30) for number in range(30)]
        eventually(lambda: len(gate.calls) == 30)
        gate.open.set()
        assert {answer.result().status_code for answer in running} == {200}
        at_rest(broker)


def test_one_mount_does_not_take_all_that_a_gateway_keeps_open(
    broker: Broker, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    other = flask.Flask("other")
    other.add_url_rule("/", view_func=lambda: "other")
    with running_bus(broker.url, open_limit=8) as bus:
        with bus.mount(gate.app, "/shop", threads=20) as url, bus.mount(other, "/other") as calm:
            open_ones = [pool.submit(httpx.get, f"{url}/wait/{number}", timeout=30) for number in range(6)]
            eventually(lambda: len(gate.calls) == 6)
            refused = httpx.get(f"{url}/fast")
            assert problem(refused)["type"].endswith("queue-full")
            assert refused.json()["detail"] == "6 exchanges are open in this gateway, 6 of them with /shop"
            assert httpx.get(f"{calm}/").text == "other"
            gate.open.set()
            assert {answer.result().status_code for answer in open_ones} == {200}
            assert httpx.get(f"{url}/fast").text == "fast"
        at_rest(broker)


def test_bodies_that_are_still_coming_close_no_queue(
    broker: Broker, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """But they do not get past its limit: when one has come, there must be room for it."""
    with running_bus(broker.url, queue_limit=2) as bus, bus.mount(gate.app, "/shop", threads=1) as url:
        host, _, port = bus.url.removeprefix("http://").partition(":")
        head = b"POST /shop/wait/late HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\nhalf"
        with ExitStack() as stack:
            slow = [
                stack.enter_context(closing(socket.create_connection((host, int(port))))) for _ in range(5)
            ]
            for client in slow:
                client.sendall(head)
            assert httpx.get(f"{url}/fast").status_code == 200
            running = pool.submit(httpx.get, f"{url}/wait/1", timeout=30)
            eventually(lambda: gate.calls == ["1"])
            waiting = [pool.submit(httpx.get, f"{url}/wait/{number}", timeout=30) for number in (2, 3)]
            eventually(lambda: counts(broker)[0] == 3)
            slow[0].sendall(b"rest")
            answer = slow[0].recv(65536)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"executed": "no"' in answer
            gate.open.set()
            assert {one.result().status_code for one in (running, *waiting)} == {200}
            slow[1].sendall(b"rest")
            assert slow[1].recv(65536).startswith(b"HTTP/1.1 200 ")
        at_rest(broker)


def test_a_queue_that_is_too_old(broker: Broker, gate: Gate, pool: ThreadPoolExecutor) -> None:
    with running_bus(broker.url, queue_age=0.5) as bus, bus.mount(gate.app, "/shop", threads=1) as url:
        assert httpx.get(f"{url}/fast").text == "fast"
        waiting = [pool.submit(httpx.get, f"{url}/wait/{number}", timeout=30) for number in range(8)]
        eventually(lambda: gate.calls)

        def refusal() -> httpx.Response | None:
            waiting.append(pool.submit(httpx.get, f"{url}/wait/more", timeout=30))
            time.sleep(0.2)
            return next((answer.result() for answer in waiting if answer.done()), None)

        refused = eventually(refusal)  # nobody else is answered yet
        assert problem(refused)["type"].endswith("queue-full")
        assert "0.5 s are allowed" in refused.json()["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        gate.open.set()
        assert {answer.result().status_code for answer in waiting} == {200, 503}
        eventually(lambda: httpx.get(f"{url}/fast").status_code == 200)
        at_rest(broker)


@pytest.mark.slow
def test_what_gathered_while_no_agent_was_there_sheds_nothing(fleet: Fleet, pool: ThreadPoolExecutor) -> None:
    """The only agent is away for some seconds, at seven tenths of its load: that costs time, and no errors."""
    first = agent(fleet, "/app")
    _, url = fleet.gateway()
    served(url, "/app")
    found = pool.submit(lambda: asyncio.run(flood(url, [f"/app/{WORK}"], 0.7 * CAPACITY, 16, patience=30)))
    time.sleep(3.0)
    first.end()
    time.sleep(5.0)
    agent(fleet, "/app")
    show("restart", found.result())
    assert set(found.result().counts()) == {200}
    assert found.result().percentile(200, 0.99) > 5
