"""The faults that the soak injects, each by name. A fault ends by itself; what it breaks, the site must mend."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import redis

from tests.faults.partition import Host
from tests.faults.proxy import Proxy
from tests.faults.site import LEASE, Broker, Service, Site, stopped
from tests.integration.fleet import eventually
from tests.integration.procs import alive

KILL = signal.SIGKILL
GRACE = 0.5
"""Seconds in which a client may still write to a connection whose other end was killed."""


@dataclass
class Scene:
    """What a fault may lay hands on. ``control`` runs a function in the proxy's loop."""

    site: Site
    broker: Broker
    proxy: Proxy
    control: Callable[[Callable[[], Any]], Any]
    dice: random.Random
    host: Host | None = None
    """Where one of the agents runs; ``None`` where this machine has no network namespaces."""
    hurt: list[tuple[int, float, float]] = field(default_factory=list)
    """Gateways whose clients may see broken connections, from when to when (monotonic seconds)."""
    killed: int = 0

    def kill(self, pids: list[int]) -> None:
        now = time.monotonic()
        hurt = [
            number
            for number, gateway in enumerate(self.site.gateways)
            if set(pids) & {gateway.pid, *gateway.workers()}
        ]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, KILL)
                self.killed += 1
        eventually(lambda: not alive(pids), "they are dead")
        # On a busy machine a process may take long to die.
        self.hurt += [(number, now, time.monotonic() + GRACE) for number in hurt]

    def lame(self, service: Service, since: float) -> None:
        """The workers of a gateway go down with it, some time later."""
        number = self.site.gateways.index(service)
        self.site.await_whole()
        self.hurt.append((number, since, time.monotonic() + GRACE))

    def network(self, **state: Any) -> None:
        """Make the proxy a bad network: fields of :class:`~tests.faults.proxy.Proxy`."""
        self.control(lambda: vars(self.proxy).update(state))

    def client(self) -> Any:
        return self.site.registry.client


Inject = Callable[[Scene], float]
"""Injects one fault; gives the monotonic time from which recovery counts."""

FAULTS: dict[str, Inject] = {}


def fault(inject: Inject) -> Inject:
    FAULTS[inject.__name__.replace("_", "-")] = inject
    return inject


@fault
def none(scene: Scene) -> float:
    """Nothing happens: what goes wrong here is nobody else's fault."""
    time.sleep(1.0)
    return time.monotonic()


# Processes


@fault
def kill_agent_worker(scene: Scene) -> float:
    since = time.monotonic()
    scene.kill([scene.dice.choice(scene.dice.choice(scene.site.agents).workers())])
    return since


@fault
def kill_agent(scene: Scene) -> float:
    since = time.monotonic()
    scene.kill(scene.dice.choice(scene.site.agents).processes())
    return since


@fault
def kill_agent_supervisor(scene: Scene) -> float:
    since = time.monotonic()
    scene.kill([scene.dice.choice(scene.site.agents).pid])
    return since


@fault
def kill_gateway_worker(scene: Scene) -> float:
    since = time.monotonic()
    scene.kill([scene.dice.choice(scene.dice.choice(scene.site.gateways).workers())])
    return since


@fault
def kill_gateway(scene: Scene) -> float:
    since = time.monotonic()
    gateway = scene.dice.choice(scene.site.gateways)
    scene.kill(gateway.processes())
    scene.lame(gateway, since)
    return since


@fault
def kill_gateway_arbiter(scene: Scene) -> float:
    since = time.monotonic()
    gateway = scene.dice.choice(scene.site.gateways)
    scene.kill([gateway.pid])
    scene.lame(gateway, since)
    return since


@fault
def kill_any(scene: Scene) -> float:
    """SIGKILL of one process of the site, whichever."""
    since = time.monotonic()
    pid = scene.dice.choice([pid for service in scene.site.services for pid in service.processes()])
    scene.kill([pid])
    for gateway in scene.site.gateways:
        if gateway.pid == pid:
            scene.lame(gateway, since)
    return since


def frozen(pids: list[int]) -> float:
    with stopped(pids):
        time.sleep(LEASE + 1.0)
    return time.monotonic()


@fault
def freeze_agent_worker(scene: Scene) -> float:
    return frozen([scene.dice.choice(scene.dice.choice(scene.site.agents).workers())])


@fault
def freeze_agent(scene: Scene) -> float:
    return frozen(scene.dice.choice(scene.site.agents).processes())


@fault
def freeze_gateway(scene: Scene) -> float:
    return frozen(scene.dice.choice(scene.site.gateways).processes())


# The broker


@fault
def broker_sleeps(scene: Scene) -> float:
    seconds = scene.dice.uniform(0.5, 4.0)
    with suppress(redis.exceptions.RedisError):
        scene.client().execute_command("DEBUG", "SLEEP", seconds)
    return time.monotonic()


@fault
def broker_freezes(scene: Scene) -> float:
    """For longer than a connection waits for an answer."""
    with stopped([scene.broker.process.pid]):
        time.sleep(7.0)
    return time.monotonic()


@fault
def broker_killed(scene: Scene) -> float:
    scene.broker.kill()
    time.sleep(scene.dice.uniform(0.0, 3.0))
    scene.broker.start()
    return time.monotonic()


@fault
def broker_full(scene: Scene) -> float:
    client = scene.client()
    client.config_set("maxmemory", "1mb")
    time.sleep(scene.dice.uniform(0.5, 4.0))
    client.config_set("maxmemory", "0")
    return time.monotonic()


@fault
def client_kill(scene: Scene) -> float:
    """Some connections to the broker, of any kind, again and again."""
    client = scene.client()
    for _ in range(10):
        mine = client.client_id()
        others = [item["id"] for item in client.client_list() if int(item["id"]) != mine]
        for number in scene.dice.sample(others, min(3, len(others))):
            with suppress(redis.exceptions.ResponseError):
                client.client_kill_filter(_id=number)
        time.sleep(0.05)
    return time.monotonic()


@fault
def script_flush(scene: Scene) -> float:
    for _ in range(5):
        scene.client().script_flush()
        time.sleep(0.1)
    return time.monotonic()


# The network between the broker and one half of the site


@fault
def net_delay(scene: Scene) -> float:
    scene.network(delay=scene.dice.uniform(0.05, 0.5))
    time.sleep(2.0)
    scene.control(scene.proxy.mend)
    return time.monotonic()


@fault
def net_half_open(scene: Scene) -> float:
    """Connections stay, and nothing arrives: past the lease, and past every time-out of a connection."""
    scene.network(swallowing=True)
    time.sleep(scene.dice.choice((1.0, LEASE + 1.0, 8.0)))
    scene.control(scene.proxy.mend)
    return time.monotonic()


@fault
def net_reset(scene: Scene) -> float:
    for _ in range(5):
        scene.control(scene.proxy.reset_all)
        time.sleep(0.1)
    return time.monotonic()


@fault
def net_cuts(scene: Scene) -> float:
    """The connection breaks that happens to carry a certain byte; forty times."""
    for _ in range(40):
        scene.network(budget=int(scene.dice.expovariate(1 / 5000)))
        time.sleep(0.05)
    scene.control(scene.proxy.mend)
    return time.monotonic()


@fault
def net_partition(scene: Scene) -> float:
    """A host is cut off, with an agent on it that goes on: for less than the lease, and for more."""
    assert scene.host is not None
    scene.host.pull()
    time.sleep(scene.dice.choice((1.0, LEASE + 1.0, 8.0)))
    scene.host.mend()
    return time.monotonic()


NEEDS_HOST = frozenset({"net-partition"})
