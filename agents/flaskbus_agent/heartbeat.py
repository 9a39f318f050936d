"""The agent's place in the registry, kept by the supervisor for all of its workers.

A worker cannot lose its lease to its own code: whatever holds the interpreter there, the supervisor beats on.
A broker that is away costs one log line, at most a second a try, and nothing else.
"""

from __future__ import annotations

import platform
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from logging import Logger
from typing import Protocol

import redis

from flaskbus import wire
from flaskbus.acl import mend
from flaskbus.broker import Unavailable, check, connect, mask
from flaskbus.errors import MountTaken, StartError
from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.signing import parse_keys, seals_of
from flaskbus_agent.board import Board, State

TIMEOUT = 1.0
"""Seconds that one command may take: signals wait for as long."""
BACKOFF = (0.1, 1.0)
"""First and longest pause in seconds between tries; the longest keeps recovery within two seconds."""


@dataclass(frozen=True, slots=True)
class MountedApp:
    """One app of this agent: what is imported, where it hangs, and the name under which it owns the mount."""

    mount: Mount
    target: str
    name: str


class Member(Protocol):
    """A worker process, as the registry sees it."""

    board: Board

    @property
    def agent_id(self) -> str: ...
    @property
    def process_id(self) -> int: ...


class Preloader:
    """The supervisor itself, as the member that failed to import the app before any fork."""

    def __init__(self, process_id: int, reason: str):
        self.process_id = process_id
        self.agent_id = make_agent_id(process_id, secrets.token_hex(2))
        self.board = Board()
        self.board.write({"reason": reason})


def make_agent_id(process_id: int, token: str) -> str:
    """The name of a process on the bus; the token tells it from another that once had its pid."""
    return f"{socket.gethostname()}-{process_id}-{token}"


class Heartbeat:
    """Claims every mount for every worker, again and again.

    Nothing here raises because the broker is away; every change that could not be made is made later.
    """

    def __init__(self, settings: AgentSettings, apps: Sequence[MountedApp], supervisor: int, log: Logger):
        self.apps = list(apps)
        self.connected = False
        self._settings = settings
        self._log = log
        self._host = socket.gethostname()
        self._version = version("flaskbus")
        self._supervisor = supervisor
        seals = seals_of(parse_keys(settings.signing_key), [app.mount.whole.key for app in apps])
        self._signing = {key: ",".join(seal.fingerprint for seal in mine) for key, mine in seals.items()}
        self._client = connect(settings.redis, timeout=TIMEOUT, name=f"agent-{self._host}-{supervisor}")
        self._registry = Registry(self._client, Keys(settings.namespace))
        self._owned: set[Mount] = set()
        self._dropped: list[Mount] = []
        self._complete = False  # whether all was claimed once
        self._left: dict[str, list[Mount]] = {}
        self._seen: dict[str, State] = {}
        self._due = 0.0
        self._pause = BACKOFF[0]
        self._trouble = ""

    def beat(self, members: Iterable[Member], now: float) -> list[tuple[MountedApp, MountTaken]]:
        """Renew what is due at ``now`` (monotonic seconds); the apps whose mount belongs to another.

        Raises :class:`~flaskbus.errors.StartError` where a broker that answers for the first time is unfit.
        """
        members = list(members)
        states = {member.agent_id: member.board.state for member in members}
        if self._trouble or not self.connected:
            if now < self._due:
                return []
        elif now < self._due and states == self._seen and not self._left:
            return []
        try:
            if not self.connected:
                check(self._client, self._settings.redis)
                self.connected = True
            taken = self._round(members, states)
        except redis.exceptions.NoPermissionError as error:
            if not self._complete:
                self.connected = bool(self._owned)  # else there is nothing to leave, and no right to
                raise StartError(
                    f"the broker at {mask(self._settings.redis)} refuses what an agent needs: {self._explained(error)}"
                ) from None
            self._failed(error)
            return []
        except (*Unavailable, redis.exceptions.RedisError) as error:
            self._failed(error)
            return []
        self._complete = self._complete or bool(members)
        if self._trouble:
            self._log.info("The broker at %s is back", mask(self._settings.redis))
        self._trouble, self._pause = "", BACKOFF[0]
        self._seen = states
        self._due = now + self._settings.lease / 4
        return taken

    def _failed(self, error: Exception) -> None:
        if not self._trouble:
            self._log.error(
                "The broker at %s cannot be used: %s; trying again until it can",
                mask(self._settings.redis),
                self._explained(error),
            )
        self._trouble = str(error) or type(error).__name__
        self._due = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, BACKOFF[1])

    def _explained(self, error: Exception) -> str:
        text = str(error).rstrip(".")
        return text + mend(text, [app.mount.name for app in self.apps])

    def _round(self, members: list[Member], states: dict[str, State]) -> list[tuple[MountedApp, MountTaken]]:
        self._flush()
        taken: dict[Mount, tuple[MountedApp, MountTaken]] = {}
        trouble: redis.exceptions.ResponseError | None = None
        for member in members:
            beat = member.board.next_beat()
            for app in self.apps:
                if app.mount in taken:
                    continue
                # Only once: two agents that both replace would take the mount from each other for ever.
                first = self._settings.replace and app.mount not in self._owned
                record = replace(self._record(app, member, states[member.agent_id]), beat=beat)
                try:
                    self._registry.claim(
                        app.mount,
                        record,
                        replace=first,
                        mount_ttl=self._settings.mount_ttl,
                        policy=self._settings.policy,
                        became_ready=record.state == "ready" and self._seen.get(member.agent_id) != "ready",
                    )
                except MountTaken as error:
                    taken[app.mount] = app, error
                    continue
                except redis.exceptions.ResponseError as error:
                    trouble = error  # of this mount's keys, perhaps: the others keep their leases
                    continue
                self._owned.add(app.mount)
                if self._seen.get(member.agent_id) not in (None, record.state):
                    self._registry.announce(app.mount)
            member.board.claimed = member.board.claimed or trouble is None
        if trouble is not None:
            raise trouble
        return list(taken.values())

    def _record(self, app: MountedApp, member: Member, state: State) -> AgentRecord:
        facts = member.board.read()
        return AgentRecord(
            id=member.agent_id,
            name=app.name,
            host=self._host,
            pid=member.process_id,
            supervisor=self._supervisor,
            version=self._version,
            python=platform.python_version(),
            code=facts.get("code", {}).get(app.mount.whole.key, ""),
            signing=self._signing.get(app.mount.whole.key, ""),
            key_fingerprint=facts.get("keys", {}).get(app.mount.whole.key, ""),
            threads=self._settings.threads,
            busy=member.board.busy,
            lease=self._settings.lease,
            mount_ttl=self._settings.mount_ttl,
            wire=wire.VERSION,
            state=state,
            reason=facts.get("reason", ""),
            at=time.time(),
        )

    def partitions(self, mount: Mount) -> list[MountedApp]:
        """What is served of a whole mount, by any of its partitions."""
        return [app for app in self.apps if app.mount.whole == mount.whole]

    def drop(self, app: MountedApp, members: Iterable[Member]) -> None:
        """The mount is another app's from now on."""
        self.apps.remove(app)
        self._dropped.append(app.mount)
        for member in members:
            self._left.setdefault(member.agent_id, []).append(app.mount)

    def leave(self, member: Member) -> None:
        """A worker is gone: say so at once, or as soon as the broker is back."""
        # A mount that was dropped knows us again if we have asked what we hold there.
        mounts = [*(app.mount for app in self.apps if app.mount in self._owned), *self._dropped]
        self._left.setdefault(member.agent_id, []).extend(mounts)
        self._seen.pop(member.agent_id, None)
        if not self._trouble and self.connected:
            try:
                self._flush()
            except (*Unavailable, redis.exceptions.RedisError) as error:
                self._failed(error)

    def _flush(self) -> None:
        for agent_id, mounts in list(self._left.items()):
            while mounts:
                pending = self._registry.leave(mounts[-1], agent_id)
                if pending:
                    self._log.warning(
                        "%s left %d unfinished requests on %s; the gateways see to them",
                        agent_id,
                        pending,
                        mounts[-1].name,
                    )
                mounts.pop()
            del self._left[agent_id]

    def forsake(self) -> None:
        """Close this process's copy of the connection, after a fork; the supervisor's stays open."""
        self._client.close()

    def close(self) -> None:
        """Say what is left to say, once, and hang up."""
        if self._left and self.connected:
            try:
                self._flush()
            except (*Unavailable, redis.exceptions.RedisError) as error:
                self._log.warning("The broker could not be told that this agent left: %s", error)
        self._client.close()
