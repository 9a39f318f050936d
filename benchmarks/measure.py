"""What processes and the broker have used, from /proc and INFO."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.systems.base import Running
from flaskbus.broker import connect, primaries

_TICKS = os.sysconf("SC_CLK_TCK")
_REST = 0.03
"""Seconds of CPU within 0.3 s that heartbeats and sweeps may use."""


def family(roots: Iterable[int]) -> list[int]:
    """These processes and their descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(entry.name)):
            parents[int(entry.name)] = int(fields[1])
    found = list(roots)
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third on (proc(5)): state, parent …; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def roles(running: Running) -> dict[str, list[int]]:
    """Process ids by role."""
    found: dict[str, list[int]] = {}
    for child in running.children.all:
        found.setdefault(child.role, []).extend(family([child.pid]))
    return found


def cpu(running: Running) -> float:
    """Seconds of CPU that all its living processes have used, in user mode and in the kernel."""
    stats = (_stat(pid) for pids in roles(running).values() for pid in pids)
    return sum(int(fields[11]) + int(fields[12]) for fields in stats if fields) / _TICKS


def busy(seconds: float = 1.0) -> float:
    """How much of all cores somebody uses meanwhile, 0 to 1 (proc(5): the first line of ``/proc/stat``)."""

    def look() -> tuple[int, int]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        # idle and iowait
        return sum(ticks), ticks[3] + ticks[4]

    total, idle = look()
    time.sleep(seconds)
    later, idler = look()
    return 1 - (idler - idle) / max(1, later - total)


def settle(running: Running, patience: float = 60.0) -> None:
    """Until it uses next to no CPU: the first answer says that one of its processes is there, and not that all are."""
    deadline = time.monotonic() + patience
    before = cpu(running)
    while time.monotonic() < deadline:
        time.sleep(0.3)
        now = cpu(running)
        if now - before <= _REST:
            return
        before = now


def pss(pids: Iterable[int]) -> int:
    """Bytes; what processes share is counted once, in shares."""
    return sum(_rollup(pid, ("Pss:",)) for pid in pids)


def private(pid: int) -> int:
    """Bytes of memory that no other process shares: what it would give back if it ended."""
    return _rollup(pid, ("Private_Clean:", "Private_Dirty:"))


def _rollup(pid: int, names: tuple[str, ...]) -> int:
    """Bytes in these lines of ``/proc/PID/smaps_rollup`` (proc(5)); 0 where it is gone."""
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(names):
                total += int(line.split()[1]) * 1024
    return total


@dataclass(frozen=True, slots=True)
class BrokerUse:
    """INFO's counters: seconds of CPU, and calls by command."""

    cpu: float
    calls: Counter[str]
    at: float

    def __sub__(self, other: BrokerUse) -> BrokerUse:
        return BrokerUse(self.cpu - other.cpu, self.calls - other.calls, self.at - other.at)


def broker_use(url: str) -> list[BrokerUse]:
    """Of the broker, or of each node of a cluster."""
    with connect(url) as client:
        return [_use(each) for each in primaries(client)]


def _use(client: redis.Redis) -> BrokerUse:
    info: dict[str, Any] = client.info("cpu")
    stats: dict[str, Any] = client.info("commandstats")
    calls = Counter({name.removeprefix("cmdstat_"): int(stat["calls"]) for name, stat in stats.items()})
    return BrokerUse(float(info["used_cpu_user"]) + float(info["used_cpu_sys"]), calls, time.monotonic())


def broker_connections(url: str) -> int:
    """Clients of the broker, less the one that asks."""
    with redis.Redis.from_url(url) as client:
        return int(client.info("clients")["connected_clients"]) - 1
