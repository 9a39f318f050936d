"""The broker in every trouble that an operator, or a host, can bring upon it, while requests come.

Each is healed by itself or answered honestly: whatever was said not to have run did not, nothing that must not
runs twice, no process is restarted, and no log is flooded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from flaskbus.keys import GROUP, Keys
from flaskbus.testing import running_bus
from tests.faults.mortal import MortalBroker
from tests.integration.fleet import LEASE, MOUNT, Fleet, Load, Program, Seen, eventually
from tests.integration.test_promises import Gate, at_rest, problem

KEYS = Keys()
M = KEYS.of(MOUNT.key)
SHOP = KEYS.of("/shop")
Client = Any

LOST = "has sent no heartbeat"
"""What a gateway logs of an agent, or a gateway, that it takes for dead."""


@dataclass
class Site:
    """Gateway and agents under load, in front of a broker that is about to be in trouble."""

    broker: MortalBroker
    fleet: Fleet
    gateway: Program
    agents: list[Program]
    load: Load
    client: Client

    def logs(self) -> str:
        return "".join(program.log() for program in self.fleet.programs)

    def bad(self) -> set[tuple[int, str]]:
        """Status and ``executed`` of the answers that were not the app's."""
        return {(seen.status, seen.executed) for seen in self.load.bad()}

    def slowest(self) -> float:
        return max(seen.ended - seen.sent for seen in self.load.seen)


@pytest.fixture
def options() -> tuple[str, ...]:
    return ()


@pytest.fixture
def site(tmp_path: Path, options: tuple[str, ...]) -> Iterator[Site]:
    """With the checks of every trouble: true answers, the same processes, a broker at rest, short logs."""
    broker = MortalBroker(tmp_path, "--enable-debug-command", "yes", *options)
    try:
        with Fleet(tmp_path, broker.url) as fleet, broker.broker.client() as client:
            agents = [fleet.agent(name, "--workers", "2") for name in ("one", "two")]
            gateway, url = fleet.gateway()
            family = {pid for program in fleet.programs for pid in program.workers()}
            with Load([url], threads=8, methods=("POST", "GET")) as load:
                site = Site(broker, fleet, gateway, agents, load, client)
                load.more(50)
                began, before = time.monotonic(), len(site.logs().splitlines())
                yield site
                load.more(100)
                lines = site.logs().splitlines()[before:]
            load.judge(fleet.runs())
            assert {pid for program in fleet.programs for pid in program.workers()} == family
            fleet.at_rest(lists=8)
            assert "Traceback" not in site.logs()
            assert len(lines) < 20 + 10 * (time.monotonic() - began), lines
    finally:
        broker.close()


def flushall(client: Client) -> None:
    client.flushall()


def destroy_group(client: Client) -> None:
    client.xgroup_destroy(M.requests, GROUP)


def flush_scripts(client: Client) -> None:
    client.script_flush()


def kill_connections(client: Client) -> None:
    client.client_kill_filter(_type="normal", skipme=True)


def kill_doorbells(client: Client) -> None:
    client.client_kill_filter(_type="pubsub")


def delete(key: str) -> Callable[[Client], None]:
    def trouble(client: Client) -> None:
        client.delete(key)

    trouble.__name__ = f"delete {key}"
    return trouble


DELETED = [delete(key) for key in (M.requests, M.owner, M.agents, KEYS.mounts, KEYS.gateways)]
HARMLESS = {flush_scripts, kill_doorbells, *DELETED[1:2], *DELETED[3:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "trouble",
    [flushall, destroy_group, flush_scripts, kill_connections, kill_doorbells, *DELETED],
    ids=lambda trouble: trouble.__name__,
)
def test_what_an_operator_can_do(site: Site, trouble: Callable[[Client], None]) -> None:
    for _ in range(3):
        trouble(site.client)
        site.load.more(30)
    # Some of what was on the broker is gone, and nobody can tell whether it ran.
    assert site.bad() <= (set() if trouble in HARMLESS else {(502, "unknown")}), site.load.bad()[-5:]
    assert site.slowest() < 10
    eventually(lambda: len(site.fleet.records()) == 4, "every agent is listed again")
    eventually(lambda: site.client.hlen(KEYS.gateways) == 1, "the gateway is listed again")
    eventually(lambda: site.client.sismember(KEYS.mounts, MOUNT.key), "the mount is listed again")


@pytest.mark.slow
def test_killed_and_restarted_with_its_append_only_file(site: Site) -> None:
    recoveries = []
    for _ in range(3):
        site.broker.kill()
        time.sleep(1.0)
        site.broker.revive()
        back = site.broker.await_answer()
        site.load.more(20)
        recoveries.append(time.monotonic() - back)
    assert max(recoveries) < 2.0, recoveries
    assert site.bad() <= {(502, "unknown"), (503, "no")}
    assert LOST not in site.logs()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 4, 8])
def test_frozen(site: Site, seconds: float) -> None:
    """Nobody can send a heartbeat to a broker that is frozen, and so nobody is dead for it."""
    for _ in range(3 if seconds < 5 else 1):
        with site.broker.frozen():
            time.sleep(seconds)
        site.load.more(20)
    time.sleep(LEASE)
    assert LOST not in site.logs()
    if seconds < 5:
        assert not site.bad()
        assert site.slowest() < seconds + 2


@pytest.mark.slow
def test_asleep(site: Site) -> None:
    site.client.execute_command("DEBUG", "SLEEP", "3")
    site.load.more(20)
    assert not site.bad()
    assert LOST not in site.logs()


@pytest.mark.slow
def test_out_of_memory(site: Site) -> None:
    """For three leases: refused at once, and nobody is taken for dead."""
    site.client.config_set("maxmemory", "1")
    time.sleep(3 * LEASE)
    refused = [seen for seen in site.load.bad() if seen.status == 503]
    site.client.config_set("maxmemory", "0")
    site.load.more(50)
    assert site.bad() == {(503, "no")}
    assert all("broker-full" in seen.text for seen in refused)
    times = sorted(seen.ended - seen.sent for seen in refused)
    print(f"{len(refused)} refused: p50 {_ms(times, 0.5)}, p99 {_ms(times, 0.99)}")
    assert times[len(times) // 2] < 0.05
    assert LOST not in site.logs()


@pytest.mark.slow
def test_what_runs_is_answered_while_memory_is_short(tmp_path: Path) -> None:
    """Replies, streams and what waited already; only what is new is refused, at once."""
    broker, gate, lease = MortalBroker(tmp_path), Gate(), 1.0
    try:
        with ThreadPoolExecutor() as pool, broker.broker.client() as client:
            with (
                running_bus(broker.url, lease=lease) as bus,
                bus.mount(gate.app, "/shop", lease=lease) as url,
            ):
                with httpx.stream("GET", f"{url}/stream", timeout=30) as stream:
                    parts = stream.iter_raw()
                    size = len(next(parts))
                    running = [pool.submit(httpx.post, f"{url}/wait/{n}", timeout=30) for n in range(6)]
                    eventually(lambda: len(set(gate.calls) - {"chunk"}) == 4)
                    eventually(lambda: client.xlen(SHOP.requests) == 7)
                    client.config_set("maxmemory", "1")
                    refused = eventually(
                        lambda: (answer := httpx.get(f"{url}/fast", timeout=30)).status_code == 503 and answer
                    )
                    assert problem(refused)["type"].endswith("broker-full")
                    time.sleep(3 * lease)
                    print(f"refused within {1000 * refusal(url):.1f} ms")
                    assert refusal(url) < 0.5
                    assert client.hlen(SHOP.agents) == client.hlen(KEYS.gateways) == 1
                    gate.open.set()
                    assert [answer.result().status_code for answer in running] == [200] * 6
                    assert size + sum(map(len, parts)) == 2000 * 32768
                client.config_set("maxmemory", "0")
                eventually(lambda: httpx.get(f"{url}/fast", timeout=30).status_code == 200)
                at_rest(broker.broker)
    finally:
        gate.open.set()
        broker.close()


def refusal(url: str) -> float:
    """Seconds that it takes to be refused, at best: the machine has other things to do too."""
    with httpx.Client() as client:
        return min(client.get(f"{url}/fast").elapsed.total_seconds() for _ in range(10))


def test_refused_before_it_is_full(tmp_path: Path) -> None:
    broker, gate = MortalBroker(tmp_path), Gate()
    try:
        with broker.broker.client() as client, running_bus(broker.url) as bus:
            with bus.mount(gate.app, "/shop") as url:
                used: Any = client.info("memory")
                client.config_set("maxmemory", str(int(used["used_memory"] / 0.85)))
                refused = eventually(
                    lambda: (answer := httpx.get(f"{url}/fast", timeout=30)).status_code == 503 and answer
                )
                assert problem(refused)["type"].endswith("broker-full")
                client.config_set("maxmemory", str(int(used["used_memory"] / 0.5)))
                eventually(lambda: httpx.get(f"{url}/fast", timeout=30).status_code == 200)
    finally:
        broker.close()


@pytest.mark.slow
def test_a_replica_that_takes_no_writes(site: Site) -> None:
    """Another is made master for a while; this one has its data, and says READONLY."""
    site.client.config_set("replica-serve-stale-data", "yes")
    site.client.replicaof("127.0.0.1", "1")
    time.sleep(3 * LEASE)
    site.client.replicaof("NO", "ONE")
    back = time.monotonic()
    site.load.more(20)
    assert time.monotonic() - back < 4
    assert site.bad() <= {(503, "no"), (502, "unknown")}
    assert LOST not in site.logs()


@pytest.mark.slow
def test_a_full_disk(site: Site) -> None:
    """MISCONF: every write is refused, heartbeats too."""
    site.client.config_set("min-replicas-to-write", "1")  # NOREPLICAS, which is the same to whoever writes
    time.sleep(3 * LEASE)
    site.client.config_set("min-replicas-to-write", "0")
    back = time.monotonic()
    site.load.more(20)
    assert time.monotonic() - back < 4
    assert site.bad() <= {(503, "no"), (502, "unknown")}
    assert LOST not in site.logs()


@pytest.mark.slow
def test_no_more_connections(site: Site) -> None:
    """What is connected goes on; what loses its connection meanwhile waits, and is answered."""
    site.client.config_set("maxclients", "5")
    site.load.more(30)
    site.client.client_kill_filter(_type="normal", skipme=True)
    time.sleep(LEASE)
    site.client.config_set("maxclients", "1000")
    site.load.more(30)
    assert site.bad() <= {(503, "no"), (502, "unknown")}


@pytest.mark.slow
def test_loading_for_a_while(site: Site) -> None:
    """It is there, has a long file to read, and says LOADING until then."""
    for number in range(300):
        site.client.set(f"ballast:{number}", "x", ex=600)
    site.client.bgrewriteaof()
    eventually(lambda: not site.client.info("persistence")["aof_rewrite_in_progress"])
    site.broker.kill()
    site.broker.revive("--key-load-delay", "10000")
    eventually(lambda: loading(site.client), "LOADING")
    back = site.broker.await_answer()
    site.load.more(20)
    assert time.monotonic() - back < 2.0
    assert site.bad() <= {(503, "no"), (502, "unknown")}
    assert LOST not in site.logs()


def loading(client: Client) -> bool:
    try:
        client.ping()
    except redis.exceptions.BusyLoadingError:
        return True
    except redis.exceptions.ConnectionError:
        pass
    return False


@pytest.mark.slow
@pytest.mark.parametrize("key", [M.requests, M.owner, M.agents, KEYS.mounts, KEYS.gateways])
def test_somebody_wrote_over_a_key(site: Site, key: str) -> None:
    """Of a type that is not ours: not healed, because it is not ours to delete, until somebody does."""
    site.client.set(key, "what is this?")
    time.sleep(3 * LEASE)
    site.client.delete(key)
    site.load.more(50)
    assert site.bad() <= {(503, "no"), (502, "unknown")}
    eventually(lambda: len(site.fleet.records()) == 4, "every agent is listed again")


def _ms(times: list[float], share: float) -> str:
    return f"{1000 * times[int(len(times) * share)]:.0f} ms"


def test_a_judge_that_sees_lies() -> None:
    """The checks of this file would fail, if there were something to see."""
    load = Load(["http://127.0.0.1:1"])
    load.seen.append(Seen("a", "POST", 0, 1, 503, "", "no"))
    with pytest.raises(AssertionError, match="told that it did not"):
        load.judge({"a": 1})
