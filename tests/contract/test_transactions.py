"""Large frames are pushed in a transaction; where that is not possible, nothing was carried out, or it is harmless."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from flaskbus.resp import LARGE
from flaskbus_agent.channel import Channel, open_channel
from flaskbus_agent.pool import ChannelPool
from tests.conftest import Broker

KEY = "flaskbus:{/t}:reply:1"
DATA = bytes(range(256)) * (LARGE // 128)


@pytest.fixture
def channel(engine: Broker) -> Iterator[Channel]:
    channel = open_channel(engine.url, "test", 5.0)
    yield channel
    channel.close()


@pytest.fixture
def client(engine: Broker) -> Iterator[Any]:
    with engine.client() as client:
        yield client
        client.delete(KEY)


def push(channel: Channel | ChannelPool, *elements: bytes) -> list[Any] | None:
    return channel.transaction(("RPUSH", KEY, *elements), ("PEXPIRE", KEY, 60_000), ("LLEN", KEY))


def test_large_arguments_arrive_as_they_are(channel: Channel, client: Any) -> None:
    elements = [DATA * 40, b"small", DATA, *[DATA] * 600]
    assert push(ChannelPool([channel]), *elements) == [603, 1, 603]
    assert client.lrange(KEY, 0, -1) == elements
    assert channel.call("PING") == b"PONG"


def test_an_error_of_one_command_is_its_answer(channel: Channel, client: Any) -> None:
    answers = channel.transaction(("RPUSH", KEY, "x"), ("EVALSHA", "0" * 40, 0), ("PEXPIRE", KEY, 60_000))
    assert answers is not None
    assert isinstance(answers[1], redis.exceptions.NoScriptError)
    assert (answers[0], answers[2]) == (1, 1)
    assert channel.call("PING") == b"PONG"


def test_out_of_memory(channel: Channel, client: Any) -> None:
    client.config_set("maxmemory", "1")
    try:
        assert push(channel, DATA) is None
        assert client.exists(KEY) == 0
    finally:
        client.config_set("maxmemory", "0")
    assert push(channel, DATA) == [1, 1, 1]


@pytest.mark.parametrize("refused", ["multi", "exec"])
def test_a_user_of_older_rules(engine: Broker, client: Any, refused: str) -> None:
    client.acl_setuser("older", enabled=True, nopass=True, keys=["*"], commands=["+@all", f"-{refused}"])
    parts = urlsplit(engine.url)
    channel = open_channel(f"redis://older:x@{parts.hostname}:{parts.port}/0", "test", 5.0)
    try:
        assert push(channel, DATA) is None
        assert channel.call("PING") == b"PONG"  # and not QUEUED
        length = client.llen(KEY)
        assert push(channel, DATA) is None
        assert client.llen(KEY) == length  # it is not tried again
        assert length == 0 or client.ttl(KEY) > 0
    finally:
        channel.close()
        client.acl_deluser("older")
