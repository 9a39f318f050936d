"""What an agent read and did not begin goes back to its gateway, which knows then that it did not run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus import wire
from flaskbus.keys import GROUP, Keys
from flaskbus.messages import NOT_RUN, Failure, Request
from flaskbus.settings import AgentSettings
from flaskbus.testing import running_bus
from flaskbus_agent.entry import Entry
from flaskbus_agent.inprocess import InProcessAgent
from flaskbus_agent.outbox import Outbox
from tests.conftest import Broker
from tests.integration.test_promises import SHOP, M, at_rest, eventually, known, problem

HOUR = 3_600_000


class Counted:
    """An app that counts its runs, and says which attempt it sees."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.app = flask.Flask("counted")
        self.app.wsgi_app = validator(self.app.wsgi_app)  # type: ignore[assignment,method-assign]
        self.app.add_url_rule("/<name>", view_func=self.run, methods=["GET", "POST"])

    def run(self, name: str) -> str:
        self.runs.append(name)
        assert self.go.wait(30)
        return name


@pytest.fixture
def counted() -> Iterator[Counted]:
    counted = Counted()
    yield counted
    counted.go.set()


@contextmanager
def agent(broker: Broker, app: Any, **settings: Any) -> Iterator[InProcessAgent]:
    """An agent that was not started yet."""
    agent = InProcessAgent(AgentSettings(redis=broker.url, **settings), {SHOP: app}, {SHOP: "shop"})
    try:
        yield agent
    finally:
        agent.stop(10.0)


def test_a_thread_that_is_just_being_begun_can_be_waited_for(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that becomes a stream begins a thread at any moment, also while the agent stops."""
    start = threading.Thread.start
    endings: list[bool] = []

    def slow_start(thread: threading.Thread) -> None:
        if thread.name == "flaskbus-request":
            waiter = threading.Thread(target=lambda: endings.append(first.consumer.join(10.0)))
            start(waiter)
            waiter.join(0.2)  # it looks meanwhile
            waiters.append(waiter)
        start(thread)

    waiters: list[threading.Thread] = []
    with agent(broker, Counted().app, threads=1) as first:
        monkeypatch.setattr(threading.Thread, "start", slow_start)
        first.start()
        monkeypatch.undo()
        first.consumer.quiet()
        for waiter in waiters:
            waiter.join(20.0)
    assert endings == [True]


def test_an_agent_that_stops_hands_back_what_it_had_not_begun(broker: Broker, counted: Counted) -> None:
    with ThreadPoolExecutor(1) as pool, running_bus(broker.url) as bus, agent(broker, counted.app) as first:
        take = first.consumer._intake._take

        def take_and_stop(answer: Any) -> bool:
            news = take(answer)
            if answer:
                first.consumer.quiet()
            return news

        first.consumer._intake._take = take_and_stop  # type: ignore[method-assign]
        first.start()
        bus.await_route(SHOP)
        answer = pool.submit(httpx.post, f"{bus.url}/shop/once", timeout=30)
        assert first.consumer.join(10.0)
        assert counted.runs == []
        with agent(broker, counted.app) as second:
            second.start()
            assert answer.result().text == "once"
        assert counted.runs == ["once"]
        at_rest(broker)


def test_nobody_takes_what_was_handed_back(broker: Broker, counted: Counted) -> None:
    with running_bus(broker.url, hold=0.5, head_timeout=0.5) as bus, agent(broker, counted.app) as only:
        take = only.consumer._intake._take

        def take_and_stop(answer: Any) -> bool:
            news = take(answer)
            if answer:
                only.consumer.quiet()
            return news

        only.consumer._intake._take = take_and_stop  # type: ignore[method-assign]
        only.start()
        bus.await_route(SHOP)
        document = problem(httpx.post(f"{bus.url}/shop/never", timeout=30))
        assert (document["status"], document["executed"]) == (503, "no")
        assert counted.runs == []
        at_rest(broker)


def test_what_waits_for_a_busy_thread_is_handed_back_at_once(broker: Broker, counted: Counted) -> None:
    """One thread is busy; more than it can take was read all the same, as after a lost answer."""
    counted.go.clear()
    with ThreadPoolExecutor(4) as pool, running_bus(broker.url) as bus:
        with agent(broker, counted.app, threads=1) as busy:
            busy.start()
            bus.await_route(SHOP)
            running = pool.submit(httpx.post, f"{bus.url}/shop/running", timeout=30)
            eventually(lambda: counted.runs == ["running"])
            waiting = pool.submit(httpx.post, f"{bus.url}/shop/waiting", timeout=30)
            with broker.client() as client:
                eventually(lambda: client.xlen(M.requests) == 2)
                taken = client.xreadgroup("agents", busy.id, {M.requests: ">"})
            answer = [
                [stream, [(i, [x for pair in f.items() for x in pair]) for i, f in es]]
                for stream, es in taken
            ]
            busy.consumer._intake._take(answer)
            busy.consumer.quiet()
            assert not busy.consumer.join(0.2)
            assert counted.runs == ["running"]
            with agent(broker, counted.app) as other:
                other.start()
                eventually(lambda: "waiting" in counted.runs)
                counted.go.set()
                assert [running.result().text, waiting.result().text] == ["running", "waiting"]
        assert sorted(counted.runs) == ["running", "waiting"]
        at_rest(broker)


def test_work_past_its_deadline_never_starts(broker: Broker, counted: Counted) -> None:
    """Its gateway cannot take it back, because it is dead or cut off."""
    with agent(broker, counted.app) as late, broker.client() as client:
        late.start()
        client.delete(M.requests)
        client.xgroup_create(M.requests, "agents", "0", mkstream=True)
        request = Request(id="late-1", method="POST", target="/shop/late", gateway="nobody", ttl=1000)
        fields = wire.encode_request(request)
        now: Any = client.time()
        entry: Any = dict(zip(fields[::2], fields[1::2], strict=True))
        client.xadd(M.requests, entry, id=f"{now[0] * 1000 - 2000}-0")
        eventually(lambda: client.llen(M.reply("late-1")))
        element: Any = client.lindex(M.reply("late-1"), 0)
        frame = wire.decode_frame(element, max_size=10_000)
        assert isinstance(frame, Failure)
        assert frame.code == NOT_RUN
        assert counted.runs == []
        assert client.xlen(M.requests) == 0
        client.delete(M.reply("late-1"))


def test_a_clock_that_jumped_costs_a_round_trip(
    broker: Broker, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the agent each entry seems an hour old; the gateway knows better, and sends it again."""
    asked = []

    def jumped(outbox: Outbox) -> int:
        asked.append(1)
        return int(time.time() * 1000) + (HOUR if len(asked) < 4 else 0)

    monkeypatch.setattr(Outbox, "broker_time", jumped)
    with running_bus(broker.url) as bus, agent(broker, counted.app) as puzzled:
        puzzled.consumer._intake._age = lambda stream, entry_id, now: HOUR  # type: ignore[method-assign]
        puzzled.start()
        bus.await_route(SHOP)
        assert httpx.post(f"{bus.url}/shop/once", timeout=30).text == "once"
        assert (counted.runs, len(asked)) == (["once"], 4)
        at_rest(broker)


def test_what_may_have_run_before_is_not_said_to_have_not(broker: Broker, counted: Counted) -> None:
    """The first agent died with it; the second one hands it back, and no third comes."""
    counted.go.clear()
    with (
        ThreadPoolExecutor(1) as pool,
        running_bus(broker.url, hold=4.0, head_timeout=4.0, lease=0.5) as bus,
        agent(broker, counted.app, lease=0.5) as first,
    ):
        first.start()
        bus.await_route(SHOP)
        answer = pool.submit(httpx.get, f"{bus.url}/shop/twice", timeout=30)
        eventually(lambda: counted.runs == ["twice"])
        first.consumer.quiet()
        first._stopping.set()  # no more heartbeats
        document = problem(answer.result())
        assert (document["status"], document["executed"]) == (503, "unknown")
        counted.go.set()
        at_rest(broker)
    known(broker)


def test_an_older_gateway_gets_an_answer(broker: Broker, counted: Counted) -> None:
    """It would not know what a hand-back means."""
    with agent(broker, counted.app) as stopping, broker.client() as client:
        take = stopping.consumer._intake._take

        def take_and_stop(answer: Any) -> bool:
            news = take(answer)
            if answer:
                stopping.consumer.quiet()
            return news

        stopping.consumer._intake._take = take_and_stop  # type: ignore[method-assign]
        stopping.start()
        fields = wire.encode_request(
            Request(
                id="old-1",
                method="POST",
                target="/shop/old",
                gateway="nobody",
                ttl=30000,
                script_name="/shop",
            )
        )
        entry: Any = dict(zip(fields[::2], fields[1::2], strict=True))
        head = entry["head"]
        entry["head"] = head[:1] + b"\x01" + head[2:]
        client.xadd(Keys().of(SHOP.key).requests, entry)
        eventually(lambda: counted.runs == ["old"])
        client.delete(M.reply("old-1"))


@pytest.mark.parametrize("given_away", [True, False])
def test_what_came_while_it_was_frozen_is_begun_only_if_it_is_its_own_still(
    broker: Broker, counted: Counted, given_away: bool
) -> None:
    lease = 1.0
    with agent(broker, counted.app, threads=1, lease=lease) as frozen, broker.client() as client:
        wait = frozen.consumer._reader.wait
        late: list[bytes] = []

        def wait_and_freeze(streams: Sequence[bytes], count: int) -> Any:
            answer = wait(streams, count)
            if answer and not late:
                late.append(answer[0][1][0][0])
                if given_away:
                    client.xack(M.requests, GROUP, late[0])
                    client.xdel(M.requests, late[0])
                since = time.monotonic()
                eventually(lambda: time.monotonic() - since > lease)
            return answer

        frozen.consumer._reader.wait = wait_and_freeze  # type: ignore[method-assign]
        frozen.start()
        for name in ("first", "second"):
            request = Request(name, "POST", f"/shop/{name}", "nobody", 30_000, script_name="/shop")
            client.execute_command("XADD", M.requests, "*", *wire.encode_request(request))
        eventually(lambda: "second" in counted.runs)
        assert counted.runs == (["second"] if given_away else ["first", "second"])
        eventually(lambda: not client.xlen(M.requests))
        client.delete(M.reply("first"), M.reply("second"))


def test_what_came_late_is_handed_back_by_an_agent_that_stops(broker: Broker, counted: Counted) -> None:
    """It was frozen, and is told to stop with its first breath."""
    lease = 1.0
    with agent(broker, counted.app, lease=lease) as frozen, broker.client() as client:
        wait = frozen.consumer._reader.wait

        def wait_and_freeze(streams: Sequence[bytes], count: int) -> Any:
            answer = wait(streams, count)
            if answer:
                since = time.monotonic()
                eventually(lambda: time.monotonic() - since > lease)
                frozen.consumer.quiet()
            return answer

        frozen.consumer._reader.wait = wait_and_freeze  # type: ignore[method-assign]
        frozen.start()
        request = Request("late", "POST", "/shop/late", "nobody", 30_000, script_name="/shop")
        client.execute_command("XADD", M.requests, "*", *wire.encode_request(request))
        assert frozen.consumer.join(10.0)
        frame = wire.decode_frame(client.lrange(M.reply("late"), 0, -1)[0], max_size=9999)
        assert isinstance(frame, Failure)
        assert frame.code == NOT_RUN
        assert counted.runs == []
        assert client.xlen(M.requests) == 0
        client.delete(M.reply("late"))


@pytest.mark.parametrize("given_away", [True, False])
def test_what_lay_there_while_it_was_frozen_is_begun_only_if_it_is_its_own_still(
    broker: Broker, counted: Counted, given_away: bool
) -> None:
    """It was read with another, during which the process was frozen for longer than a lease."""
    lease = 1.0
    with agent(broker, counted.app, threads=2, lease=lease) as frozen, broker.client() as client:
        intake = frozen.consumer._intake
        fill, take = intake.fill, intake._take

        def take_and_freeze(answer: Any) -> bool:
            news = take(answer)
            if answer and len(intake.backlog) == 2:
                second = intake.backlog[1]
                assert isinstance(second, Entry)
                intake.backlog[1] = replace(second, read_at=second.read_at - lease)
                if given_away:
                    client.xack(M.requests, GROUP, second.entry_id)
                    client.xdel(M.requests, second.entry_id)
            return news

        intake.fill = lambda most, *rest: fill(most and 2, *rest)  # type: ignore[method-assign]
        intake._take = take_and_freeze  # type: ignore[method-assign]
        names = ("first", "second", "third")
        with client.pipeline() as pipe:  # one read gets the first two
            pipe.xgroup_create(M.requests, GROUP, "0", mkstream=True)
            for name in names:
                request = Request(name, "POST", f"/shop/{name}", "nobody", 30_000, script_name="/shop")
                pipe.execute_command("XADD", M.requests, "*", *wire.encode_request(request))
            pipe.execute()
        frozen.start()
        eventually(lambda: not client.xlen(M.requests))
        assert sorted(counted.runs) == (["first", "third"] if given_away else sorted(names))
        client.delete(*map(M.reply, names))


def test_a_strangers_word_does_not_deafen_an_agent(broker: Broker, counted: Counted) -> None:
    with agent(broker, counted.app) as first:
        first.start()
        bell, channel = first.consumer.bells.of("r1"), Keys().of(SHOP.key).doorbell(first.consumer.agent_id)
        with broker.client() as client:
            eventually(lambda: client.publish(channel, b"\xff\xfe") == 1)
            client.publish(channel, b"r1 element")
        assert bell.wait(30.0)
        assert list(bell.elements) == [b"element"]
