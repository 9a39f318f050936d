"""A small HTTP/1.1 client over one keep-alive connection: fast, and strict about what it is sent."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, cast

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: a close is a reset, and leaves no port in TIME_WAIT."""


class Response(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes


class BrokenError(Exception):
    """The connection broke; ``begun`` is whether a part of the response had come."""

    def __init__(self, begun: bool) -> None:
        super().__init__("in the middle of a response" if begun else "before a response")
        self.begun = begun


class Connection(asyncio.Protocol):
    """One connection; :meth:`ask` is for one request at a time.

    ``stray`` is what came although nothing was asked: it must stay empty.
    """

    def __init__(self) -> None:
        self.stray = b""
        self.closed = False
        self.ended = asyncio.Event()
        self._buffer = b""
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._left: int | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Raises OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        if isinstance(address, str):
            return (await loop.create_unix_connection(cls, address))[1]
        return (await loop.create_connection(cls, *address))[1]

    async def ask(self, pieces: Sequence[bytes]) -> Response:
        """Send a request, with a pause after each piece but the last. Raises :class:`BrokenError`."""
        if self._transport is None or self.closed:
            raise BrokenError(False)
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._answer = answer
        self._status, self._body, self._left = 0, [], None
        unsent = deque(pieces)
        while unsent and not answer.done():
            self._transport.write(unsent.popleft())
            if unsent:
                await asyncio.sleep(0.001)
        response = await answer
        if unsent:
            self.close()  # the next request would be taken for the rest of this one
        return response

    def close(self, *, reset: bool = False) -> None:
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if reset and sock is not None and sock.fileno() >= 0 and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.closed = True
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.ended.set()
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            if self._status and self._left is None and b"transfer-encoding" not in self._headers:
                answer.set_result(self._response())  # its end is the end of the connection
            else:
                answer.set_exception(BrokenError(bool(self._status or self._buffer)))
                answer.exception()

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.stray += data
            self.close()
            return
        self._buffer += data
        if not self._status and not self._take_head():
            return
        if b"transfer-encoding" in self._headers:
            self._take_chunks()
        else:
            self._take_plain()

    def _take_head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        first, *lines = head.split(b"\r\n")
        self._status = int(first.split(b" ", 2)[1])
        self._headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            self._headers[name.lower()] = value.strip()
        self._buffer = rest
        if b"content-length" in self._headers:
            self._left = int(self._headers[b"content-length"])
        return True

    def _take_plain(self) -> None:
        self._body.append(self._buffer)
        if self._left is not None:
            over = len(self._buffer) - self._left
            self._left -= len(self._buffer)
            if over > 0:
                self.stray += self._buffer[-over:]
        self._buffer = b""
        if self._left is not None and self._left <= 0:
            self._complete()

    def _take_chunks(self) -> None:
        while True:
            line, end, rest = self._buffer.partition(b"\r\n")
            if not end:
                return
            size = int(line, 16)
            if len(rest) < size + 2:
                return
            self._body.append(rest[:size])
            self._buffer = rest[size + 2 :]
            if not size:
                self.stray, self._buffer = self._buffer, b""
                self._complete()
                return

    def _complete(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(self._response())
        if self._headers.get(b"connection", b"").lower() == b"close" or self.stray:
            self.close()

    def _response(self) -> Response:
        return Response(self._status, self._headers, b"".join(self._body))
