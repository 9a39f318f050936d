"""``flaskbus doctor``: what is wrong with a bus, and what mends it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
import redis

from flaskbus import units
from flaskbus.broker import mask, primaries
from flaskbus.commands.tools import Bus, echo_json, json_option, with_bus
from flaskbus.diagnosis import BrokerFacts, Facts, Finding, MountFacts, Severity, Stuck, diagnose
from flaskbus.errors import UsageError
from flaskbus.keys import GROUP
from flaskbus.options import FlaskbusCommand
from flaskbus.routing import Mount
from flaskbus.survey import MountView, survey, watch

PINGS = 11
MOST_KEYS = 200_000
"""Keys that are looked at for leaks; a broker that others use too may have many more."""

COLORS: Mapping[Severity, str] = {"ok": "green", "info": "blue", "warning": "yellow", "error": "red"}


@click.command(
    "doctor",
    cls=FlaskbusCommand,
    short_help="Find out what is wrong, and what mends it.",
    examples="""
    flaskbus doctor
    flaskbus doctor --json | jq '.findings[] | select(.severity == "error")'
    """,
)
@with_bus
@json_option
@click.option(
    "--stuck-after",
    default="60s",
    show_default=True,
    metavar="DURATION",
    help="How long a request may be held by an agent that is gone.",
)
def doctor(bus: Bus, as_json: bool, stuck_after: str) -> int:
    """Find out what is wrong with the bus, and what mends it.

    Looks at the broker (version, persistence, eviction, memory, clock, latency), at gateways and agents
    (heartbeats, versions, differences between agents of one mount) and at the queues (lost groups, stuck
    requests, dead letters, keys that never expire or that somebody wrote over). It changes nothing. Where
    somebody's heartbeat is in doubt, it takes half a lease to see whether it comes. The exit code is 1 if
    there is an error.
    """
    try:
        limit = units.seconds(stuck_after)
    except ValueError:
        raise UsageError(f"--stuck-after must be a duration such as 60s, not {stuck_after!r}") from None
    findings = diagnose(gather(bus, limit))
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        echo_json({"errors": errors, "findings": [asdict(finding) for finding in findings]})
    else:
        show(findings)
    return int(errors > 0)


def show(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        label = click.style(f"{finding.severity:7}", fg=COLORS[finding.severity])
        click.echo(f"{label}  {finding.check:{width}}  {finding.what}")
        if finding.mend:
            click.echo(f"{'':{width + 11}}mend: {finding.mend}")
    bad = [
        f"{number} {severity}{'' if number == 1 else 's'}"
        for severity in ("error", "warning")
        if (number := sum(finding.severity == severity for finding in findings))
    ]
    click.echo(", ".join(bad) or "all is well")


def gather(bus: Bus, stuck_after: float) -> Facts:
    """Ask the broker for all that :func:`~flaskbus.diagnosis.diagnose` wants; raises redis-py's errors."""
    broker, *others = [broker_facts(bus, one) for one in primaries(bus.client)]
    foreign, mounts = foreign_keys(bus)
    views = survey(bus.client, bus.keys, mounts)
    gateways = {} if bus.keys.gateways in foreign else bus.registry.gateways()
    alive = living(bus, views, gateways)
    leaked, whole = leaks(bus)
    return Facts(
        broker=broker,
        others=tuple(others),
        mounts=tuple(mount_facts(bus, view, alive, stuck_after) for view in views),
        gateways=gateways,
        alive_gateways=frozenset(gateways.keys() & alive),
        leaked=leaked,
        foreign=foreign,
        keys=bus.keys,
        now=time.time(),
        lease=bus.settings.lease,
        whole=whole,
    )


def foreign_keys(bus: Bus) -> tuple[dict[str, str], list[Mount]]:
    """Keys of ours that somebody else wrote, with their types; and the mounts that can be looked at all the same."""

    def foreign(expected: Mapping[str, str]) -> dict[str, str]:
        kinds = {key: _text(bus.client.type(key)) for key in expected}
        return {key: kind for key, kind in kinds.items() if kind not in (expected[key], "none")}

    found = foreign({bus.keys.mounts: "set", bus.keys.gateways: "hash"})
    if bus.keys.mounts in found:
        return found, []
    whole = []
    for mount in bus.registry.mounts():
        keys = bus.keys.of(mount.key)
        of_mount = foreign(
            {keys.requests: "stream", keys.dead: "stream", keys.owner: "hash", keys.agents: "hash"}
        )
        found |= of_mount
        if not of_mount:
            whole.append(mount)
    return found, whole


def broker_facts(bus: Bus, client: redis.Redis) -> BrokerFacts:
    """What there is to know of a server that ``client`` speaks to."""
    pings = []
    for _ in range(PINGS):
        begun = time.perf_counter()
        client.ping()
        pings.append(time.perf_counter() - begun)
    before = time.time()
    seconds, micros = client.time()
    after = time.time()
    try:
        info: dict[str, Any] = client.info()
    except redis.exceptions.ResponseError:
        info = {}
    return BrokerFacts(
        url=mask(bus.settings.redis),
        node=_node(client) if client is not bus.client else "",
        info=info,
        config=_config(client, "save")
        | _config(client, "client-output-buffer-limit")
        | _config(client, "min-replicas-to-write"),
        pings=tuple(pings),
        offset=seconds + micros / 1e6 - (before + after) / 2,
        doubt=(after - before) / 2,
    )


def _node(client: redis.Redis) -> str:
    made_with = client.connection_pool.connection_kwargs
    return f"{made_with['host']}:{made_with['port']}"


def _config(client: redis.Redis, name: str) -> dict[str, str]:
    """Empty where it may not be asked: a least-privilege user, or a hosted broker."""
    try:
        answer: dict[Any, Any] = client.config_get(name)
    except redis.exceptions.ResponseError:
        return {}
    return {_text(key): _text(value) for key, value in answer.items()}


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def living(bus: Bus, views: list[MountView], gateways: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The processes that live: their clocks say so, or else their counters move while we look."""

    def recent(at: object) -> bool:
        return isinstance(at, int | float) and abs(time.time() - at) < bus.settings.lease / 2

    heard = {record.id: recent(record.at) for view in views for record in view.agents}
    heard |= {name: recent(record.get("at")) for name, record in gateways.items()}
    doubtful = [name for name, fresh in heard.items() if not fresh]
    alive = heard.keys() - doubtful
    if not doubtful:
        return alive

    def beats() -> dict[str, int]:
        seen = survey(bus.client, bus.keys, [view.mount for view in views])
        now = {record.id: record.beat for view in seen for record in view.agents}
        listed = bus.registry.gateways() if gateways else {}
        return now | {name: record.get("beat", 0) for name, record in listed.items()}

    return alive | watch(beats, bus.settings.lease / 2, all_of=doubtful)


def mount_facts(bus: Bus, view: MountView, alive: set[str], stuck_after: float) -> MountFacts:
    keys = bus.keys.of(view.mount.key)
    letters: Any = bus.client.xrevrange(keys.dead, count=1)
    return MountFacts(
        view=view,
        alive=frozenset(record.id for record in view.agents if record.id in alive),
        stuck=_stuck(bus, view, alive, stuck_after) if view.pending else (),
        dead=bus.client.xlen(keys.dead),
        reason=_text(letters[0][1].get(b"reason", b"")) if letters else "",
    )


def _stuck(bus: Bus, view: MountView, alive: set[str], stuck_after: float) -> tuple[Stuck, ...]:
    entries: list[dict[str, Any]] = bus.client.xpending_range(
        bus.keys.of(view.mount.key).requests,
        GROUP,
        min="-",
        max="+",
        count=1000,
        idle=int(stuck_after * 1000),
    )
    return tuple(
        Stuck(_text(entry["message_id"]), agent, entry["time_since_delivered"] / 1000)
        for entry in entries
        if (agent := _text(entry["consumer"])) not in alive
    )


def leaks(bus: Bus) -> tuple[tuple[str, ...], bool]:
    """Keys of the namespace that never expire and should, and whether all keys were looked at."""
    looks = [_leaks(bus, one) for one in primaries(bus.client)]
    found = {key for keys, _ in looks for key in keys}
    return tuple(sorted(found)), all(whole for _, whole in looks)


def _leaks(bus: Bus, server: redis.Redis) -> tuple[list[str], bool]:
    found: list[str] = []
    cursor, seen = 0, 0
    while seen < MOST_KEYS:
        cursor, page = server.scan(cursor, match=f"{bus.keys.namespace}:*", count=1000)
        seen += 1000
        suspects = [key for key in map(_text, page) if not bus.keys.may_persist(key)]
        if suspects:
            with bus.client.pipeline(transaction=False) as pipe:
                for key in suspects:
                    pipe.ttl(key)
                found += [key for key, ttl in zip(suspects, pipe.execute(), strict=True) if ttl == -1]
        if not cursor:
            return found, True
    return found, False
