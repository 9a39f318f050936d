"""An app, agents that serve it, and a client; nothing of them outlives a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Broker, start_broker, stop_broker
from tests.integration.agent.support import APP, Agent, Client, StartAgent


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(APP)
    return tmp_path


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    client = Client(broker)
    yield client
    client.redis.close()


@pytest.fixture
def start(directory: Path, broker: Broker) -> Iterator[StartAgent]:
    """Start an agent; whatever is left of it is killed afterwards."""
    agents = []

    def start(*args: str, url: str = broker.url, **more: str) -> Agent:
        agents.append(Agent(directory, url, *(args or ("mine:app=/app",)), **more))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def socket_broker(tmp_path: Path) -> Iterator[Callable[[], Broker]]:
    """Start a broker again and again on one Unix socket; its ``url`` stays."""
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "s"
    started: list[Broker] = []

    def restart() -> Broker:
        broker = start_broker("valkey", tmp_path / "own", "--unixsocket", str(path))
        started.append(Broker(broker.engine, f"unix://{path}", broker.process))
        return started[-1]

    yield restart
    for broker in started:
        stop_broker(broker)
