"""What an app that serves a WebSocket sees of its client. Pure: bytes and messages in, bytes and messages out.

The app (simple-websocket, flask-sock) holds one end of a pair of sockets and speaks to it as a server does. Here is
the client to that: it makes the handshake's key, reads the app's answer, and turns messages into frames
(RFC 6455) and back. The real client's frames ended at the gateway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from flaskbus.messages import Headers

_HANDSHAKE = frozenset({"connection", "upgrade", "sec-websocket-accept", "sec-websocket-extensions"})


@dataclass(frozen=True, slots=True)
class Accepted:
    """The app took the handshake; ``headers`` are its own, and the subprotocol that it chose."""

    headers: Headers


@dataclass(frozen=True, slots=True)
class Message:
    """A part of a message; ``last`` says whether it is the last one. Text is UTF-8."""

    text: bool
    last: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The app ended the connection; 1006 where it did so without a word (RFC 6455, section 7.1.5)."""

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
        request = self._protocol.connect()
        self.key = request.headers["Sec-WebSocket-Key"]
        """For the environ: the app's answer is made from it."""
        self._protocol.send_request(request)
        self._protocol.data_to_send()  # the app has it in its environ
        self._text = False
        self._over = False

    @property
    def open(self) -> bool:
        """Whether messages can be sent to the app."""
        return self._protocol.state is State.OPEN

    def feed(self, data: bytes) -> list[Event]:
        """Bytes that the app wrote; empty for the end of what it writes."""
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        return list(self._events())

    def send(self, text: bool, last: bool, data: bytes) -> None:
        """A part of a message to the app; :meth:`to_app` gives its bytes."""
        if not self.open:
            return
        if self._continued:
            self._protocol.send_continuation(data, last)
        elif text:
            self._protocol.send_text(data, last)
        else:
            self._protocol.send_binary(data, last)
        self._continued = not last

    _continued = False

    def close(self, code: int, reason: str) -> None:
        """The real client closed; 1005 and 1006 say that it gave no code, and nothing at all."""
        if not self.open:
            return
        if code == 1006:
            self._protocol.fail(1001, "the client went away")
        elif code == 1005:
            self._protocol.send_close()
        else:
            self._protocol.send_close(code, reason)

    def to_app(self) -> bytes:
        """Bytes to write to the app."""
        return b"".join(self._protocol.data_to_send())

    def _events(self) -> Iterable[Event]:
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                if self._protocol.handshake_exc is None:
                    yield Accepted(
                        tuple(
                            (name.lower().encode("ascii"), value.encode("latin-1"))
                            for name, value in event.headers.raw_items()
                            if name.lower() not in _HANDSHAKE
                        )
                    )
            elif isinstance(event, Frame):
                if event.opcode in (Opcode.TEXT, Opcode.BINARY):
                    self._text = event.opcode is Opcode.TEXT
                if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    yield Message(self._text, event.fin, bytes(event.data))
        closed = self._protocol.close_rcvd
        if not self._over and (
            closed is not None or self._protocol.eof_sent or self._protocol.state is State.CLOSED
        ):
            self._over = True
            yield Closed(closed.code, closed.reason) if closed is not None else Closed(1006, "")


__all__ = ["Accepted", "Client", "Closed", "ConnectionClosedError", "Event", "Message"]
