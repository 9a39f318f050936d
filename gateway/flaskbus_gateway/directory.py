"""What this gateway knows of the mounts: where they are, who serves them, how long the queue is.

It is read from the registry every second, and at once when the ``news`` channel says that something changed.
Whether an agent lives is judged here and not read: an agent is lost when this gateway, connected all the
while, saw its heartbeat counter stand still for one lease of its own monotonic clock.

Each look begins with this gateway's own heartbeat. Where that is refused (a replica, a full disk) or the look
takes long (a broker that is frozen), agents could not send theirs either: nobody is lost for it, and every
lease begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

from flaskbus.broker import parse_info
from flaskbus.idempotency import Policy
from flaskbus.keys import GROUP, Keys
from flaskbus.memory import room
from flaskbus.registry import mount_from_key, parse_agents
from flaskbus.routing import Mount, Table
from flaskbus.signing import Seal
from flaskbus_gateway.admission import Look, entry_id
from flaskbus_gateway.link import Answer, AnswerError, Link, LinkError
from flaskbus_gateway.mounts import MountState as MountState
from flaskbus_gateway.mounts import Queues
from flaskbus_gateway.trouble import Troubles

log = logging.getLogger("flaskbus.gateway")

ROUND = 0.8
"""Seconds between two looks at the registry, if nothing is heard, and no agent is to be lost before."""

TICK = 0.001
"""Seconds after which a moment has passed for sure."""

PAUSE = 0.05
"""Seconds between two looks, however much is heard."""

STALL = 1.0
"""Seconds after which an agent's heartbeat fails for want of an answer; what takes a gateway as long was a stall."""


_UNLIKE = (
    "agent %s of %s has not the key with which this gateway signs: it will refuse every request; "
    "its key is printed by: flaskbus key %s",
    "agent %s of %s takes signed requests only, and this gateway has no --signing-secret: it will refuse every "
    "request to %s",
)


class Directory:
    """The mounts of one namespace, kept up to date over the gateway's link.

    ``on_routes()`` is called when other mounts are routed to than before; ``on_change(state)`` when a mount
    gained its first agent, lost its last, began to fail or was removed; ``on_doubtful(state, entries)`` with entries
    that outlived their group; ``on_orphan(state, consumer)`` is awaited for each dead agent that holds requests;
    ``on_stall()`` when nobody could be observed; ``on_memory(info)`` with the broker's account of its memory,
    empty where it may not be asked. ``heartbeat()`` sends this gateway's own; ``seal(key)`` signs for a mount.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        lease: float,
        *,
        listen: Callable[[MountState], asyncio.Future[None]],
        unlisten: Callable[[MountState], None],
        on_routes: Callable[[], object],
        on_change: Callable[[MountState], None],
        on_doubtful: Callable[[MountState, list[Answer]], None],
        on_orphan: Callable[[MountState, str], Awaitable[None]],
        on_stall: Callable[[], None],
        on_memory: Callable[[Mapping[str, Any]], None],
        heartbeat: Callable[[], Coroutine[Any, Any, None]],
        seal: Callable[[str], Seal | None],
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
        self.on_stall = on_stall
        self.on_memory = on_memory
        self.heartbeat = heartbeat
        self.seal = seal
        self.table = Table(())
        self.states: dict[Mount, MountState] = {}
        self.queues: dict[Mount, Queues] = {}
        """Of whole mounts."""
        self._states: WeakValueDictionary[Mount, MountState] = WeakValueDictionary()
        """Also of mounts that are none now, as long as exchanges of theirs are open: they may come back."""
        self._left: set[Mount] = set()
        """Mounts that are none now, and where requests wait that have to hear of it."""
        self.known = asyncio.Event()
        """Set after the first complete look."""
        self._troubles = Troubles(log)
        self._unforeseen: set[type[Exception]] = set()
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
        """Nobody could be observed for a while."""
        now = self.link.loop.time()
        for state in self.states.values():
            state.forgive(now)
        self.on_stall()

    def unmounted(self, key: str) -> None:
        """Somebody removed the mount, or a partition, on purpose."""
        for state in self.states.values():
            if state.mount.key == key:
                state.ended(self.link.loop.time())
                state.known_until = 0.0
        self.refresh()

    async def _run(self) -> None:
        while True:
            self._news.clear()
            self._begun += 1
            try:
                await self.look()
            except LinkError:
                await asyncio.sleep(PAUSE)
                await self.link.up.wait()
                continue
            except Exception as error:
                # A defect, but not the end: without looks no mount would come or go any more.
                if type(error) not in self._unforeseen:
                    self._unforeseen.add(type(error))
                    log.exception("a look at the mounts failed; it is tried again")
                await asyncio.sleep(ROUND)
                continue
            async with self._progress:
                self._done = self._begun
                self._progress.notify_all()
            await asyncio.sleep(PAUSE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._until_next_look())

    def _until_next_look(self) -> float:
        """Seconds. Only the look that sees an agent's last heartbeat may be late, not the one that misses the next."""
        now = asyncio.get_running_loop().time()
        losses = chain.from_iterable(state.losses(self.lease) for state in self.states.values())
        return min([ROUND, *(loss - now + TICK for loss in losses if loss > now)])

    # One look

    async def look(self) -> None:
        """One look at the registry and the queues."""
        began = self.link.loop.time()
        beats = await self._beat()
        listed = await self._listed()
        await self._look_at_memory()
        states = {mount: self._state(mount) for mount in listed | self.states.keys() | self._left}
        views = await asyncio.gather(*map(self._view, states.values()), return_exceptions=True)
        if not beats or self.link.loop.time() - began > min(STALL, self.lease / 2):
            self.forgive()
        kept = {}
        for state, view in zip(states.values(), views, strict=True):
            try:
                if isinstance(view, BaseException):
                    raise view
                if await self._take_in(state, *view, listed=state.mount in listed):
                    kept[state.mount] = state
                self._troubles.over(state.mount.name)
            except (AnswerError, ValueError, TypeError) as error:
                # One mount's trouble, or what a stranger wrote there, is not another's. What it says of its agents
                # is not known.
                self._troubles.say(state.mount.name, error)
                state.forgive(self.link.loop.time())
                if state.mount in self.states:
                    kept[state.mount] = state
        await self._route(kept)
        self.known.set()

    def _state(self, mount: Mount) -> MountState:
        state = self._states.get(mount)
        if state is None:
            state = MountState(mount, self.keys.of(mount.key), self.seal(mount.whole.key))
            self._states[mount] = state
        return state

    async def _beat(self) -> bool:
        """Send our own heartbeat; whether agents can send theirs."""
        about = "the broker takes no heartbeats"
        try:
            await self.heartbeat()
        except AnswerError as error:
            self._troubles.say(about, error)
            # What is wrong with our own record, or our own rights, does not keep agents from theirs.
            return error.code in ("WRONGTYPE", "NOPERM")
        self._troubles.over(about)
        return True

    async def _listed(self) -> set[Mount]:
        """The mounts in the registry; those that are known, where it cannot be read."""
        about = "the mounts cannot be read"
        try:
            members: list[bytes] = await self.link.call("SMEMBERS", self.keys.mounts)
        except AnswerError as error:
            self._troubles.say(about, error)
            return set(self.states)
        self._troubles.over(about)
        return {mount for member in members if (mount := mount_from_key(member))}

    async def _look_at_memory(self) -> None:
        try:
            told = [parse_info(await one.call("INFO", "memory")) for one in self.link.each()]
            # Of a cluster, the node that is nearest to its limit stands for all.
            self.on_memory(min(told, key=room, default={}))
        except AnswerError:  # our user may not ask
            self.on_memory({})

    async def _view(self, state: MountState) -> tuple[list[bytes | None], list[bytes], int, Answer]:
        """Owner and settings, agents, and queue of a mount."""
        owner, agents, (begun, found) = await asyncio.gather(
            self.link.call("HMGET", state.keys.owner, "name", *Policy.FIELDS),
            self.link.call("HGETALL", state.keys.agents),
            self._measure(state),
        )
        return owner, agents, begun, found

    async def _measure(self, state: MountState) -> tuple[int, Answer]:
        begun = state.queue.begin()  # and at once the command: what was sent before is in its answer
        return begun, await self.link.script("look", [state.keys.requests], [GROUP])

    async def _take_in(
        self,
        state: MountState,
        told: list[bytes | None],
        agents: list[bytes],
        begun: int,
        found: Answer,
        *,
        listed: bool,
    ) -> bool:
        """What was seen of a mount; whether it is still one."""
        owner, *policy = told
        state.owner = owner
        if owner is None and not (self._comes_back(state) or (listed and self._is_known(state))):
            outcome = await self._forget(state)
            left = state.mount not in self.states
            if outcome == b"kept" and found == b"gone":
                await self._repair(state, [])
            elif left and outcome == b"kept" and not _read(found).pending:
                state.removed = self.link.loop.time() >= state.may_return_until
                self.on_change(state)
            (self._left.add if outcome == b"kept" else self._left.discard)(state.mount)
            return False
        self._left.discard(state.mount)
        if owner is not None:
            state.missing_since, state.removed = None, False
            if not listed:
                log.warning("%s was struck off the list of mounts; it is listed again", state.mount.name)
                await self.link.script("enlist", [self.keys.mounts], [state.mount.key])
        if found == b"gone":
            # It may have been removed between two answers of this look.
            await self._repair(state, [] if owner is None else [state.keys.owner])
            found = [0, 0, []]
        # Agents have ASCII names; another consumer's is nobody that could be found dead.
        state.holders = {name.decode(): int(count) for name, count in found[2] if name.isascii()}
        if owner is not None:
            await self._observe(state, agents)
            state.policy = Policy.load(*policy) if state.keeps_answers else None
        state.queue.look(begun, _read(found), self.link.loop.time())
        return True

    def _comes_back(self, state: MountState) -> bool:
        """Whether the broker forgot a mount while agents served it: they will claim it again within a lease.

        Until then its requests wait, and are not told that there is no such mount.
        """
        now = self.link.loop.time()
        if state.missing_since is None and state.alive:
            log.warning("the broker has forgotten %s", state.mount.name)
            state.missing_since = now
        return state.alive and state.missing_since is not None and now - state.missing_since <= self.lease

    def _is_known(self, state: MountState) -> bool:
        """Whether a mount without agents is only forgotten because the broker's clock jumped."""
        return not state.alive and self.link.loop.time() < state.known_until

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
        for agent_id in state.judge_signing():
            log.error(_UNLIKE[state.seal is None], agent_id, state.mount.name, state.mount.whole.name)
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
            self.states[mount].left(self.link.loop.time(), self.lease)
        changed = states.keys() != self.states.keys()
        if changed:
            self.table = Table(states)
        self.states = states
        self.queues = _queues(states, self.queues)
        if changed:
            self.on_routes()

    async def _forget(self, state: MountState) -> bytes:
        outcome = await self.link.script(
            "forget", [state.keys.owner, state.keys.agents, state.keys.requests], []
        )
        if outcome == b"gone":
            await self.link.call("SREM", self.keys.mounts, state.mount.key)
            log.info("%s is no longer mounted", state.mount.name)
        return bytes(outcome)

    async def _repair(self, state: MountState, claimed: list[str]) -> None:
        while True:
            keys = [state.keys.requests, *claimed]
            outcome, entries = await self.link.script("repair", keys, [GROUP, 100])
            if outcome != b"doubtful":
                return
            log.warning(
                "%s lost its consumer group; %d requests are answered 502", state.mount.name, len(entries)
            )
            self.on_doubtful(state, entries)


def _queues(states: Mapping[Mount, MountState], before: Mapping[Mount, Queues]) -> dict[Mount, Queues]:
    """The queues of each whole mount. A partition that belongs to another app than the first is none of them."""
    found: dict[Mount, list[MountState]] = {}
    for mount in sorted(states):
        state, queues = states[mount], found.setdefault(mount.whole, [])
        if not queues or None in (state.owner, queues[0].owner) or state.owner == queues[0].owner:
            queues.append(state)
    return {
        mount: known if (known := before.get(mount)) and known.states == queues else Queues(queues)
        for mount, queues in found.items()
    }


def _read(found: list[Answer]) -> Look:
    """The answer of ``look.lua``."""
    length, pending, _, *waiting = found
    if not waiting:
        return Look(length, pending)
    added, last, head = waiting
    return Look(length, pending, added, entry_id(last), entry_id(head))
