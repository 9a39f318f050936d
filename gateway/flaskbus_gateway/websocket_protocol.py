"""One client's WebSocket (RFC 6455): gunicorn's, and what that lacks.

* The app's own answer to a handshake that it does not take (ASGI's WebSocket Denial Response).
* Nothing is read, and so nothing answered, before the app has taken the handshake.
* Memory is bounded by bytes: of messages that the app has not taken, of fragments, of answers to pings.
* Once the close frames are out, or a rule was broken, the connection ends; the app may take longer.
* A client that says nothing is pinged, and given up when it answers nothing.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import termios
from collections.abc import Awaitable, Callable
from typing import Any

from gunicorn.asgi import websocket

try:
    from websockets.speedups import apply_mask
except ImportError:  # there is no compiler's work for this platform
    from websockets.utils import apply_mask

_gunicorn: Any = websocket  # the stubs leave out what is overridden here

HELD = 64 * 1024
"""Bytes of messages that wait for the app, after which no further message is read."""

OVERHEAD = 256
"""Bytes that a message takes beside its own."""

NO_CODE, GONE, BROKEN = 1005, 1006, 1002
"""Codes that say how a WebSocket ended: without one, without a word, against the rules (section 7.4.1)."""

PING = bytes([0x80 | _gunicorn.OPCODE_PING, 0])
"""A ping without a word."""

UNANSWERED = (1011, "no answer to a ping")
"""Code and reason for a client that is there no more."""

Pairs = list[tuple[bytes, bytes]]


class WebSocketProtocol(_gunicorn.WebSocketProtocol):  # type: ignore[misc]
    """Serves one WebSocket over ``transport``.

    ``limit``: largest message in bytes. ``drain`` waits until the client has taken what was written. ``respond``
    writes the head of an answer to the handshake; ``hang_up`` ends the connection, after what the client still
    sends was read for a moment, if that ``lingers``.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        scope: dict[str, Any],
        app: Any,
        log: Any,
        *,
        limit: int,
        drain: Callable[[], Awaitable[None]],
        respond: Callable[[int, Pairs], None],
        hang_up: Callable[[bool], None],
    ) -> None:
        super().__init__(transport, scope, app, log, max_message_size=limit, drain=drain)
        self.status = 0
        """The status that answered the handshake; 0 before."""
        self.sent = 0
        """Bytes of messages, or of the answer's body, that were sent."""
        self._respond = respond
        self._hang_up = hang_up
        self._may_read = asyncio.Event()
        self._held = 0  # bytes of messages that wait for the app
        self._in_chunks = False  # how the body of an answer is framed
        self._heard = False  # whether the client said something since the last look
        self._pinged = False  # whether it owes an answer to a ping
        self._owed = 0  # bytes that it had not taken at the last look

    # The handshake

    async def _send(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "websocket.http.response.start":
            self._begin_answer(message["status"], message["headers"])
        elif kind == "websocket.http.response.body":
            await self._write_body(message.get("body", b""), message.get("more_body", False))
        else:
            await super()._send(message)

    async def _send_accept(self, message: dict[str, Any]) -> None:
        self._expect_client()
        await super()._send_accept(message)
        self.status = 101
        self._may_read.set()

    def _begin_answer(self, status: int, headers: Pairs) -> None:
        self._denied = True
        self.status = status
        sized = any(name.lower() == b"content-length" for name, _ in headers)
        # The connection ends with it; chunks tell an end from a break.
        self._in_chunks = not sized and status not in (204, 304)
        self._respond(status, [*headers, (b"transfer-encoding", b"chunked")] if self._in_chunks else headers)

    async def _write_body(self, data: bytes, more: bool) -> None:
        await self._drain()
        self._expect_client()
        self.sent += len(data)
        if self._in_chunks:
            data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data += b"" if more else b"0\r\n\r\n"
        self.transport.write(data)
        if not more:
            self.closed = True

    def _expect_client(self) -> None:
        """A transport that is closed raises what no app expects (uvloop's), or warns."""
        if self._eof:
            raise _gunicorn.WebSocketDisconnected("the client went away")

    # Reading

    def feed_data(self, data: bytes) -> None:
        if not self.closed:
            self._heard = True
            super().feed_data(data)

    def feed_eof(self) -> None:
        super().feed_eof()
        self._may_read.set()
        self._close_event.set()  # nobody is waited for any more

    async def _read_frames(self) -> None:
        await self._may_read.wait()
        await super()._read_frames()
        if self._close_sent and not self._eof:
            self._buffer.clear()
            self._resume_reading()
            self._hang_up(not self._close_received)

    async def _put_message(self, message: dict[str, Any]) -> None:
        while self._held >= HELD and not self._close_sent:
            self._queue_space.clear()
            await self._queue_space.wait()
        if not self._close_sent:
            self._held += _size(message)
            await self._receive_queue.put(message)

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._receive_queue.get()
        if message["type"] == "websocket.receive":
            self._held -= _size(message)
            if self._held < HELD:
                self._queue_space.set()
        elif message["type"] == "websocket.disconnect":
            code = message["code"]
            if code not in (NO_CODE, GONE) and not _gunicorn._valid_close_code(code):
                code = BROKEN
            message |= {"code": code, "reason": self.close_reason}
        return message

    async def _handle_continuation(self, payload: bytes) -> None:
        """A fragment came: all of them become one, as many small ones would take many times their size."""
        whole, *rest = self._fragments
        if not isinstance(whole, bytearray):
            whole = bytearray(whole)
        for part in rest:
            whole += part
        self._fragments[:] = [whole]

    def _unmask(self, payload: bytes, masking_key: bytes) -> bytes:
        return apply_mask(payload, masking_key)

    # Writing

    async def _send_frame(self, opcode: int, payload: bytes) -> None:
        if opcode == _gunicorn.OPCODE_PONG:
            await self._drain()  # or who asks and never listens would fill the memory
        if opcode in (_gunicorn.OPCODE_TEXT, _gunicorn.OPCODE_BINARY):
            self._expect_client()
            self.sent += len(payload)
        if not self._eof:
            await super()._send_frame(opcode, payload)

    # Silence

    def ping(self) -> bool:
        """Look whether the client is there: it is pinged if it was silent; False where it has not answered the last."""
        before, self._owed = self._owed, self._untaken()
        alive = (
            self._heard
            or not self._pinged
            or self._reading_paused  # its answer may wait behind what the app does not take
            or 0 < self._owed < before  # slow, but not gone
        )
        self._pinged = alive and self.accepted and not self._heard
        self._heard = False
        if self._pinged:
            self.transport.write(PING)
        return alive

    def _untaken(self) -> int:
        """Bytes that wait for the client, here and in the kernel."""
        waiting = array.array("i", [0])
        with contextlib.suppress(OSError):  # some kernels do not tell
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, waiting)
        size: int = self.transport.get_write_buffer_size()
        return size + waiting[0]


def _size(message: dict[str, Any]) -> int:
    return OVERHEAD + len(message.get("text") or message.get("bytes") or b"")
