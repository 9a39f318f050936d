"""A request that is served otherwise, while its client leaves: it has one owner at every moment."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config

from flaskbus_gateway.connection import Connection
from flaskbus_gateway.deadlines import Deadlines
from flaskbus_gateway.http import BEGUN, PROMPTS

REQUEST = b"POST /a HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\n\r\nx"
ROUNDS = 5
"""More of the loop than it takes until the app has begun."""


class Transport:
    """What a connection asks of one, and nobody at the other end."""

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 4711) if name in ("peername", "sockname") else default

    def get_write_buffer_size(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Bus:
    """A gateway whose requests are all prompt ones, and the ASGI app for those that are served otherwise."""

    def __init__(self) -> None:
        self.given_back: list[object] = []
        self.served: list[object] = []

    def peer(self, client: Any, *_: object) -> Any:
        prompt = SimpleNamespace(
            serve_otherwise=lambda: client.serve("begun"), abandon=lambda: self.given_back.append("prompt")
        )
        return SimpleNamespace(
            begin=lambda _: prompt, prompts=SimpleNamespace(take_back=self.given_back.append)
        )

    async def __call__(self, scope: dict[str, Any], *_: object) -> None:
        self.served.append(scope.get("extensions", {}).get(BEGUN))


def connection(bus: Bus) -> Connection:
    deadlines = {name: Deadlines[Any](10.0) for name in ("heading", "idle", "stalled", "lingering", "silent")}
    log = logging.getLogger("test")
    log.access_log_enabled = False  # type: ignore[attr-defined]
    worker: Any = SimpleNamespace(
        cfg=Config(), log=log, asgi=bus, state={PROMPTS: bus}, nr_conns=0, nr=0, max_requests=sys.maxsize, alive=True,
        stopping=False, loop=asyncio.get_running_loop(), connections=set(), forget=lambda _: None,
        deadlines=tuple(deadlines.values()), **deadlines,
    )  # fmt: skip
    worker.cfg.set("http_parser", "python")
    made: Any = Connection(worker)
    made.connection_made(Transport())
    made.data_received(REQUEST)
    return made  # type: ignore[no-any-return]


async def rounds(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("after", range(ROUNDS))
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_after_so_many_rounds(after: int, begun: bool) -> None:
    """``begun``: gunicorn's side of the connection waits for a request when this one comes."""
    bus = Bus()

    async def run() -> None:
        client: Any = connection(bus)
        await rounds(3 if begun else 0)
        client._prompt.serve_otherwise()
        await rounds(after)
        client.connection_lost(None)
        await rounds(ROUNDS)

    asyncio.run(run())
    assert sorted([*bus.given_back, *bus.served], key=str) == ["begun"]


def test_one_that_leaves_before() -> None:
    bus = Bus()

    async def run() -> None:
        client: Any = connection(bus)
        await rounds(3)
        client.connection_lost(None)
        await rounds(ROUNDS)

    asyncio.run(run())
    assert (bus.given_back, bus.served) == (["prompt"], [])
