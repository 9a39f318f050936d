"""Agents in processes of their own, and a client of the bus, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flaskbus import wire
from flaskbus.keys import GROUP, Keys
from flaskbus.messages import NOT_RUN, Failure, Reply, Request
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from tests.conftest import Broker

APP = """
import ctypes, os, signal, threading, time
from pathlib import Path
from wsgiref.validate import validator

HERE = Path(__file__).parent

def until(name):
    while not (HERE / name).exists():
        time.sleep(0.005)

VERSION = "one"

def hang_here():
    threading.Event().wait()

@validator
def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path.startswith("/until/"):
        (HERE / ("at-" + path[7:])).touch()
        until(path[7:])
    elif path == "/hang":
        (HERE / "hanging").touch()
        hang_here()
    elif path == "/hold":
        (HERE / "holding").touch()
        ctypes.PyDLL(None).sleep(600)  # a PyDLL keeps the interpreter lock
    elif path == "/raise":
        raise ZeroDivisionError("one of those days")
    elif path == "/die":
        os.kill(os.getpid(), signal.SIGKILL)
    body = f"{VERSION} {os.getpid()}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""


def eventually(condition: Callable[[], Any], timeout: float = 15.0) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {condition}"
        time.sleep(0.01)
    return value


class Agent:
    """A ``flaskbus-agent`` of its own process group, in the directory of the app ``mine.py``."""

    def __init__(self, directory: Path, url: str, *args: str, mount: str = "/app", **environ: str):
        self.mount = Mount.from_name(mount)
        self.directory = directory
        self.log_file = directory / f"{uuid4().hex}.log"
        (directory / "tmp").mkdir(exist_ok=True)
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flaskbus_agent", *args, "--redis", url],
                cwd=directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "TMPDIR": str(directory / "tmp"),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    **environ,
                },
            )
        self.registry = Registry(Broker("valkey", url, self.process).client(), Keys())

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 15.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the agent did not end:\n{self.log}")

    def records(self) -> list[AgentRecord]:
        return self.registry.agents(self.mount)

    def ready(self, count: int = 1) -> list[AgentRecord]:
        """The workers that the registry calls ready, as soon as there are so many, and no other records."""

        def look() -> list[AgentRecord]:
            assert self.process.poll() is None, self.log
            records = self.records()
            return records if [each.state for each in records] == ["ready"] * count else []

        found: list[AgentRecord] = eventually(look)
        return found

    def successor(self, old: AgentRecord) -> AgentRecord:
        """The one worker that is listed, and ready, once ``old`` is not any more."""

        def look() -> AgentRecord | None:
            (record,) = self.ready()
            return record if record.id != old.id else None

        found: AgentRecord = eventually(look)
        return found

    def members(self) -> list[int]:
        """The live processes of the agent's session."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def gone(self) -> bool:
        return not self.members()

    def close(self) -> None:
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.registry.client.close()


class Client:
    """What a gateway does, as far as these tests need it."""

    def __init__(self, broker: Broker):
        self.redis: Any = broker.client()
        self._sent: dict[str, Any] = {}

    def send(self, target: str, mount: str = "/app") -> str:
        request = Request(id=uuid4().hex, method="GET", target=mount + target, gateway="test", ttl=30_000,
                          script_name=mount, server=("localhost", 80), headers=((b"host", b"localhost"),))  # fmt: skip
        fields = wire.encode_request(request)
        entry = dict(zip(fields[::2], fields[1::2], strict=True))
        self._sent[request.id] = entry
        self.redis.xadd(Keys().of(mount).requests, entry)
        return request.id

    def reply(self, request_id: str, mount: str = "/app", timeout: float = 15.0) -> Reply:
        key = Keys().of(mount).reply(request_id)
        data = eventually(lambda: self.redis.lrange(key, 0, -1), timeout)
        self.redis.delete(key)
        frame = wire.decode_frame(data[0], max_size=1 << 20)
        if isinstance(frame, Failure) and frame.code == NOT_RUN:
            self.redis.xadd(Keys().of(mount).requests, self._sent[request_id])
            return self.reply(request_id, mount, timeout)
        assert isinstance(frame, Reply), frame
        return frame

    def get(self, target: str = "/", mount: str = "/app") -> str:
        return self.reply(self.send(target, mount), mount).body.decode()

    def pending(self, mount: str = "/app") -> int:
        count: int = self.redis.xpending(Keys().of(mount).requests, GROUP)["pending"]
        return count

    def waiting(self, mount: str = "/app") -> int:
        """Entries that no agent has read."""
        return int(self.redis.xlen(Keys().of(mount).requests)) - self.pending(mount)

    def consumers(self, mount: str = "/app") -> list[str]:
        found = self.redis.xinfo_consumers(Keys().of(mount).requests, GROUP)
        return [each["name"].decode() for each in found]


StartAgent = Callable[..., Agent]
"""Starts an agent with these arguments; the app is mounted on ``/app`` where there are none."""


def change(directory: Path, old: str, new: str) -> None:
    """Edit the app, in one step, and so that even a coarse clock shows it."""
    source = (directory / "mine.py").read_text()
    assert old in source
    (directory / "mine.new").write_text(source.replace(old, new))
    (directory / "mine.new").rename(directory / "mine.py")
