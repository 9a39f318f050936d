"""Agents that die while they hold requests: what may run again does, and all else is answered at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flaskbus.keys import Keys
from flaskbus.registry import Registry, parse_agents
from flaskbus.routing import Mount
from flaskbus.testing import Bus, running_bus
from tests.conftest import Broker
from tests.integration.test_promises import M, at_rest, counts, eventually, problem

APP = '''
import os, pathlib, threading, time, wsgiref.validate
import flask

app = flask.Flask(__name__)
app.wsgi_app = wsgiref.validate.validator(app.wsgi_app)
here = pathlib.Path(__file__).parent


@app.route("/work/<name>", methods=["GET", "POST", "PUT"])
def work(name):
    """Leaves a mark for each run, and waits until it may go on."""
    with (here / f"{name}.runs").open("a") as ledger:
        ledger.write(f"{os.getpid()}\\n")
    while not (here / f"{name}.go").exists():
        time.sleep(0.01)
    return str(os.getpid())


@app.get("/stream/<name>")
def stream(name):
    def produce():
        yield b"first"
        (here / f"{name}.runs").write_text(f"{os.getpid()}\\n")
        while not (here / f"{name}.go").exists():
            time.sleep(0.01)
        yield b"second"
    return flask.Response(produce())


@app.get("/hold/<float:seconds>")
def hold(seconds):
    """Holds the interpreter's lock, as an extension may."""
    import ctypes
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return "held"
'''

LEASE = 1.0


class Agents:
    """Starts agents, and tells which process ran what."""

    def __init__(self, directory: Path, broker: Broker) -> None:
        self.directory = directory
        self.broker = broker
        self.processes: list[subprocess.Popen[bytes]] = []
        (directory / "work.py").write_text(APP)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "flaskbus_agent", "work:app", "--prefix", "/shop", "--lease", str(LEASE),
             "--threads", "2", *options],
            cwd=self.directory,
            env={**os.environ, "FLASKBUS_REDIS_URL": self.broker.url},
            start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        eventually(lambda: process.pid in self.ready(), 20)
        return process

    def ready(self) -> list[int]:
        """The supervisors of the agents that are ready."""
        with self.broker.client() as client:
            records = parse_agents(client.hgetall(M.agents))
        return [record.supervisor for record in records if record.state == "ready"]

    def runs(self, name: str) -> list[int]:
        ledger = self.directory / f"{name}.runs"
        return [int(line) for line in ledger.read_text().split()] if ledger.exists() else []

    def runner(self, name: str) -> int:
        """The process that began the latest run."""
        return int(eventually(lambda: self.runs(name))[-1])

    def let_go(self, name: str) -> None:
        (self.directory / f"{name}.go").touch()

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The whole agent, supervisor and workers, as a host does that loses its power."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill(process)


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


def test_a_dead_child_is_known_at_once_and_its_get_runs_again(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agents.start()
    answer = pool.submit(httpx.get, f"{bus.url}/shop/work/a", timeout=30)
    first = agents.runner("a")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(agents.runs("a")) == 2)
    agents.let_go("a")
    assert answer.result().text == str(agents.runs("a")[1]) != str(first)
    at_rest(broker)


def test_a_dead_childs_post_is_answered_at_once_and_does_not_run_again(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agents.start()
    answer = pool.submit(httpx.post, f"{bus.url}/shop/work/a", timeout=30)
    os.kill(agents.runner("a"), signal.SIGKILL)
    document = problem(answer.result(10))
    assert (document["status"], document["executed"]) == (502, "unknown")
    at_rest(broker)
    assert len(agents.runs("a")) == 1


@pytest.mark.parametrize(("method", "status"), [("PUT", 200), ("POST", 502)])
def test_a_dead_host_is_known_within_a_lease(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker, method: str, status: int
) -> None:
    first = agents.start()
    answer = pool.submit(httpx.request, method, f"{bus.url}/shop/work/a", timeout=30)
    agents.runner("a")
    agents.start()
    agents.kill(first)
    agents.let_go("a")
    assert answer.result().status_code == status
    at_rest(broker)
    assert len(agents.runs("a")) == (2 if status == 200 else 1)


def test_also_when_it_was_the_last_agent(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agent = agents.start()
    post = pool.submit(httpx.post, f"{bus.url}/shop/work/a", timeout=30)
    get = pool.submit(httpx.get, f"{bus.url}/shop/work/b", timeout=30)
    agents.runner("a")
    agents.runner("b")
    agents.kill(agent)
    assert problem(post.result(10))["executed"] == "unknown"
    agents.let_go("b")
    agents.start()
    assert get.result().status_code == 200
    at_rest(broker)


def test_slow_is_not_dead(agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker) -> None:
    agents.start()
    agents.start()
    answer = pool.submit(httpx.get, f"{bus.url}/shop/work/a", timeout=30)
    agents.runner("a")
    held = httpx.get(f"{bus.url}/shop/hold/{3 * LEASE}", timeout=30)
    assert held.text == "held"
    agents.let_go("a")
    assert answer.result().status_code == 200
    assert len(agents.runs("a")) == 1


def test_a_request_that_kills_its_agents_is_given_up(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agents.start("--workers", "2")
    eventually(lambda: len(agents.ready()) == 2)
    headers = {"Authorization": "Basic secret", "X-Trace": "kept"}
    answer = pool.submit(httpx.get, f"{bus.url}/shop/work/a", timeout=60, headers=headers)
    killed: set[int] = set()
    for _ in range(3):
        runner = eventually(lambda: set(agents.runs("a")) - killed, 20).pop()
        os.kill(runner, signal.SIGKILL)
        killed.add(runner)
    document = problem(answer.result())
    assert (document["status"], document["executed"]) == (502, "unknown")
    with broker.client() as client:
        letters: Any = client.xrange(M.dead)
        assert client.ttl(M.dead) > 0
    ((_, letter),) = letters
    assert b"3 agents died" in letter[b"reason"]
    assert letter[b"target"] == b"/shop/work/a"
    assert b"secret" not in letter[b"head"]
    assert b"kept" in letter[b"head"]
    at_rest(broker)
    assert len(agents.runs("a")) == 3


def test_a_stream_that_loses_its_agent_is_broken_off(agents: Agents, bus: Bus, broker: Broker) -> None:
    agents.start()
    with httpx.stream("GET", f"{bus.url}/shop/stream/a", timeout=30) as response:
        parts = response.iter_raw()
        assert next(parts) == b"first"
        os.kill(agents.runner("a"), signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            next(parts)
    at_rest(broker)


def test_a_frozen_agent_that_thaws_disturbs_nobody(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    frozen = agents.start()
    answer = pool.submit(httpx.get, f"{bus.url}/shop/work/a", timeout=30)
    first = agents.runner("a")
    os.killpg(frozen.pid, signal.SIGSTOP)
    try:
        agents.start()
        eventually(lambda: len(agents.runs("a")) == 2)
        agents.let_go("a")
        assert answer.result().text == str(agents.runs("a")[1]) != str(first)
    finally:
        os.killpg(frozen.pid, signal.SIGCONT)
    # It serves again, under its own name.
    eventually(lambda: frozen.pid in agents.ready())
    seen: set[str] = set()
    agents.let_go("b")
    deadline = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < deadline:
        pair = [pool.submit(httpx.get, f"{bus.url}/shop/work/b", timeout=30) for _ in range(6)]
        seen |= {response.result().text for response in pair}
    assert len(seen) == 2
    at_rest(broker)


def test_a_mount_that_comes_back_still_knows_its_requests(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agent = agents.start()
    answer = pool.submit(httpx.post, f"{bus.url}/shop/work/a", timeout=60)
    agents.runner("a")
    os.killpg(agent.pid, signal.SIGSTOP)
    try:
        with broker.client() as client:
            Registry(client, Keys()).unmount(Mount.from_key("/shop"))
        eventually(lambda: httpx.get(f"{bus.url}/shop/work/b").status_code == 404)
    finally:
        os.killpg(agent.pid, signal.SIGCONT)
    eventually(lambda: agent.pid in agents.ready())
    agents.let_go("b")
    eventually(lambda: httpx.get(f"{bus.url}/shop/work/b", timeout=30).status_code == 200)
    assert not answer.done()
    agents.kill(agent)
    began = time.monotonic()
    assert problem(answer.result())["executed"] == "unknown"
    assert time.monotonic() - began < 8 * LEASE


def test_what_the_broker_lost_is_answered_and_not_left_to_its_deadline(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agents.start()
    running = pool.submit(httpx.get, f"{bus.url}/shop/work/a", timeout=30)
    agents.runner("a")
    began = time.monotonic()
    with broker.client() as client:
        client.flushall()
    document = problem(running.result())
    assert (document["status"], document["executed"]) == (502, "unknown")
    assert time.monotonic() - began < 15
    agents.let_go("a")
    agents.let_go("b")
    assert httpx.get(f"{bus.url}/shop/work/b", timeout=30).status_code == 200
    eventually(lambda: counts(broker) == (0, 0))


def test_a_group_that_was_destroyed_is_made_anew_and_nothing_runs_twice(
    agents: Agents, bus: Bus, pool: ThreadPoolExecutor, broker: Broker
) -> None:
    agents.start()
    running = pool.submit(httpx.post, f"{bus.url}/shop/work/a", timeout=30)
    agents.runner("a")
    with broker.client() as client:
        client.xgroup_destroy(M.requests, "agents")
    assert problem(running.result())["executed"] == "unknown"
    agents.let_go("a")
    agents.let_go("b")
    assert httpx.get(f"{bus.url}/shop/work/b", timeout=30).status_code == 200
    assert len(agents.runs("a")) == 1
