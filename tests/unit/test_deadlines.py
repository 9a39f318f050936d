"""Deadlines with one span: in order, and none forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flaskbus_gateway.deadlines import SLOWEST, Deadlines, Patience


def test_due_once_and_in_order() -> None:
    deadlines: Deadlines[str] = Deadlines(10.0)
    deadlines.start("first", 1.0)
    deadlines.start("second", 2.0)
    deadlines.start("third", 5.0)
    assert deadlines.take_due(10.9) == []
    assert deadlines.take_due(12.0) == ["first", "second"]
    assert deadlines.take_due(12.0) == []
    assert "first" not in deadlines
    assert "third" in deadlines


def test_starting_again_changes_nothing() -> None:
    deadlines: Deadlines[str] = Deadlines(10.0)
    deadlines.start("one", 0.0)
    deadlines.start("one", 9.0)
    assert deadlines.take_due(10.0) == ["one"]


def test_stopping() -> None:
    deadlines: Deadlines[str] = Deadlines(10.0)
    deadlines.start("one", 0.0)
    deadlines.stop("one")
    deadlines.stop("never started")
    assert deadlines.take_due(100.0) == []


def test_a_shorter_span_counts_for_what_runs_already() -> None:
    deadlines: Deadlines[str] = Deadlines(10.0)
    deadlines.start("one", 0.0)
    deadlines.span = 1.0
    assert deadlines.take_due(1.0) == ["one"]


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["start", "stop", "look"]), st.integers(0, 4), st.integers(0, 3))
    )
)
def test_against_a_plain_dict(steps: list[tuple[str, int, int]]) -> None:
    deadlines: Deadlines[int] = Deadlines(3.0)
    expected: dict[int, float] = {}
    now = 0.0
    for step, item, later in steps:
        now += later
        if step == "start":
            deadlines.start(item, now)
            expected.setdefault(item, now + 3.0)
        elif step == "stop":
            deadlines.stop(item)
            expected.pop(item, None)
        else:
            due = {item for item, end in expected.items() if end <= now}
            assert set(deadlines.take_due(now)) == due
            for item in due:
                del expected[item]


def test_patience_ends_with_who_stops() -> None:
    patience = Patience(10.0)
    assert patience.left == 10.0
    patience.spent(4.0, 0)
    assert patience.left == 6.0
    patience.spent(6.0, 0)
    assert patience.left == 0.0


def test_what_a_client_sends_brings_some_of_it_back() -> None:
    patience = Patience(10.0)
    patience.spent(4.0, 2 * SLOWEST)
    assert patience.left == 8.0
    patience.spent(1.0, 100 * SLOWEST)
    assert patience.left == 10.0  # never more
    for _ in range(10):
        patience.spent(1.0, 1)  # who drips is not waited for much longer
    assert patience.left < 0.1
