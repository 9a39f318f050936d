"""Idempotency-Key on mounts that opted in, through real gateways, agents and a real broker."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus.idempotency import Policy
from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.signing import make_key
from flaskbus.testing import Bus, running_bus
from tests.conftest import Broker
from tests.integration.test_promises import eventually, problem

SERIAL = itertools.count(1)
KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
ALICE = {"Authorization": "Bearer alice"}


class Orders:
    """An app that counts its runs, and whose handlers can be held."""

    def __init__(self) -> None:
        self.mount = Mount.parse(f"/shop{next(SERIAL)}")
        """Another for each test: a gateway learns within a second what a mount asks for, and not before."""
        self.keys = Keys().of(self.mount.key)
        self.app = flask.Flask("orders")
        self.app.wsgi_app = validator(self.app.wsgi_app)  # type: ignore[assignment,method-assign]
        self.open = threading.Event()
        self.open.set()
        self.runs: list[str] = []
        self.app.add_url_rule(
            "/order", view_func=self.order, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]
        )
        self.app.add_url_rule("/login", view_func=self.login, methods=["POST"])
        self.app.add_url_rule("/export", view_func=self.export, methods=["POST"])
        self.app.add_url_rule("/fail", view_func=self.fail, methods=["POST"])

    def order(self) -> tuple[str, int, dict[str, str]]:
        request = flask.request
        self.runs.append(request.headers.get("Idempotency-Key", ""))
        number = len(self.runs)
        assert self.open.wait(30)
        return (
            f"{request.method} {number} {request.stream.read(1 << 20).decode()}",
            201,
            {"Location": f"/order/{number}"},
        )

    def login(self) -> flask.Response:
        self.runs.append("login")
        response = flask.Response(f"session {len(self.runs)}")
        response.set_cookie("session", str(len(self.runs)))
        return response

    def export(self) -> flask.Response:
        self.runs.append("export")

        def produce() -> Iterator[bytes]:
            yield b"first"
            assert self.open.wait(30)
            yield b"second"

        return flask.Response(produce())

    def fail(self) -> str:
        self.runs.append("fail")
        raise RuntimeError


@pytest.fixture
def orders() -> Iterator[Orders]:
    orders = Orders()
    yield orders
    orders.open.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool


@contextmanager
def serving(bus: Bus, orders: Orders, **settings: Any) -> Iterator[str]:
    """The app on a mount that opted in, once the gateways know that."""
    more = {"idempotency_keys": True, **settings}
    with bus.mount(orders.app, orders.mount.prefix, name="orders", **more) as url:
        yield url


@pytest.fixture(scope="module")
def bus(broker_server: Broker) -> Iterator[Bus]:
    """One gateway for all tests; each empties the broker."""
    with running_bus(broker_server.url) as bus:
        yield bus


@pytest.fixture(scope="module")
def hasty(broker_server: Broker) -> Iterator[Bus]:
    """Another, that does not wait for long."""
    with running_bus(broker_server.url, hold=0.3, head_timeout=0.5) as bus:
        yield bus


@pytest.fixture
def url(bus: Bus, orders: Orders, broker: Broker) -> Iterator[str]:
    with serving(bus, orders) as url:
        yield url
        orders.open.set()
        at_rest(orders, broker)


def request(method: str, url: str, timeout: float = 30.0, **more: Any) -> httpx.Response:
    """A request on a connection of its own, without the certificates of the world, which take long to read."""
    with httpx.Client(transport=httpx.HTTPTransport(verify=False), timeout=timeout) as client:
        return client.request(method, url, **more)


def post(url: str, content: str = "tea", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request("POST", url, content=content, headers={**KEY, **named})


def at_rest(orders: Orders, broker: Broker) -> None:
    """Nothing is left of any exchange, but records."""
    with broker.client() as client:
        eventually(lambda: not client.xlen(orders.keys.requests) and not list(client.scan_iter("*:reply:*")))


def records(broker: Broker) -> list[dict[bytes, bytes]]:
    with broker.client() as client:
        found = list(client.scan_iter("*:idempotent:*"))
        assert all(client.pttl(key) != -1 for key in found)
        return [client.hgetall(key) for key in found]


class TestRepeats:
    def test_the_first_answer_again(self, url: str, orders: Orders) -> None:
        first = post(f"{url}/order")
        assert (first.status_code, first.text) == (201, "POST 1 tea")
        assert "idempotency-replayed" not in first.headers
        again = post(f"{url}/order")
        assert (again.status_code, again.text, again.headers["location"]) == (201, "POST 1 tea", "/order/1")
        assert again.headers["idempotency-replayed"] == "true"
        # The app sees the header, whatever the bus makes of it.
        assert orders.runs == [KEY["Idempotency-Key"]]

    def test_whatever_it_was(self, url: str, orders: Orders) -> None:
        assert [post(f"{url}/fail").status_code for _ in range(2)] == [500, 500]
        assert [post(f"{url}/none").status_code for _ in range(2)] == [404, 404]
        assert orders.runs == ["fail"]

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
    def test_of_every_method_that_changes_something(self, url: str, orders: Orders, method: str) -> None:
        texts = {request(method, f"{url}/order", headers=KEY).text for _ in range(3)}
        assert texts == {f"{method} 1 "}

    def test_but_of_no_other(self, url: str, orders: Orders) -> None:
        assert [request("GET", f"{url}/order", headers=KEY).text for _ in range(2)] == ["GET 1 ", "GET 2 "]
        assert [request("POST", f"{url}/order").text for _ in range(2)] == ["POST 3 ", "POST 4 "]

    def test_quoted_and_bare_are_one_key(self, url: str, orders: Orders) -> None:
        post(f"{url}/order", Idempotency_Key="k")
        assert post(f"{url}/order", Idempotency_Key='"k"').headers["idempotency-replayed"] == "true"

    def test_a_running_one(self, url: str, orders: Orders, pool: ThreadPoolExecutor) -> None:
        orders.open.clear()
        first = pool.submit(post, f"{url}/order")
        eventually(lambda: orders.runs)
        again = post(f"{url}/order")
        assert problem(again)["type"] == "urn:flaskbus:error:key-in-use"
        assert (again.status_code, again.json()["executed"]) == (409, "unknown")
        assert int(again.headers["retry-after"]) > 0
        orders.open.set()
        assert first.result().text == post(f"{url}/order").text == "POST 1 tea"

    def test_another_body(self, url: str, orders: Orders, pool: ThreadPoolExecutor) -> None:
        orders.open.clear()
        first = pool.submit(post, f"{url}/order")
        eventually(lambda: orders.runs)
        running = problem(post(f"{url}/order", "coffee"))
        orders.open.set()
        assert first.result().status_code == 201
        answered = problem(post(f"{url}/order", "coffee"))
        typed = problem(post(f"{url}/order", Content_Type="text/plain"))
        for document in (running, answered, typed):
            assert (document["status"], document["executed"]) == (422, "no")
        assert len(orders.runs) == 1

    @pytest.mark.parametrize("key", ["", "a, b", "x" * 256, '"open', "caf\u00e9"])
    def test_what_is_no_key(self, url: str, orders: Orders, key: str) -> None:
        response = request("POST", f"{url}/order", headers=[(b"Idempotency-Key", key.encode())])
        assert (problem(response)["status"], response.json()["executed"]) == (400, "no")
        assert orders.runs == []

    def test_two_keys(self, url: str, orders: Orders) -> None:
        response = request(
            "POST", f"{url}/order", headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
        )
        assert problem(response)["status"] == 400

    def test_fifty_at_once_through_two_gateways(
        self, url: str, orders: Orders, broker: Broker, pool: ThreadPoolExecutor
    ) -> None:
        with running_bus(broker.url) as other:
            urls = [f"{url}/order", f"{other.url}{orders.mount.prefix}/order"] * 25
            responses = list(pool.map(post, urls))
            assert len(orders.runs) == 1
            assert {response.status_code for response in responses} <= {201, 409}
            ran = [r for r in responses if r.status_code == 201 and "idempotency-replayed" not in r.headers]
            assert len(ran) == 1
            assert {r.text for r in responses if r.status_code == 201} == {"POST 1 tea"}
            assert post(urls[1]).headers["idempotency-replayed"] == "true"


class TestCallers:
    def test_each_has_a_record_of_their_own(self, url: str, orders: Orders) -> None:
        callers = [{}, ALICE, {"Authorization": "Bearer bob"}, {"Cookie": "session=1"}, {"X-Api-Key": "1"}]
        texts = [post(f"{url}/order", **headers).text for headers in callers]
        assert texts == [f"POST {n} tea" for n in range(1, 6)]
        assert [post(f"{url}/order", **headers).text for headers in callers] == texts

    def test_targets_and_hosts_too(self, url: str, orders: Orders) -> None:
        texts = [
            post(f"{url}/order").text,
            post(f"{url}/order?a").text,
            post(f"{url}/order", Host="b.example").text,
        ]
        assert texts == ["POST 1 tea", "POST 2 tea", "POST 3 tea"]

    def test_a_session_is_not_given_to_whoever_asks(self, url: str, orders: Orders) -> None:
        assert post(f"{url}/login").headers["set-cookie"].startswith("session=1")
        again = post(f"{url}/login")
        assert problem(again)["type"] == "urn:flaskbus:error:answer-not-kept"
        assert (again.status_code, again.json()["executed"]) == (409, "unknown")
        assert "set-cookie" not in again.headers
        known = [post(f"{url}/login", **ALICE) for _ in range(2)]
        assert [one.headers["set-cookie"].partition(";")[0] for one in known] == ["session=2", "session=2"]
        assert orders.runs == ["login"] * 2

    def test_other_headers_may_tell_them_apart(self, bus: Bus, orders: Orders) -> None:
        with serving(bus, orders, idempotency_identity="X-User") as url:
            users = [post(f"{url}/order", X_User=user).text for user in ("a", "b", "a")]
            assert users == ["POST 1 tea", "POST 2 tea", "POST 1 tea"]
            assert post(f"{url}/order").text == post(f"{url}/order", X_Api_Key="1").text


class TestWhatIsKept:
    def test_no_stream(self, url: str, orders: Orders, pool: ThreadPoolExecutor) -> None:
        orders.open.clear()
        first = pool.submit(post, f"{url}/export")
        eventually(lambda: orders.runs)
        assert problem(post(f"{url}/export"))["type"] == "urn:flaskbus:error:key-in-use"
        orders.open.set()
        assert first.result().text == "firstsecond"
        assert problem(post(f"{url}/export"))["type"] == "urn:flaskbus:error:answer-not-kept"
        assert orders.runs == ["export"]

    def test_nothing_above_the_limit(self, bus: Bus, orders: Orders, broker: Broker) -> None:
        with serving(bus, orders, idempotency_limit=2000) as url:
            assert post(f"{url}/order", "x" * 1000).status_code == 201
            assert post(f"{url}/order", "x" * 1000).headers["idempotency-replayed"] == "true"
            assert post(f"{url}/order", "x" * 2000, **ALICE).status_code == 201
            assert problem(post(f"{url}/order", "x" * 2000, **ALICE))["status"] == 409
            assert sorted(record[b"state"] for record in records(broker)) == [b"answered", b"unkept"]

    def test_for_as_long_as_it_is_to_be(self, bus: Bus, orders: Orders, broker: Broker) -> None:
        with serving(bus, orders, idempotency_ttl=1) as url:
            assert post(f"{url}/order").text == "POST 1 tea"
            eventually(lambda: not records(broker))
            assert post(f"{url}/order").text == "POST 2 tea"


class TestSigned:
    SECRET = "this secret is only for tests, and nobody's"

    def test_an_answer_is_believed_only_as_its_agent_signed_it(self, orders: Orders, broker: Broker) -> None:
        key = make_key(self.SECRET, "flaskbus", orders.mount.key)
        with (
            running_bus(broker.url, signing_secret=self.SECRET) as bus,
            serving(bus, orders, signing_key=key) as url,
            broker.client() as client,
        ):
            assert {post(f"{url}/order").text for _ in range(2)} == {"POST 1 tea"}
            (name,) = client.scan_iter("*:idempotent:*")
            assert post(f"{url}/order", "gin", Idempotency_Key="other").text == "POST 2 gin"
            (other,) = (found for found in client.scan_iter("*:idempotent:*") if found != name)
            for field in ("id", "reply"):  # a stranger on the broker passes one answer off for another
                client.hset(name, field, client.hget(other, field))
            again = post(f"{url}/order")
            assert problem(again)["type"] == "urn:flaskbus:error:answer-not-kept"
            assert len(orders.runs) == 2


class TestOptingIn:
    def test_without_it_a_key_is_the_apps_affair(self, bus: Bus, orders: Orders, broker: Broker) -> None:
        with serving(bus, orders, idempotency_keys=False) as url:
            texts = [post(f"{url}/order", Idempotency_Key="not, a, key").text for _ in range(2)]
            assert texts == ["POST 1 tea", "POST 2 tea"]
            assert orders.runs == ["not, a, key"] * 2
            assert not records(broker)

    def test_while_requests_are_held(
        self, bus: Bus, orders: Orders, broker: Broker, pool: ThreadPoolExecutor
    ) -> None:
        """The mount remembers what its agents asked for."""
        claimed(orders, broker)
        with broker.client() as client:
            Registry(client, Keys()).leave(orders.mount, "a")
        bus.await_route(orders.mount)
        first = pool.submit(post, f"{bus.url}{orders.mount.prefix}/order")
        eventually(lambda: records(broker))
        assert problem(post(f"{bus.url}{orders.mount.prefix}/order"))["status"] == 409
        with serving(bus, orders):
            assert first.result().text == "POST 1 tea"

    def test_not_while_an_agent_of_wire_version_1_is_there(
        self, bus: Bus, orders: Orders, broker: Broker
    ) -> None:
        """It would leave the record as if the request ran for ever."""
        with serving(bus, orders) as url, broker.client() as client:
            old = json.loads(AgentRecord(id="old", name="orders", host="h", pid=1, lease=60.0).dump())
            del old["wire"]
            client.hset(orders.keys.agents, "old", json.dumps(old))
            eventually(lambda: "idempotency-replayed" not in post(f"{url}/order").headers)
            client.hdel(orders.keys.agents, "old")
            eventually(lambda: "idempotency-replayed" in post(f"{url}/order").headers)

    def test_the_latest_agent_decides(self, bus: Bus, orders: Orders) -> None:
        with serving(bus, orders) as url:
            with serving(bus, orders, idempotency_keys=False):
                eventually(lambda: "idempotency-replayed" not in post(f"{url}/order").headers)
            with serving(bus, orders):
                eventually(lambda: "idempotency-replayed" in post(f"{url}/order").headers)


def claimed(orders: Orders, broker: Broker) -> None:
    """The mount has opted in, and an agent that does not exist says that it is ready."""
    with broker.client() as client:
        record = AgentRecord(id="a", name="orders", host="h", pid=1, beat=1, state="ready")
        Registry(client, Keys()).claim(orders.mount, record, policy=Policy(60_000), became_ready=True)


class TestWhatSurelyDidNotRun:
    """The key is free again."""

    def test_a_deadline_before_it_was_delivered(self, hasty: Bus, orders: Orders, broker: Broker) -> None:
        claimed(orders, broker)
        for _ in range(2):
            document = problem(post(f"{hasty.url}{orders.mount.prefix}/order"))
            assert (document["status"], document["executed"]) == (503, "no")
        assert not records(broker)
        at_rest(orders, broker)

    def test_a_client_that_left(self, bus: Bus, orders: Orders, broker: Broker) -> None:
        claimed(orders, broker)
        with pytest.raises(httpx.ReadTimeout):
            request("POST", f"{bus.url}{orders.mount.prefix}/order", headers=KEY, timeout=0.5)
        eventually(lambda: not records(broker))
        at_rest(orders, broker)

    def test_a_record_that_is_not_ours(self, bus: Bus, orders: Orders, broker: Broker) -> None:
        with serving(bus, orders) as url, broker.client() as client:
            assert post(f"{url}/order").status_code == 201
            (key,) = client.scan_iter("*:idempotent:*")
            client.set(key, "something else", px=60_000)
            assert problem(post(f"{url}/order"))["executed"] == "no"
            assert len(orders.runs) == 1

    def test_a_broker_without_memory(self, bus: Bus, orders: Orders, broker: Broker) -> None:
        claimed(orders, broker)
        with broker.client() as client:
            client.config_set("maxmemory", "1")
            try:
                assert problem(post(f"{bus.url}{orders.mount.prefix}/order"))["executed"] == "no"
            finally:
                client.config_set("maxmemory", "0")
        assert not records(broker)


class TestClientsThatCouldNotWait:
    """Their requests were delivered; what becomes of them is there for whoever comes again."""

    def outcome(self, url: str, wanted: Callable[[httpx.Response], bool]) -> httpx.Response:
        """The first answer of that kind; all before it say that the first one runs."""

        def look() -> httpx.Response | None:
            response = post(url)
            if wanted(response):
                return response
            assert problem(response)["type"] == "urn:flaskbus:error:key-in-use"
            return None

        found: httpx.Response = eventually(look)
        return found

    def test_after_a_deadline(self, hasty: Bus, orders: Orders, broker: Broker) -> None:
        with serving(hasty, orders) as url:
            orders.open.clear()
            document = problem(post(f"{url}/order"))
            assert (document["status"], document["executed"]) == (504, "unknown")
            assert problem(post(f"{url}/order"))["status"] == 409
            orders.open.set()
            assert self.outcome(f"{url}/order", lambda one: one.status_code == 201).text == "POST 1 tea"
            assert len(orders.runs) == 1
            at_rest(orders, broker)

    def test_after_they_left(self, url: str, orders: Orders) -> None:
        orders.open.clear()
        with pytest.raises(httpx.ReadTimeout):
            request("POST", f"{url}/order", content="tea", headers=KEY, timeout=0.5)
        assert problem(post(f"{url}/order"))["status"] == 409
        orders.open.set()
        assert self.outcome(f"{url}/order", lambda one: one.status_code == 201).text == "POST 1 tea"
        assert len(orders.runs) == 1

    def test_in_the_middle_of_a_stream(self, url: str, orders: Orders, broker: Broker) -> None:
        orders.open.clear()
        with httpx.stream("POST", f"{url}/export", content="tea", headers=KEY, timeout=30) as response:
            assert next(response.iter_raw()) == b"first"
        at_rest(orders, broker)
        assert problem(post(f"{url}/export"))["type"] == "urn:flaskbus:error:key-in-use"
        orders.open.set()
        kept = self.outcome(
            f"{url}/export", lambda one: one.json()["type"] != "urn:flaskbus:error:key-in-use"
        )
        assert problem(kept)["type"] == "urn:flaskbus:error:answer-not-kept"
        assert orders.runs == ["export"]

    def test_a_stream_that_had_not_begun(self, hasty: Bus, orders: Orders, broker: Broker) -> None:
        began = threading.Event()

        def slow() -> flask.Response:
            orders.runs.append("slow")
            began.set()
            assert orders.open.wait(30)
            return flask.Response(part for part in (b"first", b"second"))

        orders.app.add_url_rule("/slow", view_func=slow, methods=["POST"])
        with serving(hasty, orders) as url:
            orders.open.clear()
            assert problem(post(f"{url}/slow"))["status"] == 504
            orders.open.set()
            kept = self.outcome(
                f"{url}/slow", lambda one: one.json()["type"] != "urn:flaskbus:error:key-in-use"
            )
            assert problem(kept)["type"] == "urn:flaskbus:error:answer-not-kept"
            assert orders.runs == ["slow"]
