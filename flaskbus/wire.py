"""Messages <-> stream fields and list elements.

A stream entry holds plain fields first, for a person with redis-cli (``id method target from ttl attempt``
and, where they apply, ``traceparent`` and ``idempotency``), then ``head`` and ``body`` in msgpack. A frame is one
msgpack array, ``[version, kind, attempt, seq, …]``. Headers are flat: name, value, name, value.

A decoder reads its own version, the one before and the one after. It never sees more than ``max_size`` bytes, allows
no extension types and no maps, and raises :class:`~flaskbus.errors.WireError` for whatever is not of the
fixed shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack

from flaskbus.errors import WireError
from flaskbus.messages import (
    WIRE_VERSION,
    Chunk,
    Close,
    End,
    Failure,
    Frame,
    Head,
    Headers,
    Message,
    Reply,
    Request,
    Ring,
)

VERSION = WIRE_VERSION
OLDEST_READABLE = 1

HEAD, CHUNK, END, FAILURE, REPLY, MESSAGE, CLOSE = 1, 2, 3, 4, 5, 6, 7

MAX_HEAD = 1 << 20
"""Largest ``head`` field in bytes; servers refuse such headers long before."""

MAX_CHUNK = 64 * 1024
"""Largest payload of a :class:`~flaskbus.messages.Chunk` in bytes."""

MAX_BODY = 16 * 1024 * 1024
"""Largest body in bytes that an entry holds, where it cannot be streamed."""

MAX_INLINE = 256 * 1024
"""Bytes of a body from which on what follows travels as inbound frames."""

MAX_RING_FRAME = 16 * 1024
"""Largest frame in bytes that a doorbell carries beside ringing."""

_ID = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_RECORD = re.compile(rb"[0-9a-f]{64}")


def _unpack(data: bytes, max_size: int, *, max_array: int = -1) -> Any:
    # Each byte can be an empty array, which takes 56 in memory: what has to be one byte string has no arrays.
    size = len(data)
    if size > max_size:
        raise WireError(f"{size} bytes where at most {max_size} are allowed")
    try:
        return msgpack.unpackb(
            data, raw=False, use_list=True, max_ext_len=0, max_map_len=0, max_array_len=max_array
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise WireError(f"not msgpack of ours: {error or type(error).__name__}") from None


def _array(data: bytes, max_size: int, what: str) -> list[Any]:
    value = _unpack(data, max_size)
    if type(value) is not list or not value or type(value[0]) is not int:
        raise WireError(f"{what} is not an array that begins with a version")
    if not OLDEST_READABLE <= value[0] <= VERSION + 1:
        raise WireError(f"{what} has wire version {value[0]}; this is version {VERSION}")
    return value


def _flatten(headers: Headers) -> list[bytes]:
    return [part for pair in headers for part in pair]


_BYTES = {bytes}


def _pair(flat: Any) -> Headers:
    if type(flat) is not list or len(flat) % 2:
        raise WireError("headers are not name-value pairs")
    if not set(map(type, flat)) <= _BYTES:
        raise WireError("a header is not bytes")
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _check(values: Sequence[Any], types: tuple[type, ...], what: str) -> None:
    if tuple(map(type, values[: len(types)])) == types:
        return
    # A newer neighbour may append members; never fewer, and never other types.
    if len(values) < len(types):
        raise WireError(f"{what} has {len(values)} members, {len(types)} expected")
    found = map(type, values)
    wrong, right = next(pair for pair in zip(found, types, strict=False) if pair[0] is not pair[1])
    raise WireError(f"{what} holds {wrong.__name__} where {right.__name__} belongs")


# Requests


def encode_request(request: Request) -> list[str | bytes | int]:
    """The fields and values of the stream entry, in order, as XADD takes them."""
    head = msgpack.packb(
        [
            VERSION,
            request.scheme,
            request.http_version,
            request.client[0],
            request.client[1],
            request.server[0],
            request.server[1],
            request.script_name,
            _flatten(request.headers),
        ]
    )
    # fmt: off
    fields: list[str | bytes | int] = [
        "id", request.id, "method", request.method, "target", request.target.encode("latin-1"), "from", request.gateway,
        "ttl", request.ttl, "attempt", request.attempt,
    ]
    # fmt: on
    if request.traceparent:
        fields += ("traceparent", request.traceparent)
    if request.inbound:
        fields += ("inbound", request.inbound)
    if request.idempotency:
        fields += ("idempotency", request.idempotency)
    fields += ("head", head, "body", msgpack.packb(request.body))
    return fields


def request_template(request: Request) -> list[str | bytes | int | None]:
    """The same, with ``None`` for what differs between the requests of a client that repeats its headers.

    That is id, method, target and the body in msgpack, in this order.
    """
    fields: list[str | bytes | int | None] = [*encode_request(request)]
    for name in ("id", "method", "target", "body"):
        fields[fields.index(name) + 1] = None
    return fields


_HEAD_TYPES = (int, str, str, str, int, str, int, str, list)


RequestHead = tuple[int, str, str, tuple[str, int], tuple[str, int], str, Headers]
"""Wire version, scheme, HTTP version, client, server, name of the script, headers."""


def decode_head(data: bytes) -> RequestHead:
    """What the ``head`` of an entry holds."""
    head = _array(data, MAX_HEAD, "head")
    _check(head, _HEAD_TYPES, "head")
    version, scheme, http_version, host, port, server, server_port, script_name, flat, *_ = head
    return version, scheme, http_version, (host, port), (server, server_port), script_name, _pair(flat)


REPEATED = 2048
"""Bytes up to which a head that was read is remembered: a client repeats its own to the byte."""

_known_head = lru_cache(256)(decode_head)


def decode_request(fields: Sequence[bytes], *, max_body: int) -> Request:
    """An entry's flat fields and values -> :class:`~flaskbus.messages.Request`; ``max_body`` in bytes."""
    entry = dict(zip(fields[::2], fields[1::2], strict=False))
    try:
        head = entry[b"head"]
        version, scheme, http_version, client, server, script_name, headers = (
            _known_head(head) if len(head) <= REPEATED else decode_head(head)
        )
        body = _unpack(entry[b"body"], max_body + 16, max_array=0)
        if type(body) is not bytes:
            raise WireError("body is not bytes")
        request_id = entry[b"id"].decode("ascii")
        if not _ID.fullmatch(request_id):
            raise WireError("id is not one of ours")
        record = entry.get(b"idempotency", b"")
        if record and not _RECORD.fullmatch(record):
            raise WireError("idempotency is not the name of a record")
        return Request(
            id=request_id,
            method=entry[b"method"].decode("ascii"),
            target=entry[b"target"].decode("latin-1"),
            gateway=entry[b"from"].decode("ascii"),
            ttl=int(entry[b"ttl"]),
            attempt=int(entry[b"attempt"]),
            traceparent=entry.get(b"traceparent", b"").decode("latin-1"),
            scheme=scheme,
            http_version=http_version,
            client=client,
            server=server,
            script_name=script_name,
            headers=headers,
            body=body,
            inbound=entry.get(b"inbound", b"").decode("ascii"),
            version=version,
            idempotency=record.decode("ascii"),
        )
    except KeyError as error:
        raise WireError(f"field {error.args[0].decode()} is missing") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise WireError(f"a plain field is not readable: {error}") from None


class Plain(NamedTuple):
    """An entry of the plain kind: its body is in it, and its answer is for nobody but its gateway to keep."""

    id: str
    method: str
    target: str
    gateway: str
    ttl: int
    """Milliseconds."""
    attempt: int
    head: bytes
    """As it came; :func:`decode_head` reads it."""
    body: bytes


_PLAIN_NAMES = [b"id", b"method", b"target", b"from", b"ttl", b"attempt", b"traceparent", b"head", b"body"]
_BARE_NAMES = [name for name in _PLAIN_NAMES if name != b"traceparent"]


def peek_plain(fields: Sequence[bytes]) -> Plain | None:
    """An entry as gateways send most; ``None`` for any other, which :func:`decode_request` reads or refuses."""
    if (names := fields[::2]) != _PLAIN_NAMES and names != _BARE_NAMES:
        return None
    request_id, method, target, gateway, ttl, attempt, *_, head, body = fields[1::2]
    try:
        text = request_id.decode("ascii")
        content = _unpack(body, MAX_BODY + 16, max_array=0)
        if type(content) is not bytes or not _ID.fullmatch(text):
            return None
        return Plain(
            text, method.decode("ascii"), target.decode("latin-1"), gateway.decode("ascii"),
            int(ttl), int(attempt), head, content,
        )  # fmt: skip
    except (WireError, ValueError):
        return None


def peek_id(fields: Sequence[bytes]) -> str | None:
    """The id of an entry that may be otherwise unreadable, if it has one of ours."""
    for name, value in zip(fields[::2], fields[1::2], strict=False):
        if name == b"id":
            text = value.decode("ascii", "replace")
            return text if _ID.fullmatch(text) else None
    return None


def peek_sender(fields: Sequence[bytes]) -> tuple[str, int]:
    """The gateway and the attempt of an entry that may be otherwise unreadable: ``""`` and 1 where it has none."""
    members = dict(zip(fields[::2], fields[1::2], strict=False))
    attempt = members.get(b"attempt", b"")
    number = int(attempt) if attempt.isdigit() and len(attempt) < 10 else 1
    return members.get(b"from", b"").decode("latin-1"), number


def peek_record(fields: Sequence[bytes]) -> str:
    """The record of an entry that may be otherwise unreadable: ``""`` where it has none of ours."""
    record = dict(zip(fields[::2], fields[1::2], strict=False)).get(b"idempotency", b"")
    return record.decode("ascii") if _RECORD.fullmatch(record) else ""


# Frames


def max_frame(reply_limit: int) -> int:
    """Size in bytes of the largest list element where whole replies have bodies up to ``reply_limit`` bytes."""
    return max(reply_limit, MAX_CHUNK) + MAX_HEAD


def encode_frame(frame: Frame, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    """One list element; ``sign`` makes the 32 bytes of its last member from all that stands before them."""
    members = _members(frame)
    if sign is None:
        packed: bytes = msgpack.packb(members)
        return packed
    content: bytes = msgpack.packb([*members, _NO_SIGNATURE])[: -len(_NO_SIGNATURE)]
    return content + sign(content)


_NO_SIGNATURE = bytes(32)


def _members(frame: Frame) -> list[Any]:
    if isinstance(frame, Reply):
        return [VERSION, REPLY, frame.attempt, frame.seq, frame.status, _flatten(frame.headers), frame.body]
    if isinstance(frame, Chunk):
        return [VERSION, CHUNK, frame.attempt, frame.seq, frame.data]
    if isinstance(frame, Head):
        return [VERSION, HEAD, frame.attempt, frame.seq, frame.status, _flatten(frame.headers), frame.agent]
    if isinstance(frame, End):
        return [VERSION, END, frame.attempt, frame.seq]
    if isinstance(frame, Message):
        return [VERSION, MESSAGE, frame.attempt, frame.seq, frame.text, frame.last, frame.data]
    if isinstance(frame, Close):
        return [VERSION, CLOSE, frame.attempt, frame.seq, frame.code, frame.reason]
    return [VERSION, FAILURE, frame.attempt, frame.seq, frame.code, frame.detail]


_FRAME_TYPES: dict[int, tuple[type, ...]] = {
    kind: (int, int, int, int, *types)
    for kind, types in {
        HEAD: (int, list, str),
        CHUNK: (bytes,),
        END: (),
        FAILURE: (str, str),
        REPLY: (int, list, bytes),
        MESSAGE: (bool, bool, bytes),
        CLOSE: (int, str),
    }.items()
}


def decode_frame(data: bytes, *, max_size: int) -> Frame:
    """One list element -> frame; ``max_size`` in bytes."""
    members = _array(data, max_size, "frame")
    kind = members[1] if len(members) > 1 and type(members[1]) is int else END
    types = _FRAME_TYPES.get(kind)
    if types is None:
        raise WireError(f"frame of unknown kind {kind}")
    _check(members, types, "frame")
    _, _, attempt, seq, *rest = members
    if kind == REPLY:
        return Reply(attempt, seq, _status(rest[0]), _pair(rest[1]), rest[2])
    if kind == CHUNK:
        return Chunk(attempt, seq, rest[0])
    if kind == HEAD:
        return Head(attempt, seq, _status(rest[0]), _pair(rest[1]), rest[2])
    if kind == END:
        return End(attempt, seq)
    if kind == MESSAGE:
        return Message(attempt, seq, rest[0], rest[1], rest[2])
    if kind == CLOSE:
        return Close(attempt, seq, rest[0], rest[1])
    return Failure(attempt, seq, rest[0], rest[1])


def _status(status: int) -> int:
    if not 200 <= status <= 999 and status != 101:
        raise WireError(f"status {status} is not a final HTTP status")
    return status


# Doorbells


def decode_ring(message: bytes) -> Ring:
    """``id`` or ``id,id,…`` or ``id frame``, as the scripts publish it, or what :func:`encode_taken` makes."""
    ids, space, frame = message.partition(b" ")
    try:
        names, _, taker = ids.decode("ascii").partition("@")
    except UnicodeDecodeError:
        raise WireError("a doorbell message is not ours") from None
    return Ring(tuple(names.split(",")), frame if space else None, taker)


def encode_ring(request_id: str, element: bytes) -> bytes:
    """The doorbell message for one exchange, with the element that is new on its list, or without one."""
    return b"%s %s" % (request_id.encode(), element) if element else request_id.encode()


def encode_taken(request_id: str, agent: str) -> str:
    """The doorbell message by which an agent says that it takes inbound frames, and where to ring for more."""
    return f"{request_id}@{agent}"
