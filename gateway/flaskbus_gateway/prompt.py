"""Requests that are answered soon: plain ones, whose whole answer comes with the doorbell.

Most are of this kind, and for them an exchange, its task, futures and an ASGI scope would cost more than all the rest.
So they have none of it until it shows that they need it: an answer in parts, a failure, a client that goes on
sending, a broker that was away, or :data:`PATIENCE` without an answer. Then there is an exchange, as far as it has
come, and the client's connection serves the request as any other.

Not here: mounts whose requests are signed, and requests whose Idempotency-Key counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgpack

from flaskbus import wire
from flaskbus.errors import BusError, WireError
from flaskbus.messages import Reply, Request
from flaskbus.resp import template
from flaskbus_gateway.deadlines import Deadlines
from flaskbus_gateway.exchange import Exchange
from flaskbus_gateway.forwarding import TrustedProxies
from flaskbus_gateway.http import Fields
from flaskbus_gateway.link import Answer, AnswerError, LinkError
from flaskbus_gateway.plain import Header, Plain, read

if TYPE_CHECKING:
    from flaskbus_gateway.mounts import MountState
    from flaskbus_gateway.switchboard import Switchboard

log = logging.getLogger("flaskbus.gateway")

PATIENCE = 0.1
"""Seconds that a request may be a prompt one."""

TEMPLATES = 16
"""Mounts and partitions for which one connection keeps what it sent last."""


class Begun(NamedTuple):
    """An exchange whose request was sent, and the broker's answer to that."""

    exchange: Exchange
    sent: asyncio.Future[Answer]


class Client(Protocol):
    """Who waits for the answer. Either method ends that."""

    def answer(self, reply: Reply) -> bool:
        """Take the whole answer; false, and nothing is done, where it cannot be sent as it is."""

    def serve(self, begun: Begun) -> None:
        """Serve the request otherwise."""


class Prompt:
    """A request that was sent and has no exchange yet."""

    __slots__ = ("_fields", "_peer", "_plain", "id", "sent", "started", "state")

    sent: asyncio.Future[Answer]

    def __init__(
        self, peer: Peer, plain: Plain, fields: Fields, state: MountState, request_id: str, now: float
    ) -> None:
        self._peer = peer
        self._plain = plain
        self._fields = fields
        self.state = state
        self.id = request_id
        self.started = now
        """Monotonic seconds."""

    @property
    def entry_id(self) -> bytes | None:
        """Where it is in the stream, as far as that is known."""
        if self.sent.done() and not self.sent.cancelled() and self.sent.exception() is None:
            entry_id: bytes | None = self.sent.result()
            return entry_id
        return None

    def was_sent(self, sent: asyncio.Future[Answer]) -> None:
        """The broker has answered, or the link to it broke."""
        with suppress(LinkError, AnswerError, asyncio.CancelledError):
            if sent.result() is not None:
                return
        if self.id in self._peer.prompts.waiting:
            self.serve_otherwise()  # what that means, and whether it is tried again

    def ring(self, frame: bytes | None) -> None:
        """The doorbell rang; ``frame`` is the complete reply, where it was small enough."""
        if frame is not None:
            reply: object = None
            with suppress(WireError):
                reply = wire.decode_frame(frame, max_size=self._peer.prompts.board.max_frame)
            if (
                type(reply) is Reply
                and reply.attempt == 1
                and reply.seq == 0
                and self._peer.client.answer(reply)
            ):
                self._peer.prompts.answered(self)
                return
        self.serve_otherwise().ring(frame)

    def serve_otherwise(self) -> Exchange:
        """It needs an exchange, and a task that serves its client."""
        exchange = self.become_exchange()
        self._peer.client.serve(Begun(exchange, self.sent))
        return exchange

    def abandon(self) -> None:
        """Its client is gone."""
        self._peer.prompts.take_back(Begun(self.become_exchange(), self.sent))

    def become_exchange(self) -> Exchange:
        prompts = self._peer.prompts
        exchange = Exchange(
            prompts.board, self.state, self._peer.request(self.id, self._plain, self._fields, self.state)
        )
        exchange.started = self.started
        exchange.entry_id = self.entry_id
        prompts.forget(self)
        prompts.board.take_over(self, exchange)
        return exchange


class Prompts:
    """The prompt requests of one gateway.

    ``take_back`` ends an exchange whose client is gone.
    """

    def __init__(
        self, board: Switchboard, proxies: TrustedProxies, take_back: Callable[[Begun], object]
    ) -> None:
        self.board = board
        self.waiting = board.prompts
        self.proxies = proxies
        self.take_back = take_back
        self.ttl = int(board.settings.longest_wait * 1000)
        self._young = Deadlines[Prompt](PATIENCE)

    def peer(self, client: Client, address: tuple[str, int], server: tuple[str, int], scheme: str) -> Peer:
        """For one connection of a client, from this ``address`` to that of the ``server``."""
        return Peer(self, client, address, server, scheme)

    def hurry(self, now: float) -> None:
        """Serve those otherwise that take long; ``now`` in monotonic seconds."""
        for prompt in self._young.take_due(now):
            try:
                prompt.serve_otherwise()
            except Exception:
                log.exception("a request could not be served otherwise")

    def begin(self, prompt: Prompt) -> None:
        self.waiting[prompt.id] = prompt
        self._young.start(prompt, prompt.started)
        prompt.state.queue.sent(prompt, prompt.started)

    def answered(self, prompt: Prompt) -> None:
        """It is over, but for what lies on the broker of it."""
        board, state = self.board, prompt.state
        self.forget(prompt)
        state.queue.started(prompt, board.now() - prompt.started)
        board.admission.close(state.queue)
        board.discard(state, state.keys.reply(prompt.id))

    def forget(self, prompt: Prompt) -> None:
        del self.waiting[prompt.id]
        self._young.stop(prompt)


class Peer:
    """One client's connection: it repeats its header to the byte, so what was made of the last one is kept.

    Not of a long one: they would add up, in idle connections.
    """

    __slots__ = (
        "_address", "_fields", "_header", "_scheme", "_server", "_templates", "client", "prompts",
    )  # fmt: skip

    def __init__(
        self, prompts: Prompts, client: Client, address: tuple[str, int], server: tuple[str, int], scheme: str
    ) -> None:
        self.prompts = prompts
        self.client = client
        self._address = address
        self._server = server
        self._scheme = scheme
        self._header: Header | None = None
        self._fields: Fields | None = None
        """Made of that header."""
        self._templates: dict[MountState, Callable[..., bytes]] = {}
        """Made of those fields, for a mount or a partition."""

    def begin(self, data: bytes) -> Prompt | None:
        """The request in these bytes, if it is plain, and its mount takes it at once; otherwise nothing was done."""
        board = self.prompts.board
        plain = read(data, self._header)
        if plain is None or not board.link.up.is_set():
            return None
        try:
            fields = self._read(plain.header)
            state = self._route(plain, fields)
            if state is None:
                return None
            pack = self._template_for(plain, fields, state)
            now = board.now()
            board.admission.admit(state.queue, state.mount.name, len(plain.body), now)
        except BusError:
            return None  # it is met again where errors are answered
        prompt = Prompt(self, plain, fields, state, board.next_id(), now)
        target = fields.prefix.encode() + plain.target if fields.prefix else plain.target
        packed = pack(prompt.id.encode(), plain.method, target, msgpack.packb(plain.body))
        prompt.sent = board.link.send(state.keys.requests, packed)
        self.prompts.begin(prompt)
        prompt.sent.add_done_callback(prompt.was_sent)
        return prompt

    def _read(self, header: Header) -> Fields:
        if self._fields is not None and header is self._header:
            return self._fields
        self._header = self._fields = None
        self._templates.clear()
        fields = Fields(header.fields, "1.1", self._address, self._scheme, self.prompts.proxies)
        if len(header.raw) <= wire.REPEATED:
            self._header, self._fields = header, fields
        return fields

    def _route(self, plain: Plain, fields: Fields) -> MountState | None:
        """The mount of a request, if it takes what is plain."""
        board, body, target = self.prompts.board, plain.body, plain.target.decode()
        mount = board.directory.table.match(fields.host, target.partition("?")[0])
        if mount is None or len(body) > wire.MAX_INLINE or len(body) > board.settings.body_limit:
            return None
        queues = board.directory.queues[mount]
        policy = queues.first.policy
        keyed = policy and policy.record(
            plain.method.decode(), fields.host, fields.prefix + target, tuple(fields.headers)
        )
        if keyed or queues.first.seal:
            return None
        # The last question: whoever goes the other way takes a turn there.
        state = queues.next()
        return None if state.removed or not state.alive else state

    def _template_for(self, plain: Plain, fields: Fields, state: MountState) -> Callable[..., bytes]:
        """Packs the XADD of a request from its id, method, target and body."""
        made = self._templates.get(state)
        if made is not None:
            return made
        # A stream without its group would take requests that nobody can read.
        made = template(
            "XADD", state.keys.requests, "NOMKSTREAM", "*",
            *wire.request_template(self.request("", plain, fields, state)),
        )  # fmt: skip
        if plain.header is self._header:
            if len(self._templates) == TEMPLATES:
                self._templates.clear()
            self._templates[state] = made
        return made

    def request(self, request_id: str, plain: Plain, fields: Fields, state: MountState) -> Request:
        """The request as any other would be."""
        prompts = self.prompts
        return Request(
            id=request_id,
            method=plain.method.decode(),
            target=fields.prefix + plain.target.decode(),
            gateway=prompts.board.process,
            ttl=prompts.ttl,
            script_name=fields.prefix + state.mount.script_name,
            scheme=fields.scheme,
            client=fields.client,
            server=self._server,
            headers=tuple(fields.headers),
            traceparent=fields.traceparent,
            body=plain.body,
        )
