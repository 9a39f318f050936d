"""A broker of a test's own, that can be killed, frozen and started again with its data."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.conftest import Broker, binary, start_broker, stop_broker
from tests.integration.fleet import eventually

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class MortalBroker:
    """Writes each command to its append-only file before it answers."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.options = (*DURABLE, *options)
        self.directory = directory
        self.broker = start_broker("valkey", directory, *self.options)
        self.url = self.broker.url

    def kill(self) -> None:
        self.broker.process.kill()
        self.broker.process.wait()

    def revive(self, *options: str) -> float:
        """Start it again at the same place; when it answered (monotonic seconds)."""
        port = self.url.rpartition(":")[2].partition("/")[0]
        program = binary("valkey")
        assert program is not None
        process = subprocess.Popen(
            [program, "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", str(self.directory),
             *self.options, *options],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.broker = Broker("valkey", self.url, process)
        return time.monotonic()

    def await_answer(self) -> float:
        """When it serves again (monotonic seconds)."""
        with self.broker.client() as client:
            eventually(lambda: _serves(client), "the broker answers")
        return time.monotonic()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Accepts connections, as the kernel does for it, and says nothing."""
        self.broker.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.broker.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        stop_broker(self.broker)


def _serves(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
        return False
