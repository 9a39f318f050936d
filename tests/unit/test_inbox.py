"""Whatever the order of rings, looks and trims: each frame is handed over once, in order, and none is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flaskbus import wire
from flaskbus.inbox import Inbox
from flaskbus.messages import Chunk, End, Failure, Head, Reply
from flaskbus.signing import Seal


def chunk(seq: int, attempt: int = 1) -> bytes:
    return wire.encode_frame(Chunk(attempt, seq, b"%d" % seq))


def inbox() -> Inbox:
    return Inbox(1, 1 << 20)


@given(
    st.lists(
        st.sampled_from(["push", "push", "again", "stranger", "ring", "look", "look", "take", "hand over"])
    )
)
def test_a_list_that_grows_while_it_is_read(steps: list[str]) -> None:
    box, listed, pushed = inbox(), [], 0
    in_transit = 0
    received: list[bytes] = []
    for step in [*steps, "look", "look", "take", "hand over"]:
        if step == "push":
            listed.append(chunk(pushed))
            pushed += 1
        elif step == "again" and pushed:
            listed.append(chunk(pushed - 1))  # its answer was lost, so the agent sent it again
        elif step == "stranger":
            listed.append(chunk(7, attempt=2))
        elif step == "ring" and pushed:
            box.take_rung(chunk(pushed - 1))
        elif step == "look":
            box.take_listed(listed[box.seen : box.seen + 3])
        elif step == "take":
            while box.frames:
                frame = box.frames.popleft()
                assert isinstance(frame, Chunk)
                received.append(frame.data)
                in_transit += 1
        elif step == "hand over":
            box.handed_over(in_transit)
            in_transit = 0
            count = box.trimmed()
            assert 0 <= count <= len(listed)
            del listed[:count]
        assert 0 <= box.done <= box.seen <= len(listed)
    while len(received) < pushed:
        before = len(received)
        box.take_listed(listed[box.seen :])
        received.extend(frame.data for frame in box.frames if isinstance(frame, Chunk))
        box.frames.clear()
        assert len(received) > before
    assert received == [b"%d" % seq for seq in range(pushed)]


def test_a_part_that_is_missing_ends_the_reply() -> None:
    box = inbox()
    box.take_listed([wire.encode_frame(Head(1, 0, 200, ())), chunk(2)])
    assert isinstance(box.frames[1], Failure)
    assert "lost" in box.frames[1].detail


def test_a_trim_that_comes_late_loses_nothing() -> None:
    box, listed = inbox(), [chunk(seq) for seq in range(16)]
    box.take_listed(listed[:4])
    box.handed_over(4)
    late = box.trimmed()  # sent on a connection that breaks
    assert box.take_listed(listed[box.seen :][:6], box.seen)
    assert (box.seen, box.done, len(box.frames)) == (6, 4, 6)
    del listed[:late]
    start = box.seen
    assert not box.take_listed(listed[start:], start)
    assert (box.seen, box.done) == (0, 0)
    assert box.take_listed(listed[box.seen :], box.seen)
    assert [frame.seq for frame in box.frames] == list(range(16))


def test_what_is_missing_from_the_front_on_is_lost() -> None:
    box = inbox()
    box.take_listed([chunk(0)])
    assert not box.take_listed([chunk(2)], 1)
    assert box.take_listed([chunk(2)], 0)
    assert [type(frame) for frame in box.frames] == [Chunk, Failure]


def test_bytes_that_are_no_frame_end_the_reply() -> None:
    box = inbox()
    box.take_listed([b"\xc1"])
    assert isinstance(box.frames[0], Failure)
    assert "unreadable" in box.frames[0].detail


def test_a_frame_that_is_too_large_is_not_unpacked() -> None:
    box = Inbox(1, 10)
    box.take_listed([wire.encode_frame(Reply(1, 0, 200, (), b"x" * 100))])
    assert isinstance(box.frames[0], Failure)


def test_a_reply_that_rang_and_lies_on_the_list() -> None:
    box, reply = inbox(), wire.encode_frame(Reply(1, 0, 200, (), b"once"))
    assert box.take_rung(reply)
    assert not box.take_rung(reply)
    assert box.take_listed([reply][box.seen :], box.seen)
    assert len(box.frames) == 1
    assert (box.seen, box.done) == (1, 0)


def test_a_frame_that_rings_too_early_is_not_taken() -> None:
    """What came before it was too large to ring, or its ring was lost."""
    box = inbox()
    assert not box.take_rung(chunk(1))
    assert box.take_listed([chunk(0), chunk(1)])
    assert [frame.seq for frame in box.frames] == [0, 1]


def test_what_a_dead_agent_sent_is_not_for_the_next_run() -> None:
    box = inbox()
    box.take_listed([chunk(0)])
    box.next_attempt()
    box.take_rung(wire.encode_frame(Reply(1, 0, 200, (), b"late")))
    assert not box.frames
    box.take_listed([chunk(0, attempt=2), wire.encode_frame(End(2, 1))])
    assert box.frames[0] == Chunk(2, 0, b"0")
    assert box.attempt == 2


def test_what_is_not_signed_right_is_dropped_before_it_is_read() -> None:
    seal = Seal("/shop", bytes(32)).frames("r1")
    box = Inbox(1, 1000, seal.is_signed)
    signed = [wire.encode_frame(Head(1, 0, 200, ()), seal.sign), wire.encode_frame(End(1, 1), seal.sign)]
    strange = [
        chunk(0),
        b"",
        b"\xc1",
        b"x" * 5000,
        wire.encode_frame(Failure(1, 0, "x", "y"), lambda _: bytes(32)),
    ]
    box.take_listed([*strange, signed[0], *strange, signed[1]])
    for frame in strange:
        box.take_rung(frame)
    assert list(box.frames) == [Head(1, 0, 200, ()), End(1, 1)]
    assert box.forged == 3 * len(strange)
    assert (box.seen, box.done) == (12, 10)
