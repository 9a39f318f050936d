"""What travels on the bus, as plain data.

A request goes out as one entry of its mount's stream. What comes back on the reply list is a
sequence of frames: either one :class:`Reply`, or :class:`Head`, any number of :class:`Chunk`, and
:class:`End`; :class:`Failure` may come in the place of any of them and is always the last.
Every frame carries ``(attempt, seq)``: the bus's own count of runs, and its place in that run from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message(cls: type[T]) -> type[T]:
    """A dataclass that the type checker holds to be frozen.

    Nothing enforces that at run time, where it would make a request three times as dear to create.
    """
    return dataclass(slots=True)(cls)


WIRE_VERSION = 2
"""The version that :mod:`flaskbus.wire` writes; it reads the one before and the one after as well."""

Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Name and value pairs in the order of the wire; names in lower case on requests."""


BODY = "body"
"""What the inbound frames of a request hold: the rest of its body, after the part that is in the entry."""

WEBSOCKET = "websocket"
"""What they hold instead: the messages of a WebSocket."""

INBOUND = 0
"""The attempt of inbound frames: they are the client's, and the same for every run."""


@message
class Request:
    """One HTTP request on its way to an agent.

    ``target`` is origin-form as the client sent it (percent-encoded path, ``?``, query).
    ``script_name`` is the part of it that the mount took, percent-encoded, with no final slash.
    ``ttl`` is the time in milliseconds that the gateway will wait for the reply's head.
    ``version`` is the wire version that its sender speaks. ``idempotency`` names the record of its
    Idempotency-Key (see :mod:`flaskbus.idempotency`); empty where it has none, or its mount has not opted in.
    """

    id: str
    method: str
    target: str
    gateway: str
    ttl: int
    script_name: str = ""
    scheme: str = "http"
    http_version: str = "1.1"
    client: tuple[str, int] = ("", 0)
    server: tuple[str, int] = ("", 0)
    headers: Headers = ()
    body: bytes = b""
    traceparent: str = ""
    inbound: str = ""
    attempt: int = 1
    version: int = WIRE_VERSION
    idempotency: str = ""


@message
class Head:
    """Status and headers; ``agent`` is the process that rings when it wants credit or a cancel."""

    attempt: int
    seq: int
    status: int
    headers: Headers
    agent: str = ""


@message
class Chunk:
    attempt: int
    seq: int
    data: bytes


@message
class End:
    attempt: int
    seq: int


@message
class Failure:
    """The run ended without a whole response; ``code`` is a :class:`~flaskbus.errors.BusError` code."""

    attempt: int
    seq: int
    code: str
    detail: str


NOT_RUN = "not-run"
"""The code of a :class:`Failure` by which an agent ends a request that it surely did not run."""


@message
class Reply:
    """A whole response in one frame."""

    attempt: int
    seq: int
    status: int
    headers: Headers
    body: bytes


@message
class Message:
    """A part of a WebSocket's message; ``last`` says whether it is the last one. Text is UTF-8, whole or not."""

    attempt: int
    seq: int
    text: bool
    last: bool
    data: bytes


@message
class Close:
    """The end of a WebSocket: code and reason of RFC 6455 section 7.4."""

    attempt: int
    seq: int
    code: int
    reason: str


Frame: TypeAlias = Head | Chunk | End | Failure | Reply | Message | Close
FINAL_FRAMES = (End, Failure, Reply, Close)


@message
class Ring:
    """What one doorbell message says: these exchanges have something new.

    ``frame`` may carry the complete reply of the one exchange that is named, as it lies on the list; ``taker`` is
    the agent process that takes inbound frames, and waits for more.
    """

    ids: tuple[str, ...]
    frame: bytes | None = field(default=None, repr=False)
    taker: str = ""
