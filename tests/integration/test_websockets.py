"""WebSockets of unmodified apps through the bus: a gateway process, agent processes, and other people's clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import simple_websocket
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from flaskbus.signing import make_key
from tests.conftest import Broker, start_broker, stop_broker
from tests.integration.fleet import LEASE, Fleet, Program, eventually, whole_lines

ROOT = Path(__file__).parents[2]
WINDOW = 256 * 1024
LIMIT = 512 * 1024
APP = "tests.integration.apps.sockets:app"


@dataclass
class Place:
    """A gateway, a broker, and whatever agents a test wants."""

    fleet: Fleet
    gateway: Program
    url: str
    broker: Broker

    def agent(self, prefix: str, *options: str, app: str = APP, **environ: Any) -> Program:
        """An agent whose app answers."""
        agent = self.fleet.start(
            "agent", "flaskbus_agent", f"{app}={prefix}",
            "--window", str(WINDOW), "--message-limit", str(LIMIT), *options,
            PYTHONPATH=str(ROOT), **environ,
        )  # fmt: skip
        plain = f"{self.url}{prefix}/plain"
        eventually(lambda: agent.process.poll() is not None or httpx.get(plain).status_code == 200, "agent")
        assert agent.process.poll() is None, agent.log()
        return agent

    def open(self, path: str, **options: Any) -> ClientConnection:
        """A client, which its test closes, or leaves."""
        options.setdefault("open_timeout", 20)
        client = connect(self.url.replace("http", "ws") + path, legacy=True, **options)
        assert isinstance(client, ClientConnection)
        return client

    def noted(self, token: str) -> list[dict[str, Any]]:
        """What the app noted of one connection."""
        lines = whole_lines(self.fleet.ledger)
        return [fact for line in lines if (fact := json.loads(line))["token"] == token]

    def noted_at_last(self, token: str, key: str, value: object = None) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            facts = (fact for fact in self.noted(token) if key in fact)
            return next((fact for fact in facts if value is None or fact[key] == value), None)

        result: dict[str, Any] = eventually(found, f"{key} of {token}")
        return result

    def elements(self, pattern: str) -> list[int]:
        """Sizes of what lies on the lists of this kind."""
        with self.broker.client() as client:
            return [
                len(element) for key in client.scan_iter(pattern) for element in client.lrange(key, 0, -1)
            ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("sockets")
    broker = start_broker("valkey", folder)
    try:
        with Fleet(folder, broker.url) as fleet:
            gateway, url = fleet.gateway("--window", str(WINDOW), "--message-limit", str(LIMIT))
            yield Place(fleet, gateway, url, broker)
    finally:
        stop_broker(broker)


@pytest.fixture(scope="module")
def ws(place: Place) -> Place:
    """With an agent of four threads that serves the app at /ws."""
    place.agent("/ws", "--threads", "4")
    return place


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


def closed(client: ClientConnection) -> tuple[int | None, str]:
    """Code and reason of the close frame that came; ``None`` where none did."""
    try:
        while True:
            client.recv(timeout=30)
    except ConnectionClosed as end:
        return (end.rcvd.code, end.rcvd.reason) if end.rcvd else (None, "")


def frame(opcode: Opcode, data: bytes, *, fin: bool = True) -> str:
    return Frame(opcode, data, fin=fin).serialize(mask=False).hex()


MESSAGES: list[str | bytes] = [
    "hello", "", b"", b"\0\xff\n", "žluťoučký kůň 🐎", "x" * 65536, b"y" * 65537, "ž" * 100_000, b"z" * LIMIT,
]  # fmt: skip


class TestMessages:
    def test_every_kind_comes_back_as_it_was_sent(self, ws: Place) -> None:
        with ws.open("/ws/echo") as client:
            for message in MESSAGES:
                client.send(message)
                assert client.recv(timeout=20) == message

    def test_with_a_client_of_the_other_library(self, ws: Place) -> None:
        client = simple_websocket.Client(ws.url.replace("http", "ws") + "/ws/echo")
        try:
            for message in MESSAGES:
                client.send(message)
                assert client.receive(timeout=20) == message
        finally:
            client.close()

    def test_many_on_their_way_at_once_keep_their_order(self, ws: Place) -> None:
        async def run() -> list[Any]:
            async with connect_async(ws.url.replace("http", "ws") + "/ws/echo") as client:

                async def send() -> None:
                    for number in range(3000):
                        await client.send(f"{number}")

                sending = asyncio.create_task(send())
                answers = [await client.recv() for _ in range(3000)]
                await sending
                return answers

        assert asyncio.run(asyncio.wait_for(run(), 60)) == [f"{number}" for number in range(3000)]

    def test_fragments_of_the_client_are_one_message_of_the_app(self, ws: Place) -> None:
        with ws.open("/ws/echo") as client:
            client.send(["a", "", "bc", "d"])
            assert client.recv(timeout=20) == "abcd"
            client.send([b"a" * 70_000, b"b" * 70_000])
            assert client.recv(timeout=20) == b"a" * 70_000 + b"b" * 70_000

    def test_fragments_of_the_app_are_one_message_of_the_client(self, ws: Place, token: str) -> None:
        data = (
            frame(Opcode.TEXT, "ž".encode()[:1], fin=False)
            + frame(Opcode.PING, b"in between")
            + frame(Opcode.CONT, "ž".encode()[1:], fin=False)
            + frame(Opcode.CONT, b"!")
            + frame(Opcode.BINARY, b"", fin=False)
            + frame(Opcode.CONT, b"")
        )
        with ws.open(f"/ws/bytes/{token}?hex={data}") as client:
            assert client.recv(timeout=20) == "ž!"
            assert client.recv(timeout=20) == b""

    def test_thousands_of_tiny_messages_in_one_write(self, ws: Place, token: str) -> None:
        """More than a script takes arguments."""
        with ws.open("/ws/small") as client:
            assert [client.recv(timeout=20) for _ in range(20_000)] == [b"."] * 20_000

    def test_the_first_words_of_an_app_that_is_over_at_once(self, ws: Place) -> None:
        for _ in range(20):
            with ws.open("/ws/at-once") as client:
                assert [client.recv(timeout=20), client.recv(timeout=20)] == ["hello", "goodbye"]
                assert closed(client) == (1000, "")

    def test_message_limit_of_the_client(self, ws: Place, token: str) -> None:
        with ws.open(f"/ws/listen/{token}") as client:
            client.send(b"x" * (LIMIT + 1))
            assert closed(client)[0] == 1009
        ws.noted_at_last(token, "code")
        assert not [fact for fact in ws.noted(token) if "size" in fact]

    @pytest.mark.parametrize("parts", [1, 3])
    def test_message_limit_of_the_app(self, ws: Place, token: str, parts: int) -> None:
        with ws.open(f"/ws/large/{LIMIT}/{parts}") as client:
            assert len(client.recv(timeout=20)) == LIMIT
        with ws.open(f"/ws/large/{LIMIT + parts}/{parts}") as client:
            assert closed(client) == (1009, "the app's message is too big")

    def test_text_of_the_client_that_is_no_text(self, ws: Place, token: str) -> None:
        with ws.open(f"/ws/listen/{token}") as client:
            client.send(b"\xff\xfe", text=True)
            assert closed(client)[0] == 1007
        assert ws.noted_at_last(token, "code")["code"] == 1001


class TestWhatAppsMayNot:
    """Bytes of an app that break a rule end its WebSocket with 1011: it is not the client's fault."""

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(frame(Opcode.TEXT, b"\xff"), id="text that is not UTF-8"),
            pytest.param("81850000000068656c6c6f", id="a masked frame"),
            pytest.param("c100", id="a reserved bit"),
            pytest.param("8300", id="a reserved opcode"),
            pytest.param(frame(Opcode.CONT, b"x"), id="a continuation of nothing"),
            pytest.param("8801ff", id="a close frame of one byte"),
            pytest.param("880203e7", id="a close code that nobody may send"),
        ],
    )
    def test_bytes(self, ws: Place, token: str, data: str) -> None:
        with ws.open(f"/ws/bytes/{token}?hex={data}") as client:
            assert closed(client)[0] == 1011
        with ws.open("/ws/echo") as client:  # and no other's end
            client.send("still here")
            assert client.recv(timeout=20) == "still here"


class TestPings:
    def test_the_clients_are_answered(self, ws: Place) -> None:
        with ws.open("/ws/echo") as client:
            assert client.ping(b"hello").wait(20)

    def test_the_apps_are_answered(self, ws: Place, token: str) -> None:
        data = frame(Opcode.PING, b"who?") + frame(Opcode.CLOSE, b"")
        with ws.open(f"/ws/bytes/{token}?hex={data}") as client:
            closed(client)
        heard = bytes.fromhex(ws.noted_at_last(token, "heard")["heard"])
        assert heard[0] == 0x80 | Opcode.PONG
        assert unmasked(heard) == b"who?"

    def test_an_app_that_pings_goes_on(self, place: Place) -> None:
        place.agent("/pinging", PING_INTERVAL="0.4")
        with place.open("/pinging/echo") as client:
            with pytest.raises(TimeoutError):
                client.recv(timeout=1.5)
            client.send("x")
            assert client.recv(timeout=20) == "x"


def unmasked(data: bytes) -> bytes:
    """The payload of one short frame."""
    size, mask = data[1] & 0x7F, data[2:6]
    return bytes(byte ^ mask[place % 4] for place, byte in enumerate(data[6 : 6 + size]))


class TestHandshake:
    @pytest.mark.parametrize(
        ("offered", "chosen"),
        [(None, None), (["chat"], "chat"), (["other", "soap"], "soap"), (["other"], None)],
    )
    def test_subprotocols(self, ws: Place, offered: Any, chosen: str | None) -> None:
        with ws.open("/ws/echo", subprotocols=offered) as client:
            assert client.subprotocol == chosen

    def test_headers_of_the_app(self, ws: Place, token: str) -> None:
        with ws.open(f"/ws/bytes/{token}?hex=") as client:
            assert client.response is not None
            assert client.response.headers["X-Made"] == "by hand"

    @pytest.mark.parametrize(
        ("path", "status", "body"),
        [
            ("/ws/plain", 400, b"The browser (or proxy) sent a request"),
            ("/ws/nothing-here", 404, b"Not Found"),
            ("/ws/refuses", 403, b"not for you"),
            ("/ws/streams", 200, b"one two three"),
            ("/ws/raises-before", 500, b"Internal Server Error"),
            ("/ws/garbage", 502, b"does not take the handshake"),
        ],
    )
    def test_the_apps_own_answer(self, ws: Place, path: str, status: int, body: bytes) -> None:
        began = time.monotonic()
        with pytest.raises(InvalidStatus) as caught:
            ws.open(path)
        assert caught.value.response.status_code == status
        assert body in bytes(caught.value.response.body or b"")
        assert time.monotonic() - began < 5

    def test_a_request_that_is_no_handshake(self, ws: Place) -> None:
        assert httpx.get(f"{ws.url}/ws/echo").status_code == 400

    def test_a_header_of_the_apps_refusal(self, ws: Place) -> None:
        with pytest.raises(InvalidStatus) as caught:
            ws.open("/ws/refuses")
        assert caught.value.response.headers["X-Why"] == "because"


class TestClose:
    CODES = (1000, 1001, 1003, 1008, 1011, 3000, 3999, 4000, 4999)

    @pytest.mark.parametrize("code", CODES)
    @pytest.mark.parametrize("reason", ["", "so long, ž"])
    def test_of_the_client(self, ws: Place, token: str, code: int, reason: str) -> None:
        client = ws.open(f"/ws/listen/{token}")
        client.close(code, reason)
        fact = ws.noted_at_last(token, "code")
        assert (fact["code"], fact["reason"] or "") == (code, reason)

    @pytest.mark.parametrize("code", CODES)
    @pytest.mark.parametrize("reason", ["", "so long, ž"])
    def test_of_the_app(self, ws: Place, code: int, reason: str) -> None:
        with ws.open(f"/ws/close/{code}?reason={reason}") as client:
            client.send("now")
            assert closed(client) == (code, reason)

    def test_of_the_client_without_a_code(self, ws: Place, token: str) -> None:
        client = ws.open(f"/ws/listen/{token}")
        client.socket.sendall(bytes.fromhex("888000000000"))
        assert ws.noted_at_last(token, "code")["code"] in (1000, 1005)
        client.close()

    def test_of_the_app_without_a_code(self, ws: Place, token: str) -> None:
        with ws.open(f"/ws/bytes/{token}?hex=8800") as client:
            assert closed(client)[0] in (1000, 1005)

    def test_the_apps_is_answered(self, ws: Place, token: str) -> None:
        """A server that waits for the answer gets it."""
        with ws.open(f"/ws/bytes/{token}?hex={frame(Opcode.CLOSE, bytes([0x0F, 0xA1]))}") as client:
            assert closed(client) == (4001, "")
        heard = bytes.fromhex(ws.noted_at_last(token, "heard")["heard"])
        assert (heard[0] & 0x0F, unmasked(heard)) == (Opcode.CLOSE, bytes([0x0F, 0xA1]))

    @pytest.mark.parametrize("code", [999, 1004, 1005, 1006, 1015, 2999, 5000, 65535])
    def test_a_code_that_nobody_may_send(self, ws: Place, token: str, code: int) -> None:
        client = ws.open(f"/ws/listen/{token}")
        client.socket.sendall(bytes.fromhex("888200000000") + code.to_bytes(2, "big"))
        assert closed(client)[0] == 1002
        assert ws.noted_at_last(token, "code")["code"] in (1001, 1002, 1005)
        with ws.open("/ws/echo") as other:
            other.send("still here")
            assert other.recv(timeout=20) == "still here"


class TestEnds:
    def test_an_app_that_raises(self, ws: Place) -> None:
        with ws.open("/ws/raises") as client:
            client.send("now")
            assert closed(client)[0] == 1011

    def test_a_client_that_vanishes(self, ws: Place, token: str) -> None:
        client = ws.open(f"/ws/listen/{token}")
        client.send("x")
        client.recv(timeout=20)
        gone = time.time()
        vanish(client)
        fact = ws.noted_at_last(token, "code")
        assert fact["code"] == 1001
        assert fact["at"] - gone < 1.0

    def test_a_client_that_vanishes_while_it_is_not_reading(self, ws: Place, token: str) -> None:
        """Its app waits for room; that ends too."""
        client = slow(ws, f"/ws/send/10000/65536/{token}")
        stalled(ws, token)
        gone = time.time()
        vanish(client)
        eventually(lambda: not ws.elements("*:reply:*"), "nothing is left")
        assert time.time() - gone < 5.0
        httpx.get(f"{ws.url}/ws/plain").raise_for_status()

    @pytest.mark.slow
    def test_a_client_that_vanishes_while_its_app_reads_nothing(self, ws: Place, token: str) -> None:
        """Nothing is read of its connection then; the gateway's next ping tells."""
        gateway, url = ws.fleet.gateway("--window", str(WINDOW), "--websocket-ping", "0.5")
        client = Place(ws.fleet, gateway, url, ws.broker).open(f"/ws/unread/{token}")
        ws.noted_at_last(token, "event", "open")
        fill(client)
        eventually(lambda: sum(ws.elements("*:inbound:*")) >= WINDOW, "the window is full")
        vanish(client)
        ws.noted_at_last(token, "event", "hung up")
        eventually(lambda: not ws.elements("*:inbound:*"), "nothing is left")
        gateway.end()

    def test_an_engine_io_server_leaves_without_an_error(self, place: Place) -> None:
        """python-engineio ends its WSGI call with a ConnectionError, as werkzeug's server likes it."""
        agent = place.agent("/io", app="tests.integration.apps.engine:app")
        with place.open("/io/socket.io/?EIO=4&transport=websocket") as client:
            assert str(client.recv(timeout=20)).startswith("0{")
            client.send("40")
            assert str(client.recv(timeout=20)).startswith("40{")
            client.send('42["say","hello"]')
            assert client.recv(timeout=20) == '42["said","hello"]'
        eventually(lambda: b"idle" in httpx.get(f"{place.url}/io/open").content, "its thread has ended")
        assert "ERROR" not in agent.log()
        agent.end()


def limited(limits: str) -> list[str]:
    """A command that runs another one with less than the system allows."""
    return ["sh", "-c", f'ulimit {limits}; exec "$@"', "sh"]


def vanish(client: ClientConnection) -> None:
    """Without a word."""
    with suppress(OSError):  # its library may have closed it, as it timed out
        client.socket.shutdown(socket.SHUT_RDWR)
    client.close()


def slow(place: Place, path: str) -> ClientConnection:
    """A client that reads nothing, with little room in its kernel."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = place.url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    # With a queue of one message its library stops reading.
    return place.open(path, sock=sock, max_queue=1, ping_interval=None)


def fill(client: ClientConnection) -> int:
    """Send until there is no room for half a second; how many bytes went."""
    client.socket.settimeout(0.5)
    message = Frame(Opcode.BINARY, b"x" * 65536).serialize(mask=True)
    sent = 0
    try:
        while True:
            sent += client.socket.send(message[sent % len(message) :])
    except TimeoutError:
        return sent


def stalled(place: Place, token: str) -> int:
    """Wait until an app that sends has stopped; how many messages it has sent."""
    before, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        sent = len([fact for fact in place.noted(token) if "sent" in fact])
        if sent != before:
            before, since = sent, time.monotonic()
        time.sleep(0.05)
    assert before > 0
    return before


class TestBackpressure:
    def test_a_client_that_does_not_read(self, ws: Place, token: str) -> None:
        client = slow(ws, f"/ws/send/2000/65536/{token}")
        sent = stalled(ws, token)
        assert sent < 2000, "the app was never paused"
        waiting = sum(ws.elements("*:reply:*"))
        assert WINDOW - 65536 < waiting < WINDOW + 2 * 65536 + 4096
        with ws.open("/ws/echo") as other:  # others go on
            other.send("hello")
            assert other.recv(timeout=5) == "hello"
        for _ in range(2000):  # and so does this one
            assert len(client.recv(timeout=20)) == 65536
        client.close()

    def test_an_app_that_does_not_read(self, ws: Place, token: str) -> None:
        client = ws.open(f"/ws/unread/{token}", ping_interval=None)
        ws.noted_at_last(token, "event", "open")
        sent = fill(client)
        waiting = sum(ws.elements("*:inbound:*"))
        assert WINDOW - 65536 < waiting < WINDOW + 2 * 65536
        with ws.open("/ws/echo") as other:
            other.send("hello")
            assert other.recv(timeout=5) == "hello"
        httpx.post(f"{ws.url}/ws/gate/{token}").raise_for_status()
        read = ws.noted_at_last(token, "read")["read"]
        # What is unfinished is not sent on; all else is, and its headers are larger.
        assert sent - 65536 * 2 < read < sent + 65536
        vanish(client)

    def test_an_app_that_reads_slowly(self, ws: Place, token: str) -> None:
        """It is given more when it has read, and not when somebody looks."""
        with ws.open(f"/ws/sips/{8 << 20}/{token}", ping_interval=None) as client:
            for _ in range(128):
                client.send(b"x" * 65536)
            assert ws.noted_at_last(token, "seconds")["seconds"] < 5.0

    @pytest.mark.slow
    def test_a_broker_out_of_memory_stops_only_who_waits_for_room(self, place: Place, token: str) -> None:
        gateway, url = place.fleet.gateway("--lease", "60")
        own = Place(place.fleet, gateway, url, place.broker)
        agent = own.agent("/oom", "--lease", "60")
        silent = slow(own, f"/oom/ticks/300/65536/{token}")
        reader = own.open(f"/oom/ticks/300/4096/{token}")
        eventually(lambda: len(own.noted(token)) == 2, "both are open")
        with own.broker.client() as client:
            client.config_set("maxmemory", 1)
            try:
                (own.fleet.directory / token).touch()
                for number in range(300):
                    assert int(reader.recv(timeout=10)) == number
                assert own.elements("*:reply:*"), "nobody waited for room"
            finally:
                client.config_set("maxmemory", 0)
        for number in range(300):
            assert int(silent.recv(timeout=10)) == number
        silent.close()
        reader.close()
        agent.end()
        gateway.end()


class TestBudget:
    def test_more_websockets_than_threads_stop_nobody(self, ws: Place) -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(ws.open("/ws/echo")) for _ in range(50)]
            with httpx.Client() as http:
                for _ in range(20):
                    began = time.monotonic()
                    assert http.get(f"{ws.url}/ws/plain").status_code == 200
                    assert time.monotonic() - began < 2.0
            for number, client in enumerate(clients):
                client.send(f"{number}")
            assert [client.recv(timeout=20) for client in clients] == [f"{number}" for number in range(50)]

    def test_one_too_many_is_503_and_keeps_no_thread(self, place: Place) -> None:
        agent = place.agent("/few", "--threads", "1", "--streams", "3")
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(place.open("/few/echo"))
            for _ in range(3):
                with pytest.raises(InvalidStatus) as caught:
                    place.open("/few/echo")
                response = caught.value.response
                assert response.status_code == 503
                assert int(response.headers["Retry-After"]) > 0
                problem = json.loads(bytes(response.body or b""))
                assert problem["type"] == "urn:flaskbus:error:streams-full"
                assert problem["executed"] == "no"
                assert httpx.get(f"{place.url}/few/plain").status_code == 200

        def there_is_room() -> bool:
            try:
                with place.open("/few/echo") as client:
                    client.send("x")
                    return client.recv(timeout=20) == "x"
            except InvalidStatus:
                return False

        eventually(there_is_room, "places are free again")
        agent.end()

    def test_an_agent_asks_for_the_files_that_its_budget_takes(self, place: Place) -> None:
        agent = place.agent("/files", "--streams", "120", inside=limited("-Sn 128"))
        with ExitStack() as stack:
            clients = [stack.enter_context(place.open("/files/echo")) for _ in range(100)]
            for client in clients:
                client.send("x")
            assert {client.recv(timeout=20) for client in clients} == {"x"}
        agent.end()

    def test_a_websocket_for_which_there_is_no_file_is_503(self, place: Place) -> None:
        agent = place.agent("/nofile", "--streams", "120", inside=limited("-n 64"))
        with ExitStack() as stack:
            clients: list[ClientConnection] = []

            def add(count: int) -> None:
                clients.extend(stack.enter_context(place.open("/nofile/echo")) for _ in range(count))

            add(5)
            with pytest.raises(InvalidStatus) as caught:
                add(64)
            assert caught.value.response.status_code == 503
            assert b"streams-full" in bytes(caught.value.response.body or b"")
            for client in clients:  # which go on
                client.send("x")
                assert client.recv(timeout=20) == "x"
            clients.pop().close()

            def there_is_room() -> bool:
                with suppress(InvalidStatus), place.open("/nofile/echo") as client:
                    client.send("x")
                    return client.recv(timeout=20) == "x"
                return False

            eventually(there_is_room, "its files are free again")
        agent.end()

    @pytest.mark.slow
    def test_connections_to_the_broker_do_not_grow(self, place: Place) -> None:
        agent = place.agent("/wide", "--streams", "250")

        def connections() -> int:
            with place.broker.client() as client:
                return len(client.client_list())

        with ExitStack() as stack:
            one = stack.enter_context(place.open("/wide/echo"))
            one.send("x")
            one.recv(timeout=20)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: httpx.get(f"{place.url}/wide/plain"), range(40)))
            before = connections()
            clients = [stack.enter_context(place.open("/wide/echo")) for _ in range(150)]
            http = stack.enter_context(httpx.Client())
            for _ in range(50):
                response = stack.enter_context(http.stream("GET", f"{place.url}/wide/drip"))
                assert next(response.iter_raw()) == b"drop"
            for client in clients:
                client.send("x")
            assert {client.recv(timeout=20) for client in clients} == {"x"}
            # Some are opened when they are first needed, but none for an exchange.
            assert connections() <= before + 4
        agent.end()


class TestSigned:
    def test_both_sides_sign(self, place: Place, token: str) -> None:
        secret = "s" * 40
        gateway, url = place.fleet.gateway("--signing-secret", secret)
        other = Place(place.fleet, gateway, url, place.broker)
        key = make_key(secret, "flaskbus", "/signed")
        agent = other.agent("/signed", "--signing-key", key)
        with other.open(f"/signed/listen/{token}") as client:
            for message in MESSAGES:
                client.send(message)
                assert client.recv(timeout=20) == message
            client.close(4001, "bye")
        assert other.noted_at_last(token, "code")["code"] == 4001
        agent.end()
        gateway.end()


class TestLeaks:
    @pytest.mark.slow
    def test_nothing_stays_of_any_ending(self, place: Place) -> None:
        """Files and threads of the agent's process are as many as before."""
        agent = place.agent("/leak")
        [worker] = agent.workers()

        def open_now() -> tuple[int, int]:
            own = Path(f"/proc/{worker}")
            return len([*(own / "fd").iterdir()]), len([*(own / "task").iterdir()])

        def once(number: int) -> None:
            match number % 6:
                case 0:
                    with place.open("/leak/at-once") as client:
                        closed(client)
                case 1:
                    vanish(place.open("/leak/echo"))
                case 2:
                    place.open("/leak/echo").close(4000)
                case 3:
                    with place.open("/leak/raises") as client:
                        client.send("now")
                        closed(client)
                case 4:
                    with place.open("/leak/bytes/x?hex=c100") as client:
                        closed(client)
                case _:
                    with pytest.raises(InvalidStatus):
                        place.open(("/leak/plain", "/leak/garbage")[number % 2])

        for number in range(12):
            once(number)
        httpx.get(f"{place.url}/leak/plain")
        before = eventually(lambda: settled(open_now))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(once, range(240)))
        eventually(
            lambda: all(now <= then for now, then in zip(open_now(), before, strict=True)), "nothing stays"
        )
        agent.end()


def settled(count: Callable[[], tuple[int, int]]) -> tuple[int, int] | None:
    """A count that stays the same for a second."""
    first, end = count(), time.monotonic() + 1.0
    while time.monotonic() < end:
        if count() != first:
            return None
        time.sleep(0.02)
    return first


class TestStopping:
    def test_an_agent_that_stops(self, place: Place, token: str) -> None:
        agent = place.agent("/stop", "--graceful-timeout", "10")
        client = place.open(f"/stop/listen/{token}")
        place.noted_at_last(token, "event", "open")
        began = time.monotonic()
        agent.signal(signal.SIGTERM)
        assert closed(client) == (1001, "the agent stops")
        assert place.noted_at_last(token, "code")["code"] == 1001
        assert agent.process.wait(10) == 0
        assert time.monotonic() - began < 4.0

    def test_an_app_that_does_not_hear_that_it_stops(self, place: Place, token: str) -> None:
        agent = place.agent("/deaf", "--graceful-timeout", "3")
        client = place.open(f"/deaf/deaf/{token}")
        place.noted_at_last(token, "event", "open")
        began = time.monotonic()
        agent.signal(signal.SIGTERM)
        assert closed(client)[0] == 1001
        assert time.monotonic() - began < 3.0
        assert agent.process.wait(20) == 0

    def test_a_gateway_that_stops(self, place: Place, token: str) -> None:
        agent = place.agent("/stay")
        gateway, url = place.fleet.gateway()
        other = Place(place.fleet, gateway, url, place.broker)
        client = other.open(f"/stay/listen/{token}")
        place.noted_at_last(token, "event", "open")
        gateway.signal(signal.SIGTERM)
        assert closed(client)[0] == 1001
        assert place.noted_at_last(token, "code")["code"] == 1001
        assert gateway.process.wait(30) == 0
        agent.end()


class TestDeadAgents:
    def test_a_worker_that_dies(self, place: Place) -> None:
        agent = place.agent("/mortal")
        client = place.open("/mortal/die")
        began = time.monotonic()
        client.send("now")
        assert closed(client)[0] in (1011, None)
        assert time.monotonic() - began < 1.5
        agent.end()

    def test_an_agent_that_is_killed(self, place: Place, token: str) -> None:
        agent = place.agent("/killed")
        client = place.open(f"/killed/listen/{token}")
        place.noted_at_last(token, "event", "open")
        family = [agent.pid, *agent.workers()]
        began = time.monotonic()
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        assert closed(client)[0] in (1011, None)
        assert time.monotonic() - began < LEASE + 1.5  # half a second is the machine's
        agent.process.wait()
