"""What clients of a gateway and an agent see, whoever these two are: one suite for many pairs of them.

A subclass of :class:`Behaviours` with a fixture ``site`` runs it. Pairs differ in their wire versions
(test_versions.py) and in what the broker lets them do (test_acl.py).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from flaskbus.broker import connect
from flaskbus.keys import GROUP, Keys
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from tests.conftest import free_port, leaked_keys
from tests.integration.fleet import Program, eventually
from tests.integration.test_promises import problem

ROOT = Path(__file__).parents[2]
SHOP, IDLE = Mount.parse("/shop"), Mount.parse("/idle")
KEYS = Keys()
M = KEYS.of(SHOP.key)
LEASE = 1.0
CHUNK, CHUNKS = 32768, 100
"""The bytes of each part of the app's stream, and how many parts it has."""

APP = """
import hashlib, os, pathlib, time, wsgiref.validate
import flask

app = flask.Flask(__name__)
app.wsgi_app = wsgiref.validate.validator(app.wsgi_app)
here = pathlib.Path(__file__).parent

@app.route("/echo", methods=["GET", "POST", "PUT"])
def echo():
    request = flask.request
    body = request.environ["wsgi.input"].read(request.content_length or 0)
    response = flask.jsonify(
        method=request.method, path=request.path, root=request.root_path, query=request.query_string.decode(),
        body=hashlib.sha256(body).hexdigest(), sent=request.headers.get("X-Sent"),
    )
    response.headers.extend([("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
    return response

@app.get("/large")
def large():
    return flask.Response(b"x" * 500_000, mimetype="application/octet-stream")

@app.get("/flow/<name>")
def flow(name):
    def produce():
        try:
            for number in range(100):
                with (here / f"{name}.made").open("a") as made:
                    made.write(".")
                yield b"x" * 32768
        finally:
            (here / f"{name}.closed").touch()
    return flask.Response(produce(), mimetype="application/octet-stream")

@app.route("/work/<name>", methods=["GET", "POST"])
def work(name):
    with (here / f"{name}.runs").open("a") as ledger:
        ledger.write(f"{os.getpid()}\\n")
    while not (here / f"{name}.go").exists():
        time.sleep(0.01)
    return str(os.getpid())

@app.get("/quick")
def quick():
    time.sleep(0.005)
    return "quick"
"""


@dataclass
class Site:
    """A gateway and agents, started by ``gateway_command`` and ``agent_command`` (``python -m`` …).

    ``admin_url`` is for the test itself, which may do all.
    """

    directory: Path
    admin_url: str
    gateway_url: str
    agent_url: str
    gateway_command: tuple[str, ...] = ("flaskbus_gateway",)
    agent_command: tuple[str, ...] = ("flaskbus_agent",)
    agents: list[Program] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def running(self, *, answers: int = 200) -> Iterator[Site]:
        """With one agent that answers so; afterwards nothing is left that does not expire by itself."""
        (self.directory / "contract.py").write_text(APP)
        port = free_port()
        self.client: Any = connect(self.admin_url)
        self.client.flushall()
        self.url = f"http://127.0.0.1:{port}"
        self.gateway = self._start(
            "gateway",
            self.gateway_command,
            self.gateway_url,
            f"--port={port}",
            "--head-timeout=2",
            "--hold=2",
        )
        try:
            eventually(lambda: self._answers() or self.gateway.process.poll() is not None, "the gateway")
            assert self.gateway.process.poll() is None, self.gateway.log()
            self.start_agent()
            eventually(
                lambda: httpx.get(f"{self.url}/shop/quick", timeout=20).status_code == answers,
                "the mount is routed to",
            )
            yield self
            self.at_rest()
            for program in (*self.agents, self.gateway):
                if program.process.poll() is None:
                    program.end()
            assert not self.client.hgetall(KEYS.gateways)
            assert not self.client.hgetall(M.agents)
            assert not leaked_keys(self.client)
        finally:
            for program in (*self.agents, self.gateway):
                if program.process.poll() is None:
                    program.kill()
                print(f"--- {program.log_file.name}\n{program.log()}")
            self.client.flushall()
            self.client.close()

    def _answers(self) -> bool:
        try:
            return httpx.options(self.url).status_code > 0
        except httpx.TransportError:
            return False

    def _start(self, name: str, command: tuple[str, ...], url: str, *options: str) -> Program:
        log = self.directory / f"{name}.log"
        environ = {"FLASKBUS_REDIS_URL": url, "PYTHONPATH": f"{ROOT}"}
        return Program(log, *command, *options, f"--lease={LEASE}", **environ)

    def start_agent(self) -> Program:
        """One more agent, when it is ready."""
        agent = self._start(
            f"agent-{len(self.agents)}", self.agent_command, self.agent_url,
            "contract:app=/shop", "--name=shop", "--threads=4", "--window=65536",
        )  # fmt: skip
        self.agents.append(agent)
        eventually(lambda: agent.pid in self.ready() or agent.process.poll() is not None, "the agent")
        assert agent.process.poll() is None, agent.log()
        return agent

    def ready(self) -> list[int]:
        records = Registry(self.client, KEYS).agents(SHOP)
        return [record.supervisor for record in records if record.state == "ready"]

    def runs(self, name: str) -> list[int]:
        """The processes that began a piece of work, in their order."""
        ledger = self.directory / f"{name}.runs"
        return [int(line) for line in ledger.read_text().split()] if ledger.exists() else []

    def runner(self, name: str) -> int:
        return int(eventually(lambda: self.runs(name), f"{name} runs")[-1])

    def let_go(self, name: str) -> None:
        (self.directory / f"{name}.go").touch()

    def made(self, name: str) -> int:
        marks = self.directory / f"{name}.made"
        return marks.stat().st_size if marks.exists() else 0

    def pending(self) -> tuple[int, int]:
        """Entries, and how many of them are delivered."""
        if not self.client.exists(M.requests):
            return 0, 0
        return self.client.xlen(M.requests), self.client.xpending(M.requests, GROUP)["pending"]

    def at_rest(self) -> None:
        eventually(lambda: self.pending() == (0, 0), "nothing is pending")
        eventually(lambda: not list(self.client.scan_iter("*:reply:*")), "no reply is left")


class Behaviours:
    """The suite. Each test leaves the site as it found it: at rest, with an agent."""

    @pytest.fixture
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(24) as pool:
            yield pool

    @pytest.fixture(autouse=True)
    def rest(self, site: Site) -> Iterator[None]:
        yield
        site.at_rest()
        site.client.delete(M.dead)

    def test_get(self, site: Site) -> None:
        answer = httpx.get(f"{site.url}/shop/echo?a=%20b", headers={"X-Sent": "yes"}, timeout=20)
        seen = answer.json()
        assert (seen["method"], seen["path"], seen["root"]) == ("GET", "/echo", "/shop")
        assert (seen["query"], seen["sent"]) == ("a=%20b", "yes")
        assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]

    @pytest.mark.parametrize("size", [0, 10, 1_000_000])
    def test_post(self, site: Site, size: int) -> None:
        body = os.urandom(size)
        seen = httpx.post(f"{site.url}/shop/echo", content=body, timeout=20).json()
        assert (seen["method"], seen["body"]) == ("POST", sha256(body).hexdigest())

    def test_head(self, site: Site) -> None:
        answer = httpx.head(f"{site.url}/shop/large", timeout=20)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == "500000"

    def test_a_large_reply(self, site: Site) -> None:
        assert httpx.get(f"{site.url}/shop/large", timeout=20).content == b"x" * 500_000

    def test_a_stream_waits_for_its_client(self, site: Site) -> None:
        with httpx.stream("GET", f"{site.url}/shop/flow/slow", timeout=30) as response:
            parts = response.iter_raw()
            size = len(next(parts))
            eventually(lambda: site.made("slow"))
            still = time.monotonic() + 0.5
            while time.monotonic() < still:
                before = site.made("slow")
                time.sleep(0.1)
                if site.made("slow") != before:
                    still = time.monotonic() + 0.5
            waiting = site.made("slow")
            size += sum(map(len, parts))
        assert size == CHUNK * CHUNKS
        assert waiting <= CHUNKS
        assert site.made("slow") == CHUNKS

    def test_a_client_that_goes_away_ends_its_stream(self, site: Site) -> None:
        with httpx.stream("GET", f"{site.url}/shop/flow/left", timeout=30) as response:
            next(response.iter_raw())
        eventually((site.directory / "left.closed").exists, "the app's generator is closed")
        assert site.made("left") <= CHUNKS

    def test_a_deadline(self, site: Site) -> None:
        answer = problem(httpx.get(f"{site.url}/shop/work/late", timeout=20))
        site.let_go("late")
        assert (answer["status"], answer["executed"]) == (504, "unknown")

    def test_what_nobody_takes(self, site: Site) -> None:
        registry = Registry(site.client, KEYS)
        registry.claim(IDLE, AgentRecord(id="ghost", name="idle", host="h", pid=1, beat=1, state="ready"))
        registry.leave(IDLE, "ghost")
        eventually(lambda: any(IDLE.key in gateway["mounts"] for gateway in registry.gateways().values()))
        answer = problem(httpx.post(f"{site.url}/idle/x", timeout=20))
        assert (answer["status"], answer["executed"]) == (503, "no")
        registry.unmount(IDLE)
        eventually(lambda: httpx.get(f"{site.url}/idle/x", timeout=20).status_code == 404)

    def test_a_get_whose_agent_dies_runs_again(self, site: Site, pool: ThreadPoolExecutor) -> None:
        answer = pool.submit(httpx.get, f"{site.url}/shop/work/twice", timeout=20)
        first = site.runner("twice")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(site.runs("twice")) == 2, "the second run")
        site.let_go("twice")
        assert answer.result().text == str(site.runs("twice")[1]) != str(first)

    def test_a_post_whose_agent_dies_does_not(self, site: Site, pool: ThreadPoolExecutor) -> None:
        answer = pool.submit(httpx.post, f"{site.url}/shop/work/once", timeout=20)
        os.kill(site.runner("once"), signal.SIGKILL)
        document = problem(answer.result())
        assert (document["status"], document["executed"]) == (502, "unknown")
        assert len(site.runs("once")) == 1
        eventually(site.ready, "another worker")

    def test_what_is_not_ours_is_buried(self, site: Site) -> None:
        site.client.xadd(M.requests, {"hello": "world"})
        site.client.xadd(M.requests, {"id": "x1", "from": "gw", "head": b"\xc1"})
        eventually(lambda: site.client.xlen(M.dead) == 2, "two dead letters")
        site.client.delete(M.reply("x1"))
        assert httpx.get(f"{site.url}/shop/quick", timeout=20).text == "quick"

    def test_agents_come_and_go(self, site: Site, pool: ThreadPoolExecutor) -> None:
        """What a stopping agent has and did not begin is run by another, whoever hands it over."""
        old = site.agents[-1]
        with httpx.Client(timeout=20) as client:

            def send(count: int) -> list[Future[httpx.Response]]:
                return [pool.submit(client.get, f"{site.url}/shop/quick") for _ in range(count)]

            answers = send(100)
            site.start_agent()
            answers += send(100)
            old.end()
            answers += send(20)
            assert {answer.result().status_code for answer in answers} == {200}
        assert site.ready() == [site.agents[-1].pid]

    def test_a_broker_that_forgot_everything(self, site: Site) -> None:
        site.client.flushall()
        site.client.script_flush()
        eventually(
            lambda: httpx.get(f"{site.url}/shop/quick", timeout=20).status_code == 200, "the mount is back"
        )
        # The agent claims it once more, and the consumer finds its group.
        eventually(site.ready)
