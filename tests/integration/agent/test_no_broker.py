"""Something else answers where the broker was: its port was taken while it was away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from flaskbus.broker import Unavailable
from flaskbus_agent.channel import open_channel


@pytest.fixture
def no_broker() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_http, args=(server,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def answer_http(server: socket.socket) -> None:
    try:
        while True:
            with server.accept()[0] as client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    except OSError:
        pass  # it was shut down


def test_what_is_no_broker_is_a_broker_that_is_away(no_broker: str) -> None:
    channel = open_channel(no_broker, "test", 2.0)
    for _ in range(2):
        with pytest.raises(Unavailable):
            channel.call("TIME")
    channel.close()


@pytest.mark.parametrize("sentinel", [False, True])
def test_what_was_told_is_not_sent_later(no_broker: str, sentinel: bool) -> None:
    """Whoever told it takes care of it otherwise."""
    url = no_broker
    if sentinel:
        url = no_broker.replace("redis://", "redis+sentinel://").removesuffix("/0") + "/mymaster"
    channel = open_channel(url, "test", 2.0)
    heard: list[object] = []
    channel.tell([b"*1\r\n$4\r\nPING\r\n"], 1, heard.append)
    with pytest.raises(Unavailable):
        channel.call("TIME")
    channel.flush()  # there is nothing
    assert not heard
    channel.close()
