"""A gateway or an agent of another wire version: ``python -m tests.contract.neighbours VERSION MODULE …``.

The command is today's, its codec is that of the version: version 1 as it was written then, and versions to come
as docs/reference/wire.md allows them to be, with members that nobody knows yet at the end of each array.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from flaskbus import wire
from flaskbus.errors import WireError
from flaskbus.messages import NOT_RUN, Chunk, End, Failure, Frame, Head, Reply, Request

Field = str | bytes | int

# Version 1


def flat(headers: Any) -> list[bytes]:
    return [part for pair in headers for part in pair]


def paired(headers: Any) -> tuple[tuple[bytes, bytes], ...]:
    if type(headers) is not list or len(headers) % 2 or any(type(part) is not bytes for part in headers):
        raise WireError("headers are not name-value pairs of bytes")
    return tuple(zip(headers[::2], headers[1::2], strict=True))


def unpacked(data: bytes, size: int, *types: type) -> list[Any]:
    """An array that begins with members of these types, the first of them a version that version 1 read."""
    if len(data) > size:
        raise WireError(f"{len(data)} bytes where at most {size} are allowed")
    try:
        value = msgpack.unpackb(data, raw=False, max_ext_len=0, max_map_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not msgpack of ours: {error}") from None
    if type(value) is not list or len(value) < len(types):
        raise WireError("not an array of ours")
    if value[0] not in (1, 2):
        raise WireError(f"wire version {value[0]}; this is version 1")
    for member, expected in zip(value, types, strict=False):
        if type(member) is not expected:
            raise WireError(f"{type(member).__name__} where {expected.__name__} belongs")
    return value


def encode_request_1(request: Request) -> list[Field]:
    assert not request.idempotency, "version 1 knew no such field"
    head = [
        1, request.scheme, request.http_version, *request.client, *request.server, request.script_name,
        flat(request.headers),
    ]  # fmt: skip
    fields: list[Field] = [
        "id", request.id, "method", request.method, "target", request.target.encode("latin-1"),
        "from", request.gateway, "ttl", request.ttl, "attempt", request.attempt,
    ]  # fmt: skip
    if request.traceparent:
        fields += ("traceparent", request.traceparent)
    return [*fields, "head", msgpack.packb(head), "body", msgpack.packb(request.body)]


def decode_request_1(fields: Sequence[bytes], *, max_body: int) -> Request:
    entry = dict(zip(fields[::2], fields[1::2], strict=False))
    try:
        head = unpacked(entry[b"head"], wire.MAX_HEAD, int, str, str, str, int, str, int, str, list)
        body = msgpack.unpackb(entry[b"body"], max_bin_len=max_body)
        return Request(
            id=entry[b"id"].decode("ascii"),
            method=entry[b"method"].decode("ascii"),
            target=entry[b"target"].decode("latin-1"),
            gateway=entry[b"from"].decode("ascii"),
            ttl=int(entry[b"ttl"]),
            attempt=int(entry[b"attempt"]),
            traceparent=entry.get(b"traceparent", b"").decode("latin-1"),
            scheme=head[1],
            http_version=head[2],
            client=(head[3], head[4]),
            server=(head[5], head[6]),
            script_name=head[7],
            headers=paired(head[8]),
            body=body,
            version=1,  # an agent of then did as it does now for a gateway of then
        )
    except KeyError as error:
        raise WireError(f"field {error} is missing") from None
    except ValueError as error:
        raise WireError(f"a field is not readable: {error}") from None


def encode_frame_1(frame: Frame, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    assert sign is None, "version 1 knew no signatures"
    if isinstance(frame, Head):
        kind, rest = 1, [frame.status, flat(frame.headers), frame.agent]
    elif isinstance(frame, Chunk):
        kind, rest = 2, [frame.data]
    elif isinstance(frame, End):
        kind, rest = 3, []
    elif isinstance(frame, Failure):
        assert frame.code != NOT_RUN, "version 1 knew no such failure"
        kind, rest = 4, [frame.code, frame.detail]
    else:
        assert isinstance(frame, Reply), "version 1 knew no WebSockets"
        kind, rest = 5, [frame.status, flat(frame.headers), frame.body]
    packed: bytes = msgpack.packb([1, kind, frame.attempt, frame.seq, *rest])
    return packed


def decode_frame_1(data: bytes, *, max_size: int) -> Frame:
    _, kind, attempt, seq, *rest = unpacked(data, max_size, int, int, int, int)
    if kind == 1:
        return Head(attempt, seq, rest[0], paired(rest[1]), rest[2])
    if kind == 2:
        return Chunk(attempt, seq, rest[0])
    if kind == 3:
        return End(attempt, seq)
    if kind == 4:
        # Whatever the code: version 1 knew one outcome of a failure.
        return Failure(attempt, seq, "agent-lost", rest[1])
    if kind == 5:
        return Reply(attempt, seq, rest[0], paired(rest[1]), rest[2])
    raise WireError(f"frame of unknown kind {kind}")


VERSION_1: dict[str, Any] = {
    "VERSION": 1,
    "MAX_INLINE": wire.MAX_BODY,  # it sent no body in parts
    "encode_request": encode_request_1,
    "decode_request": decode_request_1,
    "encode_frame": encode_frame_1,
    "decode_frame": decode_frame_1,
}

# Versions to come


def appended(packed: bytes) -> bytes:
    """The same array with members at its end that no version knows yet."""
    longer: bytes = msgpack.packb([*msgpack.unpackb(packed), "new", 7, [b"x"]])
    return longer


def later(version: int) -> dict[str, Any]:
    """What such a version changes in :mod:`flaskbus.wire`."""
    encode_request, encode_frame = wire.encode_request, wire.encode_frame

    def request(message: Request) -> list[Field]:
        fields = encode_request(message)
        place = fields.index("head") + 1
        fields[place] = appended(bytes(fields[place]))  # type: ignore[arg-type]
        return [*fields[:-4], "tenant", "new", *fields[-4:]]

    def frame(message: Frame, sign: Callable[[bytes], bytes] | None = None) -> bytes:
        return appended(encode_frame(message, sign))

    return {
        "VERSION": version,
        "OLDEST_READABLE": version - 1,
        "encode_request": request,
        "encode_frame": frame,
    }


def install(version: int) -> None:
    for name, value in (VERSION_1 if version == 1 else later(version)).items():
        setattr(wire, name, value)


if __name__ == "__main__":
    install(int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv[:3] = [sys.argv[0]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
