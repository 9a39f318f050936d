"""Pieces of a response become chunks; nothing is lost, split or put into another order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flaskbus.wire import MAX_CHUNK
from flaskbus_agent.flow import MOST_PIECES, Pieces, Window

SIZES = st.integers(1, 300) | st.integers(1, MAX_CHUNK) | st.just(MAX_CHUNK)


@given(st.lists(SIZES | st.tuples(st.integers(-5, 4 * MAX_CHUNK)), max_size=60))
def test_what_is_taken_is_what_was_added(steps: list[int | tuple[int]]) -> None:
    """A number is the size of what is added; in a tuple it says how much may be taken."""
    pieces, added, taken = Pieces(4 * MAX_CHUNK), b"", b""
    for number, step in enumerate(steps):
        if isinstance(step, int):
            pieces.add(bytes([number]) * step)
            added += bytes([number]) * step
        else:
            chunks = pieces.take(step[0])
            assert all(1 <= len(chunk) <= MAX_CHUNK for chunk in chunks)
            assert len(chunks) <= 1 or sum(map(len, chunks)) <= step[0]
            assert bool(chunks) == (len(taken) < len(added))
            taken += b"".join(chunks)
        assert pieces.size == len(added) - len(taken)
    while chunks := pieces.take(MAX_CHUNK):
        taken += b"".join(chunks)
    assert taken == added


def test_small_pieces_travel_together_and_large_ones_are_not_copied() -> None:
    pieces = Pieces(4 * MAX_CHUNK)
    large = bytes(MAX_CHUNK)
    for data in (b"a" * 100, b"b" * 100, large, large, b"c"):
        pieces.add(data)
    chunks = pieces.take(4 * MAX_CHUNK)
    assert chunks == [b"a" * 100 + b"b" * 100, large, large, b"c"]
    assert chunks[1] is chunks[2] is large


def test_enough_is_a_number_of_bytes_or_of_pieces() -> None:
    pieces = Pieces(1000)
    seen = []
    for size in (999, 1):
        pieces.add(bytes(size))
        seen.append(pieces.enough)
    assert seen == [False, True]
    pieces.clear()
    assert (pieces.size, pieces.take(1000), pieces.enough) == (0, [], False)
    many = Pieces(2 * MOST_PIECES)
    for count in range(MOST_PIECES):
        assert many.enough == (count == MOST_PIECES)
        many.add(b"x")
    assert many.enough


@given(st.integers(1, 100), st.lists(st.lists(st.integers(1, 50)) | st.integers(0, 30)))
def test_the_room_of_a_window(size: int, steps: list[list[int] | int]) -> None:
    window, listed = Window(size), [0][1:]
    for step in steps:
        if isinstance(step, list):
            window.pushed(step)
            listed += step
        else:
            window.left(step)
            listed = listed[len(listed) - min(step, len(listed)) :]
        assert (window.elements, window.room) == (len(listed), size - sum(listed))
