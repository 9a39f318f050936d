"""A whole site for the soak: a broker that keeps its data, gateways, agents, and whoever restarts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

import flaskbus
from flaskbus.broker import connect
from flaskbus.keys import GROUP, Keys
from flaskbus.registry import Registry
from flaskbus.routing import Mount
from tests.conftest import binary, free_port
from tests.faults.partition import Host
from tests.integration.fleet import Program, eventually
from tests.integration.procs import alive

MOUNT = Mount.parse("/soak")
KEYS = Keys()
M = KEYS.of(MOUNT.key)
LEASE = 2.0
CALM = 0.5
"""Seconds without anything left after which it is taken for rest."""
REPOSITORY = Path(flaskbus.__file__).parent.parent


def group_of(leader: int) -> list[int]:
    """The living processes of a process group, its leader included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader:
            found.append(int(entry.name))
    return alive(sorted(found))


class Broker:
    """A Valkey on a port of its own, that writes down everything before it answers (``sync``: appendfsync)."""

    def __init__(self, directory: Path, *, sync: str = "always", addresses: Sequence[str] = ()) -> None:
        self.directory = directory
        self.sync = sync
        self.addresses = addresses
        """Where it listens beside the loopback."""
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(binary("valkey")), "--port", str(self.port), "--bind", "127.0.0.1", *self.addresses,
             "--protected-mode", "no", "--save", "",
             "--appendonly", "yes", "--appendfsync", self.sync, "--enable-debug-command", "yes",
             "--dir", str(self.directory)],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def answers(self) -> bool:
        with connect(self.url) as client:
            try:
                return bool(client.ping())
            except redis.exceptions.RedisError:
                return False

    def start(self) -> None:
        self.process = self._spawn()
        eventually(self.answers, "the broker answers")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Service:
    """A program that is started again whenever it ended, as a service manager does."""

    def __init__(self, name: str, start: Callable[[], Program], *, restart_alone: bool) -> None:
        self.name = name
        self._start = start
        self._restart_alone = restart_alone
        """Whether what is left of the old one must be gone first: it may hold the port."""
        self.program = start()
        self.starts = 1

    @property
    def pid(self) -> int:
        return self.program.pid

    @property
    def lives(self) -> bool:
        """Whether the program itself runs; what it started may outlive it."""
        return self.program.process.poll() is None

    def processes(self) -> list[int]:
        """The program's own and those that it started, also where it is dead itself."""
        return group_of(self.pid)

    def workers(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.pid]

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes at once."""
        os.killpg(self.pid, number)

    def tend(self) -> None:
        """Start it again where it has ended."""
        if self.lives:
            return
        if self._restart_alone and self.processes():
            return
        self.program = self._start()
        self.starts += 1

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.program.process.wait()


class Site:
    """Two gateways and two agents, of two workers each. Odd ones reach the broker through ``detour``, if given;
    one agent more runs on ``host``.

    A context manager; whatever still runs at its end is killed. ``environ`` is for the programs.
    """

    def __init__(
        self,
        directory: Path,
        broker_url: str,
        *,
        detour: str = "",
        gateways: int = 2,
        agents: int = 2,
        workers: int = 2,
        unix: bool = False,
        host: Host | None = None,
    ) -> None:
        self.directory = directory
        self.broker_url = broker_url
        self.ledger = directory / "ledger"
        self.ledger.touch()
        self.registry = Registry(connect(broker_url), KEYS)
        self.workers = workers
        self._detour = detour or broker_url
        ports = [free_port() for _ in range(gateways)]
        self.addresses: list[tuple[str, int] | str] = [
            str(directory / f"http-{number}") if unix else ("127.0.0.1", port)
            for number, port in enumerate(ports)
        ]
        self.gateways = [
            Service(f"gateway-{number}", self._gateway(number), restart_alone=True)
            for number in range(gateways)
        ]
        self.agents = [
            Service(f"agent-{number}", self._agent(number), restart_alone=False) for number in range(agents)
        ]
        if host is not None:
            far = self._agent(agents, inside=host.inside, url=host.url_of(broker_url))
            self.agents.append(Service("agent-far", far, restart_alone=False))

    @property
    def services(self) -> list[Service]:
        return [*self.gateways, *self.agents]

    def _program(
        self, name: str, number: int, module: str, *options: str, inside: Sequence[str] = (), url: str = ""
    ) -> Program:
        return Program(
            self.directory / f"{name}-{number}.log",
            module,
            "--lease", str(LEASE), "--workers", str(self.workers), *options,
            inside=inside,
            LEDGER=str(self.ledger),
            FLASKBUS_REDIS_URL=url or (self._detour if number % 2 else self.broker_url),
            PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        )  # fmt: skip

    def _gateway(self, number: int) -> Callable[[], Program]:
        address = self.addresses[number]
        where = ["--host", f"unix:{address}"] if isinstance(address, str) else ["--port", str(address[1])]
        limits = ("--hold", "15", "--head-timeout", "15", "--queue-limit", "5000")
        return lambda: self._program("gateway", number, "flaskbus_gateway", *where, *limits)

    def _agent(self, number: int, *, inside: Sequence[str] = (), url: str = "") -> Callable[[], Program]:
        options = ("tests.faults.app:app", "--prefix", "/soak", "--name", "soak", "--threads", "4")
        return lambda: self._program("agent", number, "flaskbus_agent", *options, inside=inside, url=url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.registry.client.close()
        for service in self.services:
            service.kill()

    # Whether all is well

    def tend(self) -> None:
        for service in self.services:
            service.tend()

    def whole(self) -> bool:
        """Every worker of every agent is ready, and every gateway accepts connections."""
        self.tend()
        if not all(service.lives for service in self.services):
            return False
        try:
            ready = [item.supervisor for item in self.registry.agents(MOUNT) if item.state == "ready"]
        except redis.exceptions.RedisError:
            return False
        return all(
            ready.count(agent.pid) == self.workers == len(agent.workers()) for agent in self.agents
        ) and all(
            len(gateway.workers()) == self.workers and listens(address)
            for gateway, address in zip(self.gateways, self.addresses, strict=True)
        )

    def await_whole(self, seconds: float = 30.0) -> None:
        try:
            eventually(self.whole, "the site is whole", seconds)
        except AssertionError as error:
            error.add_note(self.state())
            raise

    def state(self) -> str:
        lines = [f"{service.name}: {service.pid}, {service.processes()}" for service in self.services]
        return "\n".join([*lines, *map(str, self.registry.agents(MOUNT))])

    def keys(self) -> set[str]:
        client: Any = self.registry.client
        return {key.decode() for key in client.scan_iter("*")}

    def left(self, baseline: Collection[str]) -> dict[str, Any]:
        """What is left of requests and of processes that are no more, and keys that were not there before."""
        client: Any = self.registry.client
        groups = client.xinfo_groups(M.requests)
        found: dict[str, Any] = {
            "entries": client.xlen(M.requests),
            "pending": sum(group["pending"] for group in groups),
            "keys": sorted(self.keys().difference(baseline)),
            "agents": client.hlen(M.agents) - self.workers * len(self.agents),
            "consumers": len(client.xinfo_consumers(M.requests, GROUP)) - self.workers * len(self.agents),
            "gateways": client.hlen(KEYS.gateways) - self.workers * len(self.gateways),
        }
        return {name: value for name, value in found.items() if value}

    def await_rest(self, baseline: Collection[str], seconds: float = 30.0) -> dict[str, Any]:
        """What is still left after so long, and nothing once there was nothing for a while.

        At first a request may still be on its way whose client left.
        """
        end = time.monotonic() + seconds
        calm = time.monotonic() + CALM
        while time.monotonic() < end:
            if left := self.left(baseline):
                calm = time.monotonic() + CALM
            elif time.monotonic() > calm:
                return {}
            time.sleep(0.05)
        return left


def listens(address: tuple[str, int] | str) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(address) == 0


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Freeze processes for the time of the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in alive(pids):
            os.kill(pid, signal.SIGCONT)
