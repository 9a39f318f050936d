"""A cluster: mounts on different primaries, slots that move under load, primaries that fail."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flask
import httpx
import pytest
import redis

from flaskbus.address import Node, parse_url
from flaskbus.broker import connect, primaries, run_script
from flaskbus.cluster import PATIENCE, PAUSE, slot_of
from flaskbus.cluster_client import ClusterClient
from flaskbus.keys import GROUP, Keys
from flaskbus.partitions import partitions
from flaskbus.registry import Registry
from flaskbus.routing import Mount
from flaskbus.testing import running_bus
from flaskbus_agent.channel import open_channel
from flaskbus_agent.cluster_reading import open_reader
from flaskbus_gateway.answers import LinkDown
from flaskbus_gateway.cluster_link import HOPS, ClusterLink
from tests.conftest import leaked_keys
from tests.faults.brokers import Cluster, Server, cluster, until
from tests.faults.test_sentinel import account, run_tools
from tests.integration.fleet import MOUNT, Fleet, Load, eventually, loads

REQUESTS = Keys().of(MOUNT.key).requests


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three primaries for the tests that leave them whole."""
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def three(lasting: Cluster) -> Iterator[Cluster]:
    lasting.settled()
    with connect(lasting.url) as client:
        for one in primaries(client):
            one.flushall()
        yield lasting
        assert not leaked_keys(client)


def other(made: Cluster, key: str) -> Server:
    """A primary that does not have the slot of a key."""
    owner = made.owner(key)
    return next(server for server in made.servers[:3] if server is not owner)


def mounts(made: Cluster) -> list[str]:
    """A mount on each of three primaries."""
    found: dict[int, str] = {}
    for number in range(1000):
        name = f"/m{number}"
        found.setdefault(made.owner(Keys().of(Mount.parse(name).key).requests).port, name)
        if len(found) == 3:
            break
    return list(found.values())


def serve(fleet: Fleet, names: list[str], *options: str) -> None:
    """An agent of the fleet's app on several mounts, once all of them are served."""
    fleet.start("many", "flaskbus_agent", *(f"ledgered:app={name}" for name in names), *options)

    def ready() -> bool:
        records = [fleet.registry.agents(Mount.parse(name)) for name in names]
        return all(each and each[0].state == "ready" for each in records)

    eventually(ready, "the agent serves all mounts")


def all_good(fleet: Fleet, *some: Load) -> None:
    """Every request was answered and ran once."""
    runs = fleet.runs()
    for load in some:
        assert not load.bad(), load.bad()[:3]
        load.judge(runs)
    tokens = Counter(seen.token for load in some for seen in load.seen)
    assert runs == tokens


# Where everything is well


def test_an_agent_reads_mounts_on_three_primaries(three: Cluster, tmp_path: Path) -> None:
    """With one thread, so that each read is for one entry and the others have to be called off."""
    with Fleet(tmp_path, three.url) as fleet:
        _, url = fleet.gateway()
        names = mounts(three)
        serve(fleet, names, "--threads", "1")
        with loads(*(Load([url], threads=2, mount=name, prefix=name[1:] + "-") for name in names)) as some:
            for load in some:
                load.more(30)
        all_good(fleet, *some)
        for name in names:
            keys = Keys().of(Mount.parse(name).key)
            eventually(lambda: not fleet.registry.client.xlen(keys.requests), "nothing is left")  # noqa: B023


def test_an_agent_that_is_told_to_stop_leaves_nothing_behind(three: Cluster, tmp_path: Path) -> None:
    with Fleet(tmp_path, three.url) as fleet:
        _, url = fleet.gateway()
        names = mounts(three)
        serve(fleet, names)
        with loads(*(Load([url], threads=2, mount=name, prefix=name[1:] + "-") for name in names)) as some:
            for load in some:
                load.more(10)
            first = fleet.programs[-1]
            serve(fleet, names)
            first.end()
            for load in some:
                load.more(10)
        all_good(fleet, *some)


def test_a_quiet_agent_asks_for_nothing(three: Cluster, tmp_path: Path) -> None:
    """Its reads wait in the broker: there are as many as one a stream in BLOCK, and what heartbeats need."""
    with Fleet(tmp_path, three.url) as fleet:
        serve(fleet, mounts(three))

        def reads() -> int:
            stats = (server.client.info("commandstats") for server in three.servers)
            return sum(int(each.get("cmdstat_xreadgroup", {"calls": 0})["calls"]) for each in stats)

        before, since = reads(), time.monotonic()
        eventually(lambda: time.monotonic() - since > 5, "some time passes")
        assert reads() - before <= 3 * ((time.monotonic() - since) / 2 + 1)


def test_the_tools(three: Cluster, tmp_path: Path) -> None:
    with Fleet(tmp_path, three.url) as fleet:
        fleet.gateway()
        fleet.agent("one", "--name", "shop")
        run_tools(three.url)


# Slots that move


def test_slots_move_under_load_and_no_request_fails(three: Cluster, tmp_path: Path) -> None:
    """Key by key: for a time the keys of a mount lie on two servers, and scripts can run on neither."""
    with Fleet(tmp_path, three.url) as fleet:
        _, url = fleet.gateway()
        fleet.agent("one", "--threads", "4")
        home = three.owner(REQUESTS)
        with Load([url]) as load:
            load.more(30)
            for to in (other(three, REQUESTS), home):
                three.move(REQUESTS, to)
                assert three.owner(REQUESTS) is to
                load.more(30)
            for to in (other(three, REQUESTS), home):
                three.move_at_once(REQUESTS, to)
                load.more(30)
        all_good(fleet, load)
        fleet.at_rest()


def test_the_next_owner_of_a_slot_learns_our_scripts(three: Cluster) -> None:
    """It is asked before it has the slot, and whoever has that knows them."""
    to = other(three, REQUESTS)
    call = ("withdraw", [REQUESTS], [GROUP, "1-1"])

    async def from_gateway() -> Any:
        link = ClusterLink(three.url, parse_url(three.url), "gateway")
        link.start()
        await asyncio.wait_for(link.up.wait(), 20)
        await link.script(*call)  # it knows the next owner too by now
        to.ask("SCRIPT", "FLUSH")
        try:
            return await link.script(*call)
        finally:
            await link.close()

    def from_agent() -> Any:
        channel = open_channel(three.url, "agent", 5.0)
        try:
            return channel.script(*call)
        finally:
            channel.close()

    def from_tool() -> Any:
        with connect(three.url) as client:
            return run_script(client, *call)

    three.begin_move(REQUESTS, to)
    for ask in (from_agent, from_tool, lambda: asyncio.run(from_gateway())):
        to.ask("SCRIPT", "FLUSH")
        assert ask() == b"gone"
    three.move(REQUESTS, to)


@pytest.mark.slow
def test_slots_of_several_mounts_move_again_and_again(three: Cluster, tmp_path: Path) -> None:
    with Fleet(tmp_path, three.url) as fleet:
        _, url = fleet.gateway()
        names = mounts(three)
        serve(fleet, names, "--threads", "3")
        with loads(*(Load([url], threads=2, mount=name, prefix=name[1:] + "-") for name in names)) as some:
            for turn in range(9):
                key = Keys().of(Mount.parse(names[turn % 3]).key).requests
                (three.move if turn % 2 else three.move_at_once)(key, other(three, key))
                some[turn % 3].more(10)
        all_good(fleet, *some)


@pytest.mark.slow
def test_streams_go_on_while_their_slot_moves(three: Cluster, tmp_path: Path) -> None:
    app = flask.Flask("streaming")
    app.add_url_rule("/", "stream", lambda: (f"{n:08d}" * 5000 for n in range(300)))
    with running_bus(three.url) as bus, bus.mount(app, "/fleet", threads=2) as where:
        for move in (three.move, three.move_at_once, three.move, three.move_at_once):
            with httpx.stream("GET", f"{where}/", timeout=60) as response:
                chunks = response.iter_raw(40_000)
                text = b"".join(next(chunks) for _ in range(5))
                mover = threading.Thread(target=move, args=(REQUESTS, other(three, REQUESTS)))
                mover.start()
                text += b"".join(chunks)
                mover.join()
            assert text == b"".join(b"%08d" % n * 5000 for n in range(300))


@pytest.mark.slow
def test_a_server_joins_and_takes_over(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster") as made, Fleet(tmp_path, made.url) as fleet:
        _, url = fleet.gateway()
        fleet.agent("one", "--threads", "4")
        with Load([url]) as load:
            load.more(30)
            new = made.add()
            made.join(new)
            made.settled()
            made.move(REQUESTS, new)
            load.more(30)
        all_good(fleet, load)


# Primaries that fail


def fails(made: Cluster, fleet: Fleet, number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    _, url = fleet.gateway()
    fleet.agent("one", "--threads", "4")
    with Load([url]) as load:
        load.more(30)
        primary = made.owner(REQUESTS)
        broke = time.monotonic()
        primary.signal(number)
        until(lambda: made.replicas[primary.port].ask("ROLE")[0] == b"master", "the replica is promoted")
        elected = time.monotonic()
        load.more(50)
    account(load, fleet, broke, elected, capsys)
    until(fleet.records, "a client finds the new primary")
    fleet.at_rest(lists=len(load.bad()))


def test_a_primary_that_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        cluster(tmp_path / "cluster", replicas=True, timeout=2000) as made,
        Fleet(tmp_path, made.url) as fleet,
    ):
        fails(made, fleet, signal.SIGKILL, capsys)


@pytest.mark.slow
def test_a_primary_that_falls_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        cluster(tmp_path / "cluster", replicas=True, timeout=2000) as made,
        Fleet(tmp_path, made.url) as fleet,
    ):
        fails(made, fleet, signal.SIGSTOP, capsys)


@pytest.mark.slow
def test_mounts_on_other_primaries_go_on(tmp_path: Path) -> None:
    """A primary without a replica is away for long; the same gateway and the same agent serve the others."""
    with (
        cluster(tmp_path / "cluster", timeout=2000) as made,
        Fleet(tmp_path, made.url) as fleet,
    ):
        for server in made.servers:
            server.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
        _, url = fleet.gateway()
        names = mounts(made)
        # The registry's own keys are somewhere too, and tests ask for those.
        away = Keys().of(Mount.parse(names[0]).key).requests
        serve(fleet, names, "--threads", "4")
        victim = made.owner(away)
        with loads(
            *(Load([url], threads=2, mount=name, prefix=name[1:] + "-") for name in names[1:])
        ) as some:
            for load in some:
                load.more(20)
            victim.signal(signal.SIGSTOP)
            for load in some:
                load.more(200)
            victim.signal(signal.SIGCONT)
            with Load([url], threads=1, mount=names[0], prefix="away-") as third:
                third.more(10)
        for load in some:
            assert not load.bad(), load.bad()[:3]
        runs = fleet.runs()
        for load in (*some, third):
            load.judge(runs)


# Nothing is sent twice


def test_a_write_whose_answer_does_not_come_is_not_sent_again(three: Cluster) -> None:
    """redis-py's own client for clusters would."""
    with connect(three.url, timeout=0.5) as client:
        assert isinstance(client, ClusterClient)
        keys = Keys().of("/once")
        owner = three.owner(keys.requests)
        client.xadd(keys.requests, {"n": 0})
        with frozen(owner), pytest.raises(redis.exceptions.TimeoutError):
            client.xadd(keys.requests, {"n": 1})
        with client.pipeline(transaction=False) as pipe:
            pipe.xadd(keys.requests, {"n": 2})
            with frozen(owner), pytest.raises(redis.exceptions.TimeoutError):
                pipe.execute()
        until(lambda: owner.ask("PING"), "it is back")
        entries: Any = client.xrange(keys.requests)
        assert [fields[b"n"] for _, fields in entries] == [b"0", b"1", b"2"]
        client.delete(keys.requests)


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """The server takes what it is sent, and does not answer."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_primary_that_stalls_runs_nothing_twice(three: Cluster, tmp_path: Path) -> None:
    """For longer than a link waits, and not long enough for the others to notice."""
    with Fleet(tmp_path, three.url) as fleet:
        _, url = fleet.gateway()
        fleet.agent("one", "--threads", "4")
        with Load([url]) as load:
            load.more(30)
            with frozen(three.owner(REQUESTS)):
                since = time.monotonic()
                eventually(lambda: time.monotonic() - since > 7, "the link has given up")
            load.more(30)
        load.judge(fleet.runs())
        fleet.at_rest(lists=len(load.bad()))


def test_pipelines_transactions_and_scans(three: Cluster) -> None:
    with connect(three.url) as client:
        keys = [f"{{{number}}}:mount" for number in range(30)]
        with client.pipeline(transaction=False) as pipe:
            for number, key in enumerate(keys):
                pipe.set(key, number, ex=100)
            pipe.incr("{0}:mount")
            pipe.lpush("{1}:mount", "x")
            answers: list[Any] = pipe.execute(raise_on_error=False)
        assert answers[:-1] == [True] * 30 + [1]
        assert "WRONGTYPE" in str(answers[-1])
        assert {key.decode() for key in client.scan_iter("*:mount")} == set(keys)
        with client.pipeline() as pipe:
            pipe.get("{5}:mount")
            pipe.get("{5}:mount")
            assert pipe.execute() == [b"5", b"5"]
        with client.pipeline() as pipe:
            for key in keys:
                pipe.get(key)
            with pytest.raises(redis.exceptions.RedisError, match="one slot"):
                pipe.execute()
        with client.pipeline(transaction=False) as pipe:
            pipe.lpush("{1}:mount", "x")
            with pytest.raises(redis.exceptions.ResponseError):
                pipe.execute()
        # To where a slot is, and to where it is on its way.
        for move in (three.move_at_once, three.move):
            to = other(three, keys[7])
            move(keys[7], to)
            with client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.get(key)
                assert pipe.execute() == [b"%d" % (number + (number == 0)) for number in range(30)]
        Registry(client, Keys()).gateways()
        for key in keys:
            client.delete(key)


def test_an_agent_that_may_end_no_reads(three: Cluster, tmp_path: Path) -> None:
    """CLIENT UNBLOCK is among the dangerous commands; a user with few rights does without."""
    for server in three.servers:
        server.ask("ACL", "SETUSER", "meek", "on", ">secret", "~*", "&*", "+@all", "-client|unblock")
    url = three.url.replace("://", "://meek:secret@")
    with Fleet(tmp_path, url) as fleet:
        _, where = fleet.gateway()
        names = mounts(three)
        serve(fleet, names, "--threads", "1")
        with loads(*(Load([where], mount=name, threads=2, prefix=name[1:] + "-") for name in names)) as some:
            for load in some:
                load.more(20)
        all_good(fleet, *some)
        fleet.programs[-1].end()


@pytest.mark.parametrize("ended", [False, True])
def test_a_stream_is_not_forgotten_while_others_bring_something(three: Cluster, ended: bool) -> None:
    """A read of it goes on without us, or has ended with nothing; nobody waits, as there is always something to run."""
    name, *_ = mounts(three)
    stream = Keys().of(name).requests.encode()
    with connect(three.url) as client:
        client.xgroup_create(stream, GROUP, mkstream=True)
        reader = open_reader(three.url, "agent", partial(open_channel, three.url))
        reader.begin()
        if not ended:
            reader.interrupt()
        assert not reader.wait((stream,), 1)
        client.xadd(stream, {"field": "value"})
        eventually(lambda: reader.now(stream, 1), "its entry is found", 5.0)
        reader.close()
        client.delete(stream)


class Refuses:
    """A node that answers each command with one error, as :class:`~flaskbus_gateway.link.NodeLink` has it."""

    def __init__(self, cluster: Any, node: Node, error: str) -> None:
        self.cluster, self.node, self.error = cluster, node, error
        self.up, self.refused, self.incarnation = asyncio.Event(), None, ""
        self.up.set()
        self.sent: list[bool] = []
        cluster._links[node] = self

    def post(self, errand: Any, command: Any, asking: bool = False) -> None:
        self.sent.append(asking)
        asyncio.get_running_loop().call_soon(self.cluster._failed, self, errand, self.error)

    def call(self, *_: Any) -> asyncio.Future[bytes]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(b"PONG")
        return answer


@pytest.mark.parametrize("way", ["MOVED", "ASK"])
def test_nodes_that_name_each_other(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two do that each think the other owns a slot: a command is sent for PATIENCE, and not without a pause."""
    patience = PATIENCE / 10
    monkeypatch.setattr("flaskbus_gateway.cluster_link.PATIENCE", patience)

    async def ask() -> None:
        url, slot = "redis+cluster://one:1", slot_of(b"k")
        link = ClusterLink(url, parse_url(url), "test")
        one = Refuses(link, ("one", 1), f"{way} {slot} two:2")
        two = Refuses(link, ("two", 2), f"MOVED {slot} one:1")
        link._topology.moved(slot, one.node)
        with pytest.raises(LinkDown, match="not been served"):
            await asyncio.wait_for(link.call("GET", "k"), 10 * patience)
        assert any(two.sent) == (way == "ASK")
        assert 4 < len(one.sent + two.sent) <= (1 + patience / PAUSE) * (1 + HOPS)

    asyncio.run(ask())


# A mount in partitions


def test_a_mount_is_split_over_the_primaries(three: Cluster, tmp_path: Path) -> None:
    """Each carries as much of it."""
    parts = partitions(MOUNT, 3)
    assert len({three.owner(Keys().of(part.key).requests).port for part in parts}) > 1
    with Fleet(tmp_path, three.url) as fleet:
        _, url = fleet.gateway()
        fleet.start("split", "flaskbus_agent", "ledgered:app=/fleet", "--partitions", "3")
        eventually(
            lambda: all([one.state for one in fleet.registry.agents(part)] == ["ready"] for part in parts)
        )
        with loads(Load([url], threads=6)) as some:
            some[0].more(90)
        all_good(fleet, *some)
        counts = [
            fleet.registry.client.xinfo_stream(Keys().of(p.key).requests)["entries-added"] for p in parts
        ]
        assert min(counts) > 0.5 * len(some[0].seen) / 3
