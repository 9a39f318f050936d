"""What an app that serves a WebSocket sees of its client. Pure: bytes and messages in, bytes and messages out.

The app (simple-websocket, flask-sock) holds one end of a pair of sockets and speaks to it as a server does. Here is
the client to that: it makes the handshake's key, reads the app's answer, and turns messages into frames
(RFC 6455) and back. The real client's frames ended at the gateway, which answers its pings; the app's are
answered here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from flaskbus.messages import Headers

_HANDSHAKE = frozenset({"connection", "upgrade", "sec-websocket-accept", "sec-websocket-extensions"})

LONGEST_REASON = 123
"""Bytes of a close frame's reason (RFC 6455 section 5.5)."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The app took the handshake; ``headers`` are its own, and the subprotocol that it chose."""

    headers: Headers


@dataclass(frozen=True, slots=True)
class Message:
    """A part of a message; ``last`` says whether it is the last one. Text is UTF-8, if the app keeps the rules."""

    text: bool
    last: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The app ended the connection, or broke its rules.

    ``code`` as RFC 6455 section 7.1.5 has it: 1005 where the app gave none, 1006 where it left without a word or
    made no sense. 1009 may be ours: its message was too big.
    """

    code: int
    reason: str


Event = Accepted | Message | Closed


class Client:
    """The client of an app. ``offered`` are the subprotocols, ``limit`` the size of the largest message in bytes."""

    def __init__(self, offered: Sequence[str], limit: int) -> None:
        self._protocol = ClientProtocol(
            parse_uri("ws://flaskbus/"),
            subprotocols=[Subprotocol(name) for name in offered] or None,
            max_size=limit,
        )
        self.key = self._protocol.key
        """For the environ: the app's answer is made from it. The rest of the request is there already."""
        self._text = False
        self._within = False  # a message to the app has begun, and not ended
        self._over = False

    @property
    def open(self) -> bool:
        """Whether messages can be sent to the app."""
        return self._protocol.state is State.OPEN

    def feed(self, data: bytes) -> list[Event]:
        """Bytes that the app wrote; empty for the end of what it writes. After :class:`Closed` nothing comes."""
        if self._over:
            return []
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        return list(self._events())

    def send(self, text: bool, last: bool, data: bytes) -> None:
        """A part of a message to the app; :meth:`to_app` gives its bytes. Nothing where it is not :attr:`open`."""
        if not self.open:
            return
        if self._within:
            self._protocol.send_continuation(data, last)
        elif text:
            self._protocol.send_text(data, last)
        else:
            self._protocol.send_binary(data, last)
        self._within = not last

    def close(self, code: int, reason: str) -> None:
        """The real client closed; 1005 and 1006 say that it gave no code, and nothing at all.

        What no endpoint may say (RFC 6455 section 7.4) is told as 1002: the client broke the rules.
        """
        if not self.open:
            return
        if code == CloseCode.ABNORMAL_CLOSURE:
            code, reason = CloseCode.GOING_AWAY, "the client went away"
        if code == CloseCode.NO_STATUS_RCVD:
            self._protocol.send_close()
            return
        if not _may_be_sent(code):
            code = CloseCode.PROTOCOL_ERROR
        self._protocol.send_close(code, reason.encode()[:LONGEST_REASON].decode(errors="ignore"))

    def to_app(self) -> bytes:
        """Bytes to write to the app."""
        return b"".join(self._protocol.data_to_send())

    def _events(self) -> Iterator[Event]:
        protocol = self._protocol
        for event in protocol.events_received():
            if isinstance(event, Response):
                if protocol.handshake_exc is None:
                    yield Accepted(
                        tuple(
                            (name.lower().encode("ascii"), value.encode("latin-1"))
                            for name, value in event.headers.raw_items()
                            if name.lower() not in _HANDSHAKE
                        )
                    )
            elif isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                if event.opcode is not Opcode.CONT:
                    self._text = event.opcode is Opcode.TEXT
                yield Message(self._text, event.fin, bytes(event.data))
        if closed := self._closed():
            self._over = True
            yield closed

    def _closed(self) -> Closed | None:
        protocol = self._protocol
        if (received := protocol.close_rcvd) is not None:
            return Closed(int(received.code), received.reason)
        sent = protocol.close_sent
        if protocol.parser_exc is not None and sent is not None and sent.code == CloseCode.MESSAGE_TOO_BIG:
            return Closed(int(sent.code), "the app's message is too big")
        failed = protocol.parser_exc is not None or protocol.handshake_exc is not None
        return (
            Closed(int(CloseCode.ABNORMAL_CLOSURE), "") if failed or protocol.state is State.CLOSED else None
        )


def _may_be_sent(code: int) -> bool:
    """RFC 6455 section 7.4, and IANA's registry as of 2024: codes that may be in a close frame."""
    return (1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999
