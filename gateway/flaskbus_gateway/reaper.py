"""What becomes of requests whose agent died, and of those that the broker lost.

A gateway sees to its own exchanges, and to those of gateways that are dead themselves:

=============================================  ==================================================
the request may run again, and has attempts    requeued: another agent runs it
it may run again, but killed its agents        a dead letter, and 502 ``unknown``
it may not run again, or its head went out     withdrawn, and 502 ``unknown`` or a broken response
its gateway is dead                            withdrawn: nobody waits for it
its entry vanished and no reply lies there     502 ``unknown``
=============================================  ==================================================

A request may run again if its method is idempotent or its Idempotency-Key counts, and nothing of an answer went out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from random import randrange
from typing import Protocol

from flaskbus import errors, letters, wire
from flaskbus.keys import DEAD_KEPT, DEAD_TTL_MS, GROUP, LIST_TTL_MS
from flaskbus.messages import Failure
from flaskbus.signing import Field
from flaskbus_gateway.directory import MountState
from flaskbus_gateway.entries import encode, locate
from flaskbus_gateway.exchange import Exchange
from flaskbus_gateway.link import AnswerError, Link, LinkError

log = logging.getLogger("flaskbus.gateway")

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
"""RFC 9110 section 9.2.2: a second run has the effect of one."""


GLANCE = 1 << 20
"""Bytes of waiting requests after which one look for vanished ones ends: copying them blocks the broker."""


class Sent(Protocol):
    """What a gateway sent, and where it is in the stream, as far as that is known."""

    @property
    def entry_id(self) -> bytes | None: ...


class Reaper:
    """Settles what dead agents held.

    ``attempts`` is how often a request may be run in all, ``dead_body`` how many bytes of its body are kept of
    one that is given up.
    """

    def __init__(
        self, link: Link, attempts: int, dead_body: int, gateway_lives: Callable[[str], bool]
    ) -> None:
        self.link = link
        self.attempts = attempts
        self.dead_body = dead_body
        self.gateway_lives = gateway_lives

    async def agent_died(
        self, state: MountState, consumer: str, mine: Callable[[bytes], Exchange | None]
    ) -> None:
        """Settle every request that a dead agent holds; ``mine`` finds this gateway's exchange of an entry."""
        keys = state.keys
        start = "-"
        while True:
            pending = await self.link.call("XPENDING", keys.requests, GROUP, start, "+", 500, consumer)
            for entry_id, *_ in pending:
                exchange = mine(entry_id)
                if exchange is not None:
                    await self._settle(exchange, consumer)
                else:
                    await self._settle_strangers(state, entry_id)
            if len(pending) < 500:
                break
            start = "(" + pending[-1][0].decode()
        await self.link.script("leave", [keys.agents, keys.requests], [GROUP, consumer])

    async def _settle(self, exchange: Exchange, consumer: str) -> None:
        """Run it again if that is allowed, and end it if not."""
        request = exchange.request
        if exchange.given_up:
            await exchange.withdraw()
        elif exchange.has_head or not (request.method in IDEMPOTENT or request.idempotency):
            await self._end(exchange, f"the agent {consumer} died while it held the request")
        elif exchange.earlier_runs + 1 >= self.attempts:
            await self._bury(exchange, consumer)
        else:
            keys = exchange.state.keys
            attempt, fields = _next_attempt(exchange)
            first = exchange.inbound.first if exchange.inbound else b""
            outcome, *entry = await self.link.script(
                "requeue",
                [keys.requests, keys.reply(request.id), keys.inbound(request.id), *exchange.record],
                [GROUP, exchange.entry_id or "", consumer, attempt, first, *fields],
            )
            if outcome == b"requeued":
                log.warning("the agent %s died; %s %s runs again", consumer, request.method, request.target)
                exchange.runs_again(entry[0])
            else:
                exchange.look()
                if outcome == b"answered":
                    await self._end(exchange, f"the agent {consumer} died while it was answering")
                elif outcome == b"taken":
                    await self._end(exchange, f"the agent {consumer} died with a part of what was sent to it")

    async def _end(self, exchange: Exchange, detail: str) -> None:
        if await exchange.withdraw() == "finished":
            exchange.look()  # the reply came at the last moment
        else:
            exchange.fail(errors.AgentLost(detail))

    async def _bury(self, exchange: Exchange, consumer: str) -> None:
        """A request that keeps killing agents is kept for people to look at, and not run any more."""
        request, keys = exchange.request, exchange.state.keys
        reason = f"{self.attempts} agents died while they held it"
        log.error("%s %s is given up: %s", request.method, request.target, reason)
        entry_id = exchange.entry_id or b""
        letter = letters.of_request(
            replace(request, attempt=exchange.attempt),
            reason,
            at=datetime.now(UTC),
            entry=entry_id,
            keep=self.dead_body,
        )
        frame = wire.encode_frame(Failure(exchange.attempt, 0, "agent-lost", reason))
        outcome = await self.link.script(
            "bury",
            [keys.requests, keys.dead, keys.reply(request.id), *exchange.record],
            [
                GROUP, entry_id, consumer, DEAD_TTL_MS, DEAD_KEPT, LIST_TTL_MS, "", request.id, frame, *letter,
            ],
        )  # fmt: skip
        if outcome == b"done":
            exchange.fail(errors.AgentLost(f"the request was given up: {reason}"))
        else:
            exchange.look()  # it was answered, or handed back, at the last moment

    async def _settle_strangers(self, state: MountState, entry_id: bytes) -> None:
        """Another gateway's: its own affair, unless that gateway is dead."""
        entries = await self.link.call("XRANGE", state.keys.requests, entry_id, entry_id)
        fields = entries[0][1] if entries else []
        if not self.gateway_lives(wire.peek_sender(fields)[0]):
            await self._withdraw(state, entry_id, fields)

    async def _withdraw(self, state: MountState, entry_id: bytes, fields: Sequence[bytes]) -> None:
        """Take back what nobody waits for; its Idempotency-Key, if it has one, may be used again."""
        record = wire.peek_record(fields)
        keys = [state.keys.requests, state.keys.idempotent(record)] if record else [state.keys.requests]
        await self.link.script("withdraw", keys, [GROUP, entry_id])

    async def gateway_died(self, state: MountState, process: str) -> None:
        """Withdraw what a dead gateway had sent and nobody has taken: no client waits for it."""
        await self._withdraw_all(state, process, lambda _: None)

    async def look_for_ghosts(
        self, state: MountState, process: str, mine: Callable[[str], Sent | None]
    ) -> None:
        """Withdraw what this gateway, ``process``, sent and does not wait for any more.

        A broker that lost its last writes has entries again that were answered. ``mine`` finds an exchange by its
        correlation id.
        """
        with contextlib.suppress(LinkError, AnswerError):
            await self._withdraw_all(state, process, mine)

    async def _withdraw_all(
        self, state: MountState, process: str, awaited: Callable[[str], Sent | None]
    ) -> None:
        start = "-"
        while True:
            entries = await self.link.call("XRANGE", state.keys.requests, start, "+", "COUNT", 500)
            for entry_id, fields in entries:
                if wire.peek_sender(fields)[0] != process:
                    continue
                exchange = awaited(wire.peek_id(fields) or "")
                if exchange is None or exchange.entry_id not in (None, entry_id):
                    await self._withdraw(state, entry_id, fields)
            if len(entries) < 500:
                return
            start = "(" + entries[-1][0].decode()

    async def expire_lists(self, pattern: str, milliseconds: int) -> None:
        """Let the lists of a dead gateway expire soon; it takes what is there if it was only frozen.

        None comes any more, because none of its entries is left. They live as long as ever where our user may
        not SCAN.
        """
        for one in self.link.each():
            cursor = b"0"
            with contextlib.suppress(AnswerError):
                while True:
                    cursor, found = await one.call("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                    for key in found:
                        self.link.tell("PEXPIRE", key, milliseconds)
                    if cursor == b"0":
                        break

    async def look_for_vanished(self, state: MountState, exchanges: Collection[Exchange]) -> None:
        """End the exchanges whose entry is gone without a reply."""
        try:
            await self._look_for_adrift(state, [exchange for exchange in exchanges if exchange.adrift])
            known = [exchange for exchange in exchanges if exchange.entry_id is not None]
            if not known:
                return
            first = randrange(len(known))  # so that each has its turn, though not all may be looked at
            known = known[first:] + known[:first]
            entry_ids = [exchange.entry_id or b"" for exchange in known]
            missing = await self.link.script("vanished", [state.keys.requests], [GROUP, GLANCE, *entry_ids])
            for place in missing:
                exchange = known[place - 1]
                attempt = exchange.attempt
                if exchange.entry_id != entry_ids[place - 1] or await exchange.has_news():
                    continue
                # While its list was looked at, an agent may have handed it back.
                if exchange.attempt == attempt and exchange.entry_id == entry_ids[place - 1]:
                    exchange.fail(errors.AgentLost(exchange.distrust or "the broker lost the request"))
        except (LinkError, AnswerError):
            return  # the next round looks again

    async def _look_for_adrift(self, state: MountState, exchanges: Collection[Exchange]) -> None:
        """Find the requests whose XADD was not answered."""
        if exchanges:
            found = await locate(self.link, state.keys, {exchange.request.id for exchange in exchanges})
            for exchange in exchanges:
                await exchange.settle_adrift(found.get(exchange.request.id))


def _next_attempt(exchange: Exchange) -> tuple[int, list[Field]]:
    """What changes in the entry: the number of the attempt, and names and values of other fields."""
    attempt, seal = exchange.attempt + 1, exchange.state.seal
    if seal is None:
        return attempt, []
    signed = encode(replace(exchange.request, attempt=attempt), seal)
    return attempt, signed[-4:]  # the expiry and the signature
