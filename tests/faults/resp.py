"""Just enough of RESP2 to know which command, or which answer, a byte belongs to. Pure."""

from __future__ import annotations

from collections import deque
from importlib.resources import files
from typing import NamedTuple

from flaskbus.broker import script_sha

_NAMES = {
    script_sha(item.name.removesuffix(".lua")).encode(): item.name.removesuffix(".lua")
    for item in files("flaskbus").joinpath("scripts").iterdir()
    if item.name.endswith(".lua")
}
_TWO_WORDS = frozenset({"CLIENT", "SCRIPT", "XINFO", "XGROUP", "CONFIG"})


def element_end(data: bytes | bytearray, start: int) -> int:
    """Where the element that begins at ``start`` ends; -1 where it is not whole yet."""
    line = data.find(b"\r\n", start)
    if line < 0:
        return -1
    kind, end = data[start], line + 2
    if kind in b"+-:":
        return end
    length = int(data[start + 1 : line])
    if kind == b"$"[0]:
        end += length + 2 if length >= 0 else 0
        return end if end <= len(data) else -1
    if kind != b"*"[0]:
        raise ValueError(bytes(data[start : start + 20]))
    for _ in range(length):
        end = element_end(data, end)
        if end < 0:
            return -1
    return end


def words(data: bytes, count: int) -> list[bytes]:
    """The first words of a command or of an array; those that are no bulk strings are empty."""
    found: list[bytes] = []
    if data[:1] != b"*":
        return found
    position = data.index(b"\r\n") + 2
    end = len(data)
    while position < end and len(found) < count:
        line = data.index(b"\r\n", position)
        if data[position : position + 1] == b"$":
            length = int(data[position + 1 : line])
            found.append(data[line + 2 : line + 2 + length])
        else:
            found.append(b"")
        position = element_end(data, position)
    return found


def label(command: bytes) -> str:
    """What a command is called: ``XADD``, ``SCRIPT LOAD``, and a script by its own name."""
    first, second, *_ = [*words(command, 2), b"", b""]
    name = first.decode("latin-1").upper()
    if name == "EVALSHA":
        return _NAMES.get(second, name)
    return f"{name} {second.decode('latin-1').upper()}" if name in _TWO_WORDS else name


class Message(NamedTuple):
    """A whole command, or a whole answer, on a connection of a certain kind."""

    connection: str
    label: str
    outward: bool
    """Whether it goes to the broker."""
    data: bytes


class Conversation:
    """Both directions of one connection: bytes in, whole messages out."""

    def __init__(self) -> None:
        self.connection = "new"
        self._inward, self._outward = bytearray(), bytearray()
        self._asked: deque[str] = deque()
        self._listens = False

    def to_broker(self, data: bytes) -> list[Message]:
        messages = []
        for command in _take(self._outward, data):
            name = label(command)
            if name == "CLIENT SETNAME":
                self.connection = kind_of(words(command, 3)[2].decode())
            if name == "SUBSCRIBE":
                self._listens = True
                self.connection = self.connection.replace("link", "doorbell")
            if not self._listens:
                self._asked.append(name)
            messages.append(Message(self.connection, name, True, command))
        return messages

    def from_broker(self, data: bytes) -> list[Message]:
        messages = []
        for answer in _take(self._inward, data):
            if self._asked:
                name = self._asked.popleft()
            else:
                name = "/".join(word.decode("latin-1") for word in words(answer, 1)) or "push"
            messages.append(Message(self.connection, name, False, answer))
        return messages


def _take(buffer: bytearray, data: bytes) -> list[bytes]:
    buffer += data
    found, start = [], 0
    while start < len(buffer) and (end := element_end(buffer, start)) > 0:
        found.append(bytes(buffer[start:end]))
        start = end
    del buffer[:start]
    return found


def kind_of(name: str) -> str:
    """What a connection is for, by the name that it gave itself."""
    if name.startswith("flaskbus-gateway-"):
        return "gateway link"
    if name.startswith("flaskbus-agent-"):
        return f"agent {name.rpartition('-')[2]}"
    return "agent heartbeat" if name.startswith("agent-") else "other"
