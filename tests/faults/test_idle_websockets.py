"""Two thousand WebSockets that say nothing: what they cost, and that each is there when it speaks."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.conftest import Broker
from tests.integration.fleet import Fleet, Program, eventually
from tests.integration.websocket_client import TEXT, Raw, rss

ROOT = Path(__file__).parents[2]
COUNT = 2000
KIB = 1024
SECONDS = 5.0


class Cost:
    """What both sides and the broker use now."""

    def __init__(self, gateway: Program, agent: Program, broker: Broker) -> None:
        (self.gateway,), (self.agent,) = gateway.workers(), agent.workers()
        with broker.client() as client:
            self.connections = len(client.client_list())
            self.broker: int = client.info("memory")["used_memory"]
        self.memory = rss(self.gateway), rss(self.agent)
        self.cpu = cpu(self.gateway), cpu(self.agent)


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_thousand(broker: Broker, tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path, broker.url))
        gateway, url = fleet.gateway("--websocket-ping", "0")
        agent = fleet.start(
            "agent", "flaskbus_agent", "tests.integration.apps.sockets:app=/ws",
            "--streams", str(COUNT + 100), PYTHONPATH=str(ROOT),
        )  # fmt: skip
        eventually(lambda: httpx.get(f"{url}/ws/plain").status_code == 200, "agent")

        def echo(raw: Raw) -> None:
            raw.send(TEXT, "x")
            assert raw.receive() == (TEXT, b"x")

        def one(_: int) -> Raw:
            raw = stack.enter_context(Raw(f"{url}/ws/echo")).opened()
            echo(raw)
            return raw

        with ThreadPoolExecutor(8) as pool:
            some = list(pool.map(one, range(50)))
            before = Cost(gateway, agent, broker)
            began = time.monotonic()
            rest = list(pool.map(one, range(COUNT)))
            opening = time.monotonic() - began
            for raw in some + rest:
                echo(raw)  # and is heard of for a while
            after = Cost(gateway, agent, broker)
            time.sleep(SECONDS)
            idle = Cost(gateway, agent, broker)
            began = time.monotonic()
            assert httpx.get(f"{url}/ws/plain").status_code == 200
            assert time.monotonic() - began < 1.0
            for raw in some + rest:
                echo(raw)
        assert after.connections <= before.connections + 4
        gateways, agents = (now - then for now, then in zip(after.memory, before.memory, strict=True))
        brokers = after.broker - before.broker
        computed = [(now - then) / SECONDS for now, then in zip(idle.cpu, after.cpu, strict=True)]
        each = [f"{size / COUNT / KIB:.1f} KiB" for size in (gateways, agents, brokers)]
        print(f"opened in {opening:.1f} s; memory of gateway, agent, broker: {each}; CPU: {computed}")
        assert gateways < COUNT * 64 * KIB
        assert agents < COUNT * 256 * KIB  # two threads: the app's, and simple-websocket's
        assert brokers < COUNT * 4 * KIB
        assert max(computed) < 0.5
        began = time.monotonic()
        for raw in some + rest:
            raw.sock.close()
        with broker.client() as client:
            eventually(lambda: not client.xlen("flaskbus:{/ws}:requests"), "all of them end")
            eventually(
                lambda: not [*client.scan_iter("*:inbound:*"), *client.scan_iter("*:reply:*")], "no lists"
            )
        print(f"ended within {time.monotonic() - began:.1f} s")
        assert httpx.get(f"{url}/ws/plain").status_code == 200
