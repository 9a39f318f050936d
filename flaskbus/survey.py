"""What a tool sees of the bus: every mount with its owner, its agents and its queue, in one round trip.

A tool that looks once cannot know who lives. It has ``at``, the writer's clock, as a hint; :func:`watch`
knows better after some seconds, because it sees the heartbeat counters move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from flaskbus.keys import GROUP, Keys
from flaskbus.registry import AgentRecord, Registry, parse_agents
from flaskbus.routing import Mount

PACE = 0.1
"""Seconds between two looks at the heartbeat counters."""


@dataclass(frozen=True, slots=True)
class MountView:
    """One mount at one moment.

    ``owner`` is ``None`` where nobody has renewed the mount for its whole TTL. ``length`` counts the entries of
    the stream (None: there is no stream), ``pending`` those that an agent has (None: there is no group).
    ``oldest`` is the age of the oldest entry in seconds by the broker's clock.
    """

    mount: Mount
    owner: str | None
    agents: tuple[AgentRecord, ...]
    length: int | None
    pending: int | None
    oldest: float | None

    @property
    def running(self) -> int:
        return self.pending or 0

    @property
    def waiting(self) -> int:
        """XLEN - pending. The group's ``lag`` is null too often to be of use."""
        return max(0, (self.length or 0) - self.running)

    def serving(self, now: float, lease: float) -> list[AgentRecord]:
        """The agents that are ready and whose clock says that they live: a hint."""
        return [record for record in self.agents if record.state == "ready" and now - record.at < lease]


def survey(client: redis.Redis, keys: Keys, mounts: Iterable[Mount] | None = None) -> list[MountView]:
    """Look at these mounts, or at all that are registered; raises redis-py's errors."""
    mounts = Registry(client, keys).mounts() if mounts is None else list(mounts)
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for mount in mounts:
            of = keys.of(mount.key)
            pipe.hget(of.owner, "name")
            pipe.hgetall(of.agents)
            pipe.exists(of.requests)
            pipe.xlen(of.requests)
            pipe.xpending(of.requests, GROUP)
            pipe.xrange(of.requests, count=1)
        (seconds, micros), *answers = pipe.execute(raise_on_error=False)
    now = seconds + micros / 1e6
    return [
        _view(mount, _checked(answers[6 * index : 6 * index + 6]), now) for index, mount in enumerate(mounts)
    ]


def _checked(answers: Sequence[Any]) -> Sequence[Any]:
    for answer in answers:
        if isinstance(answer, Exception) and not _no_group(answer):
            raise answer
    return answers


def _no_group(error: object) -> bool:
    return isinstance(error, redis.exceptions.ResponseError) and "NOGROUP" in str(error)


def _view(mount: Mount, answers: Sequence[Any], now: float) -> MountView:
    owner, agents, exists, length, pending, oldest = answers
    return MountView(
        mount=mount,
        owner=None if owner is None else owner.decode("utf-8", "replace"),
        agents=tuple(parse_agents(agents)),
        length=length if exists else None,
        pending=None if _no_group(pending) else pending["pending"],
        oldest=entry_age(oldest[0][0], now) if oldest else None,
    )


def entry_age(entry_id: bytes, now: float) -> float:
    """Seconds since an entry was added, told from its id: a hint, because ids never go back."""
    return max(0.0, now - int(entry_id.partition(b"-")[0]) / 1000)


def watch(
    beats: Callable[[], Mapping[str, int]],
    seconds: float,
    *,
    all_of: Iterable[str] = (),
    any_of: Iterable[str] = (),
) -> set[str]:
    """The processes whose heartbeat counter moves while we look.

    ``beats()`` gives the counter of each. Looks until all of ``all_of`` and one of ``any_of`` moved, but for
    ``seconds`` at most. A counter that began anew has moved too.
    """
    needed, enough = set(all_of), set(any_of)
    moved: set[str] = set()
    first = dict(beats())
    deadline = time.monotonic() + seconds
    while not (needed <= moved and (not enough or enough & moved)) and time.monotonic() < deadline:
        time.sleep(PACE)
        moved |= {name for name, beat in beats().items() if first.setdefault(name, beat) != beat}
    return moved
