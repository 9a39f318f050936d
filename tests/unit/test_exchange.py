"""Moments in an exchange that only a broker which answers when the test says so can bring about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flaskbus import errors, wire
from flaskbus.keys import Keys
from flaskbus.messages import BODY, INBOUND, NOT_RUN, WEBSOCKET, Chunk, Failure, Head, Request
from flaskbus.routing import Mount
from flaskbus.settings import GatewaySettings
from flaskbus_gateway.exchange import ClientGone, Exchange
from flaskbus_gateway.link import AnswerError
from flaskbus_gateway.mounts import MountState
from flaskbus_gateway.reaper import Reaper

MOUNT = Mount.parse("/m")


class Link:
    """Keeps what is sent; :meth:`answer` is the broker."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.up = asyncio.Event()
        self.up.set()
        self.sent: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []

    def call(self, *command: Any) -> asyncio.Future[Any]:
        future = self.loop.create_future()
        self.sent.append((command, future))
        return future

    def tell(self, *command: Any) -> None:
        self.call(*command)

    async def script(self, name: str, keys: list[str], args: list[Any]) -> Any:
        return await self.call(name, *keys, *args)

    async def answer(self, name: str, value: Any) -> None:
        """Answer the oldest command of this name, and let everybody take note."""
        waiting = (future for command, future in self.sent if command[0] == name and not future.done())
        next(waiting).set_result(value)
        await settled()

    def count(self, name: str) -> int:
        return sum(command[0] == name for command, _ in self.sent)


class Board:
    """As much of a switchboard as an exchange sees."""

    SWEEP = 1.0
    BROKER_WAIT = 0.2

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
        self.link = Link()
        self.max_frame = 1 << 20
        self.settings = GatewaySettings()
        self.discarded: list[str] = []
        self.directory = SimpleNamespace(states={}, fresh=self.never)
        self.tasks: set[asyncio.Task[Any]] = set()

    async def never(self) -> None:
        await asyncio.Event().wait()

    def spawn(self, work: Coroutine[Any, Any, Any], **_: Any) -> None:
        self.tasks.add(self.loop.create_task(work))

    def discard(self, state: MountState, key: str) -> None:
        self.discarded.append(key)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def exchange_of(board: Board, inbound: str = "") -> Exchange:
    state = MountState(MOUNT, Keys().of(MOUNT.key))
    state.queue.alive_since = 0.0
    board.directory.states[MOUNT] = state
    request = Request(
        id="0123456789abcdef01", method="POST", target="/m/", gateway="g", ttl=30000, inbound=inbound
    )
    return Exchange(cast(Any, board), state, request)


Story = Callable[[Board, Exchange], Awaitable[None]]


def tell(story: Story) -> None:
    async def main() -> None:
        board = Board()
        await story(board, exchange_of(board))

    asyncio.run(main())


async def sent(board: Board, exchange: Exchange) -> asyncio.Task[Any]:
    """The request is on the stream, and its head is waited for."""
    sending = asyncio.create_task(exchange.send())
    await settled()
    await board.link.answer("XADD", b"1-1")
    await sending
    head = asyncio.create_task(exchange.head())
    await settled()
    return head


def test_what_is_handed_back_while_the_sweep_looks_is_not_lost() -> None:
    async def story(board: Board, exchange: Exchange) -> None:
        head = await sent(board, exchange)
        reaper = Reaper(cast(Any, board.link), 3, 1000, lambda _: True)
        sweep = asyncio.create_task(reaper.look_for_vanished(exchange.state, [exchange]))
        await settled()
        frame = wire.encode_frame(Failure(1, 0, NOT_RUN, "the agent stops"))
        await board.link.answer("vanished", [1])
        exchange.ring(frame)
        await settled()
        assert board.link.count("XADD") == 2
        await board.link.answer("LRANGE", [frame])
        await board.link.answer("XADD", b"2-1")
        assert not head.done()
        assert (exchange.attempt, exchange.entry_id) == (2, b"2-1")
        sweep.cancel()
        head.cancel()

    tell(story)


def test_a_failure_whose_ring_was_missed_leaves_no_list() -> None:
    async def story(board: Board, exchange: Exchange) -> None:
        head = await sent(board, exchange)
        exchange.look()
        await settled()
        await board.link.answer("LRANGE", [wire.encode_frame(Failure(1, 0, "agent-lost", "it broke off"))])
        assert isinstance(head.exception(), errors.AgentLost)
        exchange.close()
        assert board.discarded == [exchange.replies.key]

    tell(story)


def test_a_stream_that_is_gone_and_a_broker_that_is_away_are_not_waited_for_for_ever() -> None:
    async def story(board: Board, exchange: Exchange) -> None:
        sending = asyncio.create_task(exchange.send())
        await settled()
        await board.link.answer("XADD", None)
        with pytest.raises(errors.BrokerUnavailable) as caught:
            await asyncio.wait_for(sending, 5.0)
        assert caught.value.executed == "no"

    tell(story)


def test_there_is_nothing_to_take_back_of_what_was_never_sent() -> None:
    async def story(board: Board, exchange: Exchange) -> None:
        sending = asyncio.create_task(exchange.send())
        await settled()
        _, future = board.link.sent[-1]
        future.set_exception(AnswerError("NOREPLICAS Not enough good replicas to write."))
        with pytest.raises(errors.BrokerUnavailable):
            await sending
        assert exchange.ended

    tell(story)


def test_an_agent_that_asks_before_the_broker_has_answered_the_request_is_rung() -> None:
    async def story(board: Board, _: Exchange) -> None:
        exchange = exchange_of(board, BODY)
        exchange.taken("agent-1")
        pushing = asyncio.create_task(exchange.open_inbound().push(lambda seq: Chunk(INBOUND, seq, b"x")))
        await settled()
        rung = [call[1] for call, _ in board.link.sent if call[0] == "PUBLISH"]
        assert rung == [exchange.state.keys.doorbell("agent-1")]
        pushing.cancel()

    tell(story)


def test_an_agent_that_took_a_handshake_while_its_client_left_hears_of_it() -> None:
    async def story(board: Board, _: Exchange) -> None:
        exchange = exchange_of(board, WEBSOCKET)
        exchange.open_inbound()
        head = await sent(board, exchange)
        exchange.abandon()  # before the ring for its head came
        with pytest.raises(ClientGone):
            await head
        finding = asyncio.create_task(exchange.find_agent())
        await settled()
        await board.link.answer("LRANGE", [wire.encode_frame(Head(1, 0, 101, (), "agent-1"))])
        await finding
        exchange.call_off()
        _, channel, message = board.link.sent[-1][0]
        assert channel == exchange.state.keys.doorbell("agent-1")
        ring = wire.decode_ring(message)
        assert ring.ids == (exchange.request.id,)
        assert ring.frame is not None
        frame = wire.decode_frame(ring.frame, max_size=1 << 10)
        assert isinstance(frame, Failure)
        assert (frame.attempt, frame.seq) == (INBOUND, 0)  # what the agent waits for

    tell(story)
