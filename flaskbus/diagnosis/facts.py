"""What a diagnosis is made of, and what it says."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord
from flaskbus.survey import MountView

Severity = Literal["ok", "info", "warning", "error"]

CLOCK = 1.0
"""Seconds that clocks may differ before ages are shown wrong enough to mislead."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``check`` says which, ``mend`` is a command or an advice."""

    severity: Severity
    check: str
    what: str
    mend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerFacts:
    """``info`` is INFO's answer, ``config`` what CONFIG GET gave; empty where they may not be asked.

    ``node`` is its host and port, where it is one of a cluster. ``pings`` in seconds; ``offset`` is how far the
    broker's clock is ahead of ours, give or take ``doubt``.
    """

    url: str
    info: Mapping[str, Any]
    config: Mapping[str, str]
    pings: tuple[float, ...]
    offset: float
    doubt: float
    node: str = ""


@dataclass(frozen=True, slots=True)
class Stuck:
    """A request that an agent holds which is gone; ``idle`` in seconds."""

    entry_id: str
    agent: str
    idle: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MountFacts:
    """``alive`` are the ids of agents that beat; ``reason`` is that of the newest dead letter."""

    view: MountView
    alive: frozenset[str]
    stuck: tuple[Stuck, ...] = ()
    dead: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that was found; ``now`` is our wall clock, ``lease`` in seconds.

    ``gateways`` maps process ids to records; ``leaked`` are keys that never expire and should; ``foreign``
    maps keys that are not of their type to what they are. ``others`` are the further nodes of a cluster.
    """

    broker: BrokerFacts
    mounts: tuple[MountFacts, ...]
    gateways: Mapping[str, Mapping[str, Any]]
    alive_gateways: frozenset[str]
    leaked: tuple[str, ...]
    foreign: Mapping[str, str]
    keys: Keys
    now: float
    lease: float
    others: tuple[BrokerFacts, ...] = ()
    whole: bool = field(default=True)
    """Whether every key was looked at."""


def shell(*words: str) -> str:
    """A ``flaskbus redis`` line that can be pasted."""
    return shlex.join(["flaskbus", "redis", *words])


def serving(mount: MountFacts) -> list[AgentRecord]:
    return [record for record in mount.view.agents if record.state == "ready" and record.id in mount.alive]


def listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
