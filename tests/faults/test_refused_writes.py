"""The broker refuses writes while an app runs: what it answers is kept until it can be sent, or its client hears."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest
import redis

from flaskbus import wire
from flaskbus.keys import GROUP
from flaskbus.messages import NOT_RUN, Failure, Request
from flaskbus.testing import running_bus
from tests.faults.mortal import MortalBroker
from tests.integration.test_promises import M, at_rest, eventually, problem

WAITS = "waits, the broker refuses it"

Client = Any
Refusing = Callable[[Client], AbstractContextManager[None]]


class Shop:
    """An app that goes on when the test lets it."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = threading.Event()
        self.app = flask.Flask("shop")
        self.app.wsgi_app = validator(self.app.wsgi_app)  # type: ignore[assignment,method-assign]
        self.app.add_url_rule("/work", view_func=self.work, methods=["POST"])
        self.app.add_url_rule("/events", view_func=self.events)

    def work(self) -> str:
        self.runs += 1
        assert self.go.wait(30)
        return "done"

    def events(self) -> flask.Response:
        def produce() -> Iterator[bytes]:
            self.runs += 1
            for number in range(6):
                yield b"data: %d\n\n" % number
                assert number < 2 or self.go.wait(30)

        return flask.Response(produce(), mimetype="text/event-stream")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MortalBroker]:
    broker = MortalBroker(tmp_path)
    yield broker
    broker.close()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.go.set()


@pytest.fixture
def client(broker: MortalBroker) -> Iterator[Client]:
    with broker.broker.client() as client:
        yield client


@contextmanager
def few_replicas(client: Client) -> Iterator[None]:
    """NOREPLICAS."""
    client.config_set("min-replicas-to-write", "1")
    try:
        yield
    finally:
        client.config_set("min-replicas-to-write", "0")


@contextmanager
def long_script(client: Client) -> Iterator[None]:
    """BUSY."""
    client.config_set("busy-reply-threshold", "50")
    other = redis.Redis(connection_pool=client.connection_pool)

    def run() -> None:
        with suppress(redis.exceptions.RedisError):  # it is killed
            other.eval("while true do end", 0)

    running = threading.Thread(target=run)
    running.start()
    try:
        eventually(lambda: busy(client))
        yield
    finally:
        client.script_kill()
        running.join()


def busy(client: Client) -> bool:
    try:
        client.ping()
    except redis.exceptions.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@contextmanager
def no_scripts(client: Client) -> Iterator[None]:
    """NOPERM, which does not pass by itself."""
    client.execute_command("ACL", "SETUSER", "default", "-evalsha")
    try:
        yield
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+evalsha")


@pytest.mark.parametrize("refusing", [few_replicas, long_script])
def test_a_reply_waits_until_writes_are_taken_again(
    broker: MortalBroker, shop: Shop, client: Client, caplog: pytest.LogCaptureFixture, refusing: Refusing
) -> None:
    with ThreadPoolExecutor(1) as pool, running_bus(broker.url) as bus, bus.mount(shop.app, "/shop") as url:
        answer = pool.submit(httpx.post, f"{url}/work", timeout=60)
        eventually(lambda: shop.runs)
        with refusing(client):
            shop.go.set()
            eventually(lambda: WAITS in caplog.text)
        assert (answer.result().status_code, answer.result().text) == (200, "done")
        assert shop.runs == 1
        assert caplog.text.count(WAITS) == 1
        at_rest(broker.broker)


def test_a_stream_of_events_goes_on(
    broker: MortalBroker, shop: Shop, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with running_bus(broker.url) as bus, bus.mount(shop.app, "/shop") as url:
        with httpx.stream("GET", f"{url}/events", timeout=60) as answer:
            received = answer.iter_bytes()
            head = b""
            while b"data: 2" not in head:
                head += next(received)
            with few_replicas(client):
                shop.go.set()
                eventually(lambda: WAITS in caplog.text)
            everything = head + b"".join(received)
        assert everything == b"".join(b"data: %d\n\n" % number for number in range(6))
        assert shop.runs == 1
        at_rest(broker.broker)


def test_one_refused_for_good_is_not_waited_for(
    broker: MortalBroker, shop: Shop, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the reply nor its end can be written, until somebody mends that: then the entry goes, unanswered."""
    with ThreadPoolExecutor(1) as pool, running_bus(broker.url) as bus, bus.mount(shop.app, "/shop") as url:
        answer = pool.submit(httpx.post, f"{url}/work", timeout=60)
        eventually(lambda: shop.runs)
        with no_scripts(client):
            shop.go.set()
            eventually(lambda: "could not be removed" in caplog.text)
        mended = time.monotonic()
        refused = problem(answer.result())
        assert (refused["status"], refused["executed"]) == (502, "unknown")
        assert time.monotonic() - mended < 15  # its deadline is later
        assert shop.runs == 1
        at_rest(broker.broker)


def test_what_could_not_be_handed_back_or_buried_is_looked_at_again(
    broker: MortalBroker, shop: Shop, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with running_bus(broker.url) as bus, bus.mount(shop.app, "/shop"):
        request = Request(id="late-1", method="POST", target="/shop/work", gateway="nobody", ttl=1000)
        fields = wire.encode_request(request)
        seconds, _ = client.time()
        with no_scripts(client):
            client.delete(M.requests)
            client.xgroup_create(M.requests, GROUP, "0", mkstream=True)
            late = dict(zip(fields[::2], fields[1::2], strict=True))
            client.xadd(M.requests, late, id=f"{seconds * 1000 - 3000}-0")
            eventually(lambda: "could not be handed back" in caplog.text)
            client.xadd(M.requests, {"what": "is this?"})
            eventually(lambda: "could not be buried" in caplog.text)
        element = eventually(lambda: client.lindex(M.reply("late-1"), 0))
        frame = wire.decode_frame(element, max_size=10_000)
        assert isinstance(frame, Failure)
        assert frame.code == NOT_RUN
        eventually(lambda: client.xlen(M.dead) == 1)
        assert shop.runs == 0
        client.delete(M.reply("late-1"))
        at_rest(broker.broker)


def test_one_that_is_too_large_for_the_broker(
    broker: MortalBroker, shop: Shop, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply is refused, and its end is not: the client hears at once."""
    shop.app.add_url_rule("/large", view_func=lambda: b"x" * 1_500_000)
    client.config_set("proto-max-bulk-len", str(2**20))
    with running_bus(broker.url) as bus, bus.mount(shop.app, "/shop", reply_limit=2**21) as url:
        answer = httpx.get(f"{url}/large", timeout=60)
        refused = problem(answer)
        assert (refused["status"], refused["executed"]) == (502, "unknown")
        assert "refused its reply" in refused["detail"]
        assert "was refused by the broker" in caplog.text
        at_rest(broker.broker)
