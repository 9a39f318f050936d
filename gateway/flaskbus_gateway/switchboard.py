"""All exchanges of one gateway process: who waits for what, over two connections however many they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from flaskbus import __version__, errors, wire
from flaskbus.keys import LIST_TTL_MS, Keys
from flaskbus.memory import room
from flaskbus.messages import Failure
from flaskbus.registry import UNMOUNTED
from flaskbus.settings import GatewaySettings
from flaskbus.signing import make_seal, secret_fingerprint
from flaskbus_gateway.admission import Admission
from flaskbus_gateway.cluster_link import link_to
from flaskbus_gateway.directory import STALL, Directory, MountState
from flaskbus_gateway.doorbell import DoorbellLink
from flaskbus_gateway.entries import Locator
from flaskbus_gateway.exchange import Exchange
from flaskbus_gateway.link import Answer, AnswerError, LinkError
from flaskbus_gateway.peers import Peers, stem
from flaskbus_gateway.reaper import Reaper

if TYPE_CHECKING:
    from flaskbus_gateway.prompt import Prompt

log = logging.getLogger("flaskbus.gateway")

THAW = 5
"""Leases that the replies to a dead gateway are kept: it may have been frozen, and come back for them."""


class Switchboard:
    """Opens exchanges and brings them what arrives.

    One link for commands, one for doorbells. A sweep each second looks at every list whose ring may have been
    missed, so that a half-open connection costs time and no reply.
    """

    BROKER_WAIT = 5.0
    """Seconds that an exchange waits for a broker that is away."""

    SWEEP = 1.0

    COLLECT = 0.01
    """Seconds that lists which are not needed any more are gathered before they are deleted."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
        self.process = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(6)}"
        self.keys = Keys(settings.namespace)
        self.max_frame = wire.max_frame(settings.reply_limit)
        self.exchanges: dict[str, Exchange] = {}
        self.prompts: dict[str, Prompt] = {}
        """Requests that have no exchange yet."""
        self._incarnation = ""
        self._serial = 0
        self._prefix = stem(self.process)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_acts: set[asyncio.Task[Any]] = set()
        self._beats = 0
        self._garbage: dict[MountState, list[str]] = {}
        self._collecting: asyncio.TimerHandle | None = None
        name = f"flaskbus-gateway-{os.getpid()}"
        self.link = link_to(settings.redis, name, on_up=self._link_is_up)
        self.bell = DoorbellLink(settings.redis, name, self._rang, on_up=self._bell_is_up)
        self.peers = Peers(settings.lease)
        self.admission = Admission(settings.queue_limit, settings.queue_age, settings.open_limit)
        self.directory = Directory(
            self.link,
            self.keys,
            settings.lease,
            listen=lambda state: self.bell.subscribe(state.keys.doorbell(self.process)),
            unlisten=lambda state: self.bell.unsubscribe(state.keys.doorbell(self.process)),
            on_routes=lambda: self.spawn(self._tell_routes()),
            on_change=self._mount_changed,
            on_doubtful=self._answer_doubtful,
            on_orphan=self._agent_died,
            on_stall=lambda: self.peers.forgive(self.now()),
            on_memory=self._memory_seen,
            heartbeat=self._beat,
            seal=lambda key: make_seal(settings.signing_secret, settings.namespace, key),
        )
        self.locator = Locator(self.link)
        self.reaper = Reaper(self.link, settings.attempts, settings.dead_body, self.peers.lives)

    # Life

    async def start(self) -> None:
        """Connect and learn the mounts; returns after a short time even if the broker is away.

        Raises :class:`~flaskbus.errors.StartError` where it refuses us, or is unfit.
        """
        self.link.start()
        self.bell.start()
        self.bell.subscribe(self.keys.news)
        self.directory.start()
        self.spawn(self._sweep())
        self.spawn(self._pulse())
        deadline = self.now() + 2.0
        while not self.directory.known.is_set() and self.now() < deadline:
            if self.link.refused is not None:
                raise self.link.refused
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.directory.known.wait(), 0.05)

    async def close(self) -> None:
        if self._last_acts:
            await asyncio.wait(self._last_acts, timeout=1.0)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.directory.close()
        self._collect()
        with contextlib.suppress(LinkError, AnswerError, TimeoutError):
            await asyncio.wait_for(self.link.call("HDEL", self.keys.gateways, self.process), 1.0)
        await self.bell.close()
        await self.link.close()

    def spawn(self, work: Coroutine[Any, Any, Any], *, last_act: bool = False) -> asyncio.Task[Any]:
        """Run a coroutine beside the exchanges, until it ends or the switchboard is closed.

        The ``last_act`` of an exchange is given a second to end by itself.
        """
        task = self.loop.create_task(work)
        self._tasks.add(task)
        if last_act:
            self._last_acts.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._last_acts.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work of the gateway failed", exc_info=error)

    # Exchanges

    def next_id(self) -> str:
        """A correlation id: unique, and nothing that a client can choose."""
        self._serial += 1
        return f"{self._prefix}{self._serial:x}"

    def open(self, exchange: Exchange) -> None:
        self.exchanges[exchange.request.id] = exchange
        exchange.state.queue.sent(exchange, exchange.started)

    def take_over(self, prompt: Prompt, exchange: Exchange) -> None:
        """The exchange of a prompt request."""
        self.exchanges[prompt.id] = exchange
        prompt.state.queue.goes_by(prompt, exchange)

    def close_exchange(self, exchange: Exchange) -> None:
        """Forget the exchange, and remove what lies on the broker of it."""
        if self.exchanges.pop(exchange.request.id, None) is not None:
            if not exchange.has_head:
                exchange.state.queue.started(exchange, None)
            self.admission.close(exchange.state.queue)
            exchange.close()

    def got_head(self, exchange: Exchange) -> None:
        """The exchange no longer waits in the queue."""
        exchange.state.queue.started(exchange, self.now() - exchange.started)

    def discard(self, state: MountState, key: str) -> None:
        """Delete a list that is not needed any more: soon, and together with others of its mount."""
        self._garbage.setdefault(state, []).append(key)
        if self._collecting is None:
            self._collecting = self.loop.call_later(self.COLLECT, self._collect)

    def _collect(self) -> None:
        self._collecting = None
        if not self.link.up.is_set():
            return  # when it is up again
        garbage, self._garbage = self._garbage, {}
        for state, keys in garbage.items():
            answer = self.link.call("DEL", *keys)
            answer.add_done_callback(partial(self._collected, state, keys))

    def _collected(self, state: MountState, keys: list[str], answer: asyncio.Future[Answer]) -> None:
        if answer.cancelled() or (error := answer.exception()) is None:
            return
        self._garbage.setdefault(state, []).extend(keys)
        if isinstance(error, AnswerError) and self._collecting is None:
            self._collecting = self.loop.call_later(1.0, self._collect)  # a broker that takes no writes now

    async def link_up(self) -> None:
        """Wait for the broker, for a bounded time."""
        try:
            await asyncio.wait_for(self.link.up.wait(), self.BROKER_WAIT)
        except TimeoutError:
            detail = str(self.link.refused or f"the broker has been away for {self.BROKER_WAIT:g} s")
            raise errors.BrokerUnavailable(detail, retry_after=1) from None

    # What arrives

    def _rang(self, channel: bytes, message: bytes) -> None:
        if channel == self.keys.news.encode():
            text = message.decode("utf-8", "replace")
            if text.startswith(UNMOUNTED):
                self.directory.unmounted(text.removeprefix(UNMOUNTED))
            else:
                self.directory.refresh()
            return
        try:
            ring = wire.decode_ring(message)
        except errors.WireError:
            return
        for request_id in ring.ids:
            exchange = self.exchanges.get(request_id)
            if exchange is None:
                prompt = self.prompts.get(request_id)
                if prompt is not None:
                    try:
                        prompt.ring(ring.frame)
                    except Exception:
                        log.exception("an answer could not be given")
                continue
            if ring.taker:
                exchange.taken(ring.taker)
            else:
                exchange.ring(ring.frame)

    def _link_is_up(self) -> None:
        self._settle_prompts()
        if self.link.incarnation != self._incarnation:
            self._incarnation = self.link.incarnation
            for exchange in self.exchanges.values():
                if exchange.adrift or exchange.entry_id is not None:
                    exchange.doubtful = True
        for state in self.directory.states.values():
            self.spawn(self.reaper.look_for_ghosts(state, self.process, self._awaited))
        self._collect()
        self.directory.forgive()
        self.directory.refresh()
        self._look_at_all()

    def _bell_is_up(self) -> None:
        """Rings may have been missed: look at everything."""
        self.directory.refresh()
        self._look_at_all()

    def _awaited(self, request_id: str) -> Exchange | Prompt | None:
        return self.exchanges.get(request_id) or self.prompts.get(request_id)

    def _settle_prompts(self, of: MountState | None = None) -> None:
        """Something happened for which there have to be exchanges, maybe only of one mount."""
        for prompt in tuple(self.prompts.values()):
            if of is None or prompt.state is of:
                prompt.serve_otherwise()

    def _look_at_all(self) -> None:
        self._settle_prompts()
        for exchange in self.exchanges.values():
            exchange.look()

    def _mount_changed(self, state: MountState) -> None:
        if state.failing or state.removed:
            self._settle_prompts(state)
            for exchange in self.exchanges.values():
                if exchange.state is state:
                    exchange.poke()

    def _answer_doubtful(self, state: MountState, entries: list[Answer]) -> None:
        """Tell whoever waits that its request lost its place, and may have run."""
        for _, fields in entries:
            request_id = wire.peek_id(fields)
            if request_id is None:
                continue
            sender, attempt = wire.peek_sender(fields)
            failure = Failure(attempt, 0, "agent-lost", "the queue lost track of who had the request")
            reply = state.keys.reply(request_id)
            seal = state.seal.frames(request_id, wire.peek_record(fields)) if state.seal else None
            self.link.tell("RPUSH", reply, wire.encode_frame(failure, None if seal is None else seal.sign))
            self.link.tell("PEXPIRE", reply, LIST_TTL_MS)
            self.link.tell("PUBLISH", state.keys.doorbell(sender), request_id)

    async def _agent_died(self, state: MountState, consumer: str) -> None:
        self._settle_prompts(state)
        by_entry = {item.entry_id: item for item in self.exchanges.values() if item.state is state}
        await self._observe_peers()
        await self.reaper.agent_died(state, consumer, by_entry.get)

    def _memory_seen(self, info: Mapping[str, Any]) -> None:
        self.admission.room = room(info)

    async def _observe_peers(self) -> None:
        """Gateways that are dead are struck off, and what is theirs is nobody's."""
        asked = self.now()
        found = await self.link.call("HGETALL", self.keys.gateways)
        if self.now() - asked > STALL:
            self.peers.forgive(self.now())  # they could not be heard
        for process in self.peers.observe(found, self.now()):
            if process != self.process:
                log.warning("gateway %s has sent no heartbeat for %g s", process, self.settings.lease)
                for state in tuple(self.directory.states.values()):
                    await self.reaper.gateway_died(state, process)
                if own := stem(process):
                    soon = int(THAW * self.settings.lease * 1000)
                    await self.reaper.expire_lists(self.keys.replies_of(own), soon)
                    await self.reaper.expire_lists(self.keys.inbound_of(own), soon)
                # Last, so that another does all of it again if we are cut off before.
                await self.link.call("HDEL", self.keys.gateways, process)

    # Rounds

    async def _sweep(self) -> None:
        """Look for replies whose ring was missed."""
        while True:
            await asyncio.sleep(self.SWEEP)
            before = self.now() - self.SWEEP
            overdue: dict[MountState, list[Exchange]] = {}
            for exchange in self.exchanges.values():
                if exchange.started < before:
                    overdue.setdefault(exchange.state, []).append(exchange)
            for state, exchanges in overdue.items():
                for start in range(0, len(exchanges), 500):
                    batch = exchanges[start : start + 500]
                    await self._sweep_batch(state, batch)
                    await self.reaper.look_for_vanished(state, batch)

    async def _sweep_batch(self, state: MountState, exchanges: list[Exchange]) -> None:
        """One EXISTS for many lists; only if some exist it matters which."""
        with contextlib.suppress(LinkError, AnswerError):
            found = await self.link.call("EXISTS", *(state.keys.reply(item.request.id) for item in exchanges))
            if found:
                for exchange in exchanges:
                    exchange.look()

    async def _pulse(self) -> None:
        """Look whether the others live."""
        while True:
            await self.link.up.wait()
            with contextlib.suppress(LinkError, AnswerError):
                await self._observe_peers()
            await asyncio.sleep(self.settings.lease / 4)

    async def _tell_routes(self) -> None:
        with contextlib.suppress(LinkError, AnswerError):  # the next look tells
            await self._beat()

    async def _beat(self) -> None:
        """Say that this gateway lives, and what other processes and people may know of it; see it with HGETALL."""
        self._beats += 1
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "beat": self._beats,
            "lease": self.settings.lease,
            "open": self.admission.open,
            "mounts": sorted(mount.key for mount in self.directory.states),
            "at": round(time.time(), 3),
            "signing": secret_fingerprint(self.settings.signing_secret),
        }
        await self.link.script(
            "enlist", [self.keys.gateways], [self.process, json.dumps(record, separators=(",", ":"))]
        )
