"""What a client may rely on, through a real gateway and a real broker."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus import wire
from flaskbus.errors import MountTaken
from flaskbus.keys import GROUP, Keys
from flaskbus.messages import Request
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.testing import Bus, running_bus
from flaskbus_agent.inprocess import InProcessAgent
from tests.conftest import Broker

KEYS = Keys()
SHOP = Mount.parse("/shop")
M = KEYS.of(SHOP.key)


def eventually(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Poll until the condition holds; its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return value


class Gate:
    """An app whose handlers wait until the test lets them go."""

    def __init__(self) -> None:
        self.app = flask.Flask("gate")
        self.app.wsgi_app = validator(self.app.wsgi_app)  # type: ignore[assignment,method-assign]
        self.open = threading.Event()
        self.calls: list[str] = []
        self.closed = threading.Event()
        self.app.add_url_rule("/wait/<name>", view_func=self.wait, methods=["GET", "POST"])
        self.app.add_url_rule("/stream", view_func=self.stream)
        self.app.add_url_rule("/fast", view_func=lambda: "fast")

    def wait(self, name: str) -> str:
        self.calls.append(name)
        assert self.open.wait(30)
        return name

    def stream(self) -> flask.Response:
        def produce() -> Iterator[bytes]:
            try:
                for _ in range(2000):
                    self.calls.append("chunk")
                    yield b"x" * 32768
            finally:
                self.closed.set()

        return flask.Response(produce(), mimetype="application/octet-stream")


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def claim(
    broker: Broker, *, name: str = "shop", state: Any = "ready", reason: str = "", agent: str = "a"
) -> None:
    """Register an agent that does not exist: the mount is known, and nobody reads."""
    with broker.client() as client:
        record = AgentRecord(id=agent, name=name, host="h", pid=1, beat=1, state=state, reason=reason)
        Registry(client, KEYS).claim(SHOP, record)


def known(broker: Broker) -> None:
    """The mount is known, and its last agent has left."""
    claim(broker)
    with broker.client() as client:
        Registry(client, KEYS).leave(SHOP, "a")


def problem(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == response.status_code
    return document


def counts(broker: Broker) -> tuple[int, int]:
    """Requests on the stream, and how many of them are delivered."""
    with broker.client() as client:
        if not client.exists(M.requests):
            return 0, 0
        pending: Any = client.xpending(M.requests, GROUP)
        length: Any = client.xlen(M.requests)
        return length, pending["pending"]


def at_rest(broker: Broker) -> None:
    """Nothing is left of any exchange."""
    with broker.client() as client:
        eventually(lambda: not list(client.scan_iter("*:reply:*")))
        eventually(lambda: counts(broker) == (0, 0))


@contextmanager
def bus_of(broker: Broker, **settings: Any) -> Iterator[Bus]:
    with running_bus(broker.url, **settings) as bus:
        yield bus
        if settings.pop("rest", True):
            at_rest(broker)


class TestRouting:
    def test_an_unknown_mount_is_a_404_that_tells_nothing(self, broker: Broker) -> None:
        known(broker)
        with bus_of(broker) as bus:
            answer = problem(httpx.get(f"{bus.url}/else/x"))
            assert (answer["status"], answer["executed"]) == (404, "no")
            assert "shop" not in str(answer)
            assert "flaskbus-agent" not in answer["detail"]

    def test_in_development_it_says_what_would_serve_it(self, broker: Broker) -> None:
        known(broker)
        with running_bus(broker.url, development=True) as bus:
            answer = problem(httpx.get(f"{bus.url}/else/x"))
        assert "flaskbus-agent MODULE:APP --prefix /else" in answer["detail"]

    def test_a_mount_appears_and_vanishes_while_everything_runs(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker) as bus:
            for _ in range(3):
                assert httpx.get(f"{bus.url}/shop/fast").status_code == 404
                with bus.mount(gate.app, "/shop"):
                    assert httpx.get(f"{bus.url}/shop/fast").text == "fast"
                # What is sent while it vanishes waits until it is certain that its agent does not come back.
                eventually(lambda: httpx.get(f"{bus.url}/shop/fast", timeout=20).status_code == 404)
            with bus.mount(gate.app, "/shop"):
                pass
            with broker.client() as client:
                eventually(lambda: client.exists(M.requests) == 0)
            known(broker)

    def test_what_waits_for_a_mount_that_is_removed_hears_of_it(
        self, broker: Broker, pool: ThreadPoolExecutor
    ) -> None:
        known(broker)
        with bus_of(broker) as bus:
            waiting = [pool.submit(httpx.get, f"{bus.url}/shop/x", timeout=20) for _ in range(4)]
            eventually(lambda: counts(broker) == (4, 0))
            with broker.client() as client:
                Registry(client, KEYS).unmount(SHOP)
                for each in waiting:
                    answer = problem(each.result())
                    assert (answer["status"], answer["executed"]) == (404, "no")
                    assert "no longer mounted" in answer["detail"]
                eventually(lambda: not client.exists(M.requests))
                eventually(lambda: not client.sismember(KEYS.mounts, SHOP.key))

    def test_what_runs_when_its_mount_is_removed_is_answered(
        self, broker: Broker, gate: Gate, pool: ThreadPoolExecutor
    ) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop", name="gate", threads=2):
            running = pool.submit(httpx.get, f"{bus.url}/shop/wait/slow", timeout=20)
            eventually(lambda: counts(broker) == (1, 1))
            with broker.client() as client:
                Registry(client, KEYS).unmount(SHOP)
                eventually(lambda: httpx.get(f"{bus.url}/shop/fast").status_code in (200, 404))
            gate.open.set()
            assert running.result().text == "slow"

    def test_a_mount_whose_last_agent_left_long_ago_is_forgotten(self, broker: Broker) -> None:
        known(broker)
        with bus_of(broker, hold=0.1) as bus:
            assert httpx.get(f"{bus.url}/shop/x").status_code == 503
            with broker.client() as client:
                client.pexpire(M.owner, 1)
                eventually(lambda: httpx.get(f"{bus.url}/shop/x").status_code == 404)
                eventually(lambda: not client.exists(M.owner, M.agents, M.requests))
                assert not client.sismember(KEYS.mounts, SHOP.key)
            known(broker)


class TestHolding:
    def test_requests_wait_for_the_first_agent(
        self, broker: Broker, gate: Gate, pool: ThreadPoolExecutor
    ) -> None:
        claim(broker, name="gate")
        with broker.client() as client:
            Registry(client, KEYS).leave(SHOP, "a")
        with bus_of(broker) as bus:
            answers = [pool.submit(httpx.get, f"{bus.url}/shop/fast") for _ in range(8)]
            eventually(lambda: counts(broker) == (8, 0))
            with bus.mount(gate.app, "/shop", name="gate"):
                assert [answer.result().text for answer in answers] == ["fast"] * 8

    def test_nobody_comes(self, broker: Broker) -> None:
        known(broker)
        with bus_of(broker, hold=0.3) as bus:
            response = httpx.post(f"{bus.url}/shop/x", content=b"data")
            answer = problem(response)
            assert (answer["status"], answer["executed"]) == (503, "no")
            assert int(response.headers["retry-after"]) > 0

    def test_agents_that_fail_to_start_end_the_hold(self, broker: Broker) -> None:
        claim(broker, state="failed", reason="No module named 'cart'")
        with bus_of(broker, hold=60) as bus:
            began = time.monotonic()
            answer = problem(httpx.get(f"{bus.url}/shop/x", timeout=30))
            assert (answer["status"], answer["executed"]) == (503, "no")
            assert "No module named 'cart'" in answer["detail"]
            assert time.monotonic() - began < 20

    def test_also_one_that_began_before_they_failed(self, broker: Broker, pool: ThreadPoolExecutor) -> None:
        known(broker)
        with bus_of(broker, hold=60) as bus:
            answer = pool.submit(httpx.get, f"{bus.url}/shop/x", timeout=30)
            eventually(lambda: counts(broker) == (1, 0))
            claim(broker, state="failed", reason="broken")
            assert problem(answer.result())["status"] == 503


class TestDeadlines:
    def test_delivered_and_not_answered(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker, head_timeout=0.4) as bus, bus.mount(gate.app, "/shop"):
            answer = problem(httpx.get(f"{bus.url}/shop/wait/a"))
            assert (answer["status"], answer["executed"]) == (504, "unknown")
            gate.open.set()
            assert httpx.get(f"{bus.url}/shop/fast").text == "fast"

    def test_not_started_for_want_of_a_free_thread(
        self, broker: Broker, gate: Gate, pool: ThreadPoolExecutor
    ) -> None:
        with bus_of(broker, head_timeout=1.5) as bus, bus.mount(gate.app, "/shop", threads=1):
            first = pool.submit(httpx.get, f"{bus.url}/shop/wait/first")
            eventually(lambda: gate.calls == ["first"])
            second = problem(httpx.post(f"{bus.url}/shop/wait/second"))
            assert (second["status"], second["executed"]) == (503, "no")
            assert problem(first.result())["status"] == 504
            gate.open.set()
            assert httpx.get(f"{bus.url}/shop/fast").text == "fast"
            assert gate.calls == ["first"]

    def test_a_stream_that_falls_silent_is_broken_off(self, broker: Broker) -> None:
        app, more = flask.Flask("silent"), threading.Event()
        app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]

        @app.get("/")
        def silent() -> flask.Response:
            def produce() -> Iterator[bytes]:
                yield b"one"
                assert more.wait(30)
                yield b"two"

            return flask.Response(produce())

        with bus_of(broker, idle_timeout=0.3) as bus, bus.mount(app, "/shop") as url:
            try:
                with pytest.raises(httpx.RemoteProtocolError):
                    httpx.get(f"{url}/")
            finally:
                more.set()


class TestAdmission:
    def test_a_full_queue(self, broker: Broker, pool: ThreadPoolExecutor) -> None:
        known(broker)
        with bus_of(broker, queue_limit=3, hold=2) as bus:
            held = [pool.submit(httpx.get, f"{bus.url}/shop/{n}", timeout=30) for n in range(3)]
            eventually(lambda: counts(broker) == (3, 0))
            response = httpx.get(f"{bus.url}/shop/x")
            assert problem(response)["type"].endswith("queue-full")
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert {answer.result().status_code for answer in held} == {503}
            assert httpx.get(f"{bus.url}/shop/x").json()["type"].endswith("no-agent")

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_large_body(self, broker: Broker, gate: Gate, chunked: bool) -> None:
        with bus_of(broker, body_limit=1000) as bus, bus.mount(gate.app, "/shop"):
            body: Any = iter([b"x" * 600] * 2) if chunked else b"x" * 1200
            answer = problem(httpx.post(f"{bus.url}/shop/fast", content=body))
            assert (answer["status"], answer["executed"]) == (413, "no")


class TestClientsThatGoAway:
    def test_before_the_work_started(self, broker: Broker, gate: Gate) -> None:
        claim(broker, name="gate")
        with bus_of(broker) as bus:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{bus.url}/shop/wait/gone", timeout=0.4)
            eventually(lambda: counts(broker) == (0, 0))
            with bus.mount(gate.app, "/shop", name="gate") as url:
                assert httpx.get(f"{url}/fast").text == "fast"
            assert gate.calls == []

    def test_in_the_middle_of_a_stream(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop", window=65536) as url:
            with httpx.stream("GET", f"{url}/stream") as response:
                next(response.iter_raw())
            assert gate.closed.wait(10)
            assert len(gate.calls) < 2000

    def test_a_slow_reader_pauses_its_stream_and_no_other(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop", window=65536) as url:
            with httpx.stream("GET", f"{url}/stream") as response:
                received = response.iter_raw()
                size = len(next(received))
                produced = stable(lambda: len(gate.calls))
                assert produced < 1000
                assert httpx.get(f"{url}/fast").text == "fast"
                with broker.client() as client:
                    waiting: Any = eventually(
                        lambda: sum(client.memory_usage(key) or 0 for key in client.scan_iter("*:reply:*"))
                    )
                assert waiting < 65536 * 3
                size += sum(len(part) for part in received)
            assert size == 2000 * 32768


def stable(measure: Callable[[], int]) -> int:
    """The value that a measure comes to rest at."""
    seen, since = measure(), time.monotonic()
    while time.monotonic() - since < 0.5:
        if (now := measure()) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.02)
    return seen


class TestWhatIsNotOurs:
    def test_a_strangers_entry_is_buried_and_the_agent_lives_on(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop") as url:
            with broker.client() as client:
                client.xadd(M.requests, {"hello": "world"})
                client.xadd(M.requests, {"id": "x1", "from": "gw", "head": b"\xc1"})
                client.xadd(M.requests, {"id": "x2", "from": "gw", "body": b"x" * 100_000})
                letters: Any = eventually(lambda: client.xlen(M.dead) == 3 and client.xrange(M.dead))
                assert client.ttl(M.dead) > 0
                for _, letter in letters:
                    assert letter[b"reason"]
                    assert all(len(value) <= 4096 for value in letter.values())
                client.delete(M.reply("x1"), M.reply("x2"))
            assert httpx.get(f"{url}/fast").text == "fast"

    def test_a_request_of_a_newer_version_is_answered(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop"):
            with broker.client() as client:
                fields = wire.encode_request(Request("new-1", "GET", "/shop/fast", "gw", 1000))
                entry: dict[Any, Any] = dict(zip(fields[::2], fields[1::2], strict=True))
                entry["head"] = b"\x91\x63"
                client.xadd(M.requests, entry)
                (element,) = eventually(lambda: client.lrange(M.reply("new-1"), 0, -1))
                assert "wire version 99" in str(wire.decode_frame(element, max_size=9999))
                client.delete(M.reply("new-1"))


class TestOwnership:
    def test_another_app_is_refused_by_name(self, broker: Broker, gate: Gate) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop", name="shop:app"):
            with pytest.raises(Exception, match="belongs to the app 'shop:app', not to 'blog:app'"):
                bus.mount(gate.app, "/shop", name="blog:app").__enter__()

    def test_also_by_a_broker_that_is_slow_to_answer(
        self, broker: Broker, gate: Gate, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
    ) -> None:
        claim(broker, name="shop:app")
        agent = InProcessAgent(AgentSettings(redis=broker.url), {SHOP: gate.app}, {SHOP: "blog:app"})
        broker.process.send_signal(signal.SIGSTOP)
        try:
            start = pool.submit(agent.start)
            eventually(lambda: "cannot be used" in caplog.text)
            assert not start.done()
        finally:
            broker.process.send_signal(signal.SIGCONT)
        with pytest.raises(MountTaken, match="belongs to the app 'shop:app'"):
            start.result(20)

    def test_agents_of_one_name_share_the_work(
        self, broker: Broker, gate: Gate, pool: ThreadPoolExecutor
    ) -> None:
        with bus_of(broker) as bus, bus.mount(gate.app, "/shop", name="shop", threads=1) as url:
            with bus.mount(gate.app, "/shop", name="shop", threads=1):
                answers = [pool.submit(httpx.get, f"{url}/wait/{n}") for n in range(2)]
                eventually(lambda: len(gate.calls) == 2)
                gate.open.set()
                assert sorted(answer.result().text for answer in answers) == ["0", "1"]

    def test_several_mounts_share_the_threads_of_one_agent(
        self, broker: Broker, gate: Gate, pool: ThreadPoolExecutor
    ) -> None:
        mounts = [Mount.parse(f"/m{n}") for n in range(6)]
        agent = InProcessAgent(
            AgentSettings(redis=broker.url, threads=2),
            dict.fromkeys(mounts, gate.app),
            {mount: mount.name for mount in mounts},
        )
        agent.start()
        try:
            with running_bus(broker.url) as bus:
                urls = [f"{bus.url}{mount.prefix}/wait/x" for mount in mounts]
                answers = [pool.submit(httpx.get, url, timeout=30) for url in urls]
                eventually(lambda: len(gate.calls) == 2)
                assert stable(lambda: len(gate.calls)) == 2
                gate.open.set()
                assert [answer.result().text for answer in answers] == ["x"] * 6
        finally:
            agent.stop()
            with broker.client() as client:
                for mount in mounts:
                    Registry(client, KEYS).unmount(mount)


class TestComingAndGoing:
    def test_agents_come_and_go_under_load_and_no_request_fails(
        self, broker: Broker, pool: ThreadPoolExecutor
    ) -> None:
        app = flask.Flask("load")
        app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]
        app.add_url_rule("/n/<int:n>", view_func=lambda n: str(n), methods=["POST"])
        done = threading.Event()

        def load(url: str, worker: int) -> tuple[int, list[str]]:
            good, bad, n = 0, [], worker
            with httpx.Client(timeout=30) as client:
                while not done.is_set():
                    n += 100
                    response = client.post(f"{url}/n/{n}")
                    if response.text == str(n):
                        good += 1
                    else:
                        bad.append(response.text)
            return good, bad

        with bus_of(broker) as bus:
            known_as: dict[str, Any] = {"name": "load", "threads": 2}
            with bus.mount(app, "/shop", **known_as) as url:
                workers = [pool.submit(load, url, worker) for worker in range(8)]
                for _ in range(6):
                    enough = broker_served(broker) + 50
                    agent = extra_agent(broker, app)
                    while broker_served(broker) < enough:
                        time.sleep(0.01)
                    agent.stop()
                done.set()
                results = [worker.result() for worker in workers]
            assert [bad for _, bad in results if bad] == []
            assert sum(good for good, _ in results) > 300


def extra_agent(broker: Broker, app: flask.Flask) -> Any:
    agent = InProcessAgent(AgentSettings(redis=broker.url, threads=2), {SHOP: app}, {SHOP: "load"})
    agent.start()
    return agent


def broker_served(broker: Broker) -> int:
    """How many entries the stream has ever had."""
    with broker.client() as client:
        info: Any = client.xinfo_stream(M.requests)
        return int(info["entries-added"])
