"""Whether an app computes, as its latest requests show."""

from __future__ import annotations

from flaskbus_agent.pace import PROBE, SAMPLE, Pace

LIMIT = 0.002


def run(pace: Pace, took: float, computed: float, requests: int) -> tuple[int, int]:
    """So many requests come; how many of them the leader ran, and how many of these were measured."""
    led = samples = 0
    for _ in range(requests):
        if pace.is_for_leader():
            led += 1
            if pace.is_sample():
                samples += 1
                pace.measured(took, computed, LIMIT)
    return led, samples


def test_what_computes_is_the_leaders() -> None:
    led, samples = run(Pace(), 0.0004, 0.0003, 100 * SAMPLE)
    assert led == 100 * SAMPLE
    assert 50 < samples < 200


def test_what_waits_is_not() -> None:
    pace = Pace()
    run(pace, 0.0008, 0.0001, 10 * SAMPLE)
    led, samples = run(pace, 0.0008, 0.0001, 100 * PROBE)
    assert 50 < led == samples < 200


def test_nor_is_what_is_long() -> None:
    pace = Pace()
    run(pace, 0.05, 0.05, 10 * SAMPLE)
    led, samples = run(pace, 0.05, 0.05, 100 * PROBE)
    assert 50 < led == samples < 200


def test_few_that_wait_change_little() -> None:
    """One in ten, of which one in eight is measured."""
    pace = Pace()
    led = 0
    for _ in range(1000):
        led += run(pace, 0.2, 0.0001, 1)[0] + run(pace, 0.0003, 0.0003, 9)[0]
    assert led > 9000


def test_an_app_that_was_mended_is_the_leaders_again() -> None:
    pace = Pace()
    run(pace, 0.05, 0.0001, 100)
    run(pace, 0.0003, 0.0003, 40 * PROBE)
    assert run(pace, 0.0003, 0.0003, 100)[0] == 100
