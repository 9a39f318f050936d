"""Other people's WebSocket clients, as they come: each says the same to an unmodified flask-sock app.

``websockets``, ``simple-websocket``, ``websocket-client`` and ``aiohttp`` share no code; some offer compression, some
send an Origin, some fragment what is large.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest
import simple_websocket
import websocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from flaskbus import embedded
from tests.integration.fleet import Fleet
from tests.integration.test_websockets import Place
from tests.integration.websocket_client import TEXT, Raw, frame, rss

LIMIT = 256 * 1024
PATIENCE = 20.0

Said = str | bytes


class Client(Protocol):
    """A WebSocket of some library. ``chosen`` is the subprotocol; :meth:`end` waits for the server's close frame."""

    chosen: str | None

    def __init__(self, url: str, protocols: list[str]) -> None: ...
    def send(self, message: Said) -> None: ...
    def receive(self) -> Said: ...
    def ping(self) -> None: ...
    def close(self, code: int, reason: str) -> None: ...
    def end(self) -> int: ...


class Websockets:
    def __init__(self, url: str, protocols: list[str]) -> None:
        self._ws: Any = connect(url, subprotocols=[Subprotocol(name) for name in protocols], legacy=True)
        self.chosen: str | None = self._ws.subprotocol

    def send(self, message: Said) -> None:
        self._ws.send(message)

    def receive(self) -> Said:
        said: Said = self._ws.recv(timeout=PATIENCE)
        return said

    def ping(self) -> None:
        assert self._ws.ping().wait(PATIENCE)

    def close(self, code: int, reason: str) -> None:
        self._ws.close(code, reason)

    def end(self) -> int:
        with pytest.raises(ConnectionClosed):
            self.receive()
        return int(self._ws.protocol.close_rcvd.code)


class SimpleWebsocket:
    def __init__(self, url: str, protocols: list[str]) -> None:
        self._ws = simple_websocket.Client(url, subprotocols=protocols)
        self.chosen = self._ws.subprotocol

    def send(self, message: Said) -> None:
        self._ws.send(message)

    def receive(self) -> Said:
        said: Said | None = self._ws.receive(timeout=PATIENCE)
        assert said is not None
        return said

    def ping(self) -> None:
        """It pings at intervals only."""

    def close(self, code: int, reason: str) -> None:
        self._ws.close(code, reason)

    def end(self) -> int:
        with pytest.raises(simple_websocket.ConnectionClosed) as caught:
            self.receive()
        return int(caught.value.reason)


class WebsocketClient:
    def __init__(self, url: str, protocols: list[str]) -> None:
        self._ws = websocket.create_connection(url, subprotocols=protocols, timeout=PATIENCE)
        self.chosen = self._ws.getsubprotocol()

    def send(self, message: Said) -> None:
        send = self._ws.send if isinstance(message, str) else self._ws.send_binary
        send(message)

    def receive(self) -> Said:
        opcode, data = self._ws.recv_data()
        said: Said = data.decode() if opcode == websocket.ABNF.OPCODE_TEXT else data
        return said

    def ping(self) -> None:
        self._ws.ping("who?")
        answer = self._ws.recv_frame()
        assert (answer.opcode, answer.data) == (websocket.ABNF.OPCODE_PONG, b"who?")

    def close(self, code: int, reason: str) -> None:
        self._ws.close(code, reason.encode())

    def end(self) -> int:
        opcode, data = self._ws.recv_data()
        assert opcode == websocket.ABNF.OPCODE_CLOSE
        self._ws.shutdown()
        return int.from_bytes(data[:2])


class Aiohttp:
    """Offers permessage-deflate."""

    def __init__(self, url: str, protocols: list[str]) -> None:
        self._runner = asyncio.Runner()
        self._runner.run(self._open(url, protocols))

    async def _open(self, url: str, protocols: list[str]) -> None:
        self._session = aiohttp.ClientSession()
        self._ws = await self._session.ws_connect(url, protocols=protocols, compress=15)
        assert not self._ws.compress
        self.chosen = self._ws.protocol

    def send(self, message: Said) -> None:
        send = self._ws.send_str if isinstance(message, str) else self._ws.send_bytes
        self._runner.run(send(message))

    def receive(self) -> Said:
        said: Said = self._runner.run(self._ws.receive(PATIENCE)).data
        return said

    def ping(self) -> None:
        self._runner.run(self._ws.ping(b"who?"))

    def close(self, code: int, reason: str) -> None:
        self._runner.run(self._close(code, reason))
        self._runner.close()

    async def _close(self, code: int, reason: str) -> None:
        await self._ws.close(code=code, message=reason.encode())
        await self._session.close()

    def end(self) -> int:
        message = self._runner.run(self._ws.receive(PATIENCE))
        assert message.type is aiohttp.WSMsgType.CLOSE
        self.close(1000, "")
        return int(message.data)


CLIENTS: list[type[Client]] = [Websockets, SimpleWebsocket, WebsocketClient, Aiohttp]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder: Path = tmp_path_factory.mktemp("clients")
    with embedded.start() as broker, Fleet(folder, broker.url) as fleet:
        gateway, url = fleet.gateway("--message-limit", str(LIMIT))
        place = Place(fleet, gateway, url, broker)  # type: ignore[arg-type]
        place.agent("/ws", "--message-limit", str(LIMIT))
        yield place


@pytest.fixture
def url(place: Place) -> str:
    return place.url.replace("http", "ws") + "/ws"


@pytest.mark.parametrize("kind", CLIENTS)
def test_what_it_says_comes_back(url: str, kind: type[Client]) -> None:
    client = kind(f"{url}/echo", ["other", "soap"])
    assert client.chosen == "soap"
    for message in ("text €", b"bytes", "", b"", "€" * 50_000, os.urandom(LIMIT)):
        client.send(message)
        assert client.receive() == message
    client.ping()
    client.send("after the ping")
    assert client.receive() == "after the ping"
    client.close(1000, "")


@pytest.mark.parametrize("kind", CLIENTS)
def test_the_app_hears_its_close(place: Place, url: str, kind: type[Client]) -> None:
    token = f"close-{kind.__name__}"
    client = kind(f"{url}/listen/{token}", [])
    assert client.chosen is None
    client.close(4001, "that was it")
    heard = place.noted_at_last(token, "code")
    assert (heard["code"], heard["reason"]) == (4001, "that was it")


@pytest.mark.parametrize("kind", CLIENTS)
def test_it_hears_the_apps_close(url: str, kind: type[Client]) -> None:
    client = kind(f"{url}/close/4002?reason=enough", [])
    client.send("now")
    assert client.end() == 4002


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_byte_too_many(url: str, kind: type[Client]) -> None:
    client = kind(f"{url}/echo", [])
    client.send(bytes(LIMIT))
    assert client.receive() == bytes(LIMIT)
    client.send(bytes(LIMIT + 1))
    assert client.end() == 1009


def test_a_compressed_bomb_is_not_inflated(place: Place) -> None:
    """No compression was agreed on, so its bit is an error (RFC 7692 section 6), whatever the frame holds."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(1 << 27)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < LIMIT
    (worker,) = place.gateway.workers()
    before = rss(worker)
    with Raw(f"{place.url}/ws/echo", "Sec-WebSocket-Extensions: permessage-deflate") as raw:
        assert not raw.answer().values("sec-websocket-extensions")
        raw.sock.sendall(frame(TEXT, bomb, rsv=4))
        assert raw.closed()[0] == 1002
    assert rss(worker) - before < 1 << 24
