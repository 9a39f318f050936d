"""The inbound list of the gateway, over a link that says what a test wants."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from flaskbus.messages import INBOUND, Chunk
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
