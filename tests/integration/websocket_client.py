"""A WebSocket client that may break every rule: it sends the bytes that a test wants, and reads what comes."""

from __future__ import annotations

import base64
import os
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from websockets.frames import Opcode

from tests.integration.clients import Got, parse

KEY = base64.b64encode(b"0123456789abcdef").decode()
TIMEOUT = 20.0

TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG


def frame(opcode: int, data: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True) -> bytes:
    """One frame, in the shortest form of its length."""
    size = len(data)
    first = bytes([fin << 7 | rsv << 4 | opcode])
    flag = mask << 7
    if size < 126:
        head = first + bytes([flag | size])
    elif size < 65536:
        head = first + struct.pack("!BH", flag | 126, size)
    else:
        head = first + struct.pack("!BQ", flag | 127, size)
    return head + bytes(4) * mask + data  # a mask of zeros is one


def closing(code: int, reason: bytes = b"") -> bytes:
    return struct.pack("!H", code) + reason


class Raw:
    """``lines`` replace headers of the handshake of the same name; ``after`` are bytes that follow it at once."""

    def __init__(
        self,
        url: str,
        *lines: str,
        method: str = "GET",
        version: str = "HTTP/1.1",
        without: str = "",
        after: bytes = b"",
        receive_buffer: int = 0,
    ) -> None:
        parts = urlsplit(url)
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect((parts.hostname or "", parts.port or 80))
        standard = {
            "Host": parts.netloc,
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": KEY,
        }
        changed = {line.partition(":")[0].lower() for line in (*lines, without)}
        head = [f"{method} {parts.path or '/'}{parts.query and '?' + parts.query} {version}"]
        head += [f"{name}: {value}" for name, value in standard.items() if name.lower() not in changed]
        self.sock.sendall("\r\n".join([*head, *lines, "", ""]).encode("latin-1") + after)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def answer(self) -> Got:
        """The answer to the handshake; where it is not 101, all that comes until the connection ends."""
        while b"\r\n\r\n" not in self._buffer:
            data = self.sock.recv(65536)
            assert data, self._buffer
            self._buffer += data
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 101 "):
            self._buffer = rest
            lines = [line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:]]
            return Got(101, [(name.lower(), value.strip()) for name, _, value in lines], b"")
        return parse(self._buffer + self.rest())

    def opened(self) -> Self:
        """It was accepted."""
        answer = self.answer()
        assert answer.status == 101, answer
        return self

    def rest(self) -> bytes:
        """All that comes until the connection ends."""
        received = b""
        while data := self.sock.recv(65536):
            received += data
        return received

    def send(self, opcode: int, data: bytes | str = b"", **more: bool | int) -> None:
        data = data.encode() if isinstance(data, str) else data
        self.sock.sendall(frame(opcode, data, **more))  # type: ignore[arg-type]

    def receive(self) -> tuple[int, bytes]:
        """One frame; ``(-1, b"")`` at the end of the connection."""
        head = self._exactly(2)
        if not head:
            return -1, b""
        size = head[1]
        assert head[0] & 0xF0 == 0x80, "a server's frame is whole, and has no extension"
        assert size < 128, "a server masks nothing"
        if size == 126:
            size = int.from_bytes(self._exactly(2))
        elif size == 127:
            size = int.from_bytes(self._exactly(8))
        return head[0] & 15, self._exactly(size)

    def closed(self) -> tuple[int, str]:
        """Code and reason of the next close frame; messages and pings before it are left out."""
        opcode, data = self.receive()
        while opcode not in (CLOSE, -1):
            opcode, data = self.receive()
        assert opcode == CLOSE, "the connection ended without a close frame"
        return int.from_bytes(data[:2]) if data else 1005, data[2:].decode()

    def ended(self) -> bool:
        """Whether nothing more comes but the end of the connection, which a reset is too."""
        try:
            return self._buffer == b"" and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def goodbye(self, code: int = 1000) -> None:
        """The closing handshake."""
        self.send(CLOSE, closing(code))
        assert self.closed()[0] == code
        assert self.ended()

    def vanish(self) -> None:
        """End the connection without a word, so that the server hears of it (RST)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.sock.recv(max(65536, size - len(self._buffer)))
            if not data:
                return b""
            self._buffer += data
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data


def rss(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
