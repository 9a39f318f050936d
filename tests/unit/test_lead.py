"""The lead of a process's threads: one has it, keeps it as long as it is quick, and loses it where it lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flaskbus_agent.lead import STALL, Lead
from tests.integration.fleet import eventually


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Thread:
    """Takes the lead, and does with it what it is told."""

    def __init__(self, lead: Lead[str]) -> None:
        self.has_lead = threading.Event()
        self._tasks: list[Callable[[], object]] = []
        self._there = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._result: object = None
        self._thread = threading.Thread(target=self._run, args=(lead,), daemon=True)
        self._thread.start()

    def _run(self, lead: Lead[str]) -> None:
        lead.take()
        self.has_lead.set()
        while self._there.acquire():
            self._result = self._tasks.pop()()
            self._done.release()

    def do(self, task: Callable[[], object]) -> object:
        assert self.has_lead.wait(30)
        self._tasks.append(task)
        self._there.release()
        assert self._done.acquire(timeout=30)
        return self._result


def waits(lead: Lead[str], count: int) -> None:
    eventually(lambda: lead.waiting == count, f"{count} wait")


def test_a_free_lead_goes_to_each_in_turn() -> None:
    lead: Lead[str] = Lead(Clock())
    threads = [Thread(lead) for _ in range(5)]
    for left in (4, 3, 2, 1, 0):
        eventually(lambda: any(each.has_lead.is_set() for each in threads), "one has the lead")
        waits(lead, left)
        (leader,) = (each for each in threads if each.has_lead.is_set())
        assert lead.is_reading()
        leader.do(lead.release)
        threads.remove(leader)
    assert not lead.is_reading()


def test_one_at_a_time() -> None:
    lead: Lead[str] = Lead()
    inside, most, rounds = [0], [0], 300

    def work() -> None:
        for _ in range(rounds):
            lead.take()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            lead.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert most == [1]


def test_what_is_quick_keeps_it() -> None:
    clock = Clock()
    lead: Lead[str] = Lead(clock)
    leader = Thread(lead)
    assert leader.has_lead.wait(30)
    other = Thread(lead)
    waits(lead, 1)
    for number in range(3):
        leader.do(lead.begin)
        clock.now += STALL * 0.9
        assert not lead.is_reading()
        assert leader.do(lambda name=str(number): lead.leave(name)) is True  # type: ignore[misc]
        assert leader.do(lead.end) is True
    assert lead.is_reading()
    assert leader.do(lead.collect) == ["0", "1", "2"]
    assert leader.do(lead.collect) == []
    assert not other.has_lead.is_set()
    leader.do(lead.release)
    assert other.has_lead.wait(30)


def test_what_lasts_loses_it_with_all_that_was_left() -> None:
    clock = Clock()
    lead: Lead[str] = Lead(clock)
    leader = Thread(lead)
    assert leader.has_lead.wait(30)
    deputy, third = Thread(lead), Thread(lead)
    waits(lead, 2)
    leader.do(lambda: lead.leave("before"))
    leader.do(lead.begin)
    clock.now += STALL
    eventually(lambda: deputy.has_lead.is_set() or third.has_lead.is_set(), "another has the lead")
    if third.has_lead.is_set():
        deputy, third = third, deputy
    assert leader.do(lambda: lead.leave("too late")) is False
    assert leader.do(lead.end) is False
    leader.do(lead.release)  # which is not its own any more
    assert lead.is_reading()
    assert deputy.do(lead.collect) == ["before"]
    # The third watches now.
    deputy.do(lead.begin)
    clock.now += STALL
    assert third.has_lead.wait(30)


def test_a_deputy_that_sleeps_is_called() -> None:
    clock = Clock()
    lead: Lead[str] = Lead(clock)
    leader = Thread(lead)
    assert leader.has_lead.wait(30)
    deputy = Thread(lead)
    eventually(lambda: lead._asleep, "the deputy does not look any more")
    leader.do(lead.begin)
    eventually(lambda: not lead._asleep, "it looks again")
    clock.now += STALL
    assert deputy.has_lead.wait(30)


def test_a_deputy_that_sleeps_is_given_what_is_free() -> None:
    lead: Lead[str] = Lead(Clock())
    leader = Thread(lead)
    assert leader.has_lead.wait(30)
    deputy = Thread(lead)
    eventually(lambda: lead._asleep, "the deputy does not look any more")
    leader.do(lead.release)
    assert deputy.has_lead.wait(30)
