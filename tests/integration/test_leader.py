"""What the leader of an agent's threads runs itself: nobody waits for it, and its replies are not lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import flask
import httpx
import pytest

from flaskbus import wire
from flaskbus.messages import Reply, Request
from flaskbus.settings import AgentSettings
from flaskbus.testing import running_bus
from flaskbus_agent.inprocess import InProcessAgent
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.post import Post
from tests.conftest import Broker
from tests.integration.fleet import eventually
from tests.integration.test_promises import SHOP, M, at_rest

NAMES = [f"r{number}" for number in range(4)]


class App:
    """Each request says what it is to do; the threads in which they ran are written down."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.together = threading.Barrier(4)
        self.ran: dict[str, str] = {}
        self.app = flask.Flask("app")
        self.app.add_url_rule("/<what>/<name>", view_func=self.run, methods=["GET", "POST"])

    def run(self, what: str, name: str) -> str:
        self.ran[name] = threading.current_thread().name + str(threading.get_ident())
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
    agent = InProcessAgent(
        AgentSettings(redis=broker.url, threads=4, **settings), {SHOP: app.app}, {SHOP: "shop"}
    )
    fill = agent.consumer._intake.fill
    agent.consumer._intake.fill = lambda most, posts: fill(4, posts)  # type: ignore[method-assign]
    try:
        yield agent
    finally:
        agent.stop(10.0)


def put(broker: Broker, what: Sequence[str]) -> None:
    """Requests that are there before any agent is, so that one read gets all of them."""
    with broker.client() as client:
        client.xgroup_create(M.requests, "agents", "0", mkstream=True)
        for name, kind in zip(NAMES, what, strict=False):
            request = Request(name, "POST", f"/shop/{kind}/{name}", "nobody", 30_000, script_name="/shop")
            client.execute_command("XADD", M.requests, "*", *wire.encode_request(request))


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
    put(broker, ["quick"] * 4)
    with agent(broker, app) as one:
        one.start()
        eventually(lambda: answered(broker) == NAMES, "all are answered")
        assert len(set(app.ran.values())) == 1
        forget(broker)


def test_an_agent_that_stops_hands_in_what_it_has_left(
    broker: Broker, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stops it while the reply to the first is left; the third and fourth go back."""
    put(broker, ["quick"] * 4)
    with agent(broker, app) as one:
        leave = one.consumer._lead.leave

        def leave_and_stop(post: Post) -> bool:
            if post.reply.body == b"r1":
                one.consumer.quiet()
            return leave(post)

        monkeypatch.setattr(one.consumer._lead, "leave", leave_and_stop)
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


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_replies_that_the_broker_did_not_take_are_sent_again(
    broker: Broker, app: App, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forgets its scripts, or the connection breaks, with what was left on its way."""
    with running_bus(broker.url) as bus, agent(broker, app) as one:
        again: list[str] = []
        finish = Outbox.finish

        def counted(outbox: Outbox, *args: Any) -> None:
            again.append(outbox.request_id)
            finish(outbox, *args)

        monkeypatch.setattr(Outbox, "finish", counted)
        one.start()
        bus.await_route(SHOP)
        with broker.client() as client, httpx.Client(base_url=bus.url, timeout=30) as web:
            for round_ in range(6):
                before = len(again)
                if round_ % 2:
                    client.script_flush()
                else:
                    for each in client.client_list():
                        if each["name"].endswith("-reader"):
                            client.client_kill_filter(_id=each["id"])
                assert web.request(method, f"/shop/quick/{round_}").text == str(round_)
                if round_ % 2:
                    assert len(again) > before
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
