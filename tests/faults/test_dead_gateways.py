"""Gateways that die, and a broker that forgets what they had taught it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.testing import Bus, running_bus
from tests.conftest import Broker, free_port
from tests.integration.test_promises import M, at_rest, counts, eventually, known, problem

LEASE = 1.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def hello() -> flask.Flask:
    app = flask.Flask("hello")
    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]
    app.add_url_rule("/<name>", view_func=lambda name: name, methods=["GET", "POST"])
    return app


def test_what_a_dead_gateway_had_queued_never_runs(broker: Broker, pool: ThreadPoolExecutor) -> None:
    known(broker)
    port = free_port()
    gateway = subprocess.Popen(
        [sys.executable, "-m", "flaskbus_gateway", f"--port={port}", f"--lease={LEASE}"],
        env={**os.environ, "FLASKBUS_REDIS_URL": broker.url},
        start_new_session=True,
    )
    bus = Bus(f"http://127.0.0.1:{port}", broker.url)

    def post() -> int | None:
        try:
            return httpx.post(f"{bus.url}/shop/lost", timeout=30).status_code
        except httpx.TransportError:
            return None

    eventually(lambda: answers(port))
    lost = pool.submit(post)
    eventually(lambda: counts(broker) == (1, 0))
    os.killpg(gateway.pid, signal.SIGKILL)
    gateway.wait()
    assert lost.result() is None
    with running_bus(broker.url, lease=LEASE):
        eventually(lambda: counts(broker) == (0, 0))
        with broker.client() as client:
            eventually(lambda: client.hlen(Keys().gateways) == 1)


def test_what_was_answered_to_a_dead_gateway_is_gone_soon(broker: Broker) -> None:
    dead, living = f"host-1-{'0a' * 6}", f"host-2-{'0b' * 6}"
    lists = [Keys().of(key).reply("0a" * 6 + "1f") for key in ("/shop", "/other")]
    others = [Keys().of("/shop").reply("0b" * 6 + "1f"), Keys().of("/shop").reply("0c" * 6 + "1f")]
    with broker.client() as client:
        client.hset(Keys().gateways, dead, '{"beat": 1, "lease": 0.5}')
        client.hset(Keys().gateways, living, '{"beat": 1, "lease": 600}')
        for key in (*lists, *others):
            client.rpush(key, b"a reply")
            client.pexpire(key, 7200_000)
        with running_bus(broker.url, lease=0.5):
            eventually(lambda: not client.exists(*lists))
        left: Any = client.exists(*others)
        assert left == len(others)


def answers(port: int) -> bool:
    try:
        return httpx.options(f"http://127.0.0.1:{port}/").status_code > 0
    except httpx.TransportError:
        return False


def test_script_flush_is_no_more_than_a_delay(broker: Broker, pool: ThreadPoolExecutor) -> None:
    with running_bus(broker.url, hold=0.5, head_timeout=0.5) as bus:
        known(broker)
        with broker.client() as client:
            client.script_flush()
        document = problem(httpx.get(f"{bus.url}/shop/x"))
        assert (document["status"], document["executed"]) == (503, "no")
        with bus.mount(hello(), "/shop", name="shop") as url:
            with broker.client() as client:
                client.script_flush()
            assert httpx.get(f"{url}/again").text == "again"
        at_rest(broker)


def test_an_app_that_never_was_ready_owns_nothing(broker: Broker) -> None:
    mount = Mount.parse("/shop")
    with broker.client() as client:
        record = AgentRecord(
            id="a", name="shpo:app", host="h", pid=1, state="failed", reason="no such module"
        )
        Registry(client, Keys()).claim(mount, record)
    with running_bus(broker.url) as bus, bus.mount(hello(), "/shop", name="shop:app") as url:
        assert httpx.get(f"{url}/right").text == "right"


def test_each_process_is_judged_by_its_own_lease(broker: Broker) -> None:
    with running_bus(broker.url, lease=0.5) as bus, bus.mount(hello(), "/shop", lease=8.0) as url:
        with broker.client() as client:
            began = time.monotonic()
            while time.monotonic() - began < 1.5:  # an agent that beats each two seconds
                records: Any = client.hlen(M.agents)
                assert records == 1
                assert httpx.get(f"{url}/here").text == "here"


def test_requests_wait_while_a_broker_that_lost_its_data_learns_of_its_mounts_again(
    broker: Broker, pool: ThreadPoolExecutor
) -> None:
    with running_bus(broker.url) as bus, bus.mount(hello(), "/shop", lease=4.0) as url:
        assert httpx.get(f"{url}/before").text == "before"
        with broker.client() as client:
            client.flushall()
        responses = [pool.submit(httpx.get, f"{url}/{n}", timeout=30) for n in range(6)]
        for n, response in enumerate(responses):
            # Held until the mount is back; what was sent before the flush was lost, and is not said to be unknown here.
            assert response.result().text == str(n) or problem(response.result())["status"] == 502
