"""The inbound list of the gateway, over a link that says what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, cast

import pytest

from flaskbus import errors
from flaskbus.messages import INBOUND, Chunk
from flaskbus_gateway.http import Receive
from flaskbus_gateway.inbound import LOOK, Inbound
from flaskbus_gateway.link import Link


class Hasty:
    """A broker whose doorbell is faster than its answers, which come over another connection."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.inbound: Inbound | None = None

    async def call(self, command: str, *_: Any) -> int:
        if command == "LLEN":
            return 0
        assert self.inbound is not None
        self.inbound.taken("agent")
        return 1  # as it was before that

    def tell(self, *_: Any) -> None:
        """TTLs."""


def test_room_that_was_made_before_the_answer_came_is_not_waited_for() -> None:
    async def run() -> float:
        link = Hasty()
        inbound = link.inbound = Inbound(
            cast(Link, link), "list", window=1, ring=lambda agent, element: None, sign=None
        )
        began = link.loop.time()
        for _ in range(3):
            await inbound.push(lambda seq: Chunk(INBOUND, seq, b"x"))
        return link.loop.time() - began

    assert asyncio.run(run()) < LOOK / 2


class Unanswered(Hasty):
    """A broker whose answer to the third frame does not come before the gateway ends."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def call(self, command: str, *_: Any) -> asyncio.Future[int]:  # type: ignore[override]
        self.said.append(command)
        answer = self.loop.create_future()
        if self.said.count("RPUSH") < 3:
            answer.set_result(1)  # the agent takes each at once
        return answer

    def tell(self, command: str, *_: Any) -> None:
        self.said.append(command)


def test_a_list_has_a_time_to_live_before_the_broker_answers() -> None:
    async def run() -> list[str]:
        link = Unanswered()
        inbound = Inbound(
            cast(Link, link), "list", window=1 << 20, ring=lambda agent, element: None, sign=None
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                while True:
                    await inbound.push(lambda seq: Chunk(INBOUND, seq, b"x"))
        return link.said

    assert asyncio.run(run()) == ["RPUSH", "PEXPIRE"] * 3


def body_of(
    inbound: Inbound, receive: Receive, *, timeout: float, is_answering: Callable[[], bool] = lambda: False
) -> Coroutine[Any, Any, None]:
    return inbound.push_body(receive, received=0, limit=1 << 30, timeout=timeout, is_answering=is_answering)


class Quiet(Hasty):
    """A broker that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.pushed = 0

    async def call(self, command: str, *_: Any) -> int:
        self.pushed += command == "RPUSH"
        return 0


def test_nothing_is_pushed_once_it_is_closed() -> None:
    """Also where who pushes does not hear that it is cancelled: the list is deleted, and would lie there for hours."""

    async def run() -> int:
        link = Quiet()
        inbound = Inbound(
            cast(Link, link), "list", window=1 << 20, ring=lambda agent, element: None, sign=None
        )
        came = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await came.wait()
            return {"type": "http.request", "body": b"x", "more_body": False}

        pump = asyncio.create_task(body_of(inbound, receive, timeout=5.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        inbound.close()
        came.set()
        pump.cancel()  # which CPython 3.11 swallows: the part came first
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(pump, 5.0)
        return link.pushed

    assert asyncio.run(run()) == 0


TIMEOUT = 0.5
"""Seconds for each part, in the tests of a client that waits between small parts."""


@pytest.mark.parametrize("answers", ["first", "meanwhile", "never"])
def test_who_waits_for_the_answer_to_each_part_is_not_too_slow(answers: str) -> None:
    """Fewer than 4 KiB a second, and never silent for as long as a client may be."""

    async def run() -> int:
        link = Quiet()
        inbound = Inbound(
            cast(Link, link), "list", window=1 << 20, ring=lambda agent, element: None, sign=None
        )
        sent, answering = 0, answers == "first"

        async def receive() -> dict[str, Any]:
            nonlocal sent, answering
            if sent == 1 and answers == "meanwhile":
                answering = True
            await asyncio.sleep(0.6 * TIMEOUT)
            sent += 1
            return {"type": "http.request", "body": b"x", "more_body": sent < 5}

        await body_of(inbound, receive, timeout=TIMEOUT, is_answering=lambda: answering)
        return link.pushed

    if answers == "never":
        with pytest.raises(errors.BodyTimeout):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == 6
