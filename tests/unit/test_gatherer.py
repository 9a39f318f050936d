"""What gathers while one push is under way goes with the next; nothing waits for what comes later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue

import pytest

from flaskbus_agent import gatherer as module
from flaskbus_agent.flow import Pieces
from flaskbus_agent.gatherer import Gatherer

PATIENCE = 10.0


class Broker:
    """Takes each push when the test lets it."""

    def __init__(self) -> None:
        self.pushes: Queue[list[bytes]] = Queue()
        self.answers: Queue[int | BaseException] = Queue()
        self.rested = threading.Semaphore(0)

    def send(self, chunks: list[bytes]) -> int:
        self.pushes.put(chunks)
        answer = self.answers.get(timeout=PATIENCE)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def pushed(self) -> list[bytes]:
        return self.pushes.get(timeout=PATIENCE)


@contextmanager
def gathering(limit: int = 1000) -> Iterator[tuple[Gatherer, Broker]]:
    broker = Broker()
    gatherer = Gatherer(broker.send, broker.rested.release, limit)
    try:
        yield gatherer, broker
    finally:
        broker.answers.put(RuntimeError("the end"))
        gatherer.close()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_first_leaves_at_once_and_what_gathers_goes_with_the_next() -> None:
    with gathering() as (gatherer, broker):
        gatherer.add(b"a")
        assert broker.pushed() == [b"a"]
        busy = not gatherer.idle
        assert busy
        gatherer.add(b"b")
        gatherer.add(b"c")
        gatherer.wait()  # there is room
        assert broker.pushes.empty()
        broker.answers.put(1000)
        assert broker.pushed() == [b"bc"]
        broker.answers.put(1000)
        gatherer.drain()
        assert gatherer.idle
        assert broker.rested.acquire(timeout=PATIENCE)


def test_what_was_taken_and_is_not_sent_yet_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app's thread looks without a lock: were it told otherwise, it would send what comes later first."""
    told = []

    class Watched(Pieces):
        def take(self, most: int) -> list[bytes]:
            chunks = super().take(most)
            told.append(gatherer.idle)
            return chunks

    monkeypatch.setattr(module, "Pieces", Watched)
    with gathering() as (gatherer, broker):
        gatherer.add(b"a")
        broker.pushed()
        assert told == [False]


def test_whoever_adds_too_much_waits() -> None:
    with gathering(limit=10) as (gatherer, broker):
        gatherer.add(bytes(10))
        broker.pushed()
        gatherer.add(bytes(10))
        waits = in_thread(gatherer.wait)
        waits.join(0.05)
        assert waits.is_alive()
        broker.answers.put(10)
        waits.join(PATIENCE)
        assert not waits.is_alive()


def test_no_more_is_sent_than_there_is_room_for() -> None:
    with gathering() as (gatherer, broker):
        gatherer.add(b"a")
        broker.pushed()
        gatherer.add(b"bb")
        gatherer.add(b"cc")
        gatherer.add(b"dd")
        broker.answers.put(4)
        assert broker.pushed() == [b"bbcc"]


@pytest.mark.parametrize("call", ["add", "wait", "drain"])
def test_what_sending_raises_is_raised_to_the_app(call: str) -> None:
    with gathering() as (gatherer, broker):
        gatherer.add(b"a")
        broker.answers.put(RuntimeError("as it should"))
        with pytest.raises(RuntimeError, match="as it should"):
            gatherer.drain()
        assert not gatherer.idle  # what follows must not pass what was lost
        calls = {"add": lambda: gatherer.add(b"b"), "wait": gatherer.wait, "drain": gatherer.drain}
        with pytest.raises(RuntimeError, match="as it should"):
            calls[call]()


def test_the_thread_ends_when_it_has_nothing_to_do_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.01)
    with gathering() as (gatherer, broker):
        for data in (b"a", b"b"):
            gatherer.add(data)
            assert broker.pushed() == [data]
            thread = gatherer._thread
            assert thread is not None
            broker.answers.put(1000)
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_closed_one_ends_once_all_is_sent() -> None:
    with gathering() as (gatherer, broker):
        gatherer.add(b"a")
        thread = gatherer._thread
        assert thread is not None
        broker.pushed()
        gatherer.add(b"b")
        gatherer.close()
        broker.answers.put(1000)
        assert broker.pushed() == [b"b"]
        broker.answers.put(1000)
        thread.join(PATIENCE / 10)
        assert not thread.is_alive()
