"""Whether an app computes, as its latest requests show."""

from __future__ import annotations

from flaskbus_agent.pace import PROBE, Pace

LIMIT = 0.002


def run(pace: Pace, took: float, computed: float, requests: int) -> int:
    """So many requests come; how many of them the leader ran."""
    led = 0
    for _ in range(requests):
        if pace.is_for_leader():
            led += 1
            pace.measured(took, computed, LIMIT)
    return led


def test_what_computes_is_the_leaders() -> None:
    assert run(Pace(), 0.0004, 0.0003, 1000) == 1000


def test_what_waits_is_not() -> None:
    pace = Pace()
    run(pace, 0.0008, 0.0001, 10)
    assert run(pace, 0.0008, 0.0001, 100 * PROBE) < 200


def test_nor_is_what_is_long() -> None:
    pace = Pace()
    run(pace, 0.05, 0.05, 10)
    assert run(pace, 0.05, 0.05, 100 * PROBE) < 200


def test_few_that_wait_change_nothing() -> None:
    pace = Pace()
    for _ in range(100):
        assert run(pace, 0.2, 0.0001, 1) == 1
        assert run(pace, 0.0003, 0.0003, 9) == 9


def test_an_app_that_was_mended_is_the_leaders_again() -> None:
    pace = Pace()
    run(pace, 0.05, 0.0001, 100)
    run(pace, 0.0003, 0.0003, 40 * PROBE)
    assert run(pace, 0.0003, 0.0003, 100) == 100
