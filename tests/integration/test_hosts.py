"""Agents on hosts of their own that nobody can connect to: they reach the broker, and nothing reaches them.

Each host is a network namespace, with one link to the broker's and no route to any other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flaskbus.keys import GROUP, Keys
from tests.conftest import Broker, binary
from tests.integration.fleet import LEASE, MOUNT, Fleet, Load, Program, Seen, eventually

BROKER = "10.87.{}.1"
HOSTS = {"gateway": 1, "near": 2, "far": 3}
"""Each host's network is 10.87.N.0/30; the broker is .1 in each, the host .2."""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Network:
    """The broker's namespace in the middle, and a link from it to each host."""

    def __init__(self) -> None:
        self.names = {host: f"flaskbus-{os.getpid()}-{host}" for host in ("broker", *HOSTS)}

    def build(self) -> None:
        middle = self.names["broker"]
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for host, number in HOSTS.items():
            name = self.names[host]
            ip("-n", middle, "link", "add", host, "type", "veth", "peer", "name", "uplink", "netns", name)
            ip("-n", middle, "address", "add", f"{BROKER.format(number)}/30", "dev", host)
            ip("-n", name, "address", "add", f"10.87.{number}.2/30", "dev", "uplink")
            ip("-n", middle, "link", "set", host, "up")
            ip("-n", name, "link", "set", "uplink", "up")

    def remove(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def inside(self, host: str) -> list[str]:
        """What a command begins with that runs on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut(self, host: str) -> None:
        ip("-n", self.names["broker"], "link", "set", host, "down")

    def mend(self, host: str) -> None:
        ip("-n", self.names["broker"], "link", "set", host, "up")

    def reaches(self, host: str, address: str) -> bool:
        """Whether a host has a route to an address."""
        found = subprocess.run(
            ["ip", "-n", self.names[host], "route", "get", address], check=False, capture_output=True
        )
        return found.returncode == 0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces can only be made by root")
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed (apt-get install iproute2)")
    network = Network()
    try:
        network.build()
    except subprocess.CalledProcessError as error:
        network.remove()
        pytest.skip(f"this machine does not let us make network namespaces: {error.stderr.strip()}")
    yield network
    network.remove()


class Site:
    """A gateway and two agents, each on its host; clients come by a socket in the file system."""

    def __init__(self, network: Network, fleet: Fleet) -> None:
        self.network = network
        self.fleet = fleet
        self.socket = fleet.directory / "http"
        gateway = fleet.start(
            "gateway", "flaskbus_gateway", "--host", f"unix:{self.socket}", **self.on("gateway")
        )
        eventually(self.socket.exists, f"the gateway listens: {gateway.log()}")
        self.near = fleet.agent("near", "--threads", "2", **self.on("near"))
        self.far = fleet.agent("far", "--threads", "2", **self.on("far"))

    def on(self, host: str) -> dict[str, Any]:
        url = f"redis://{BROKER.format(HOSTS[host])}:6379/0"
        return {"FLASKBUS_REDIS_URL": url, "inside": self.network.inside(host)}

    def load(self, *methods: str) -> Load:
        return Load(["http://flaskbus"], methods=methods or ("POST",), uds=str(self.socket))


@pytest.fixture
def site(network: Network, tmp_path: Path) -> Iterator[Site]:
    unix = tmp_path / "broker"
    server = subprocess.Popen(
        [*network.inside("broker"), str(binary("valkey")), "--bind", "0.0.0.0", "--protected-mode", "no",
         "--save", "", "--unixsocket", str(unix), "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(unix.exists, "the broker listens")
        with Fleet(tmp_path, f"unix://{unix}") as fleet:
            yield Site(network, fleet)
    finally:
        server.terminate()
        server.wait(10)


def by(agent: str, seen: Seen) -> bool:
    return seen.agent == agent


def listening(program: Program) -> list[str]:
    """The TCP addresses at which something listens on a program's host."""
    lines = []
    for table in ("tcp", "tcp6"):
        lines += Path(f"/proc/{program.pid}/net/{table}").read_text().splitlines()[1:]
    return [line.split()[1] for line in lines if line.split()[3] == "0A"]


def test_agents_that_nobody_can_reach_serve(site: Site, network: Network) -> None:
    for host in ("near", "far"):
        assert network.reaches(host, BROKER.format(HOSTS[host]))
        assert not network.reaches("gateway", f"10.87.{HOSTS[host]}.2")
        assert not network.reaches(host, "10.87.1.2")
    assert listening(site.near) == listening(site.far) == []
    with site.load() as load:
        load.more(100, lambda seen: by("near", seen))
        load.more(100, lambda seen: by("far", seen))
    assert not load.bad()
    load.judge(site.fleet.runs())
    site.fleet.at_rest()


def test_a_host_that_is_cut_off_comes_back_by_itself(site: Site, network: Network) -> None:
    with site.load("POST", "GET") as load:
        load.more(20, lambda seen: by("near", seen))
        load.more(20, lambda seen: by("far", seen))
        network.cut("far")
        # Until the gateway knows, and what the far one held is settled: the near one serves alone.
        eventually(lambda: not site.fleet.ready(site.far), "the far agent's lease runs out")
        load.more(50, lambda seen: by("near", seen))
        eventually(lambda: settled(site.fleet), "what the far agent held is settled")
        network.mend("far")
        eventually(lambda: site.fleet.ready(site.far), "the far agent is back")
        load.more(20, lambda seen: by("far", seen))
    load.judge(site.fleet.runs())
    # One connection reads for two threads: it held that much at most, or had run it.
    assert len(load.bad()) <= 4, load.bad()
    assert {(each.method, each.executed) for each in load.bad()} <= {("POST", "unknown")}
    assert {each.status for each in load.bad()} <= {502, 504}
    assert all(each.ended - each.sent < LEASE + 10 for each in load.bad()), load.bad()
    assert site.far.process.poll() is None
    site.fleet.at_rest()


def settled(fleet: Fleet) -> bool:
    """No consumer but those of listed agents holds anything."""
    pending: Any = fleet.registry.client.xpending(Keys().of(MOUNT.key).requests, GROUP)
    return {each["name"].decode() for each in pending["consumers"]} <= {each.id for each in fleet.records()}


def test_a_gateway_on_a_unix_socket(broker: Broker, tmp_path: Path) -> None:
    socket = tmp_path / "http"
    with Fleet(tmp_path, broker.url) as fleet:
        fleet.start("gateway", "flaskbus_gateway", "--host", f"unix:{socket}")
        eventually(socket.exists, "the gateway listens")
        fleet.agent("one")
        with Load(["http://flaskbus"], threads=1, uds=str(socket)) as load:
            load.more(5)
        assert not load.bad()
