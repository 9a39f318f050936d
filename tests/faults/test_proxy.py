"""The bad network does what it is told: to the byte, in order, and to nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.broker import script_sha
from tests.conftest import Broker
from tests.faults.proxy import Cut, Proxy
from tests.faults.resp import Conversation, element_end, label

ELEMENTS = st.recursive(
    st.one_of(
        st.integers(-(2**63), 2**63 - 1).map(lambda number: b":%d\r\n" % number),
        st.binary(max_size=40).map(lambda data: b"$%d\r\n%b\r\n" % (len(data), data)),
        st.sampled_from([b"+OK\r\n", b"-ERR no\r\n", b"$-1\r\n", b"*-1\r\n", b"*0\r\n"]),
    ),
    lambda inner: st.lists(inner, max_size=4).map(lambda some: b"*%d\r\n" % len(some) + b"".join(some)),
    max_leaves=8,
)


@given(ELEMENTS, ELEMENTS)
def test_an_element_ends_where_the_next_begins(first: bytes, second: bytes) -> None:
    assert element_end(first + second, 0) == len(first)
    assert element_end(first + second, len(first)) == len(first) + len(second)
    assert all(element_end(first[:cut], 0) == -1 for cut in range(len(first)))


def command(*words: str | bytes | int) -> bytes:
    packed: bytes = hiredis.pack_command(cast(Any, words))
    return packed


def test_commands_have_names() -> None:
    assert label(command("XADD", "stream", "*")) == "XADD"
    assert label(command("client", "setname", "x")) == "CLIENT SETNAME"
    assert label(command("EVALSHA", script_sha("finish"), 0)) == "finish"
    assert label(command("EVALSHA", "0" * 40, 0)) == "EVALSHA"


@given(st.integers(1, 30))
def test_answers_belong_to_commands_however_they_are_cut_up(step: int) -> None:
    talk = Conversation()
    asked = command("CLIENT", "SETNAME", "flaskbus-gateway-1") + command("GET", "a") + command("LLEN", "b")
    answered = b"+OK\r\n$3\r\nabc\r\n:3\r\n"
    out = [each for at in range(0, len(asked), step) for each in talk.to_broker(asked[at : at + step])]
    back = [
        each for at in range(0, len(answered), step) for each in talk.from_broker(answered[at : at + step])
    ]
    assert [each.label for each in out] == [each.label for each in back] == ["CLIENT SETNAME", "GET", "LLEN"]
    assert b"".join(each.data for each in out) == asked
    assert b"".join(each.data for each in back) == answered
    assert {each.connection for each in back} == {"gateway link"}


def test_messages_of_a_subscription_have_names_too() -> None:
    talk = Conversation()
    talk.to_broker(command("CLIENT", "SETNAME", "flaskbus-gateway-1"))
    talk.from_broker(b"+OK\r\n")
    talk.to_broker(command("SUBSCRIBE", "news"))
    (message,) = talk.from_broker(b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$1\r\nx\r\n")
    assert (message.connection, message.label) == ("gateway doorbell", "message")


@asynccontextmanager
async def proxy_of(broker: Broker, *, parsing: bool = False) -> AsyncIterator[Proxy]:
    proxy = Proxy(urlsplit(broker.url).port or 0, parsing=parsing)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
    await asyncio.sleep(0.01)


async def talk_to(proxy: Proxy, data: bytes, wait: float = 1.0) -> bytes:
    """All that comes back until the connection ends, or for so long."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(data)
    received = b""
    try:
        async with asyncio.timeout(wait):
            while part := await reader.read(65536):
                received += part
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return received


@pytest.mark.parametrize("after", [0, 5, 25])
def test_a_command_is_cut_at_its_byte(broker: Broker, after: int) -> None:
    async def main() -> None:
        async with proxy_of(broker, parsing=True) as proxy:
            proxy.cut = Cut(lambda message: message.label == "SET" and message.outward, after, count=2)
            assert len(command("SET", "b", 1)) > 25
            assert await talk_to(proxy, command("SET", "a", 1), 0.2) == b"+OK\r\n"
            assert not proxy.fired.is_set()
            assert await talk_to(proxy, command("SET", "b", 1)) == b""
            assert proxy.fired.is_set()
            assert await talk_to(proxy, command("MGET", "a", "b"), 0.2) == b"*2\r\n$1\r\n1\r\n$-1\r\n"

    asyncio.run(main())


@pytest.mark.parametrize("after", [0, 3, 5])
def test_an_answer_is_cut_at_its_byte(broker: Broker, after: int) -> None:
    async def main() -> None:
        async with proxy_of(broker, parsing=True) as proxy:
            proxy.cut = Cut(lambda message: not message.outward, after, reset=False)
            assert await talk_to(proxy, command("SET", "a", 1)) == b"+OK\r\n"[:after]
            assert await talk_to(proxy, command("GET", "a"), 0.2) == b"$1\r\n1\r\n"

    asyncio.run(main())


def test_a_delay_keeps_the_order(broker: Broker) -> None:
    async def main() -> None:
        async with proxy_of(broker) as proxy:
            loop = asyncio.get_running_loop()
            proxy.delay = 0.2
            began = loop.time()
            loop.call_later(0.1, proxy.mend)
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            for number in range(20):
                writer.write(command("RPUSH", "list", number))
                await asyncio.sleep(0.02)
            for number in range(1, 21):
                assert await reader.readline() == b":%d\r\n" % number
            assert loop.time() - began > 0.2
            writer.close()

    asyncio.run(main())
    with broker.client() as client:
        assert client.lrange("list", 0, -1) == [b"%d" % number for number in range(20)]


def test_what_is_swallowed_never_comes_and_the_connection_is_broken_afterwards(broker: Broker) -> None:
    async def main() -> None:
        async with proxy_of(broker) as proxy:
            proxy.swallowing = True
            asked = asyncio.create_task(talk_to(proxy, command("SET", "a", 1), 5.0))
            await asyncio.sleep(0.1)
            assert not asked.done()
            proxy.mend()
            assert await asked == b""
            assert await talk_to(proxy, command("EXISTS", "a"), 0.2) == b":0\r\n"

    asyncio.run(main())


def test_a_budget_of_bytes(broker: Broker) -> None:
    async def main() -> None:
        async with proxy_of(broker) as proxy:
            proxy.budget = len(command("PING")) + 3
            assert await talk_to(proxy, command("PING")) == b"+PO"
            assert await talk_to(proxy, command("PING"), 0.2) == b"+PONG\r\n"

    asyncio.run(main())
