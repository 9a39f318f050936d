"""Event boundaries: the grammar of each format, however its bytes are cut into pieces."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.boundaries import Boundaries, boundaries


def of(media_type: str) -> Boundaries:
    found = boundaries(((b"Content-Type", media_type.encode()),))
    assert found is not None
    return found


SSE, LINES, SEQUENCE = "text/event-stream", "application/x-ndjson", "application/json-seq"


@pytest.mark.parametrize(
    ("media_type", "body", "complete"),
    [
        (SSE, b"", True),
        (SSE, b"data: 1", False),
        (SSE, b"data: 1\n", False),
        (SSE, b"data: 1\r\n", False),
        (SSE, b"data: 1\r", False),
        (SSE, b"data: 1\n\n", True),
        (SSE, b"data: 1\r\n\r\n", True),
        (SSE, b"data: 1\r\r", True),
        (SSE, b"data: 1\n\r", True),
        (SSE, b"data: 1\r\n\r", True),
        (SSE, b"data: 1\r\r\n", True),
        (SSE, b"data: 1\n\r\n", True),
        (SSE, b"data: 1\n\n\n", True),
        (SSE, b"data: 1\n\ndata: 2\n", False),
        (SSE, b"\n", True),
        (SSE, b"\r\n", True),
        (LINES, b"", True),
        (LINES, b"{}", False),
        (LINES, b"{}\n", True),
        (LINES, b"{}\r\n", True),
        (LINES, b"{}\n{", False),
        (SEQUENCE, b"", True),
        (SEQUENCE, b"\x1e{}", False),
        (SEQUENCE, b"\x1e{\n", False),
    ],
)
def test_complete(media_type: str, body: bytes, complete: bool) -> None:
    whole, bytewise = of(media_type), of(media_type)
    whole.advance(body)
    for byte in body:
        bytewise.advance(bytes((byte,)))
    assert whole.complete is bytewise.complete is complete


@pytest.mark.parametrize(
    ("media_type", "before", "data", "cut"),
    [
        (SSE, b"", b"data: 1", b""),
        (SSE, b"data", b": 1\n\n", b": 1\n\n"),
        (SSE, b"data", b": 1\n\ndata: 2\n\ndata", b": 1\n\ndata: 2\n\n"),
        (SSE, b"data", b": 1\ndata: 2", None),
        (SSE, b"data: 1\r", b"\n", None),
        (SSE, b"data: 1\r", b"\n\r\ndata", b"\n\r\n"),
        (SSE, b"data: 1\n", b"\ndata", b"\n"),
        (SSE, b"data: 1\n\n", b"data: 2", b""),
        (SSE, b"data: 1\n\n", b"\ndata: 2", b"\n"),
        (LINES, b"{", b"}\n{}\n{", b"}\n{}\n"),
        (LINES, b"{", b"}", None),
        (SEQUENCE, b"\x1e{\n", b"}\n", None),
        (SEQUENCE, b"\x1e{\n", b"}\n\x1e{}\n", b"}\n"),
        (SEQUENCE, b"\x1e{}\n", b"\x1e{}\n", b""),
    ],
)
def test_cut(media_type: str, before: bytes, data: bytes, cut: bytes | None) -> None:
    found = of(media_type)
    found.advance(before)
    assert found.cut(data) == cut


def pieces(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


PLACES = st.lists(st.integers(0, 1000), max_size=8)


def dispatched(body: bytes) -> tuple[list[list[str]], list[str]]:
    """The events of a stream, each its lines, and the lines of one that is not complete."""
    *lines, rest = re.split("\r\n|\n|\r", body.decode("latin-1"))
    events: list[list[str]] = []
    event: list[str] = []
    for line in lines:
        if line:
            event.append(line)
        elif event:
            events.append(event)
            event = []
    return events, [*event, *([rest] if rest else [])]


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n"]), max_size=30).map(b"".join), PLACES)
def test_an_event_stream_is_complete_where_a_parser_has_nothing_in_hand(
    body: bytes, places: list[int]
) -> None:
    found = of(SSE)
    for piece in pieces(body, places):
        found.advance(piece)
    in_hand = dispatched(body)[1]
    assert not (found.complete and in_hand)
    # The other way round, an LF may still follow a CR: that is for the next piece to tell.
    if not in_hand and re.search(rb"(^|[\r\n])(\r\n|\n|\r)\Z", body):
        assert found.complete


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n"]), max_size=30).map(b"".join), PLACES)
def test_what_is_cut_loses_no_event_and_leaves_no_half(body: bytes, places: list[int]) -> None:
    found, sent = of(SSE), b""
    *before, last = pieces(body, places)
    for piece in before:
        found.advance(piece)
        sent += piece
    kept = found.cut(last)
    if kept is not None:
        events, in_hand = dispatched(sent + kept)
        assert not in_hand
        assert events == dispatched(body)[0]


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.integers(), max_size=3), max_size=3),
    PLACES,
    st.sampled_from([None, 1]),
)
def test_a_sequence_is_cut_between_records(
    records: list[dict[str, int]], places: list[int], indent: int | None
) -> None:
    body = b"".join(b"\x1e" + json.dumps(record, indent=indent).encode() + b"\n" for record in records)
    found, sent = of(SEQUENCE), b""
    *before, last = pieces(body, places)
    for piece in before:
        found.advance(piece)
        sent += piece
    kept = found.cut(last)
    if kept is not None:
        texts = (sent + kept).split(b"\x1e")[1:]
        assert [json.loads(text) for text in texts] == records[: len(texts)]


@pytest.mark.parametrize(
    ("headers", "any_found"),
    [
        ([("content-type", "text/event-stream")], True),
        ([("Content-Type", "Text/Event-Stream; charset=utf-8")], True),
        ([("content-type", "application/jsonl")], True),
        (
            [("x-powered-by", "us"), ("content-type", "application/jsonl"), ("cache-control", "no-store")],
            True,
        ),
        ([("content-type", "text/html")], False),
        ([], False),
        ([("content-type", "text/event-stream"), ("content-encoding", "gzip")], False),
        ([("Content-Length", "100"), ("content-type", "text/event-stream")], False),
    ],
)
def test_which_responses_have_boundaries(headers: list[tuple[str, str]], any_found: bool) -> None:
    found = boundaries(tuple((name.encode(), value.encode()) for name, value in headers))
    assert (found is not None) is any_found
