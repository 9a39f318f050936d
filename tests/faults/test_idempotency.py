"""Requests with an Idempotency-Key whose agent, gateway, client or broker goes away."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus.idempotency import Policy
from flaskbus.registry import parse_agents
from flaskbus.settings import AgentSettings
from flaskbus.testing import Bus, running_bus
from flaskbus_agent.inprocess import InProcessAgent
from tests.conftest import Broker, free_port
from tests.faults.mortal import MortalBroker
from tests.faults.proxy import Cut, Proxy
from tests.faults.resp import Message
from tests.faults.test_dead_agents import LEASE, Agents
from tests.integration.fleet import Fleet
from tests.integration.procs import alive
from tests.integration.test_promises import SHOP, M, at_rest, eventually, problem

KEYED = {"Idempotency-Key": "k-1", "Authorization": "Bearer alice"}
IN_USE = "urn:flaskbus:error:key-in-use"


@pytest.fixture
def agents(tmp_path: Path, broker: Broker) -> Iterator[Agents]:
    agents = Agents(tmp_path, broker)
    yield agents
    agents.end()


@pytest.fixture
def bus(broker: Broker) -> Iterator[Bus]:
    with running_bus(broker.url, lease=LEASE) as bus:
        yield bus


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def post(url: str, name: str = "a", timeout: float = 60.0) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(verify=False), timeout=timeout) as client:
        return client.post(f"{url}/shop/work/{name}", headers=KEYED)


def replayed(url: str, name: str = "a") -> httpx.Response:
    """The answer to a repeat; all before it say that the first request runs."""

    def look() -> httpx.Response | None:
        response = post(url, name)
        if response.status_code == 200:
            return response
        assert problem(response)["type"] == IN_USE
        return None

    found: httpx.Response = eventually(look)
    assert found.headers["idempotency-replayed"] == "true"
    return found


def opted_in(broker: Broker, bus: Bus) -> None:
    """Wait until the gateway routes to the mount."""
    with broker.client() as client:
        assert client.hexists(M.owner, Policy.FIELDS[0])
    bus.await_route(SHOP)


@contextmanager
def gateway(broker: Broker, *options: str) -> Iterator[tuple[Bus, Callable[[], None]]]:
    """A gateway that can be killed."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "flaskbus_gateway", f"--port={port}", f"--lease={LEASE}", *options],
        env={**os.environ, "FLASKBUS_REDIS_URL": broker.url},
        start_new_session=True,
    )

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    bus = Bus(f"http://127.0.0.1:{port}", broker.url)

    def routes() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{bus.url}/shop/").headers["content-type"] != "application/problem+json"
        return False

    try:
        eventually(routes, 20)
        yield bus, kill
    finally:
        if process.poll() is None:
            kill()


def rested(agents: Agents, process: subprocess.Popen[bytes]) -> None:
    """Wait until an agent that thawed beats again and runs nothing any more."""

    def idle() -> bool:
        with agents.broker.client() as client:
            records = parse_agents(client.hgetall(M.agents))
        return any(one.supervisor == process.pid and one.state == "ready" and not one.busy for one in records)

    eventually(idle, 20)


class TestAgents:
    def test_a_dead_ones_post_runs_again_and_its_answer_stays(
        self, agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
    ) -> None:
        agents.start("--idempotency-keys")
        opted_in(broker, bus)
        answer = pool.submit(post, bus.url)
        first = agents.runner("a")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(agents.runs("a")) == 2)
        assert problem(post(bus.url))["type"] == IN_USE
        agents.let_go("a")
        second = answer.result().text
        assert second == str(agents.runs("a")[1]) != str(first)
        assert {replayed(bus.url).text for _ in range(3)} == {second}
        assert len(agents.runs("a")) == 2
        at_rest(broker)

    def test_one_that_kills_its_agents_is_given_up_and_may_be_tried_again(
        self, agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
    ) -> None:
        agents.start("--idempotency-keys", "--workers", "2")
        opted_in(broker, bus)
        answer = pool.submit(post, bus.url)
        killed: set[int] = set()
        for _ in range(3):
            runner = eventually(lambda: set(agents.runs("a")) - killed, 20).pop()
            os.kill(runner, signal.SIGKILL)
            killed.add(runner)
        document = problem(answer.result())
        assert (document["status"], document["executed"]) == (502, "unknown")
        with broker.client() as client:
            assert client.xlen(M.dead) == 1
        agents.let_go("a")
        fresh = post(bus.url)
        assert (fresh.status_code, "idempotency-replayed" in fresh.headers) == (200, False)
        assert len(agents.runs("a")) == 4
        at_rest(broker)

    def test_a_frozen_one_that_thaws_changes_no_answer(
        self, agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
    ) -> None:
        frozen = agents.start("--idempotency-keys")
        opted_in(broker, bus)
        answer = pool.submit(post, bus.url)
        first = agents.runner("a")
        os.killpg(frozen.pid, signal.SIGSTOP)
        try:
            agents.start("--idempotency-keys")
            eventually(lambda: len(agents.runs("a")) == 2)
            agents.let_go("a")
            second = answer.result().text
            assert second == str(agents.runs("a")[1]) != str(first)
        finally:
            os.killpg(frozen.pid, signal.SIGCONT)
        rested(agents, frozen)
        assert replayed(bus.url).text == second
        at_rest(broker)

    @pytest.mark.slow
    @pytest.mark.parametrize("thaws", [False, True])
    def test_one_that_had_it_when_its_client_could_not_wait(
        self, agents: Agents, pool: ThreadPoolExecutor, broker: Broker, thaws: bool
    ) -> None:
        """The request was taken back from an agent that then dies: a repeat runs once that is known."""
        first = agents.start("--idempotency-keys")
        with running_bus(broker.url, lease=LEASE, head_timeout=1.0) as bus:
            opted_in(broker, bus)
            assert problem(post(bus.url))["status"] == 504
            assert problem(post(bus.url))["type"] == IN_USE
            if thaws:
                os.killpg(first.pid, signal.SIGSTOP)
            else:
                agents.kill(first)
            try:
                agents.start("--idempotency-keys")
                agents.let_go("b")

                def again() -> httpx.Response | None:
                    response = post(bus.url)
                    if problem(response)["type"] == IN_USE:
                        return None
                    return response

                assert eventually(again, 20).status_code == 504  # it runs again, and is as slow
                assert len(agents.runs("a")) == 2
            finally:
                if thaws:
                    os.killpg(first.pid, signal.SIGCONT)
            agents.let_go("a")
            if thaws:
                rested(agents, first)
            assert replayed(bus.url).text == str(agents.runs("a")[1])
            assert len(agents.runs("a")) == 2
            at_rest(broker)

    def test_one_that_hands_it_back(self, broker: Broker, bus: Bus, pool: ThreadPoolExecutor) -> None:
        app, runs = counted()
        settings = AgentSettings(redis=broker.url, idempotency_keys=True)
        stopping = InProcessAgent(settings, {SHOP: app}, {SHOP: "shop"})
        take = stopping.consumer._intake._take

        def take_and_stop(answer: Any) -> bool:
            news = take(answer)
            if answer:
                stopping.consumer.quiet()
            return news

        stopping.consumer._intake._take = take_and_stop  # type: ignore[method-assign]
        stopping.start()
        bus.await_route(SHOP)
        answer = pool.submit(post, bus.url)
        assert stopping.consumer.join(10.0)
        assert runs == []
        other = InProcessAgent(settings, {SHOP: app}, {SHOP: "shop"})
        other.start()
        try:
            assert answer.result().text == replayed(bus.url).text == "done"
            assert runs == ["a"]
            at_rest(broker)
        finally:
            stopping.stop()
            other.stop()


class TestFleet:
    @pytest.mark.slow
    def test_all_repeats_agree_while_workers_and_gateways_are_killed(
        self, broker: Broker, tmp_path: Path
    ) -> None:
        """Each client repeats its request until it is answered, and then twice more, through any gateway."""
        with Fleet(tmp_path, broker.url) as fleet:
            options = ("--idempotency-keys", "--workers", "2", "--threads", "2")
            agents = [fleet.agent(name, *options) for name in ("one", "two")]
            (first, url), (_, other) = fleet.gateway(), fleet.gateway()
            ports = [int(each.rpartition(":")[2]) for each in (url, other)]
            done, texts = threading.Event(), dict[str, set[str]]()

            def work(number: int) -> None:
                dice = random.Random(number)
                for serial in itertools.count():
                    if done.is_set():
                        return
                    token = f"{number}-{serial}"
                    texts[token] = {self.insist(token, ports, dice) for _ in range(3)}

            with ThreadPoolExecutor(6) as pool:
                clients = [pool.submit(work, number) for number in range(6)]
                dice, kills = random.Random(1), 0
                deadline = time.monotonic() + 12
                while time.monotonic() < deadline:
                    os.kill(dice.choice(alive(dice.choice(agents).workers())), signal.SIGKILL)
                    kills += 1
                    if kills == 5:
                        first.kill()
                        fleet.gateway(port=ports[0])
                    time.sleep(0.7)
                done.set()
                for client in clients:
                    client.result(60)
            runs = fleet.runs()
            assert len(texts) > 100
            assert {token: found for token, found in texts.items() if len(found) != 1} == {}
            assert runs.keys() == texts.keys()
            # A run more for each that was killed; a worker has two threads.
            assert sum(runs.values()) - len(runs) <= 2 * kills

    def insist(self, token: str, ports: list[int], dice: random.Random) -> str:
        def once() -> str:
            url = f"http://127.0.0.1:{dice.choice(ports)}/fleet/{token}"
            with httpx.Client(transport=httpx.HTTPTransport(verify=False), timeout=30) as client:
                try:
                    response = client.post(url, headers=KEYED | {"Idempotency-Key": token})
                except httpx.TransportError:
                    return ""
            assert response.status_code in (200, 409, 502, 503, 504), response.text
            return response.text if response.status_code == 200 else ""

        return str(eventually(once, 30))


class TestGateways:
    def test_a_dead_ones_answer_is_there_for_another(
        self, agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
    ) -> None:
        agents.start("--idempotency-keys")
        with gateway(broker) as (mortal, kill):
            broken = pool.submit(post, mortal.url)
            agents.runner("a")
            kill()
            with pytest.raises(httpx.TransportError):
                broken.result()
        assert problem(post(bus.url))["type"] == IN_USE
        agents.let_go("a")
        assert replayed(bus.url).text == str(agents.runner("a"))
        assert len(agents.runs("a")) == 1

    @pytest.mark.slow
    def test_also_after_it_was_struck_off(
        self, agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
    ) -> None:
        agents.start("--idempotency-keys")
        with gateway(broker) as (mortal, kill):
            broken = pool.submit(post, mortal.url)
            agents.runner("a")
            kill()
            with pytest.raises(httpx.TransportError):
                broken.result()
        at_rest(broker)
        assert problem(post(bus.url))["type"] == IN_USE
        agents.let_go("a")
        assert replayed(bus.url).text == str(agents.runner("a"))
        assert len(agents.runs("a")) == 1

    @pytest.mark.slow
    def test_together_with_the_agent(
        self, agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
    ) -> None:
        first = agents.start("--idempotency-keys")
        with gateway(broker) as (mortal, kill):
            broken = pool.submit(post, mortal.url)
            agents.runner("a")
            kill()
            agents.kill(first)
            with pytest.raises(httpx.TransportError):
                broken.result()
        agents.start("--idempotency-keys")
        agents.let_go("a")

        def again() -> httpx.Response | None:
            response = post(bus.url)
            return response if response.status_code == 200 else None

        fresh = eventually(again, 20)
        assert "idempotency-replayed" not in fresh.headers
        assert fresh.text == str(agents.runner("a"))
        assert len(agents.runs("a")) == 2
        at_rest(broker)


class TestBrokers:
    @pytest.mark.slow
    def test_without_one_nothing_runs(self, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
        """And an answer that could not be sent is kept when it is back."""
        mortal = MortalBroker(tmp_path)
        app, runs = counted(go := threading.Event())
        try:
            with running_bus(mortal.broker.url) as bus:
                with bus.mount(app, "/shop", name="shop", idempotency_keys=True):
                    first = pool.submit(post, bus.url)
                    eventually(lambda: runs)
                    mortal.kill()
                    go.set()
                    away = problem(post(bus.url, "b"))
                    assert (away["status"], away["executed"]) == (503, "no")
                    mortal.revive()
                    assert first.result().text == "done"
                    assert replayed(bus.url).text == "done"
                    assert runs == ["a"]
        finally:
            go.set()
            mortal.close()


@contextmanager
def proxied(broker: Broker) -> Iterator[tuple[Proxy, str]]:
    """A proxy in front of the broker, in a thread of its own, and its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Proxy:
        proxy = Proxy(int(broker.url.rpartition(":")[2].partition("/")[0]), parsing=True)
        await proxy.start()
        return proxy

    proxy = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield proxy, f"redis://127.0.0.1:{proxy.port}/0"
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def is_one(label: str, outward: bool, message: Message) -> bool:
    return (message.label, message.outward) == (label, outward)


class TestCuts:
    @pytest.mark.parametrize("places", [2, pytest.param(25, marks=pytest.mark.slow)])
    def test_who_repeats_until_there_is_an_answer_runs_once(self, broker: Broker, places: int) -> None:
        """A connection breaks within the command that sends, or that answers, or within the broker's word on it."""
        app, runs = counted()
        with proxied(broker) as (proxy, url), running_bus(url) as bus:
            with bus.mount(app, "/shop", name="shop", idempotency_keys=True):
                post(bus.url, "warm")
                sizes = {(one.label, one.outward): len(one.data) for one in proxy.messages}
                dice = random.Random(places)
                for label, outward in itertools.product(("remember", "finish"), (True, False)):
                    size = sizes[label, outward]
                    for after in dice.sample(range(size), min(places, size)):
                        name = f"{label}-{outward}-{after}"
                        cut = Cut(partial(is_one, label, outward), after, reset=bool(after % 2))
                        proxy.cut = cut
                        answered = eventually(partial(self.answered, bus.url, name), 30)
                        assert cut.message is not None, name
                        assert answered.text == "done"
                        assert runs.count(name) == 1, name
                        assert post(bus.url, name).headers["idempotency-replayed"] == "true"
            at_rest(broker)

    def answered(self, url: str, name: str) -> httpx.Response | None:
        response = post(url, name)
        if response.status_code == 200:
            return response
        document = problem(response)
        assert document["type"] == IN_USE or document["status"] in (502, 503, 504), document
        return None


def counted(go: threading.Event | None = None) -> tuple[flask.Flask, list[str]]:
    """An app of this process, and what it ran; it waits until it may go on."""
    app, runs = flask.Flask("counted"), []
    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]

    @app.post("/work/<name>")
    def work(name: str) -> str:
        runs.append(name)
        assert go is None or go.wait(30)
        return "done"

    return app, runs
