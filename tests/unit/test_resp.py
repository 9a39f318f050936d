"""RESP2 commands and replies, and how redis-cli shows them."""

from __future__ import annotations

import io
from typing import Any, cast

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaskbus import resp, wire
from flaskbus.messages import Failure, Reply, Request
from flaskbus.resp import Error, Status, formatted, quoted, raw, read, split, unpacked


@given(
    st.lists(
        st.text() | st.integers() | st.binary() | st.integers(0, 3 * resp.LARGE).map(bytes),
        min_size=1,
        max_size=9,
    )
)
def test_a_command_is_what_hiredis_would_make_of_it(command: list[str | bytes | int]) -> None:
    assert b"".join(resp.buffers(tuple(command))) == resp.pack(tuple(command))
    assert resp.pack(tuple(command)) == hiredis.pack_command(cast(Any, tuple(command)))


@given(
    st.lists(
        st.tuples(st.text() | st.integers() | st.binary(), st.none() | st.binary()), min_size=1, max_size=9
    )
)
def test_a_template_packs_as_well(parts: list[tuple[str | bytes | int, bytes | None]]) -> None:
    """Each part as it is, or given later."""
    pack = resp.template(*(part if later is None else None for part, later in parts))
    whole = tuple(part if later is None else later for part, later in parts)
    assert pack(*(later for _, later in parts if later is not None)) == resp.pack(whole)


def reply(data: bytes) -> resp.Reply:
    return read(io.BytesIO(data))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"+OK\r\n", Status("OK")),
        (b"-ERR no\r\n", Error("ERR no")),
        (b":-3\r\n", -3),
        (b"$2\r\nOK\r\n", b"OK"),
        (b"$4\r\na\r\nb\r\n", b"a\r\nb"),
        (b"$0\r\n\r\n", b""),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"*0\r\n", []),
        (b"*2\r\n:1\r\n*1\r\n+a\r\n", [1, [Status("a")]]),
    ],
)
def test_read(data: bytes, value: resp.Reply) -> None:
    found = reply(data)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("data", [b"", b"+OK", b"$5\r\nab", b"*2\r\n:1\r\n"])
def test_read_says_that_the_connection_ended(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        reply(data)


@pytest.mark.parametrize("data", [b"HTTP/1.1 400\r\n", b":x\r\n", b"%1\r\n"])
def test_read_refuses_what_is_not_resp2(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"RESP2|int"):
        reply(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Status("OK"), "OK"),
        (Error("ERR no"), "(error) ERR no"),
        (3, "(integer) 3"),
        (b"OK", '"OK"'),
        (None, "(nil)"),
        ([], "(empty array)"),
        ([b"a", 1], '1) "a"\n2) (integer) 1'),
        (
            [b"x", [b"a", [None, 2]], 3],
            '1) "x"\n2) 1) "a"\n   2) 1) (nil)\n      2) (integer) 2\n3) (integer) 3',
        ),
    ],
)
def test_formatted(value: resp.Reply, text: str) -> None:
    assert formatted(value) == text


def test_numbers_are_aligned_like_those_of_redis_cli() -> None:
    lines = formatted([b"x"] * 9 + [[b"a", b"b"]]).splitlines()
    assert lines[0] == ' 1) "x"'
    assert lines[9:] == ['10) 1) "a"', '    2) "b"']


def test_quoted_escapes_all_that_is_not_printable_ascii() -> None:
    assert quoted(b'a"\\\n\r\t\a\b\x00\x7f\xc3\xa9') == r'"a\"\\\n\r\t\a\b\x00\x7f\xc3\xa9"'


def test_raw_is_for_other_programs() -> None:
    assert raw([b"a\xff", 1, None, [Status("OK")]]) == b"a\xff\n1\n\nOK"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=6))
def test_what_is_quoted_can_be_typed(words: list[bytes]) -> None:
    assert split(" ".join(map(quoted, words))) == words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  get   a ", [b"get", b"a"]),
        ("set 'it\\'s' \"\\x41\\n\\q\"", [b"set", b"it's", b"A\nq"]),
        ("set a é", [b"set", b"a", "é".encode()]),
        ("xrange flaskbus:{/a}:requests - +", [b"xrange", b"flaskbus:{/a}:requests", b"-", b"+"]),
    ],
)
def test_split(line: str, words: list[bytes]) -> None:
    assert split(line) == words


@pytest.mark.parametrize("line", ['"a', "'a", '"a"b', "get \"a'"])
def test_split_refuses_unbalanced_quotes(line: str) -> None:
    with pytest.raises(ValueError, match="unbalanced"):
        split(line)


def test_frames_and_fields_of_ours_are_unpacked() -> None:
    assert unpacked(wire.encode_frame(Reply(1, 0, 200, ((b"A", b"b"),), b"caf\xc3\xa9 \xff"))) == (
        '[2, 5, 1, 0, 200, ["A", "b"], "café \\\\xff"]'
    )
    assert unpacked(wire.encode_frame(Failure(1, 0, "x", "y"))) == '[2, 4, 1, 0, "x", "y"]'
    body = wire.encode_request(Request("1", "GET", "/", "g", 1, body=b"hi"))[-1]
    assert isinstance(body, bytes)
    assert unpacked(body) == '"hi"'
    assert formatted([body], decode=True) == '1) "hi"'
    assert raw([body], decode=True) == b'"hi"'


@pytest.mark.parametrize(
    "data", [b"", b"1795241003485-0", b"hello", b"\x95\x01", b"\xc1", b"\x80", "ĉu".encode()]
)
def test_anything_else_is_not(data: bytes) -> None:
    assert unpacked(data) is None
    assert formatted(data, decode=True) == quoted(data)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_nothing_on_a_broker_breaks_the_prompt(data: bytes) -> None:
    assert formatted(data, decode=True)
    raw(data, decode=True)
