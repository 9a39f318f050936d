"""Which mounts there are, who owns them, and which agents and gateways say that they live.

Agents write here (through their supervisor), gateways and tools read. A record is JSON, so that a person
can read it with ``redis-cli HGETALL``. Being listed is not being alive: an observer that stays connected
knows that from the heartbeat counter (see :mod:`flaskbus_gateway.directory`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import redis

from flaskbus.broker import run_script
from flaskbus.errors import MountTaken, UsageError
from flaskbus.idempotency import Policy
from flaskbus.keys import GROUP, Keys
from flaskbus.messages import WIRE_VERSION
from flaskbus.routing import Mount

UNMOUNTED = "-"
"""What stands before the mount's key in the news of its end; there is nothing before it in any other news."""

State = Literal["starting", "ready", "stopping", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """One agent process on one mount.

    ``beat`` counts heartbeats, and ``lease`` is how many seconds it may stand still; ``mount_ttl`` is how many the
    mount stays known after it; ``at`` is the writer's wall clock in seconds, for people only.
    ``key_fingerprint`` tells apart agents of one app that were given different secret keys, ``signing`` those
    with different signing keys (it names each key that they have, separated by commas; empty: none).
    ``wire`` is the version that it speaks; agents of version 1 do not say it.
    """

    id: str
    name: str
    host: str
    pid: int
    supervisor: int = 0
    version: str = ""
    python: str = ""
    code: str = ""
    key_fingerprint: str = ""
    signing: str = ""
    threads: int = 0
    busy: int = 0
    beat: int = 0
    lease: float = 0.0
    mount_ttl: float = 0.0
    state: State = "starting"
    reason: str = ""
    at: float = 0.0
    wire: int = WIRE_VERSION

    def dump(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def load(cls, data: bytes | str) -> AgentRecord | None:
        """``None`` for what is not such a record; members that a newer version added are left out.

        Every member has its type: what an agent of one mount writes must not stop a gateway that serves others.
        """
        try:
            members = json.loads(data)
            if not isinstance(members, dict):
                return None
            known = {name: members[name] for name in _MEMBERS if name in members}
            for name, value in known.items():
                if type(value) not in _MEMBERS[name]:
                    return None
                if isinstance(value, str):
                    value.encode()  # JSON can name half a surrogate pair, which nothing can be sent with
            return cls(**{"wire": 1, **known})
        except (ValueError, TypeError, RecursionError):
            return None


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "State": (str,)}
_MEMBERS = {item.name: _TYPES[str(item.type)] for item in fields(AgentRecord)}


def parse_agents(flat: Mapping[Any, Any]) -> list[AgentRecord]:
    """HGETALL of an agents hash -> its readable records, by id."""
    records = (AgentRecord.load(value) for value in flat.values())
    return sorted((record for record in records if record), key=lambda record: record.id)


def mount_from_key(key: bytes | str) -> Mount | None:
    """A member of the set of mounts -> mount; ``None`` for what was not written by us."""
    try:
        return Mount.from_key(key.decode() if isinstance(key, bytes) else key)
    except (UsageError, UnicodeDecodeError):
        return None


class Registry:
    """Reads and writes the registry through a redis-py client; raises redis-py's errors."""

    def __init__(self, client: redis.Redis, keys: Keys):
        self.client = client
        self.keys = keys

    def claim(
        self,
        mount: Mount,
        record: AgentRecord,
        *,
        replace: bool = False,
        mount_ttl: float = 3600.0,
        policy: Policy | None = None,
        became_ready: bool = False,
    ) -> None:
        """Register an agent, or renew it: the heartbeat.

        ``policy`` is what the agent asks of its mount. It holds from when the agent ``became_ready``, which it
        says once, until another does.

        The first claim makes the mount known to every gateway. Raises
        :class:`~flaskbus.errors.MountTaken` where an app of another name owns the mount.
        """
        keys = self.keys.of(mount.key)
        outcome, owner = run_script(
            self.client,
            "claim",
            [keys.owner, keys.agents, keys.requests],
            [
                record.name,
                int(replace),
                int(mount_ttl * 1000),
                GROUP,
                record.id,
                record.dump(),
                int(record.state == "ready"),
                int(became_ready),
                *(part for pair in (policy.fields() if policy else {}).items() for part in pair),
            ],
        )
        if outcome == b"taken":
            raise MountTaken(
                f"{mount.name} belongs to the app {owner.decode()!r}, not to {record.name!r}; "
                "give this app another prefix, give both the same --name, or hand the mount over with --replace"
            )
        if outcome == b"claimed" or record.beat <= 1:
            self._enlist(mount)
            self.client.publish(self.keys.news, mount.key)
        elif record.beat % 4 == 0:
            # What FLUSHALL or a failover forgot is known again soon.
            self._enlist(mount)

    def _enlist(self, mount: Mount) -> None:
        run_script(self.client, "enlist", [self.keys.mounts], [mount.key])

    def announce(self, mount: Mount) -> None:
        """Make gateways look at the mount now and not at their next round."""
        self.client.publish(self.keys.news, mount.key)

    def leave(self, mount: Mount, agent_id: str) -> int:
        """Remove an agent; how many requests it still holds (0 to 1000)."""
        keys = self.keys.of(mount.key)
        _, pending = run_script(self.client, "leave", [keys.agents, keys.requests], [GROUP, agent_id])
        self.client.publish(self.keys.news, mount.key)
        return int(pending)

    def mounts(self) -> list[Mount]:
        members = self.client.smembers(self.keys.mounts)
        found = (mount_from_key(member) for member in members)
        return sorted((mount for mount in found if mount), key=lambda mount: mount.name)

    def owner(self, mount: Mount) -> str | None:
        """The name of the app that owns the mount, or ``None`` where it is not known (any longer)."""
        name = self.client.hget(self.keys.of(mount.key).owner, "name")
        return None if name is None else _text(name)

    def agents(self, mount: Mount) -> list[AgentRecord]:
        return parse_agents(self.client.hgetall(self.keys.of(mount.key).agents))

    def gateways(self) -> dict[str, dict[str, Any]]:
        """Process id on the bus -> its record."""
        found = {}
        for name, value in self.client.hgetall(self.keys.gateways).items():
            try:
                found[_text(name)] = dict(json.loads(value))
            except (ValueError, TypeError):
                continue
        return found

    def unmount(self, mount: Mount) -> None:
        """Forget the mount: gateways answer 404 from their next round on. Its agents, if any, bring it back."""
        keys = self.keys.of(mount.key)
        self.client.delete(keys.owner, keys.agents)
        # With requests still waiting, gateways forget it when the last of them is gone.
        if run_script(self.client, "forget", [keys.owner, keys.agents, keys.requests], []) == b"gone":
            self.client.srem(self.keys.mounts, mount.key)
        self.client.publish(self.keys.news, UNMOUNTED + mount.key)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
