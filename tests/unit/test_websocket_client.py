"""The client that an app with a WebSocket sees, against the server side of two libraries, and against bare bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from wsproto import ConnectionType, WSConnection
from wsproto import events as wsproto

from flaskbus_agent.websocket import LONGEST_REASON, Accepted, Client, Closed, Event, Message

LIMIT = 1 << 20
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


class App:
    """An app's side by websockets, for as long as a test talks to it."""

    def __init__(self, client: Client, subprotocols: Sequence[str] = (), offered: Sequence[str] = ()) -> None:
        self.client = client
        self.server = ServerProtocol(subprotocols=[Subprotocol(name) for name in subprotocols] or None)
        request = Request(
            "/",
            Headers(
                {
                    "Host": "x",
                    "Connection": "Upgrade",
                    "Upgrade": "websocket",
                    "Sec-WebSocket-Key": client.key,
                    "Sec-WebSocket-Version": "13",
                }
            ),
        )
        if offered:
            request.headers["Sec-WebSocket-Protocol"] = ", ".join(offered)
        self.server.receive_data(request.serialize())
        [received] = self.server.events_received()
        assert isinstance(received, Request)
        response = self.server.accept(received)
        response.headers["X-App"] = "mine"
        self.server.send_response(response)

    def spoken(self) -> bytes:
        return b"".join(self.server.data_to_send())

    def heard(self) -> list[Frame]:
        """What came from the client since the last call."""
        if data := self.client.to_app():
            self.server.receive_data(data)
        return [event for event in self.server.events_received() if isinstance(event, Frame)]


def opened(limit: int = LIMIT) -> tuple[Client, App]:
    client = Client([], limit)
    app = App(client)
    assert [type(event) for event in client.feed(app.spoken())] == [Accepted]
    assert client.open
    return client, app


def fed(client: Client, data: bytes, size: int) -> list[Event]:
    """Events of bytes that come in pieces of this size."""
    return [event for start in range(0, len(data), size) for event in client.feed(data[start : start + size])]


class TestHandshake:
    def test_headers_of_the_app_without_those_of_the_connection(self) -> None:
        client = Client(["chat", "soap"], LIMIT)
        app = App(client, ["soap"], ["chat", "soap"])
        [event] = client.feed(app.spoken())
        assert isinstance(event, Accepted)
        headers = dict(event.headers)
        assert headers[b"x-app"] == b"mine"
        assert headers[b"sec-websocket-protocol"] == b"soap"
        assert not {b"connection", b"upgrade", b"sec-websocket-accept"} & set(headers)

    def test_nothing_is_said_before(self) -> None:
        client = Client([], LIMIT)
        client.send(True, True, b"too early")
        client.close(1000, "")
        assert client.to_app() == b""
        assert not client.open

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            SWITCHING + b"Sec-WebSocket-Accept: AAAA\r\n\r\n",
            b"garbage\r\n\r\n",
            b"x" * 100_000,
        ],
    )
    def test_an_answer_that_does_not_take_it(self, answer: bytes) -> None:
        client = Client([], LIMIT)
        assert client.feed(answer) == [Closed(1006, "")]
        assert client.feed(b"more") == []
        assert not client.open

    def test_a_subprotocol_that_was_not_offered(self) -> None:
        client = Client(["chat"], LIMIT)
        answer = App(client).spoken()[:-2] + b"Sec-WebSocket-Protocol: soap\r\n\r\n"
        assert client.feed(answer) == [Closed(1006, "")]

    def test_an_end_in_its_midst(self) -> None:
        client = Client([], LIMIT)
        assert client.feed(SWITCHING) == []
        assert client.feed(b"") == [Closed(1006, "")]
        assert client.feed(b"") == []

    @given(offered=st.lists(st.text(max_size=20), max_size=5))
    def test_whatever_is_offered_can_be_declined(self, offered: list[str]) -> None:
        client = Client(offered, LIMIT)
        assert [type(event) for event in client.feed(App(client).spoken())] == [Accepted]


message = st.one_of(st.text(max_size=300), st.binary(max_size=300))


class TestMessages:
    @given(messages=st.lists(message, max_size=8), size=st.integers(1, 400))
    def test_of_the_app_come_as_they_were_sent(self, messages: list[str | bytes], size: int) -> None:
        """However its bytes are cut."""
        client, app = opened()
        for sent in messages:
            if isinstance(sent, str):
                app.server.send_text(sent.encode())
            else:
                app.server.send_binary(sent)
        assert fed(client, app.spoken(), size) == [
            Message(True, True, sent.encode()) if isinstance(sent, str) else Message(False, True, sent)
            for sent in messages
        ]

    @given(
        text=st.booleans(),
        parts=st.lists(st.binary(max_size=50), min_size=1, max_size=6),
        size=st.integers(1, 99),
    )
    def test_fragments_of_the_app_keep_their_kind(self, text: bool, parts: list[bytes], size: int) -> None:
        client, app = opened()
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            if number:
                app.server.send_continuation(part, last)
            elif text:
                app.server.send_text(part, last)
            else:
                app.server.send_binary(part, last)
            app.server.send_ping(b"between")
        events = fed(client, app.spoken(), size)
        assert [event.data for event in events if isinstance(event, Message)] == parts
        assert [event.text for event in events if isinstance(event, Message)] == [text] * len(parts)
        assert [event.last for event in events if isinstance(event, Message)] == [False] * (
            len(parts) - 1
        ) + [True]

    @given(
        sent=st.lists(
            st.tuples(st.booleans(), st.lists(st.text(max_size=20), min_size=1, max_size=4)), max_size=6
        )
    )
    def test_of_the_client_arrive_at_wsproto(self, sent: list[tuple[bool, list[str]]]) -> None:
        """In parts, with simple-websocket's own library at the other end."""
        client = Client([], LIMIT)
        app = WSConnection(ConnectionType.SERVER)
        app.initiate_upgrade_connection(
            [
                (b"Host", b"x"),
                (b"Connection", b"Upgrade"),
                (b"Upgrade", b"websocket"),
                (b"Sec-WebSocket-Key", client.key.encode()),
                (b"Sec-WebSocket-Version", b"13"),
            ],
            "/",
        )
        client.feed(app.send(wsproto.AcceptConnection()))
        list(app.events())
        for text, parts in sent:
            for number, part in enumerate(parts):
                client.send(text, number == len(parts) - 1, part.encode())
        app.receive_data(client.to_app())
        arrived: list[Any] = [b""]
        for event in app.events():
            assert isinstance(event, (wsproto.TextMessage, wsproto.BytesMessage))
            data = event.data.encode() if isinstance(event, wsproto.TextMessage) else bytes(event.data)
            arrived[-1] += data
            if event.message_finished:
                arrived.append(b"")
        assert arrived == [*("".join(parts).encode() for _, parts in sent), b""]

    def test_pings_of_the_app_are_answered(self) -> None:
        client, app = opened()
        app.server.send_ping(b"who?")
        app.server.send_pong(b"unasked")
        assert client.feed(app.spoken()) == []
        assert [(frame.opcode, frame.data) for frame in app.heard()] == [(Opcode.PONG, b"who?")]

    @pytest.mark.parametrize("parts", [1, 4])
    def test_the_largest_message(self, parts: int) -> None:
        for size, fits in ((4096, True), (4097, False)):
            client, app = opened(4096)
            for number in range(parts):
                data, last = bytes(size * (number + 1) // parts - size * number // parts), number == parts - 1
                (app.server.send_continuation if number else app.server.send_binary)(data, last)
            events = client.feed(app.spoken())
            assert (Closed(1009, "the app's message is too big") in events) is not fits
            assert client.open is fits
            assert [frame.opcode for frame in app.heard()] == ([] if fits else [Opcode.CLOSE])


class TestClose:
    @given(
        code=st.one_of(st.sampled_from([1000, 1001, 1011, 1014]), st.integers(3000, 4999)),
        reason=st.text(max_size=30),
    )
    def test_of_the_app(self, code: int, reason: str) -> None:
        client, app = opened()
        reason = reason.encode()[:LONGEST_REASON].decode(errors="ignore")
        app.server.send_text(b"last")
        app.server.send_close(code, reason)
        assert client.feed(app.spoken()) == [Message(True, True, b"last"), Closed(code, reason)]
        assert not client.open
        client.send(True, True, b"too late")
        client.close(1000, "")
        [answer] = app.heard()
        assert answer.opcode is Opcode.CLOSE

    def test_of_the_app_without_a_code(self) -> None:
        client, app = opened()
        app.server.send_close()
        assert client.feed(app.spoken()) == [Closed(1005, "")]

    def test_of_the_app_without_a_word(self) -> None:
        client, _ = opened()
        assert client.feed(b"") == [Closed(1006, "")]
        assert client.feed(b"") == []

    @pytest.mark.parametrize(
        "data",
        [
            "81850000000068656c6c6f",
            "c100",
            "8300",
            "8000",
            "8801ff",
            "880203e7",
            "0900",
            "89fe",
            "880403e8fffe",
        ],
    )
    def test_of_an_app_that_breaks_the_rules(self, data: str) -> None:
        client, app = opened()
        assert client.feed(bytes.fromhex(data)) == [Closed(1006, "")]
        assert [frame.opcode for frame in app.heard()] == [Opcode.CLOSE]

    @given(code=st.one_of(st.integers(0, 70_000), st.integers(1000, 1015)), reason=st.text(max_size=200))
    @example(code=1005, reason="")
    @example(code=1006, reason="")
    def test_of_the_client(self, code: int, reason: str) -> None:
        """Whatever a gateway says that its client said, the app hears something that may be said."""
        client, app = opened()
        client.send(False, False, b"unfinished")
        client.close(code, reason)
        app.heard()
        received = app.server.close_rcvd
        assert received is not None
        assert len(received.reason.encode()) <= LONGEST_REASON
        if code in (1006, 1005):
            assert received.code == {1006: 1001, 1005: 1005}[code]
        elif 3000 <= code < 5000 or code in (1000, 1001, 1002, 1003, *range(1007, 1015)):
            assert received.code == code
            assert reason.startswith(received.reason)
        else:
            assert received.code == 1002
        assert not client.open

    def test_both_at_once(self) -> None:
        client, app = opened()
        app.server.send_close(4001, "app")
        data = app.spoken()
        client.close(4002, "client")
        assert client.feed(data) == [Closed(4001, "app")]

    def test_the_apps_answer_to_the_clients(self) -> None:
        client, app = opened()
        client.close(4002, "client")
        app.heard()
        assert client.feed(app.spoken()) == [Closed(4002, "client")]


class TestAnything:
    @given(data=st.lists(st.binary(max_size=60), max_size=6), handshake=st.booleans())
    def test_no_bytes_of_an_app_raise(self, data: list[bytes], handshake: bool) -> None:
        client = opened()[0] if handshake else Client([], LIMIT)
        ends = 0
        for part in [*data, b""]:
            events = client.feed(part)
            assert not (ends and events)
            ends += sum(isinstance(event, Closed) for event in events)
            client.send(False, True, b"x")
        assert ends == 1

    @given(
        steps=st.lists(
            st.one_of(
                st.tuples(st.just("send"), st.booleans(), st.booleans(), st.binary(max_size=9)),
                st.tuples(st.just("close"), st.integers(900, 5100)),
            ),
            max_size=9,
        )
    )
    def test_no_frames_of_a_client_raise(self, steps: list[tuple[Any, ...]]) -> None:
        client, app = opened()
        calls: dict[str, Callable[..., None]] = {
            "send": client.send,
            "close": lambda code: client.close(code, ""),
        }
        for name, *arguments in steps:
            calls[name](*arguments)
        app.heard()
        # A close frame may come between the parts of a message (RFC 6455 section 5.4), and this server is strict.
        assert str(app.server.parser_exc) in ("None", "incomplete fragmented message")
