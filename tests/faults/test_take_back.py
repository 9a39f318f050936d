"""What nobody waits for is taken back, also where the broker refuses that for a while."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from flaskbus.testing import running_bus
from tests.faults.mortal import MortalBroker
from tests.integration.test_promises import Gate, M, at_rest, eventually, problem


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MortalBroker]:
    mortal = MortalBroker(tmp_path)
    yield mortal
    mortal.close()


def writes(mortal: MortalBroker, allowed: bool) -> None:
    """Let the broker refuse writes (NOREPLICAS), or take them again."""
    with mortal.broker.client() as client:
        client.config_set("min-replicas-to-write", 0 if allowed else 1)


def commands(mortal: MortalBroker, name: str) -> int:
    """How often a command was carried out."""
    with mortal.broker.client() as client:
        stats: Any = client.info("commandstats")
    return int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"])


def test_a_client_that_leaves_while_writes_are_refused(mortal: MortalBroker) -> None:
    gate = Gate()
    with ThreadPoolExecutor(1) as pool, running_bus(mortal.url) as bus:
        with bus.mount(gate.app, "/shop", threads=1) as url:
            running = pool.submit(httpx.post, f"{url}/wait/running", timeout=30)
            eventually(lambda: gate.calls == ["running"])
            parts = urlsplit(bus.url)
            client = socket.create_connection((parts.hostname or "", parts.port or 0))
            client.sendall(b"POST /shop/wait/left HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            with mortal.broker.client() as broker:
                eventually(lambda: broker.xlen(M.requests) == 2)
            refused = commands(mortal, "evalsha")
            writes(mortal, False)
            client.close()
            eventually(lambda: commands(mortal, "evalsha") > refused + 2)  # it was tried, and is again
            writes(mortal, True)
            with mortal.broker.client() as broker:
                eventually(lambda: broker.xlen(M.requests) == 1)
            gate.open.set()
            assert running.result().text == "running"
            assert gate.calls == ["running"]
            at_rest(mortal.broker)


def test_what_was_refused_is_not_looked_for(mortal: MortalBroker) -> None:
    gate = Gate()
    with running_bus(mortal.url) as bus, bus.mount(gate.app, "/shop") as url:
        assert httpx.get(f"{url}/fast").text == "fast"
        before = commands(mortal, "xrevrange")
        writes(mortal, False)
        for _ in range(5):
            assert problem(httpx.post(f"{url}/wait/a"))["executed"] == "no"
        writes(mortal, True)
        assert eventually(lambda: httpx.get(f"{url}/fast").text == "fast")
        assert commands(mortal, "xrevrange") == before
        at_rest(mortal.broker)
