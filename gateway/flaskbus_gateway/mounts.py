"""One mount as this gateway sees it, and whether its agents live."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flaskbus.idempotency import Policy
from flaskbus.keys import MountKeys
from flaskbus.registry import AgentRecord
from flaskbus.routing import Mount
from flaskbus.signing import Seal
from flaskbus_gateway.admission import Queue


@dataclass(slots=True)
class Pulse:
    """When an agent's heartbeat counter was last seen to change (monotonic seconds)."""

    beat: int
    seen: float


@dataclass(slots=True, eq=False, weakref_slot=True)
class MountState:
    """One mount, as this gateway sees it."""

    mount: Mount
    keys: MountKeys
    seal: Seal | None = None
    """Signs what goes there and checks what comes from there; ``None`` where this gateway signs nothing."""
    pulses: dict[str, Pulse] = field(default_factory=dict)
    records: dict[str, AgentRecord] = field(default_factory=dict)
    queue: Queue = field(default_factory=Queue)
    held_since: float | None = None
    """Since when no agent has been ready (monotonic seconds)."""
    looked: float = 0.0
    """When it was last seen as a whole (monotonic seconds)."""
    known_until: float = 0.0
    """Until when it stays known without agents, by this gateway's own clock (monotonic seconds)."""
    missing_since: float | None = None
    """Since when the broker does not know the mount any more (monotonic seconds)."""
    holders: dict[str, int] = field(default_factory=dict)
    """How many requests each consumer of the group holds, at the last look."""
    seen: dict[str, float] = field(default_factory=dict)
    """Consumers that hold something and are not listed, and since when (monotonic seconds)."""
    unlike: set[str] = field(default_factory=set)
    """Agents that are ready, and sign otherwise than this gateway does: neither believes the other."""
    failing: str = ""
    """Why its agents do not start; empty where at least one may come."""
    may_return_until: float = 0.0
    """Until when agents that serve it still may claim it again after it was removed (monotonic seconds)."""
    removed: bool = False
    """Whether it is no mount any more, and nobody will take what waits there."""
    owner: bytes | None = None
    """The name of the app whose mount it is, where the broker knows that."""
    policy: Policy | None = None
    """What its agents ask of requests with an Idempotency-Key; ``None`` where they did not opt in."""

    @property
    def alive(self) -> bool:
        """Whether an agent is ready."""
        return self.queue.alive_since is not None

    @property
    def keeps_answers(self) -> bool:
        """Whether every agent settles the record of an Idempotency-Key: those of wire version 1 know of none."""
        return all(record.wire > 1 for record in self.records.values())

    @property
    def streams(self) -> bool:
        """Whether every agent takes bodies in parts: those of wire version 1 do not."""
        return self.keeps_answers

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
        for record in self.records.values():
            self.known_until = max(self.known_until, now + record.mount_ttl)
        self._count_threads(now)
        states = {record.state for record in self.records.values()}
        failed = [record.reason for record in self.records.values() if record.state == "failed"]
        self.failing = failed[-1] if failed and states <= {"failed", "stopping"} else ""
        return lost

    def losses(self, lease: float) -> Iterable[float]:
        """When each agent is lost if it sends no heartbeat any more (monotonic seconds)."""
        return (self.pulses[record.id].seen + (record.lease or lease) for record in self.records.values())

    def judge_signing(self) -> list[str]:
        """The ids of agents that were not known to sign otherwise than this gateway does."""
        mine = self.seal.fingerprint if self.seal else ""
        ready = (record for record in self.records.values() if record.state == "ready")
        unlike = {record.id for record in ready if mine not in record.signing.split(",")}
        new = unlike - self.unlike
        self.unlike = unlike
        return sorted(new)

    def _count_threads(self, now: float) -> None:
        ready = [record.threads for record in self.records.values() if record.state == "ready"]
        queue, self.looked = self.queue, now
        queue.threads = sum(ready)
        if not ready:
            self.ended(now)
        elif queue.alive_since is None:
            queue.goes_on(now, 0.0 if self.held_since is None else now - self.held_since)
            self.held_since = None

    def ended(self, now: float) -> None:
        """No agent is ready."""
        self.queue.pauses()
        self.held_since = now if self.held_since is None else self.held_since

    def left(self, now: float, lease: float) -> None:
        """It is no mount any more. Should it come back, its agents get a lease of time to appear, as new ones do."""
        self.ended(now)
        # Every quarter of a lease an agent claims what it serves.
        self.may_return_until = now + lease / 3 if self.records else now
        self.missing_since, self.known_until, self.failing = None, 0.0, ""
        for forgotten in (self.pulses, self.records, self.holders, self.seen):
            forgotten.clear()
        self.unlike.clear()

    def orphans(self, known: set[str], now: float, lease: float) -> list[str]:
        """Consumers that hold requests and are dead.

        One that was listed (is in ``known``) and is no longer was given up by its supervisor or for its
        heartbeat. One that was never listed is given a lease of time to appear.
        """
        absent = self.holders.keys() - self.records.keys()
        self.seen = {consumer: self.seen.get(consumer, now) for consumer in absent}
        return [name for name, since in self.seen.items() if name in known or now - since > lease]

    def forgive(self, now: float) -> None:
        """Nobody could be observed for a while: every lease, and the age of the queue, begin anew."""
        for pulse in self.pulses.values():
            pulse.seen = now
        self.seen.clear()
        if self.alive:
            self.queue.goes_on(now, now - self.looked)
        self.looked = now


class Queues:
    """Where the requests of a whole mount wait: in its queue, or in those of its partitions."""

    __slots__ = ("_turn", "first", "states")

    def __init__(self, states: Sequence[MountState]) -> None:
        self.states = states
        self._turn = 0
        self.first = states[0]
        """For requests that have to find each other."""

    def next(self) -> MountState:
        """For the next request: partitions take turns, as far as agents serve them."""
        states = self.states
        if len(states) > 1:
            self._turn = turn = (self._turn + 1) % len(states)
            for state in (*states[turn:], *states[:turn]):
                if state.alive:
                    return state
        return self.first
