"""What the leader of an agent's threads runs itself: nobody waits for it, and its replies are not lost."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flask
import httpx
import pytest
import redis

from flaskbus import wire
from flaskbus.keys import Keys, MountKeys
from flaskbus.messages import Reply, Request
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.testing import running_bus
from flaskbus_agent.channel import Channel
from flaskbus_agent.inprocess import InProcessAgent
from flaskbus_agent.post import Post
from flaskbus_agent.reading import BLOCK_MS
from tests.conftest import Broker
from tests.integration.fleet import eventually
from tests.integration.test_promises import SHOP, M, at_rest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

NAMES = [f"r{number}" for number in range(4)]


class App:
    """Each request says what it is to do; the threads in which they ran are written down."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.together = threading.Barrier(4)
        self.ran: dict[str, str] = {}
        self.app = flask.Flask("app")
        self.app.add_url_rule("/<what>/<name>", view_func=self.run, methods=["GET", "POST"])

    def run(self, what: str, name: str) -> str | flask.Response:
        self.ran[name] = threading.current_thread().name + str(threading.get_ident())
        if what == "behind":
            response = flask.Response(name)
            response.call_on_close(lambda: self.go.wait(30))
            return response
        if what == "slow":
            assert self.go.wait(30)
        elif what == "together":
            self.together.wait(30)
        return name


@pytest.fixture
def app() -> Iterator[App]:
    app = App()
    yield app
    app.go.set()


@contextmanager
def agent(broker: Broker, app: App, **settings: Any) -> Iterator[InProcessAgent]:
    """One that was not started yet, and whose first read is for all its threads, though they may not wait yet."""
    settings = {"threads": 4, **settings}
    agent = InProcessAgent(AgentSettings(redis=broker.url, **settings), {SHOP: app.app}, {SHOP: "shop"})
    fill = agent.consumer._intake.fill
    agent.consumer._intake.fill = lambda most, *rest: fill(most and settings["threads"], *rest)  # type: ignore[method-assign]
    try:
        yield agent
    finally:
        agent.stop(10.0)


def put(broker: Broker, what: Sequence[str]) -> None:
    """Requests that are there before any agent is, so that one read gets all of them."""
    with broker.client() as client:
        client.xgroup_create(M.requests, "agents", "0", mkstream=True)
        for name, kind in zip(NAMES, what, strict=False):
            add(
                client,
                M,
                Request(name, "POST", f"/shop/{kind}/{name}", "nobody", 30_000, script_name="/shop"),
            )


def add(client: Any, keys: MountKeys, request: Request) -> None:
    client.execute_command("XADD", keys.requests, "*", *wire.encode_request(request))


def answered(broker: Broker) -> list[str]:
    """Whose replies are there; each says its own name."""
    with broker.client() as client:
        found = []
        for name in NAMES:
            for element in client.lrange(M.reply(name), 0, -1):
                reply = wire.decode_frame(element, max_size=1 << 20)
                assert isinstance(reply, Reply)
                assert (reply.status, reply.body) == (200, name.encode())
                found.append(name)
        return found


def forget(broker: Broker) -> None:
    with broker.client() as client:
        client.delete(*map(M.reply, NAMES))


@pytest.mark.parametrize("place", range(4))
def test_nobody_waits_for_a_slow_one(broker: Broker, app: App, place: int) -> None:
    """Neither what was read after it, nor the replies to what was run before."""
    kinds = ["quick"] * 4
    kinds[place] = "slow"
    put(broker, kinds)
    others = NAMES[:place] + NAMES[place + 1 :]
    with agent(broker, app) as one:
        one.start()
        eventually(lambda: answered(broker) == others, "the others are answered")
        app.go.set()
        eventually(lambda: answered(broker) == NAMES, "all are answered")
        forget(broker)
        with broker.client() as client:
            assert client.xlen(M.requests) == 0


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_nobody_waits_for_what_an_app_does_behind_its_response(
    broker: Broker, app: App, threads: int
) -> None:
    """Not even its own client; also where no other thread is there to send the reply."""
    put(broker, ["behind"] * threads)
    with agent(broker, app, threads=threads) as one:
        one.start()
        eventually(lambda: answered(broker) == NAMES[:threads], "all are answered")
        assert not app.go.is_set()
        app.go.set()
        forget(broker)


def test_one_thread_has_entries_of_two_mounts(broker: Broker, app: App) -> None:
    """A read of both streams brings one of each. The reply to the first does not wait for the second."""
    first = Mount.parse("/first")
    keys = Keys().of(first.key)
    settings = AgentSettings(redis=broker.url, threads=1)
    one = InProcessAgent(settings, {SHOP: app.app, first: app.app}, {SHOP: "shop", first: "first"})
    one.consumer._reader.now = lambda *_: ()  # type: ignore[method-assign]
    with broker.client() as client:
        put(broker, ["slow"])
        client.xgroup_create(keys.requests, "agents", "0", mkstream=True)
        add(client, keys, Request("q", "GET", "/first/quick/q", "nobody", 30_000, script_name="/first"))
        try:
            one.start()
            eventually(lambda: "r0" in app.ran, "the second runs")
            assert [*app.ran] == ["q", "r0"]
            eventually(lambda: client.llen(keys.reply("q")), "the first is answered")
        finally:
            app.go.set()
            one.stop(10.0)
            client.delete(keys.reply("q"), M.reply("r0"))


def test_an_app_that_writes_in_a_thread_of_its_own(broker: Broker) -> None:
    """That makes a stream of it, whose thread is replaced; it is not to lead any more."""

    def wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        thread = threading.Thread(target=write, args=(environ["PATH_INFO"].encode(),))
        thread.start()
        thread.join()
        return []

    settings = AgentSettings(redis=broker.url, threads=2)
    one = InProcessAgent(settings, {SHOP: wsgi}, {SHOP: "shop"})
    with running_bus(broker.url) as bus:
        one.start()
        try:
            bus.await_route(SHOP)
            for number in range(20):
                assert httpx.get(f"{bus.url}/shop/{number}", timeout=30).text == f"/{number}"
                eventually(lambda: not one.consumer._streams, "its place is free")
                eventually(lambda: len(one.consumer._threads) == 2, "there are as many threads as before")
        finally:
            one.stop(10.0)
        at_rest(broker)


def test_errors_of_any_kind_can_be_written_to(
    broker: Broker, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Tee(io.StringIO):  # equal to others, and so not to be hashed
        name: str = "tee"

    monkeypatch.setattr(sys, "stderr", Tee())
    put(broker, ["quick"] * 2)
    with agent(broker, app) as one:
        one.start()
        eventually(lambda: answered(broker) == NAMES[:2], "all are answered")
        forget(broker)


def test_those_that_wait_run_beside_each_other(broker: Broker, app: App) -> None:
    put(broker, ["together"] * 4)
    with agent(broker, app) as one:
        one.start()
        eventually(lambda: answered(broker) == NAMES, "all are answered")
        assert len(set(app.ran.values())) == 4
        forget(broker)


def test_those_that_compute_run_in_one_thread(
    broker: Broker, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flaskbus_agent.lead.STALL", 30.0)
    put(broker, [])
    with agent(broker, app) as one:
        one.start()
        eventually(lambda: one.consumer._lead.waiting == 3, "the others wait")
        with broker.client() as client, client.pipeline() as pipe:  # which one read gets together
            for name in NAMES:
                add(
                    pipe,
                    M,
                    Request(name, "GET", f"/shop/quick/{name}", "nobody", 30_000, script_name="/shop"),
                )
            pipe.execute()
        eventually(lambda: answered(broker) == NAMES, "all are answered")
        assert len(set(app.ran.values())) == 1
        forget(broker)


def test_an_agent_that_stops_hands_in_what_it_has_left(
    broker: Broker, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stops it while the reply to the first is left; the third and fourth go back."""
    put(broker, ["quick"] * 4)
    with agent(broker, app) as one:
        takes = one.consumer._lead.takes

        def stop_and_take() -> bool:
            if "r1" in app.ran:
                one.consumer.quiet()
            return takes()

        monkeypatch.setattr(one.consumer._lead, "takes", stop_and_take)
        one.start()
        assert one.consumer.join(10.0)
        assert [*app.ran] == ["r0", "r1"]
        with broker.client() as client:
            assert client.xlen(M.requests) == 0
            codes = [
                wire.decode_frame(client.lrange(M.reply(name), 0, -1)[0], max_size=9999) for name in NAMES
            ]
        assert [type(frame).__name__ for frame in codes] == ["Reply", "Reply", "Failure", "Failure"]
        forget(broker)


def test_a_script_that_was_forgotten_costs_no_wait(broker: Broker, app: App) -> None:
    """Also for a user who may not end our read (CLIENT UNBLOCK), and where another question took the reply along."""
    with broker.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-client|unblock")
    try:
        with running_bus(broker.url) as bus, agent(broker, app) as one, broker.client() as client:
            one.start()
            bus.await_route(SHOP)
            with httpx.Client(base_url=bus.url, timeout=30) as web:
                for number in range(6):
                    client.script_flush()
                    if number % 2:
                        one.consumer._intake._clock_due = 0.0
                    answer = web.post(f"/shop/quick/{number}")
                    assert answer.text == str(number)
                    assert answer.elapsed.total_seconds() < BLOCK_MS / 1000
            at_rest(broker)
    finally:
        with broker.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "+client|unblock")


@pytest.mark.parametrize("due", [False, True], ids=["", "with the clock"])
def test_a_reply_that_was_refused_is_not_left_behind_a_read(
    broker: Broker, app: App, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer to what was left is an error once, as a broker may have it that is short of replicas."""
    refused: list[Post] = []

    def say(post: Post, channel: Channel) -> object:
        refused.append(post)
        return redis.exceptions.ResponseError("NOREPLICAS Not enough good replicas to write.")

    monkeypatch.setattr("flaskbus_agent.intake._say", say)
    with running_bus(broker.url) as bus, agent(broker, app) as one, broker.client() as client:
        one.start()
        bus.await_route(SHOP)
        number = 0
        while len(refused) < 4:  # where the machine stalls, a reply may take the other way
            client.script_flush()
            if due:
                one.consumer._intake._clock_due = 0.0
            answer = httpx.post(f"{bus.url}/shop/quick/{number}", timeout=30)
            assert answer.text == str(number)
            assert answer.elapsed.total_seconds() < BLOCK_MS / 1000
            number += 1
            assert number < 50
        at_rest(broker)


def test_replies_that_a_broken_connection_took_with_it_are_sent_again(broker: Broker, app: App) -> None:
    with running_bus(broker.url) as bus, agent(broker, app) as one, broker.client() as client:
        one.start()
        bus.await_route(SHOP)
        leave = one.consumer._lead.leave

        def leave_and_break(thing: Post) -> bool:
            for each in client.client_list():
                if each["name"].endswith("-reader"):
                    client.client_kill_filter(_id=each["id"])
            return leave(thing)

        one.consumer._lead.leave = leave_and_break  # type: ignore[method-assign]
        for number in range(6):
            assert httpx.post(f"{bus.url}/shop/quick/{number}", timeout=30).text == str(number)
        assert len(app.ran) == 6
        at_rest(broker)


def test_many_clients_of_an_app_that_computes(broker: Broker, app: App) -> None:
    """Each has its own answer, and each request runs once."""
    with running_bus(broker.url) as bus, agent(broker, app) as one, ThreadPoolExecutor(16) as pool:
        one.start()
        bus.await_route(SHOP)
        names = [f"n{number}" for number in range(1000)]

        def ask(name: str) -> str:
            return httpx.post(f"{bus.url}/shop/quick/{name}", timeout=30).text

        assert list(pool.map(ask, names)) == names
        eventually(lambda: one.consumer.served == 1000)
        assert sorted(app.ran) == sorted(names)
        at_rest(broker)


def test_nobody_looks_all_the_time_where_there_is_no_work(broker: Broker, app: App) -> None:
    with agent(broker, app) as one:
        one.start()
        lead = one.consumer._lead
        eventually(lambda: lead._asleep and lead.is_reading(), "the deputy sleeps")


def test_what_comes_late_of_a_mount_that_was_dropped_runs(broker: Broker, app: App) -> None:
    """A read that goes on for more than half a lease may still bring it, and nobody else has it."""
    other = Mount.parse("/other")
    settings = AgentSettings(redis=broker.url, threads=2, lease=0.5)
    one = InProcessAgent(settings, {SHOP: app.app, other: app.app}, {SHOP: "shop", other: "other"})
    intake = one.consumer._intake
    put(broker, [])
    one.start()
    try:
        with broker.client() as client:
            one.consumer._reader.interrupt = lambda: None  # type: ignore[method-assign]
            # Reads are 2 s long.
            eventually(lambda: client.exists(M.owner) and 0.3 < time.monotonic() - intake._asked_at < 0.8)
            one.consumer.drop(SHOP)
            add(client, M, Request("late", "POST", "/shop/quick/late", "nobody", 30_000, script_name="/shop"))
            eventually(lambda: not client.xlen(M.requests), "it ran", 10)
            assert "late" in app.ran
            client.delete(M.reply("late"))
    finally:
        one.stop(10.0)
