"""Signed requests and replies: a stranger on the broker can neither run code nor answer clients."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus import wire
from flaskbus.keys import Keys
from flaskbus.messages import NOT_RUN, Chunk, Failure, Reply, Request
from flaskbus.routing import Mount
from flaskbus.signing import CLOCK_DOUBT, Seal, make_key
from tests.conftest import Broker
from tests.faults.test_dead_agents import LEASE, Agents
from tests.integration.fleet import Fleet
from tests.integration.test_promises import M, at_rest, bus_of, eventually, problem

SECRET = "this secret is only for tests, and nobody's"
KEY = make_key(SECRET, "flaskbus", "/shop")
SEAL = Seal("/shop", bytes.fromhex(KEY))
REQUEST = Request(
    "captured-1", "POST", "/shop/buy", "gw-1", 30_000, script_name="/shop", headers=((b"host", b"h"),)
)


class Shop:
    """Counts what it sold; can be held, and streams."""

    def __init__(self) -> None:
        self.sold: list[str] = []
        self.go = threading.Event()
        self.app = flask.Flask("shop")
        self.app.wsgi_app = validator(self.app.wsgi_app)  # type: ignore[assignment,method-assign]
        self.app.add_url_rule("/buy", view_func=self.buy, methods=["GET", "POST"])
        self.app.add_url_rule("/wait", view_func=self.wait)
        self.app.add_url_rule("/stream", view_func=self.stream)
        self.app.add_url_rule("/large", view_func=lambda: b"x" * 300_000)

    def buy(self) -> str:
        self.sold.append(flask.request.headers.get("X-Who", ""))
        return "sold"

    def wait(self) -> str:
        self.sold.append("waiting")
        assert self.go.wait(30)
        return "waited"

    def stream(self) -> flask.Response:
        def produce() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 32768

        return flask.Response(produce())


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.go.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def put(client: Any, fields: list[Any], request_id: str = REQUEST.id) -> list[bytes]:
    """Write an entry as a stranger would; the frames that come back."""
    client.xadd(M.requests, dict(zip(fields[::2], fields[1::2], strict=True)))
    frames: list[bytes] = eventually(lambda: client.lrange(M.reply(request_id), 0, -1))
    client.delete(M.reply(request_id))
    return frames


def command(*words: str, url: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``flaskbus …``, as a person runs it."""
    return subprocess.run(
        [sys.executable, "-m", "flaskbus", *words],
        env={**os.environ, "FLASKBUS_REDIS_URL": url, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def expires(seconds: float = 30) -> int:
    return int(time.time() + seconds)


class TestBothSign:
    @pytest.fixture
    def url(self, broker: Broker, shop: Shop) -> Iterator[str]:
        with (
            bus_of(broker, signing_secret=SECRET) as bus,
            bus.mount(shop.app, "/shop", signing_key=KEY) as url,
        ):
            yield url
            at_rest(broker)

    def test_everything_works_as_without(self, url: str, shop: Shop) -> None:
        assert httpx.post(f"{url}/buy", content=b"x" * 100_000).text == "sold"
        assert len(httpx.get(f"{url}/large").content) == 300_000
        assert len(httpx.get(f"{url}/stream").content) == 100 * 32768
        assert httpx.head(f"{url}/buy").status_code == 200
        assert httpx.get(f"{url}/none").status_code == 404

    def test_a_stranger_runs_nothing(
        self, broker: Broker, url: str, shop: Shop, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain = wire.encode_request(REQUEST)
        other = Seal("/shop", bytes.fromhex(make_key(SECRET[::-1], "flaskbus", "/shop")))
        elsewhere = Seal("/shop2", bytes.fromhex(make_key(SECRET, "flaskbus", "/shop2")))
        signed = SEAL.sign_request(plain, expires())
        moved = list(signed)
        moved[moved.index("target") + 1] = b"/shop/admin"
        again = list(signed)
        again[again.index("attempt") + 1] = 2
        late = SEAL.sign_request(plain, expires(-CLOCK_DOUBT - 60))
        strange = [
            plain,
            other.sign_request(plain, expires()),
            elsewhere.sign_request(plain, expires()),
            moved,
            again,
            late,
        ]
        with broker.client() as client, caplog.at_level(logging.ERROR, "flaskbus.agent"):
            for fields in strange:
                (frame,) = put(client, fields)
                # What is said of it is not signed: it was a stranger who chose the id.
                assert not SEAL.frames(REQUEST.id).is_signed(frame)
                failure = wire.decode_frame(frame, max_size=10_000)
                assert isinstance(failure, Failure)
                assert "unreadable request" in failure.detail
            letters: Any = client.xrange(M.dead)
            client.delete(M.dead)
        reasons = [letter[b"reason"].decode() for _, letter in letters]
        assert [word for reason in reasons for word in ("not signed", "wrong", "expired") if word in reason] == [
            "not signed", "wrong", "wrong", "wrong", "wrong", "expired",
        ]  # fmt: skip
        assert shop.sold == []
        # Each second, fourth, … one: a flood of them does not fill the log.
        assert [record.getMessage().partition("(")[2][:8] for record in caplog.records] == [
            "1 so far", "2 so far", "4 so far",
        ]  # fmt: skip

    def test_a_copy_of_a_signed_entry_does_not_run_again(self, broker: Broker, url: str, shop: Shop) -> None:
        captured = SEAL.sign_request(wire.encode_request(REQUEST), expires())
        with broker.client() as client:
            (frame,) = put(client, captured)
            assert isinstance(wire.decode_frame(frame, max_size=10_000), Reply)
            (frame,) = put(client, captured)
            assert isinstance(wire.decode_frame(frame, max_size=10_000), Failure)
            assert not SEAL.frames(REQUEST.id).is_signed(frame)
            client.delete(M.dead)
        assert len(shop.sold) == 1

    def test_clocks_that_jumped_by_an_hour(self, broker: Broker, url: str, shop: Shop) -> None:
        with broker.client() as client:
            for number, jump in enumerate((-3600, 3600)):
                request = replace(REQUEST, id=f"jump-{number}")
                put(client, SEAL.sign_request(wire.encode_request(request), expires(jump)), request.id)
        assert len(shop.sold) == 2

    def test_a_stranger_answers_nobody(
        self, broker: Broker, url: str, shop: Shop, pool: ThreadPoolExecutor
    ) -> None:
        answer = pool.submit(httpx.get, f"{url}/wait", timeout=30)
        eventually(lambda: shop.sold)
        with broker.client() as client:
            ((_, entry),) = eventually(lambda: client.xrange(M.requests))
            request_id, gateway = entry[b"id"].decode(), entry[b"from"].decode()
            foreign = Seal("/shop", bytes(32)).frames(request_id).sign
            forged = [
                wire.encode_frame(Reply(1, 0, 200, (), b"forged")),
                wire.encode_frame(Reply(1, 0, 200, (), b"forged"), foreign),
                wire.encode_frame(Failure(1, 0, "not-run", "forged")),
                wire.encode_frame(Reply(1, 0, 200, (), b"forged"), SEAL.frames("another").sign),
                b"\xc1",
                b"x" * (wire.max_frame(65536) + 1),
            ]
            for frame in forged:
                client.rpush(M.reply(request_id), frame)
                client.publish(M.doorbell(gateway), request_id)
                client.publish(M.doorbell(gateway), request_id.encode() + b" " + frame)
            # The gateway has seen them all, and put them aside.
            client.rpush(M.reply(request_id), forged[0])
            client.publish(M.doorbell(gateway), request_id)
            assert not answer.done()
            shop.go.set()
            assert answer.result().text == "waited"
            client.delete(M.dead)

    def test_a_stranger_breaks_into_no_stream(self, broker: Broker, url: str, shop: Shop) -> None:
        with httpx.stream("GET", f"{url}/stream") as response, broker.client() as client:
            (key,) = eventually(lambda: list(client.scan_iter(M.reply("*"))))
            for seq in range(200):
                client.rpushx(key, wire.encode_frame(Chunk(1, seq, b"forged")))
            body = b"".join(response.iter_raw())
        assert body == b"x" * 100 * 32768

    def test_a_command_signs_too(self, broker: Broker, url: str, shop: Shop) -> None:
        for variables in ({"FLASKBUS_SIGNING_SECRET": SECRET}, {"FLASKBUS_SIGNING_KEY": KEY}):
            done = command("request", "POST", "/shop/buy", url=broker.url, **variables)
            assert (done.returncode, done.stdout) == (0, "sold"), done.stderr
        done = command("request", "/shop/buy", url=broker.url)
        assert done.returncode == 3
        assert "not signed" in done.stderr
        assert len(shop.sold) == 2
        with broker.client() as client:
            client.delete(M.dead)


class TestKeptAnswers:
    def test_a_stranger_keeps_no_answer_for_a_key(self, broker: Broker, shop: Shop) -> None:
        with (
            bus_of(broker, signing_secret=SECRET) as bus,
            bus.mount(shop.app, "/shop", signing_key=KEY, idempotency_keys=True) as url,
        ):

            def buy(key: str) -> httpx.Response:
                return httpx.post(
                    f"{url}/buy", headers={"Idempotency-Key": key, "Authorization": "me"}, timeout=20
                )

            first = eventually(lambda: (answer := buy("one")).status_code == 200 and answer)
            assert first.text == "sold"
            with broker.client() as client:
                (record,) = eventually(lambda: list(client.scan_iter(M.idempotent("*"))))
                assert buy("one").headers["idempotency-replayed"] == "true"
                assert buy("two").text == "sold"
                (other,) = [key for key in client.scan_iter(M.idempotent("*")) if key != record]
                kept: Any = client.hgetall(record)
                forged = wire.encode_frame(Reply(1, 0, 200, (), b"forged"))
                elsewhere: Any = client.hmget(other, "id", "reply")
                for request_id, reply in ((kept[b"id"], forged), tuple(elsewhere)):
                    client.hset(record, mapping={"id": request_id, "reply": reply})
                    answer = problem(buy("one"))
                    assert (answer["status"], answer["detail"]) == (409, "it is not signed as it should be")
                client.hset(record, mapping=kept)
            assert buy("one").text == "sold"
            assert len(shop.sold) == 2
            with broker.client() as client:
                client.delete(record, other)


def dead_letter(broker: Broker) -> str:
    """Why the newest was given up; the letters are removed."""
    with broker.client() as client:
        letters: Any = client.xrevrange(M.dead)
        client.delete(M.dead)
    return str(letters[0][1][b"reason"].decode())


class TestOneSigns:
    """Half of an upgrade: nothing runs, and both sides and ``flaskbus doctor`` say why."""

    def test_a_gateway_that_signs_and_an_agent_without_a_key(self, broker: Broker, shop: Shop) -> None:
        with bus_of(broker, signing_secret=SECRET) as bus, bus.mount(shop.app, "/shop") as url:
            answer = problem(httpx.post(f"{url}/buy", timeout=20))
            assert (answer["status"], answer["executed"]) == (502, "unknown")
            assert "do the agents of /shop have the key" in answer["detail"]
            said = command("doctor", url=broker.url)
            assert "has no signing key, and the gateways sign" in said.stdout
            assert "flaskbus key /shop" in said.stdout
            assert said.returncode == 1
        assert shop.sold == []
        assert "this agent has no signing key" in dead_letter(broker)

    def test_a_gateway_without_a_secret_and_an_agent_with_a_key(self, broker: Broker, shop: Shop) -> None:
        with bus_of(broker) as bus, bus.mount(shop.app, "/shop", signing_key=KEY) as url:
            answer = problem(httpx.post(f"{url}/buy", timeout=20))
            assert (answer["status"], answer["executed"]) == (502, "unknown")
            assert "the request is not signed, and this agent has a signing key" in answer["detail"]
            said = command("doctor", url=broker.url)
            assert "takes signed requests only, and no gateway signs" in said.stdout
            assert said.returncode == 1
        assert shop.sold == []
        assert "this agent has a signing key" in dead_letter(broker)

    @pytest.mark.parametrize(
        ("secret", "key", "line"),
        [
            (SECRET, "", "has not the key with which this gateway signs"),
            ("", KEY, "takes signed requests only"),
        ],
    )
    def test_the_gateways_log_says_it_once_for_each_agent(
        self, broker: Broker, shop: Shop, tmp_path: Path, secret: str, key: str, line: str
    ) -> None:
        with Fleet(tmp_path, broker.url) as fleet:
            gateway, url = fleet.gateway(FLASKBUS_SIGNING_SECRET=secret)
            fleet.agent("one", FLASKBUS_SIGNING_KEY=key and make_key(SECRET, "flaskbus", "/fleet"))
            eventually(lambda: line in gateway.log())
            eventually(lambda: httpx.get(f"{url}/fleet/x", timeout=20).status_code == 502)
            assert gateway.log().count(line) == 1
        with broker.client() as client:
            client.delete(Keys().of("/fleet").dead)


class TestKeys:
    def test_a_secret_is_replaced_without_an_error(self, broker: Broker, shop: Shop) -> None:
        fresh = SECRET[::-1]
        keys = f"/shop={KEY} /shop={make_key(fresh, 'flaskbus', '/shop')}"
        with bus_of(broker, signing_secret=SECRET) as old, bus_of(broker, signing_secret=fresh) as new:
            with old.mount(shop.app, "/shop", signing_key=keys):
                for bus in (old, new, old):
                    assert httpx.post(f"{bus.url}/shop/buy").text == "sold"

    def test_several_mounts_of_one_agent(self, broker: Broker, shop: Shop, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text(SECRET + "\n")
        printed = command("key", "/shop", "/api", url=broker.url, FLASKBUS_SIGNING_SECRET=f"@{secret}")
        assert printed.stdout.splitlines()[0] == f"/shop={KEY}"
        keys = tmp_path / "keys"
        keys.write_text(printed.stdout)
        (tmp_path / "signed.py").write_text(SITE)
        with bus_of(broker, signing_secret=f"@{secret}") as bus:
            variables = {"FLASKBUS_SIGNING_KEY": f"@{keys}"}
            with agent_process(broker, tmp_path, "signed:app=/shop", "signed:app=/api", **variables) as agent:
                try:
                    for prefix in ("/shop", "/api"):
                        bus.await_route(Mount.parse(prefix))
                        assert httpx.post(f"{bus.url}{prefix}/x").text == prefix
                finally:
                    agent.terminate()

    @pytest.mark.parametrize(
        ("apps", "key", "message"),
        [
            (["signed:app=/shop"], "hunter2", "a signing key is 64 hexadecimal digits"),
            (["signed:app=/shop"], f"/api={KEY}", "there is no signing key for /shop among those of /api"),
            (["signed:app=/shop", "signed:app=/api"], KEY, "each mount has a signing key of its own"),
            (["signed:app=/shop"], "@missing", "the secret in missing cannot be read"),
        ],
    )
    def test_what_an_agent_cannot_use_is_one_line(
        self, broker: Broker, tmp_path: Path, apps: list[str], key: str, message: str
    ) -> None:
        (tmp_path / "signed.py").write_text(SITE)
        agent = agent_process(broker, tmp_path, *apps, FLASKBUS_SIGNING_KEY=key)
        _, said = agent.communicate(timeout=30)
        assert agent.returncode == 2
        assert message in said
        assert "Traceback" not in said
        assert "hunter2" not in said

    def test_neither_is_shown(self, broker: Broker) -> None:
        shown = command(
            "config", "--json", url=broker.url, FLASKBUS_SIGNING_SECRET=SECRET, FLASKBUS_SIGNING_KEY=KEY
        )
        assert SECRET not in shown.stdout
        assert KEY not in shown.stdout
        assert json.loads(shown.stdout)["gateway"]["signing_secret"]["value"] == "***"

    def test_no_key_without_a_secret(self, broker: Broker) -> None:
        said = command("key", "/shop", url=broker.url)
        assert said.returncode == 2
        assert "there is no signing secret" in said.stderr


SITE = """
from wsgiref.validate import validator

@validator
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["SCRIPT_NAME"].encode()]
"""


def agent_process(broker: Broker, directory: Path, *apps: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flaskbus_agent", *apps],
        cwd=directory,
        env={**os.environ, "FLASKBUS_REDIS_URL": broker.url, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestDeadAgents:
    @pytest.fixture
    def agents(self, tmp_path: Path, broker: Broker) -> Iterator[Agents]:
        agents = Agents(tmp_path, broker)
        yield agents
        agents.end()

    def test_each_attempt_is_signed_anew(
        self, broker: Broker, agents: Agents, pool: ThreadPoolExecutor
    ) -> None:
        with bus_of(broker, signing_secret=SECRET, lease=LEASE) as bus:
            agents.start("--signing-key", KEY)
            get = pool.submit(httpx.get, f"{bus.url}/shop/work/a", timeout=30)
            os.kill(agents.runner("a"), signal.SIGKILL)
            eventually(lambda: len(agents.runs("a")) == 2)
            agents.let_go("a")
            assert get.result().text == str(agents.runs("a")[1])

    def test_what_the_gateway_says_of_a_lost_group_is_believed(
        self, broker: Broker, agents: Agents, pool: ThreadPoolExecutor
    ) -> None:
        with bus_of(broker, signing_secret=SECRET, lease=LEASE) as bus:
            agents.start("--signing-key", KEY)
            post = pool.submit(httpx.post, f"{bus.url}/shop/work/a", timeout=30)
            agents.runner("a")
            with broker.client() as client:
                client.xgroup_destroy(M.requests, "agents")
            assert "lost track" in problem(post.result(10))["detail"]
            agents.let_go("a")

    def test_what_is_handed_back_runs_elsewhere(
        self, broker: Broker, agents: Agents, pool: ThreadPoolExecutor
    ) -> None:
        with bus_of(broker, signing_secret=SECRET, lease=LEASE) as bus:
            agents.start("--signing-key", KEY)
            with broker.client() as client:
                # An entry that is older than its time to live, by the broker's clock.
                ((moment, _),) = [client.time()]
                request = replace(REQUEST, id="handed-1", ttl=1000)
                fields = SEAL.sign_request(wire.encode_request(request), expires())
                client.xadd(
                    M.requests,
                    dict(zip(fields[::2], fields[1::2], strict=True)),
                    id=f"{(moment - 60) * 1000}-0",
                )
                (frame,) = eventually(lambda: client.lrange(M.reply("handed-1"), 0, -1))
                client.delete(M.reply("handed-1"))
            assert SEAL.frames("handed-1").is_signed(frame)
            failure = wire.decode_frame(frame, max_size=10_000)
            assert isinstance(failure, Failure)
            assert failure.code == NOT_RUN
            agents.let_go("b")
            assert httpx.get(f"{bus.url}/shop/work/b", timeout=30).status_code == 200
