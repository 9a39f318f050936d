"""A mount in several queues is one mount to its clients."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flaskbus.keys import GROUP, Keys
from flaskbus.partitions import partitions
from flaskbus.routing import Mount
from tests.conftest import Broker
from tests.integration.fleet import MOUNT, Fleet, Load, eventually

PARTS = partitions(MOUNT, 3)
SPLIT = ("--partitions", "3")


@pytest.fixture
def fleet(tmp_path: Path, broker: Broker) -> Iterator[Fleet]:
    with Fleet(tmp_path, broker.url) as fleet:
        yield fleet


def split(fleet: Fleet, name: str, *options: str) -> None:
    """An agent of all partitions, once it is ready in each, and the gateway routes to them."""
    agent = fleet.agent(name, *SPLIT, *options)

    def ready(part: Mount) -> bool:
        return any(
            one.supervisor == agent.pid and one.state == "ready" for one in fleet.registry.agents(part)
        )

    eventually(lambda: all(map(ready, PARTS)), "every partition is served")
    known(fleet, *PARTS)


def known(fleet: Fleet, *parts: Mount) -> None:
    """Wait until the gateways route to these and no others."""
    keys = sorted(part.key for part in parts)
    eventually(lambda: [one["mounts"] for one in fleet.registry.gateways().values()] == [keys], f"{keys}")


def added(fleet: Fleet, part: Mount) -> int:
    """How many requests were ever added to a queue."""
    info: Any = fleet.registry.client.xinfo_stream(Keys().of(part.key).requests)
    return int(info["entries-added"])


def flaskbus(url: str, *words: str) -> str:
    """What a command of ours says."""
    done = subprocess.run(
        [sys.executable, "-m", "flaskbus", *words],
        env={**os.environ, "FLASKBUS_REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_requests_take_turns_and_each_runs_once(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    split(fleet, "first")
    with Load([url], threads=4) as load:
        load.more(60)
    assert not load.bad()
    load.judge(fleet.runs())
    assert fleet.runs() == dict.fromkeys((seen.token for seen in load.seen), 1)
    counts = [added(fleet, part) for part in PARTS]
    assert sum(counts) == len(load.seen)
    assert min(counts) > 0.5 * len(load.seen) / 3
    for part in PARTS:
        queue = Keys().of(part.key).requests
        eventually(lambda: not fleet.registry.client.xlen(queue), "nothing is left")  # noqa: B023
    assert "Serving ledgered:app on /fleet, in 3 partitions" in fleet.programs[1].log()


def test_an_app_is_made_once_for_all_partitions(fleet: Fleet) -> None:
    (fleet.directory / "made.py").write_text(
        "import flask\n\ndef create_app():\n    print('made', flush=True)\n    return flask.Flask(__name__)\n"
    )
    agent = fleet.start("made", "flaskbus_agent", "made:create_app=/made", "--factory", *SPLIT)
    parts = partitions(Mount.parse("/made"), 3)
    eventually(
        lambda: all(any(one.state == "ready" for one in fleet.registry.agents(part)) for part in parts)
    )
    assert agent.log().count("made\n") == 1


def test_a_partition_that_nobody_serves_is_passed_over(fleet: Fleet) -> None:
    """An agent of before the mount was split, or of after: each takes what it knows of.

    What lies in a queue when its last agent leaves waits there for another, as anywhere.
    """
    _, url = fleet.gateway("--hold", "2")
    split(fleet, "all")
    whole = fleet.agent("whole")
    with Load([url], threads=4) as load:
        load.more(20)
        fleet.programs[1].end()
        eventually(lambda: not any(fleet.registry.agents(part) for part in PARTS[1:]), "it has left")
        load.more(20)
        before = [added(fleet, part) for part in PARTS]
        load.more(20)
        after = [added(fleet, part) for part in PARTS]
    load.judge(fleet.runs())
    assert {(seen.status, seen.executed) for seen in load.bad()} <= {(503, "no")}
    assert len(load.bad()) <= load.threads
    assert after[0] - before[0] >= 20
    assert after[1:] == before[1:]
    whole.end()


def test_repeats_of_a_key_find_each_other(fleet: Fleet) -> None:
    """Whatever turn it is: one of many runs, and all get its answer."""
    _, url = fleet.gateway()
    split(fleet, "keeps", "--idempotency-keys")

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{url}/fleet/once", headers={"Idempotency-Key": "k1"}, timeout=30)

    first = post(0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(12)))
    assert {answer.text for answer in answers} == {first.text}
    assert fleet.runs()["once"] == 1


def test_who_replaces_an_app_takes_all_its_queues(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    split(fleet, "old")
    with Load([url], threads=2) as load:
        load.more(10)
        new = fleet.agent("new", "--name", "new", "--replace")
        assert fleet.programs[1].process.wait(30) == 3
        eventually(lambda: all(name == "new" for name in answering(url, 12)), "only the new one answers")
    load.judge(fleet.runs())
    new.end()


def answering(url: str, count: int) -> list[str]:
    """The names of the agents that answer so many requests."""
    return [httpx.get(f"{url}/fleet/x", timeout=30).text.split()[1] for _ in range(count)]


def test_one_queue_alone(fleet: Fleet) -> None:
    """Named by its operator: it has all requests but those that have to find each other."""
    _, url = fleet.gateway("--hold", "0")
    alone = Mount.from_name("/fleet;7")
    fleet.start("alone", "flaskbus_agent", "ledgered:app=/fleet;7", "--idempotency-keys")
    eventually(lambda: any(one.state == "ready" for one in fleet.registry.agents(alone)))
    known(fleet, alone)
    assert httpx.get(f"{url}/fleet/x").text.startswith("x alone ")
    assert flaskbus(fleet.url, "request", "/fleet/y").startswith("y alone ")
    answer = httpx.post(f"{url}/fleet/once", headers={"Idempotency-Key": "k1"})
    assert (answer.status_code, answer.json()["executed"]) == (503, "no")
    assert "once" not in fleet.runs()
    assert "Serving ledgered:app on /fleet;7\n" in fleet.programs[1].log()
    fleet.programs[1].end()
    assert flaskbus(fleet.url, "unmount", "/fleet", "--yes") == "/fleet is no longer mounted\n"
    assert not fleet.registry.mounts()


def test_unmount_takes_the_partitions_along(fleet: Fleet) -> None:
    _, url = fleet.gateway()
    split(fleet, "first")
    fleet.programs[1].end()
    assert flaskbus(fleet.url, "unmount", "/fleet", "--yes") == "/fleet is no longer mounted\n"
    known(fleet)
    assert httpx.get(f"{url}/fleet/x").status_code == 404
    assert not fleet.registry.mounts()


def test_an_agent_may_do_what_its_rules_say(fleet: Fleet, broker: Broker) -> None:
    line = flaskbus(fleet.url, "acl", "agent", "/fleet", *SPLIT, "--user", "split")
    with broker.client() as client:
        client.execute_command(*shlex.split(line), ">right")
        try:
            _, url = fleet.gateway()
            fleet.url = broker.url.replace("//", "//split:right@")
            split(fleet, "fenced")
            with Load([url], threads=2) as load:
                load.more(20)
            assert not load.bad()
            fleet.programs[1].end()
            assert "refuse" not in fleet.programs[1].log()
        finally:
            client.acl_deluser("split")


def test_an_agent_that_may_not_do_all_says_so_and_ends(fleet: Fleet, broker: Broker) -> None:
    line = flaskbus(fleet.url, "acl", "agent", "/fleet", "--user", "whole")
    with broker.client() as client:
        client.execute_command(*shlex.split(line), ">right")
        try:
            url = broker.url.replace("//", "//whole:right@")
            agent = fleet.start(
                "fenced", "flaskbus_agent", "ledgered:app=/fleet", *SPLIT, FLASKBUS_REDIS_URL=url
            )
            assert agent.process.wait(30)
            assert "flaskbus acl agent /fleet --partitions 3" in agent.log()
            eventually(lambda: not fleet.records(), "it has left")
        finally:
            client.acl_deluser("whole")


def test_who_was_replaced_leaves_no_consumer_behind(fleet: Fleet) -> None:
    """It looks for what it may hold of the mount that it has lost, when its connection broke."""
    fleet.gateway()
    first = fleet.start("first", "flaskbus_agent", "ledgered:app=/fleet", "ledgered:app=/other")
    eventually(lambda: fleet.ready(first))
    second = fleet.agent("second", "--name", "second", "--replace")
    eventually(lambda: "this agent no longer serves it" in first.log())
    client: Any = fleet.registry.client
    queue = Keys().of(MOUNT.key).requests
    mine = {one.id for one in fleet.registry.agents(Mount.parse("/other"))}

    def consumers() -> set[str]:
        return {each["name"].decode() for each in client.xinfo_consumers(queue, GROUP)}

    def asked() -> bool:
        for each in client.client_list():
            if each["name"].endswith("-reader") and any(one in each["name"] for one in mine):
                client.client_kill_filter(_id=each["id"])
        return bool(mine & consumers())

    eventually(asked, "it has looked")
    first.end()
    assert not mine & consumers()
    second.end()


def test_one_signing_key_is_for_all_partitions(fleet: Fleet) -> None:
    secret = "a secret of thirty-two characters"
    _, url = fleet.gateway("--signing-secret", secret)
    key = subprocess.run(
        [sys.executable, "-m", "flaskbus", "key", "/fleet", "--signing-secret", secret],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    split(fleet, "signs", "--signing-key", key)
    with Load([url], threads=2) as load:
        load.more(20)
    assert not load.bad()
    assert min(added(fleet, part) for part in PARTS) >= 6


def test_bodies_in_parts(fleet: Fleet) -> None:
    (fleet.directory / "streams.py").write_text(
        "import flask\n\napp = flask.Flask(__name__)\n\n"
        "@app.post('/echo')\ndef echo():\n"
        "    stream = flask.request.stream\n"
        "    def parts():\n"
        "        while part := stream.read(65536):\n"
        "            yield part\n"
        "    return flask.Response(parts())\n"
    )
    _, url = fleet.gateway()
    fleet.start("streams", "flaskbus_agent", "streams:app=/streams", *SPLIT)
    parts = partitions(Mount.parse("/streams"), 3)
    known(fleet, *parts)
    sent = os.urandom(1_000_000)
    with httpx.Client() as client:

        def each_had_some() -> bool:
            assert client.post(f"{url}/streams/echo", content=sent, timeout=30).content == sent
            return all(added(fleet, part) for part in parts)

        eventually(each_had_some, "every queue has had a request")
