"""Is the broker fit: version, persistence, memory, buffers, clock, latency?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flaskbus import memory
from flaskbus.broker import OLDEST_REDIS
from flaskbus.diagnosis.facts import CLOCK, BrokerFacts, Finding, shell

SLOW_PING = 0.01
"""Seconds; a request makes three round trips and more."""

CROWDED = 0.9
"""Share of maxclients from which on it is a finding."""

SMALL_BUFFER = 8 * 1024 * 1024
"""Bytes of unread doorbells below which a busy gateway might be cut off."""


def of_broker(broker: BrokerFacts) -> Iterator[Finding]:
    """What there is to say of the broker."""
    yield from _engine(broker)
    if broker.info:
        yield from _persistence(broker)
        yield from _memory(broker.info)
        yield from _connections(broker.info)
    yield from _replicas(broker)
    yield from _buffers(broker.config)
    yield _clock(broker)
    yield _latency(broker)


def _engine(broker: BrokerFacts) -> Iterator[Finding]:
    info = broker.info
    if not info:
        yield Finding(
            "info", "broker", f"{broker.url} answers; its user may not ask INFO, so half of this is not known"
        )
        return
    engine, version = ("Valkey", info.get("valkey_version")) if "valkey_version" in info else ("Redis", None)
    compatible = str(info.get("redis_version", "0"))
    what = f"{engine} {version or compatible} at {broker.url}"
    if tuple(int(part) for part in compatible.split(".")[:2]) < OLDEST_REDIS:
        yield Finding("error", "broker", f"{what} is too old", "install Redis 7.0 or Valkey 7.2, or newer")
    else:
        yield Finding("ok", "broker", what)
    if info.get("role", "master") != "master":
        yield Finding(
            "error",
            "role",
            "the broker is a replica, which cannot be written to",
            "name its master with --redis",
        )


def _persistence(broker: BrokerFacts) -> Iterator[Finding]:
    info, save = broker.info, broker.config.get("save")
    appending = bool(info.get("aof_enabled"))
    if appending and info.get("aof_last_write_status", "ok") != "ok":
        yield Finding("error", "persistence", "the last write to the append-only file failed", _DISK)
    elif info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding("error", "persistence", "the last snapshot failed, and writes may be refused", _DISK)
    elif appending:
        yield Finding("ok", "persistence", "append-only file")
    elif save is None:
        yield Finding(
            "info",
            "persistence",
            "no append-only file; whether there are snapshots may not be asked",
            _APPEND,
        )
    elif save:
        yield Finding(
            "info", "persistence", "snapshots only: a crash loses what came after the last", _APPEND
        )
    else:
        yield Finding(
            "warning",
            "persistence",
            "neither append-only file nor snapshots: a restart loses what waits",
            _APPEND,
        )


_DISK = "look into the broker's log; is its disk full?"
_APPEND = f"{shell('CONFIG', 'SET', 'appendonly', 'yes')}, and the same in its configuration file"


def _memory(info: Mapping[str, Any]) -> Iterator[Finding]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Finding(
            "error",
            "eviction",
            f"maxmemory-policy is {policy}: a full broker would throw requests away",
            shell("CONFIG", "SET", "maxmemory-policy", "noeviction"),
        )
    else:
        yield Finding("ok", "eviction", "maxmemory-policy is noeviction")
    used, limit = memory.used(info), memory.limit(info)
    if not limit:
        yield Finding(
            "info",
            "memory",
            f"{_mib(used)} used, without a limit: it may grow until the system runs out of memory",
            f"{shell('CONFIG', 'SET', 'maxmemory', '1gb')} (or what its host can spare)",
        )
    elif used >= limit:
        yield Finding(
            "error",
            "memory",
            f"{_mib(used)} of {_mib(limit)} used: it is full; requests are refused, what runs is still answered",
            "raise maxmemory, or find out what fills it: flaskbus mounts",
        )
    elif used >= memory.FULL * limit:
        yield Finding(
            "warning",
            "memory",
            f"{_mib(used)} of {_mib(limit)} used: from {memory.FULL:.0%} on, requests are refused",
            "raise maxmemory, or find out what fills it: flaskbus mounts",
        )
    else:
        yield Finding("ok", "memory", f"{_mib(used)} of {_mib(limit)} used")


def _connections(info: Mapping[str, Any]) -> Iterator[Finding]:
    open_ones, most = int(info.get("connected_clients", 0)), int(info.get("maxclients", 0))
    if most and open_ones >= CROWDED * most:
        yield Finding(
            "warning",
            "connections",
            f"{open_ones} of at most {most} are open: whoever loses its own may not get another",
            shell("CONFIG", "SET", "maxclients", str(4 * most)),
        )


def _replicas(broker: BrokerFacts) -> Iterator[Finding]:
    """A broker that wants more replicas than it has refuses every write: NOREPLICAS."""
    wanted = int(broker.config.get("min-replicas-to-write", 0))
    there = int(broker.info.get("min_slaves_good_slaves", 0))
    if there < wanted:
        yield Finding(
            "error",
            "replicas",
            f"every write is refused: {there} of at least {wanted} replicas are connected",
            shell("CONFIG", "SET", "min-replicas-to-write", str(there)) + " (or bring them back)",
        )


def _mib(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"


def _buffers(config: Mapping[str, str]) -> Iterator[Finding]:
    words = config.get("client-output-buffer-limit", "").split()
    if "pubsub" not in words:
        return
    at = words.index("pubsub")
    hard, soft, seconds = (int(word) for word in words[at + 1 : at + 4])
    limits = f"{_limit(hard)}, or {_limit(soft)} for {seconds} s" if hard or soft else "no limit"
    what = f"unread doorbells of a process: {limits}"
    if 0 < hard < SMALL_BUFFER:
        yield Finding(
            "warning",
            "buffers",
            f"{what}; a busy gateway would be disconnected",
            shell("CONFIG", "SET", "client-output-buffer-limit", "pubsub 33554432 8388608 60"),
        )
    else:
        yield Finding("ok", "buffers", what)


def _limit(size: int) -> str:
    return _mib(size) if size else "no limit"


def _clock(broker: BrokerFacts) -> Finding:
    if abs(broker.offset) - broker.doubt > CLOCK:
        direction = "ahead of" if broker.offset > 0 else "behind"
        return Finding(
            "warning",
            "clock",
            f"the broker's clock is {abs(broker.offset):.1f} s {direction} this host's: ages are shown wrong",
            "keep both hosts' clocks by NTP (chrony, systemd-timesyncd)",
        )
    return Finding("ok", "clock", f"the broker's clock differs by {abs(broker.offset) * 1000:.0f} ms")


def _latency(broker: BrokerFacts) -> Finding:
    pings = sorted(broker.pings)
    median, worst = pings[len(pings) // 2], pings[-1]
    what = f"PING takes {median * 1000:.1f} ms, at worst {worst * 1000:.1f} ms"
    if median > SLOW_PING:
        return Finding(
            "warning", "latency", what, "run the broker nearer, or find out what keeps it: SLOWLOG GET"
        )
    return Finding("ok", "latency", what)
