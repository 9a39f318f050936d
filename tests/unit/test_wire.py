"""The wire format: a table of (message, bytes), properties both ways, and whatever is not ours."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus import wire
from flaskbus.errors import WireError
from flaskbus.messages import Chunk, Close, End, Failure, Frame, Head, Message, Reply, Request, Ring

FRAMES: list[tuple[Frame, list[Any]]] = [
    (Head(1, 0, 200, ((b"X-Name", b"value"),), "ag"), [2, 1, 1, 0, 200, [b"X-Name", b"value"], "ag"]),
    (Chunk(2, 7, b"\x00data"), [2, 2, 2, 7, b"\x00data"]),
    (End(1, 9), [2, 3, 1, 9]),
    (Failure(3, 0, "app-error", "it raised"), [2, 4, 3, 0, "app-error", "it raised"]),
    (Reply(1, 0, 404, ((b"a", b"1"), (b"a", b"2")), b"no"), [2, 5, 1, 0, 404, [b"a", b"1", b"a", b"2"], b"no"]),
    (Message(0, 3, True, False, b"caf\xc3"), [2, 6, 0, 3, True, False, b"caf\xc3"]),
    (Close(0, 4, 1001, "bye"), [2, 7, 0, 4, 1001, "bye"]),
]  # fmt: skip

REQUEST = Request(
    id="abc1",
    method="POST",
    target="/shop/a%20b?x=1",
    gateway="host-1-ab",
    ttl=30_000,
    script_name="/shop",
    scheme="https",
    http_version="2",
    client=("203.0.113.7", 4711),
    server=("127.0.0.1", 5000),
    headers=((b"host", b"example.com"), (b"x", b"\xff")),
    body=b"\x00\x01",
    traceparent="00-aa-bb-01",
    attempt=2,
)

header = st.tuples(st.binary(max_size=40), st.binary(max_size=200))
headers = st.lists(header, max_size=20).map(tuple)
number = st.integers(0, 2**31)
frames = st.one_of(
    st.builds(Head, number, number, st.integers(200, 999), headers, st.text(max_size=40)),
    st.builds(Chunk, number, number, st.binary(max_size=500)),
    st.builds(End, number, number),
    st.builds(Failure, number, number, st.text(max_size=40), st.text(max_size=200)),
    st.builds(Reply, number, number, st.integers(200, 999), headers, st.binary(max_size=500)),
    st.builds(Message, number, number, st.booleans(), st.booleans(), st.binary(max_size=500)),
    st.builds(Close, number, number, number, st.text(max_size=40)),
)
ascii_text = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
address = st.tuples(st.text(max_size=40), st.integers(0, 65535))
requests = st.builds(
    Request,
    id=st.from_regex(r"[A-Za-z0-9_.-]{1,80}", fullmatch=True),
    method=ascii_text,
    target=st.text(st.characters(max_codepoint=255), max_size=100),
    gateway=ascii_text,
    ttl=number,
    script_name=st.text(max_size=40),
    scheme=st.sampled_from(["http", "https"]),
    http_version=st.sampled_from(["1.0", "1.1", "2"]),
    client=address,
    server=address,
    headers=headers,
    body=st.binary(max_size=500),
    traceparent=st.text(st.characters(max_codepoint=127), max_size=60),
    attempt=st.integers(1, 99),
    idempotency=st.from_regex(r"([0-9a-f]{64})?", fullmatch=True),
    inbound=st.sampled_from(["", "body", "websocket"]),
)


def stored(fields: Sequence[str | bytes | int]) -> list[bytes]:
    """What Redis gives back of fields that were given to XADD."""
    return [field if isinstance(field, bytes) else str(field).encode("utf-8") for field in fields]


class TestFrames:
    @pytest.mark.parametrize(("frame", "members"), FRAMES)
    def test_bytes(self, frame: Frame, members: list[Any]) -> None:
        assert msgpack.unpackb(wire.encode_frame(frame)) == members
        assert wire.decode_frame(msgpack.packb(members), max_size=1000) == frame

    @pytest.mark.parametrize(("frame", "members"), FRAMES)
    def test_an_older_neighbours_bytes(self, frame: Frame, members: list[Any]) -> None:
        assert wire.decode_frame(msgpack.packb([1, *members[1:]]), max_size=1000) == frame

    @given(frames)
    def test_there_and_back(self, frame: Frame) -> None:
        assert wire.decode_frame(wire.encode_frame(frame), max_size=1 << 20) == frame

    @given(st.binary(max_size=300))
    def test_any_bytes_are_a_frame_or_a_wire_error(self, data: bytes) -> None:
        with contextlib.suppress(WireError):
            wire.decode_frame(data, max_size=1 << 20)

    @given(frames, st.data())
    def test_a_cut_frame_is_a_wire_error(self, frame: Frame, data: st.DataObject) -> None:
        encoded = wire.encode_frame(frame)
        with pytest.raises(WireError):
            wire.decode_frame(encoded[: data.draw(st.integers(0, len(encoded) - 1))], max_size=1 << 20)

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"a": 1}, "not msgpack of ours"),
            ("text", "not an array"),
            ([], "not an array"),
            (["1", 3, 1, 0], "not an array that begins with a version"),
            ([0, 3, 1, 0], "wire version 0"),
            ([wire.VERSION + 2, 3, 1, 0], f"this is version {wire.VERSION}"),
            ([1, 3, 1], "3 members"),
            ([1, 3, 1, "0"], "str where int"),
            ([1, 3, True, 0], "bool where int"),
            ([1, 99, 1, 0], "unknown kind 99"),
            ([1, 2, 1, 0], "4 members"),
            ([1, 2, 1, 0, "text"], "str where bytes"),
            ([1, 5, 1, 0, 199, [], b""], "status 199"),
            ([1, 5, 1, 0, 1000, [], b""], "status 1000"),
            ([1, 1, 1, 0, 200, [b"odd"], ""], "not name-value pairs"),
            ([1, 1, 1, 0, 200, [b"a", "b"], ""], "not bytes"),
            ([1, 2, 1, 0, msgpack.ExtType(5, b"x")], "not msgpack of ours"),
        ],
    )
    def test_other_shapes(self, members: Any, message: str) -> None:
        with pytest.raises(WireError, match=message):
            wire.decode_frame(msgpack.packb(members), max_size=1000)

    def test_a_newer_neighbour_may_say_more(self) -> None:
        assert wire.decode_frame(msgpack.packb([wire.VERSION + 1, 3, 1, 0, "new"]), max_size=99) == End(1, 0)

    def test_a_large_one_is_not_unpacked(self) -> None:
        with pytest.raises(WireError, match="at most 10"):
            wire.decode_frame(b"\xdd\xff\xff\xff\xff" + b"x" * 100, max_size=10)

    def test_a_bomb_of_nested_arrays(self) -> None:
        with pytest.raises(WireError):
            wire.decode_frame(b"\x91" * 5000 + b"\xc0", max_size=10_000)


class TestRequests:
    def test_a_template_is_a_request_with_gaps(self) -> None:
        other = replace(REQUEST, id="other", method="DELETE", target="/else", body=b"other")
        fields = iter([other.id, other.method, other.target.encode(), msgpack.packb(other.body)])
        template = wire.request_template(REQUEST)
        assert [next(fields) if each is None else each for each in template] == wire.encode_request(other)

    def test_a_person_can_read_the_plain_fields(self) -> None:
        fields = wire.encode_request(REQUEST)
        assert fields[::2] == [
            "id", "method", "target", "from", "ttl", "attempt", "traceparent", "head", "body",
        ]  # fmt: skip
        assert fields[1:14:2] == ["abc1", "POST", b"/shop/a%20b?x=1", "host-1-ab", 30_000, 2, "00-aa-bb-01"]
        assert wire.decode_request(stored(fields), max_body=10) == REQUEST

    def test_what_does_not_apply_takes_no_room(self) -> None:
        fields = wire.encode_request(Request("a", "GET", "/", "g", 1))
        assert not {"traceparent", "idempotency"}.intersection(fields)

    @pytest.mark.parametrize("version", [1, 2, 3])
    def test_it_knows_what_its_sender_speaks(self, version: int) -> None:
        fields = stored(wire.encode_request(REQUEST))
        place = fields.index(b"head") + 1
        head = [version, *msgpack.unpackb(fields[place])[1:], *["new"] * (version - 2)]
        fields[place] = msgpack.packb(head)
        assert wire.decode_request(fields, max_body=10) == replace(REQUEST, version=version)

    @given(requests)
    def test_there_and_back(self, request: Request) -> None:
        assert wire.decode_request(stored(wire.encode_request(request)), max_body=1 << 20) == request

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({b"head": None}, "field head is missing"),
            ({b"id": None}, "field id is missing"),
            ({b"id": b"a b"}, "not one of ours"),
            ({b"id": b""}, "not one of ours"),
            ({b"method": b"\xff"}, "not readable"),
            ({b"ttl": b"soon"}, "not readable"),
            ({b"attempt": b""}, "not readable"),
            ({b"body": msgpack.packb("text")}, "body is not bytes"),
            ({b"body": msgpack.packb(b"x" * 100)}, "at most"),
            ({b"body": b""}, "not msgpack of ours"),
            ({b"idempotency": b"0" * 63}, "not the name of a record"),
            ({b"idempotency": b"../reply:1" + b"0" * 54}, "not the name of a record"),
            ({b"head": msgpack.packb([1])}, "1 members"),
            ({b"head": msgpack.packb([9])}, "wire version 9"),
        ],
    )
    def test_other_shapes(self, change: dict[bytes, bytes | None], message: str) -> None:
        flat = stored(wire.encode_request(REQUEST))
        entry: dict[bytes, bytes | None] = {**dict(zip(flat[::2], flat[1::2], strict=True)), **change}
        fields = [part for pair in entry.items() if pair[1] is not None for part in pair]
        with pytest.raises(WireError, match=message):
            wire.decode_request([part for part in fields if part is not None], max_body=10)

    @given(st.lists(st.binary(max_size=50), max_size=20))
    def test_any_fields_are_a_request_or_a_wire_error(self, fields: list[bytes]) -> None:
        with contextlib.suppress(WireError):
            wire.decode_request(fields, max_body=100)

    @given(requests)
    def test_a_plain_one_is_the_same_request(self, request: Request) -> None:
        fields = stored(wire.encode_request(request))
        plain = wire.peek_plain(fields)
        if request.inbound or request.idempotency:
            assert plain is None
            return
        assert plain == wire.Plain(
            request.id, request.method, request.target, request.gateway, request.ttl, request.attempt,
            fields[-3], request.body,
        )  # fmt: skip

    @given(st.integers(0, 17), st.binary(max_size=40))
    def test_one_that_is_plain_can_be_decoded_but_for_its_head(self, place: int, value: bytes) -> None:
        fields = stored(wire.encode_request(REQUEST))
        fields[place] = value
        if (plain := wire.peek_plain(fields)) is None:
            return
        with contextlib.suppress(WireError):
            wire.decode_head(plain.head)
            request = wire.decode_request(fields, max_body=wire.MAX_BODY)
            assert plain == (
                request.id, request.method, request.target, request.gateway, request.ttl, request.attempt,
                fields[-3], request.body,
            )  # fmt: skip
            return
        with pytest.raises(WireError):
            wire.decode_head(plain.head)

    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ([b"id", b"abc"], "abc"),
            ([b"x", b"y", b"id", b"a b"], None),
            ([b"id"], None),
            ([b"a", b"b"], None),
        ],
    )
    def test_peek_id(self, fields: list[bytes], found: str | None) -> None:
        assert wire.peek_id(fields) == found

    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ([b"from", b"gw", b"attempt", b"3"], ("gw", 3)),
            ([b"attempt", b"soon"], ("", 1)),
            ([b"from", b"\xff", b"attempt", b"9" * 10], ("\xff", 1)),
            ([b"from"], ("", 1)),
        ],
    )
    def test_peek_sender(self, fields: list[bytes], found: tuple[str, int]) -> None:
        assert wire.peek_sender(fields) == found

    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ([b"idempotency", b"0a" * 32], "0a" * 32),
            ([b"idempotency", b"0A" * 32], ""),
            ([b"id", b"abc"], ""),
            ([b"idempotency"], ""),
        ],
    )
    def test_peek_record(self, fields: list[bytes], found: str) -> None:
        assert wire.peek_record(fields) == found

    def test_the_largest_frame(self) -> None:
        assert wire.max_frame(0) == wire.MAX_CHUNK + wire.MAX_HEAD
        assert wire.max_frame(1 << 20) == (1 << 20) + wire.MAX_HEAD


class TestRings:
    @pytest.mark.parametrize(
        ("message", "ring"),
        [
            (b"a1", Ring(("a1",))),
            (b"a1,a2", Ring(("a1", "a2"))),
            (b"a1 \x95 x", Ring(("a1",), b"\x95 x")),
            (b"a1 ", Ring(("a1",), b"")),
            (b"a1@host-7-ab", Ring(("a1",), taker="host-7-ab")),
        ],
    )
    def test_decode(self, message: bytes, ring: Ring) -> None:
        assert wire.decode_ring(message) == ring

    @given(st.from_regex(r"[A-Za-z0-9_.-]{1,80}", fullmatch=True), st.binary(max_size=50))
    def test_there_and_back(self, name: str, element: bytes) -> None:
        assert wire.decode_ring(wire.encode_ring(name, element)) == Ring((name,), element or None)
        assert wire.decode_ring(wire.encode_taken(name, "ag").encode()) == Ring((name,), taker="ag")

    def test_not_ours(self) -> None:
        with pytest.raises(WireError):
            wire.decode_ring(b"\xff\xfe")
