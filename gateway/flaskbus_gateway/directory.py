"""What this gateway knows of the mounts: where they are, who serves them, how long the queue is.

It is read from the registry every second, and at once when the ``news`` channel says that something changed.
Whether an agent lives is judged here and not read: an agent is lost when this gateway, connected all the
while, saw its heartbeat counter stand still for one lease of its own monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

from flaskbus.keys import GROUP, Keys, MountKeys
from flaskbus.registry import AgentRecord, mount_from_key, parse_agents
from flaskbus.routing import Mount, Table
from flaskbus_gateway.link import Answer, AnswerError, Link, LinkError

log = logging.getLogger("flaskbus.gateway")

ROUND = 1.0
"""Seconds between two looks at the registry, if nothing is heard."""

PAUSE = 0.05
"""Seconds between two looks, however much is heard."""


@dataclass(slots=True)
class Pulse:
    """When an agent's heartbeat counter was last seen to change (monotonic seconds)."""

    beat: int
    seen: float


@dataclass(slots=True, eq=False)
class MountState:
    """One mount, as this gateway sees it."""

    mount: Mount
    keys: MountKeys
    pulses: dict[str, Pulse] = field(default_factory=dict)
    records: dict[str, AgentRecord] = field(default_factory=dict)
    waiting_elsewhere: int = 0
    """Requests in the queue that this process did not put there, at the last look."""
    mine: int = 0
    """Exchanges of this process that have no head yet."""
    alive: bool = False
    missing_since: float | None = None
    """Since when the broker does not know the mount any more (monotonic seconds)."""
    holders: dict[str, int] = field(default_factory=dict)
    """How many requests each consumer of the group holds, at the last look."""
    seen: dict[str, float] = field(default_factory=dict)
    """Consumers that hold something and are not listed, and since when (monotonic seconds)."""
    failing: str = ""
    """Why its agents do not start; empty where at least one may come."""

    @property
    def waiting(self) -> int:
        """Requests in the queue, at most; what other gateways did since the last look is not in it."""
        return self.waiting_elsewhere + self.mine

    def observe(self, records: Iterable[AgentRecord], now: float, lease: float) -> list[str]:
        """Take in the agents that are listed; returns the ids of those that are lost."""
        self.records = {record.id: record for record in records}
        lost = []
        for record in self.records.values():
            pulse = self.pulses.get(record.id)
            if pulse is None or pulse.beat != record.beat:
                self.pulses[record.id] = Pulse(record.beat, now)
            elif now - pulse.seen > (record.lease or lease):
                lost.append(record.id)
        for gone in self.pulses.keys() - self.records.keys():
            del self.pulses[gone]
        for agent_id in lost:
            del self.records[agent_id]
        self.alive = any(record.state == "ready" for record in self.records.values())
        states = {record.state for record in self.records.values()}
        failed = [record.reason for record in self.records.values() if record.state == "failed"]
        self.failing = failed[-1] if failed and states <= {"failed", "stopping"} else ""
        return lost

    def orphans(self, known: set[str], now: float, lease: float) -> list[str]:
        """Consumers that hold requests and are dead.

        One that was listed (is in ``known``) and is no longer was given up by its supervisor or for its
        heartbeat. One that was never listed is given a lease of time to appear.
        """
        absent = self.holders.keys() - self.records.keys()
        self.seen = {consumer: self.seen.get(consumer, now) for consumer in absent}
        return [name for name, since in self.seen.items() if name in known or now - since > lease]

    def forgive(self, now: float) -> None:
        """Nobody was observed while the broker was away: every lease begins anew."""
        for pulse in self.pulses.values():
            pulse.seen = now
        self.seen.clear()


class Directory:
    """The mounts of one namespace, kept up to date over the gateway's link.

    ``on_routes()`` is called when other mounts are routed to than before; ``on_change(state)`` when a mount
    gained its first agent, lost its last, or began to fail; ``on_doubtful(state, entries)`` with entries that
    outlived their group; ``on_orphan(state, consumer)`` is awaited for each dead agent that holds requests.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        lease: float,
        *,
        listen: Callable[[MountState], asyncio.Future[None]],
        unlisten: Callable[[MountState], None],
        on_routes: Callable[[], None],
        on_change: Callable[[MountState], None],
        on_doubtful: Callable[[MountState, list[Answer]], None],
        on_orphan: Callable[[MountState, str], Awaitable[None]],
    ) -> None:
        self.link = link
        self.keys = keys
        self.lease = lease
        self.listen = listen
        self.unlisten = unlisten
        self.on_routes = on_routes
        self.on_change = on_change
        self.on_doubtful = on_doubtful
        self.on_orphan = on_orphan
        self.table = Table(())
        self.states: dict[Mount, MountState] = {}
        self.known = asyncio.Event()
        """Set after the first complete look."""
        self._news = asyncio.Event()
        self._begun = 0
        self._done = 0
        self._progress = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def refresh(self) -> None:
        """Look now and not at the next round."""
        self._news.set()

    async def fresh(self) -> None:
        """Wait for a look that began after now: a mount that was claimed before is known then."""
        wanted = self._begun + 1
        self._news.set()
        async with self._progress:
            await self._progress.wait_for(lambda: self._done >= wanted)

    def forgive(self) -> None:
        now = self.link.loop.time()
        for state in self.states.values():
            state.forgive(now)

    async def _run(self) -> None:
        while True:
            self._news.clear()
            self._begun += 1
            try:
                await self.look()
            except LinkError:
                await self.link.up.wait()
                continue
            except AnswerError as error:
                log.warning("the registry cannot be read: %s", error)
            async with self._progress:
                self._done = self._begun
                self._progress.notify_all()
            await asyncio.sleep(PAUSE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), ROUND)

    async def look(self) -> None:
        """One look at the registry."""
        members: list[bytes] = await self.link.call("SMEMBERS", self.keys.mounts)
        mounts = {mount for member in members if (mount := mount_from_key(member))}
        states = {
            mount: self.states.get(mount) or MountState(mount, self.keys.of(mount.key)) for mount in mounts
        }
        answers = [(state, self._ask(state)) for state in states.values()]
        states |= self._missing(mounts)
        for state, futures in answers:
            owner, agents, length = await asyncio.gather(*futures[:3])
            try:
                delivered, _, _, holders = await futures[3]
            except AnswerError as error:
                if error.code != "NOGROUP":
                    raise
                delivered, holders = 0, None
                lost_group = True
            else:
                lost_group = False
            if owner is None:
                del states[state.mount]
                await self._forget(state)
                continue
            if lost_group:
                await self._repair(state)
            state.holders = {name.decode(): int(count) for name, count in holders or ()}
            state.waiting_elsewhere = max(0, length - delivered - state.mine)
            await self._observe(state, agents)
        await self._route(states)
        self.known.set()

    def _missing(self, listed: Collection[Mount]) -> dict[Mount, MountState]:
        """Mounts that the broker forgot while agents served them: those will claim them again within a lease.

        Until then their requests wait, and are not told that there is no such mount.
        """
        now, kept = self.link.loop.time(), {}
        for mount, state in self.states.items():
            if mount in listed:
                state.missing_since = None
            elif state.alive:
                if state.missing_since is None:
                    log.warning("the broker has forgotten %s", mount.name)
                    state.missing_since = now
                if now - state.missing_since <= self.lease:
                    kept[mount] = state
        return kept

    def unmounted(self, key: str) -> None:
        """Somebody removed the mount on purpose."""
        for state in self.states.values():
            if state.mount.key == key:
                state.alive = False
        self.refresh()

    def _ask(self, state: MountState) -> list[asyncio.Future[Answer]]:
        keys = state.keys
        return [
            self.link.call("HGET", keys.owner, "name"),
            self.link.call("HGETALL", keys.agents),
            self.link.call("XLEN", keys.requests),
            self.link.call("XPENDING", keys.requests, GROUP),
        ]

    async def _observe(self, state: MountState, flat: list[bytes]) -> None:
        before = (state.alive, state.failing)
        known = set(state.pulses)
        now = self.link.loop.time()
        records = parse_agents(dict(zip(flat[::2], flat[1::2], strict=True)))
        for agent_id in state.observe(records, now, self.lease):
            log.warning(
                "agent %s of %s has sent no heartbeat for %g s", agent_id, state.mount.name, self.lease
            )
            await self.link.script("leave", [state.keys.agents, state.keys.requests], [GROUP, agent_id])
        if (state.alive, state.failing) != before:
            self.on_change(state)
        for consumer in state.orphans(known, now, self.lease):
            await self.on_orphan(state, consumer)

    async def _route(self, states: dict[Mount, MountState]) -> None:
        """A mount is routed to only once this process hears its doorbell."""
        new = states.keys() - self.states.keys()
        if new:
            await asyncio.wait([self.listen(states[mount]) for mount in new], timeout=2.0)
        for mount in self.states.keys() - states.keys():
            self.unlisten(self.states[mount])
        changed = states.keys() != self.states.keys()
        if changed:
            self.table = Table(states)
        self.states = states
        if changed:
            self.on_routes()

    async def _forget(self, state: MountState) -> None:
        outcome = await self.link.script(
            "forget", [state.keys.owner, state.keys.agents, state.keys.requests], []
        )
        if outcome == b"gone":
            await self.link.call("SREM", self.keys.mounts, state.mount.key)
            log.info("%s is no longer mounted", state.mount.name)

    async def _repair(self, state: MountState) -> None:
        while True:
            outcome, entries = await self.link.script("repair", [state.keys.requests], [GROUP, 100])
            if outcome != b"doubtful":
                return
            log.warning(
                "%s lost its consumer group; %d requests are answered 502", state.mount.name, len(entries)
            )
            self.on_doubtful(state, entries)
