"""Which deliveries are in hand, and which are done with."""

from __future__ import annotations

from flaskbus_agent.inhand import InHand, Standing


def test_a_delivery_is_new_once() -> None:
    hand = InHand()
    assert [hand.take(b"1"), hand.take(b"1"), hand.take(b"2")] == [Standing.NEW, Standing.HELD, Standing.NEW]


def test_what_was_settled_is_not_run_again() -> None:
    hand = InHand()
    hand.take(b"1")
    hand.settle(b"1")
    assert hand.take(b"1") is Standing.DONE


def test_the_oldest_are_forgotten_first() -> None:
    hand = InHand(remembered=2)
    for mark in (b"1", b"2", b"3"):
        hand.take(mark)
        hand.settle(mark)
    assert [hand.take(mark) for mark in (b"1", b"2", b"3")] == [Standing.NEW, Standing.DONE, Standing.DONE]


def test_what_ran_is_remembered_until_its_end_is_confirmed() -> None:
    hand = InHand(remembered=1)
    for mark in (b"1", b"2", b"3"):
        hand.take(mark)
        hand.abandon(mark)
    assert [hand.take(mark) for mark in (b"1", b"2", b"3")] == [Standing.DONE] * 3
    hand.settle(b"1")
    hand.settle(b"2")
    assert hand.take(b"1") is Standing.NEW  # the oldest is forgotten now


def test_what_came_to_nothing_is_looked_at_again() -> None:
    hand = InHand()
    hand.take(b"1")
    hand.release(b"1")
    assert hand.take(b"1") is Standing.NEW


def test_to_settle_it_twice_is_to_settle_it_once() -> None:
    hand = InHand(remembered=2)
    for mark in (b"1", b"2", b"2", b"2"):
        hand.settle(mark)
    assert [hand.take(mark) for mark in (b"1", b"2")] == [Standing.DONE] * 2
