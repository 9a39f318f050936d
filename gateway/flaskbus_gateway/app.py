"""The gateway as an ASGI application, for gunicorn's worker or any other ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from functools import partial

from flaskbus import errors, wire
from flaskbus.boundaries import Boundaries, boundaries
from flaskbus.messages import BODY, WEBSOCKET, Chunk, Head, Reply, Request
from flaskbus.routing import Mount
from flaskbus.settings import GatewaySettings
from flaskbus_gateway.deadlines import Patience
from flaskbus_gateway.directory import MountState
from flaskbus_gateway.exchange import ClientGone, Exchange, StreamEnded
from flaskbus_gateway.forwarding import TrustedProxies
from flaskbus_gateway.http import (
    BEGUN,
    IS_LOST,
    PROMPTS,
    Incoming,
    Receive,
    Scope,
    Send,
    add_date,
    has_body,
    problem,
    relayed_headers,
    stated_length,
)
from flaskbus_gateway.link import Answer
from flaskbus_gateway.prompt import Begun, Prompts
from flaskbus_gateway.switchboard import Switchboard
from flaskbus_gateway.websocket import ANSWER_BODY, Origins, WebSocket, as_request, begin_answer

log = logging.getLogger("flaskbus.gateway")

WATCH_AFTER = 0.1
"""Seconds after which an exchange begins to listen for its client going away. Most are over by then, and a
task for each would cost more than the rest of the gateway."""


GATHER = 0.1
"""Seconds in which the beginning of a body is gathered that may be long. Then its app begins with what is there:
a client may wait for the answer to the first part before it sends the next."""

END_STREAMS = "flaskbus.end_streams"
"""Where the state of the lifespan has :meth:`Gateway.end_streams`, for a server that stops and knows of it."""


class Gateway:
    """Routes, admits, sends and relays. One instance serves one event loop."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.proxies = TrustedProxies(settings.trusted_proxies)
        self.origins = Origins(settings.websocket_origins)
        self.board: Switchboard | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.prompts: Prompts | None = None
        self._young: list[tuple[Exchange, Receive]] = []
        self._streams: dict[Exchange, Boundaries] = {}
        """Responses on their way that have event boundaries."""
        self._ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)

    # Life

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        state[END_STREAMS] = self.end_streams
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                except errors.OperatorError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                state[PROMPTS] = self.prompts
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def start(self) -> None:
        """Connect to the broker; returns soon even if it is away.

        Raises :class:`~flaskbus.errors.StartError` where it is unfit, or refuses us.
        """
        if self.board is None:
            board = Switchboard(self.settings)
            try:
                await board.start()
            except errors.StartError:
                await board.close()
                raise
            self.board = board
            self.prompts = Prompts(board, self.proxies, lambda begun: self._take_back_soon(board, *begun))
            self._watcher = asyncio.get_running_loop().create_task(self._watch_clients())

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self.board is not None:
            await self.board.close()
            self.board = None

    def end_streams(self) -> None:
        """The server stops soon: every response that has event boundaries ends at its next one.

        That is now, where nothing but the next event is waited for.
        """
        self._ending = True
        for exchange, found in self._streams.items():
            if found.complete:
                exchange.fail(StreamEnded())
        if self._streams:
            log.info("%d event streams end at their next event boundary", len(self._streams))

    # HTTP

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.board is None:
            await self.start()
        board = self.board
        assert board is not None
        exchange: Exchange | None = None
        started = False
        if scope["method"] == "OPTIONS" and scope.get("raw_path") == b"*":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        try:
            begun: Begun | None = (scope.get("extensions") or {}).get(BEGUN)
            if begun is None:
                state, request = await self._accept(board, scope, receive)
                exchange = Exchange(board, state, request)
                board.open(exchange)
            else:
                exchange = begun.exchange
            if exchange.request.inbound:
                await exchange.send()
                self._send_rest(exchange, scope, receive)
            else:
                self._young.append((exchange, receive))
                await exchange.send(None if begun is None else begun.sent)
            head = await exchange.head()
            board.got_head(exchange)
            started = True
            headers = relayed_headers(head.headers)
            if scope["http_version"] == "2":
                add_date(headers)
            await send({"type": "http.response.start", "status": head.status, "headers": headers})
            if isinstance(head, Reply):
                await send({"type": "http.response.body", "body": head.body})
            elif found := boundaries(head.headers):
                await self._relay_events(exchange, found, send)
            else:
                await self._relay(exchange, stated_length(headers), send)
        except errors.BusError as error:
            if started and exchange is not None:
                # The client must not take what it has for the whole: a server breaks the connection off when
                # its app returns in the middle of a response.
                log.warning("%s ended early: %s", exchange.request.target, error)
            else:
                await self._answer(error, exchange, scope, send)
        except ClientGone:
            pass
        finally:
            if exchange is not None:
                if exchange.ended:
                    board.close_exchange(exchange)
                else:
                    self._take_back_soon(board, exchange)

    # WebSockets

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.board is None:
            await self.start()
        board = self.board
        assert board is not None
        await receive()
        exchange: Exchange | None = None
        socket: WebSocket | None = None
        answered = False
        try:
            state, request = await self._accept(board, as_request(scope), receive)
            exchange = Exchange(board, state, replace(request, inbound=WEBSOCKET))
            board.open(exchange)
            socket = WebSocket(exchange, scope, receive, send, self.settings.message_limit)
            inbound = exchange.open_inbound()
            await exchange.send()
            exchange.pump(partial(socket.feed, inbound))
            head = await exchange.head()
            board.got_head(exchange)
            if head.status == 101 and isinstance(head, Head):
                inbound.taken(head.agent)
                await socket.accept(head)
                await socket.relay()
            else:
                await socket.answer(head)
                answered = True
                if isinstance(head, Reply):
                    await send({"type": ANSWER_BODY, "body": head.body})
                else:
                    await self._relay(exchange, None, send, ANSWER_BODY)
        except errors.BusError as error:
            if socket is not None and socket.accepted:
                await socket.fail(str(error))
            elif answered:
                log.warning("%s ended early: %s", scope["path"], error)
            else:
                await self._deny(error, exchange, scope, send)
        except (ClientGone, OSError):
            pass
        finally:
            if exchange is not None:
                if exchange.ended:
                    board.close_exchange(exchange)
                else:
                    self._take_back_soon(board, exchange)

    async def _deny(
        self, error: errors.BusError, exchange: Exchange | None, scope: Scope, send: Send
    ) -> None:
        status, headers, body = problem(error, exchange.request.id if exchange else "")
        with contextlib.suppress(OSError):
            await begin_answer(scope.get("extensions") or {}, send, status, headers)
            await send({"type": ANSWER_BODY, "body": body})

    async def _accept(self, board: Switchboard, scope: Scope, receive: Receive) -> tuple[MountState, Request]:
        """Route, admit, and only then read the body."""
        if scope["method"] == "CONNECT":
            raise errors.InvalidRequest("CONNECT asks for a tunnel, and this is no proxy")
        incoming = Incoming(scope, self.proxies)
        websocket = scope["type"] == "websocket"
        if websocket:
            self.origins.check(incoming)
        mount = board.directory.table.match(incoming.host, incoming.path)
        if mount is None:
            mount = await self._look_again(board, incoming)
        queues = board.directory.queues[mount]
        state = queues.first
        headers = tuple(incoming.headers)
        record = ""
        if state.policy is not None:
            record = state.policy.record(scope["method"], incoming.host, incoming.target, headers)
        if not record:
            state = queues.next()
        elif state.mount.partition:
            raise errors.NoAgent(
                f"an Idempotency-Key needs the first queue of {mount.name}, and nobody serves that",
                retry_after=5,
            )
        if websocket and not state.streams:
            raise errors.UnsupportedUpgrade(f"an agent of {mount.name} is too old for WebSockets")
        # What has an Idempotency-Key is compared as a whole, and an older agent takes it as a whole.
        streams = not record and state.streams
        most = wire.MAX_INLINE + self.settings.window if streams else wire.MAX_BODY
        size = min(incoming.content_length or 0, most)  # that the broker will ever hold
        board.admission.admit(state.queue, mount.name, size, board.now())
        body, whole = b"", True
        if not websocket and has_body(scope, incoming):
            try:
                body, whole = await self._read_body(incoming, receive, streams=streams)
                board.admission.check(state.queue, mount.name, board.now())
            except BaseException:
                board.admission.close(state.queue)
                raise
        return state, Request(
            id=board.next_id(),
            method=scope["method"],
            target=incoming.target,
            gateway=board.process,
            ttl=int(self.settings.longest_wait * 1000),
            script_name=incoming.prefix + mount.script_name,
            scheme=incoming.scheme,
            http_version=scope["http_version"],
            client=incoming.client,
            server=incoming.server,
            headers=headers,
            traceparent=incoming.traceparent,
            body=body,
            inbound="" if whole else BODY,
            idempotency=record,
        )

    async def _look_again(self, board: Switchboard, incoming: Incoming) -> Mount:
        """The mount, if it was claimed a moment ago; :class:`~flaskbus.errors.UnknownMount` if not."""
        try:
            await asyncio.wait_for(board.directory.fresh(), board.BROKER_WAIT)
        except TimeoutError:
            raise errors.BrokerUnavailable("the mounts cannot be looked up", retry_after=1) from None
        mount = board.directory.table.match(incoming.host, incoming.path)
        if mount is not None:
            return mount
        detail = "no app is mounted here"
        if self.settings.development:
            first = "/" + incoming.path.lstrip("/").partition("/")[0]
            detail += f"; this would mount one: flaskbus-agent MODULE:APP --prefix {first}"
        raise errors.UnknownMount(detail)

    async def _read_body(self, incoming: Incoming, receive: Receive, *, streams: bool) -> tuple[bytes, bool]:
        """The body, or the first part of one that ``streams``; whether it is the whole."""
        stated, limit = incoming.content_length, self.settings.body_limit
        reason = ""
        if not streams and limit > wire.MAX_BODY:
            limit = wire.MAX_BODY
            reason = " with an Idempotency-Key, or by an agent of an older version"
        if stated is not None and stated > limit:
            raise errors.BodyTooLarge(f"{stated} bytes; at most {limit} are taken{reason}")
        may_be_long = streams and (stated is None or stated > wire.MAX_INLINE)
        patience = Patience(self.settings.body_timeout)
        parts: list[bytes] = []
        size, more = 0, True
        try:
            now = asyncio.get_running_loop().time
            began = now()
            async with asyncio.timeout(GATHER if may_be_long else patience.left) as deadline:
                while more and not (may_be_long and size > wire.MAX_INLINE):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part: bytes = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(part)
                    if size > limit:
                        raise errors.BodyTooLarge(f"more than {limit} bytes{reason}")
                    parts.append(part)
                    if deadline.expired() and more:
                        # CPython 3.11's wait_for() swallows a cancellation that comes together with a byte.
                        raise TimeoutError
                    if more and not may_be_long:
                        patience.spent(now() - began, len(part))
                        began = now()
                        deadline.reschedule(began + patience.left)
        except TimeoutError:
            if not may_be_long:
                raise errors.BodyTimeout(f"{size} bytes came, and then too little") from None
        return parts[0] if len(parts) == 1 else b"".join(parts), not more

    def _send_rest(self, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        """Send the rest of the body while its reply is waited for; then listen for the end of the client."""
        is_lost = scope.get("extensions", {}).get(IS_LOST, lambda: False)
        exchange.send_rest(
            receive, len(exchange.request.body), is_lost, lambda: self._young.append((exchange, receive))
        )

    async def _relay(
        self, exchange: Exchange, left: int | None, send: Send, kind: str = "http.response.body"
    ) -> None:
        """Bring the client what the app yields, as fast as the client takes it.

        ``left``: bytes of the body, where the app said. A client that has them all may have sent its next request
        already: what becomes of the run that is over for it must not break its connection.
        """
        while True:
            try:
                frames = await exchange.chunks()
            except errors.BusError as error:
                if left != 0:
                    raise
                log.info("%s ended after its answer was out: %s", exchange.request.target, error)
                await send({"type": kind, "body": b""})
                return
            data = b"".join(frame.data for frame in frames if isinstance(frame, Chunk))
            if data:
                left = None if left is None else left - len(data)
                await send({"type": kind, "body": data, "more_body": True})
            if exchange.gone:
                raise ClientGone
            if exchange.ended:
                await send({"type": kind, "body": b""})
                return
            exchange.handed_over(len(frames), len(data))

    async def _relay_events(self, exchange: Exchange, found: Boundaries, send: Send) -> None:
        """The same, for a response that may end at an event boundary before the app ends it."""
        self._streams[exchange] = found
        over = False
        try:
            while not over and not (self._ending and found.complete):
                frames = await exchange.chunks()
                data = b"".join(frame.data for frame in frames if isinstance(frame, Chunk))
                over = exchange.ended
                if self._ending and not over and (kept := found.cut(data)) is not None:
                    data, over = kept, True
                if data:
                    found.advance(data)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if exchange.gone:
                    raise ClientGone
                if not over:
                    exchange.handed_over(len(frames), len(data))
        except StreamEnded:
            pass
        finally:
            del self._streams[exchange]
        await send({"type": "http.response.body", "body": b""})

    async def _answer(
        self, error: errors.BusError, exchange: Exchange | None, scope: Scope, send: Send
    ) -> None:
        status, headers, body = problem(error, exchange.request.id if exchange else "")
        if scope["http_version"] == "2":
            add_date(headers)
        elif isinstance(error, (errors.BodyTooLarge, errors.BodyTimeout)):
            headers.append((b"connection", b"close"))  # what is left of the body is not read
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # Clients that go away

    def _take_back_soon(
        self, board: Switchboard, exchange: Exchange, sent: asyncio.Future[Answer] | None = None
    ) -> None:
        board.spawn(self._take_back(board, exchange, sent), last_act=True)

    async def _take_back(
        self, board: Switchboard, exchange: Exchange, sent: asyncio.Future[Answer] | None
    ) -> None:
        """Nobody waits any longer: queued work is withdrawn, and a running stream ends at its next yield.

        ``sent`` is the broker's answer to the request, where it may not have come yet.
        """
        exchange.forget_request()
        if sent is not None:
            await exchange.await_entry(sent)
        delay = 0.1
        while await exchange.withdraw() == "unreachable":
            # Else it would run for nobody, and its reply would lie there until its list expires.
            await board.link.up.wait()
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)
        await exchange.find_agent()
        if exchange.agent:
            # First the list: an agent that waits for its client wakes up, and looks whether something lies there.
            board.link.tell("DEL", exchange.replies.key)
            exchange.call_off()
        board.close_exchange(exchange)

    async def _watch_clients(self) -> None:
        """Start listening for the end of the client in every exchange that lasts."""
        while True:
            await asyncio.sleep(WATCH_AFTER)
            if self.prompts is not None:
                self.prompts.hurry(asyncio.get_running_loop().time())
            young, self._young = self._young, []
            for exchange, receive in young:
                board = self.board
                if board is None or exchange.request.id not in board.exchanges:
                    continue
                if board.now() - exchange.started < WATCH_AFTER:
                    self._young.append((exchange, receive))
                else:
                    board.spawn(self._watch_client(exchange, receive))

    async def _watch_client(self, exchange: Exchange, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                exchange.abandon()
                return
