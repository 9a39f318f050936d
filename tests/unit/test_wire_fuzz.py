"""What broken software or a stranger may write: it decodes to a message, or is a WireError, and costs little.

:mod:`tests.unit.test_wire` has the table and the properties of the format; here valid bytes are damaged.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus import wire
from flaskbus.errors import WireError
from flaskbus.messages import Frame, Reply, Request, Ring
from tests.unit.test_wire import REQUEST, frames, requests, stored

MAX_BODY = 4096

# Damage


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes after one to four accidents: flipped bits, a cut, a splice with others, a piece twice."""
    data = draw(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "splice", "insert", "repeat", "drop"])):
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "splice":
                other = draw(whole)
                data = data[:at] + other[draw(st.integers(0, len(other))) :]
            case "insert":
                data = data[:at] + draw(st.binary(max_size=6)) + data[at:]
            case "repeat":
                data = data[:at] + data[at // 2 : at] + data[at:]
            case "drop":
                data = data[:at] + data[at + draw(st.integers(1, 4)) :]
    return data


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=6), max_leaves=20)
"""Anything that msgpack can say in our types, and in some that are not ours."""


@st.composite
def misshapen(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Valid msgpack whose members are not all what they should be."""
    members = msgpack.unpackb(draw(whole))
    place = draw(st.integers(0, len(members) - 1))
    match draw(st.sampled_from(["replace", "remove", "append", "nest"])):
        case "replace":
            members[place] = draw(values)
        case "remove":
            del members[place]
        case "append":
            members.append(draw(values))
        case "nest":
            members = [members]
    return bytes(msgpack.packb(members))


def size(message: Request | Frame) -> int:
    """Bytes of text and data in a message."""
    parts: list[Any] = []
    for name in message.__dataclass_fields__:
        value = getattr(message, name)
        parts += (
            chain.from_iterable(value)
            if name == "headers"
            else value
            if isinstance(value, tuple)
            else [value]
        )
    return sum(len(part) for part in parts if isinstance(part, (str, bytes)))


def frame_or_error(data: bytes) -> None:
    try:
        frame = wire.decode_frame(data, max_size=4096)
    except WireError:
        return
    assert size(frame) <= len(data) <= 4096
    # It is one that we could have sent.
    assert wire.decode_frame(wire.encode_frame(frame), max_size=2 * 4096) == frame


def request_or_error(fields: Sequence[bytes]) -> None:
    try:
        request = wire.decode_request(fields, max_body=MAX_BODY)
    except WireError:
        return
    assert len(request.body) <= MAX_BODY + 16
    assert size(request) <= sum(map(len, fields)) + len("1.1http")
    again = wire.decode_request(stored(wire.encode_request(request)), max_body=MAX_BODY + 16)
    assert again.headers == request.headers
    assert again.body == request.body


encoded = frames.map(wire.encode_frame)


@given(damaged(encoded))
def test_a_damaged_frame(data: bytes) -> None:
    frame_or_error(data)


@given(misshapen(encoded))
def test_a_misshapen_frame(data: bytes) -> None:
    frame_or_error(data)


@given(values.map(msgpack.packb) | st.binary(max_size=5000))
def test_any_msgpack_as_a_frame(data: bytes) -> None:
    frame_or_error(data)


@st.composite
def damaged_entries(draw: st.DrawFn) -> list[bytes]:
    """The fields of a request, one of them damaged, misshapen, gone, or there twice."""
    fields = stored(wire.encode_request(draw(requests)))
    place = 2 * draw(st.integers(0, len(fields) // 2 - 1))
    name, value = fields[place : place + 2]
    match draw(st.sampled_from(["damage", "shape", "remove", "twice", "odd", "rename"])):
        case "damage":
            fields[place + 1] = draw(damaged(st.just(value)))
        case "shape":
            heads = st.just(dict(zip(fields[::2], fields[1::2], strict=True))[b"head"])
            fields += [b"head", draw(misshapen(heads))]
        case "remove":
            del fields[place : place + 2]
        case "twice":
            fields += [name, draw(st.binary(max_size=200))]
        case "odd":
            fields.append(name)
        case "rename":
            fields[place] = draw(st.binary(max_size=10))
    return fields


@given(damaged_entries())
def test_a_damaged_entry(fields: list[bytes]) -> None:
    request_or_error(fields)
    # What is done with one that cannot be read may not fail either.
    wire.peek_id(fields)
    sender, attempt = wire.peek_sender(fields)
    assert isinstance(sender, str)
    assert attempt >= 0


rings = st.lists(st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True), min_size=1, max_size=5).map(
    lambda ids: ",".join(ids).encode()
)


@given(damaged(rings | st.tuples(rings, encoded).map(b" ".join)) | st.binary(max_size=300))
def test_a_damaged_doorbell(message: bytes) -> None:
    try:
        ring = wire.decode_ring(message)
    except WireError:
        return
    assert isinstance(ring, Ring)
    assert sum(map(len, ring.ids)) + len(ring.frame or b"") <= len(message)


# Bombs

BIG = 100_000
BOMBS: dict[str, bytes] = {
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
    "a timestamp": b"\xc7\x0c\xff" + b"\0" * 12,
    "arrays in arrays": b"\x91" * BIG,
    "arrays in arrays of two": b"\x92" * BIG,
    "arrays beside arrays": b"\xdd" + (BIG - 5).to_bytes(4, "big") + b"\x90" * (BIG - 5),
    "maps": b"\xdd" + (BIG - 5).to_bytes(4, "big") + b"\x80" * (BIG - 5),
    "nothing, often": b"\xdd" + (BIG - 5).to_bytes(4, "big") + b"\xc0" * (BIG - 5),
    "a number that is too large": b"\xcf" + b"\xff" * 8,
    "bytes behind the end": msgpack.packb([2, 3, 1, 0]) + b"\xc0" * 100,
    "a byte that msgpack has not": b"\xc1",
    "text that is not UTF-8": b"\x91\xa2\xff\xfe",
}


def cost(decode: Callable[[], object]) -> int:
    """The most memory that a decoder had at a time, in bytes; it must refuse."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_and_cost_no_more_than_their_bytes(name: str) -> None:
    bomb = BOMBS[name]
    good = stored(wire.encode_request(REQUEST))
    # An empty array in a list takes 64 bytes, and each came as a byte.
    bound = 1_000_000 + 80 * len(bomb)
    assert cost(lambda: wire.decode_frame(bomb, max_size=wire.max_frame(65536))) < bound
    assert cost(lambda: wire.decode_request([*good, b"head", bomb], max_body=BIG)) < bound
    # A body may be much larger than a head, and so it may not be unpacked but as one byte string.
    assert cost(lambda: wire.decode_request([*good, b"body", bomb], max_body=BIG)) < 100_000


def test_many_headers_are_bounded_by_their_bytes() -> None:
    headers = tuple((b"", b"") for _ in range(250_000))
    frame = wire.encode_frame(Reply(1, 0, 200, headers, b""))
    assert len(frame) > BIG
    assert wire.decode_frame(frame, max_size=wire.max_frame(65536)) == Reply(1, 0, 200, headers, b"")
    with pytest.raises(WireError, match="at most"):
        wire.decode_frame(frame, max_size=65536)


@pytest.mark.parametrize("name", ["ttl", "attempt"])
@pytest.mark.parametrize(
    "value", [b"9" * 5000, b"-1", b"1_0", "٣".encode(), b" 1", b"1e9", b"nan", b"", b"0x1"]
)
def test_numbers_in_plain_fields(name: str, value: bytes) -> None:
    request_or_error([*stored(wire.encode_request(REQUEST)), name.encode(), value])
