"""Who is taken and who is refused: length, age, exchanges and memory."""

from __future__ import annotations

import math

import pytest

from flaskbus import memory
from flaskbus.errors import BrokerFull, BusError, QueueFull
from flaskbus_gateway.admission import LONGEST_RETRY, Admission, EntryId, Look, Queue, entry_id


class Stream:
    """A stream as the broker keeps it; ids are whatever its clock says, and never go back."""

    def __init__(self) -> None:
        self.clock = 1_000_000
        self.added = 0
        self.last: EntryId = (0, 0)
        self.queued: list[EntryId] = []
        self.running = 0

    def add(self, count: int = 1) -> None:
        for _ in range(count):
            self.last = max((self.clock, 0), (self.last[0], self.last[1] + 1))
            self.queued.append(self.last)
            self.added += 1

    def take(self, count: int = 1) -> None:
        del self.queued[:count]
        self.running += count

    def look(self) -> Look:
        if not self.queued:
            return Look(self.running, self.running)
        return Look(len(self.queued) + self.running, self.running, self.added, self.last, self.queued[0])


class Observer:
    """A gateway that looks at a stream at times of its own."""

    def __init__(self, stream: Stream, alive_since: float | None = 0.0) -> None:
        self.stream = stream
        self.queue = Queue(alive_since=alive_since)

    def look(self, now: float) -> Queue:
        self.queue.look(self.queue.begin(), self.stream.look(), now)
        return self.queue


@pytest.fixture
def stream() -> Stream:
    return Stream()


class TestAge:
    def test_a_request_has_waited_since_the_first_look_that_saw_it(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add()
        assert seen.look(100.0).age == 0
        assert seen.look(101.0).age == 1
        stream.add(5)
        assert seen.look(104.0).age == 4

    def test_what_came_later_is_younger(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add(2)
        seen.look(100.0)
        stream.add(2)
        seen.look(103.0)
        stream.take(2)
        assert seen.look(104.0).age == 1
        stream.take(2)
        assert seen.look(105.0).age == 0

    def test_of_those_that_are_deleted_only_the_rest_counts(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add()
        seen.look(100.0)
        stream.add()
        seen.look(102.0)
        del stream.queued[0]  # withdrawn
        assert seen.look(103.0).age == 1

    @pytest.mark.parametrize("jump", [-3_600_000, 3_600_000])
    def test_a_jump_of_the_brokers_clock_makes_nothing_older_or_younger(
        self, stream: Stream, jump: int
    ) -> None:
        seen = Observer(stream)
        stream.add()
        seen.look(100.0)
        stream.clock += jump
        stream.add()
        assert seen.look(102.0).age == 2
        stream.take()
        assert seen.look(103.0).age == 1

    @pytest.mark.parametrize("clock", [500_000, 2_000_000])
    def test_a_stream_that_begins_anew_has_no_past(self, stream: Stream, clock: int) -> None:
        seen = Observer(stream)
        stream.add(10)
        seen.look(100.0)
        seen.look(105.0)
        seen.stream = Stream()
        seen.stream.clock = clock
        seen.stream.add()
        assert seen.look(106.0).age == 0
        assert seen.look(107.0).age == 1

    def test_a_hold_is_no_age(self, stream: Stream) -> None:
        seen = Observer(stream, alive_since=None)
        stream.add(500)
        seen.look(100.0)
        assert seen.look(125.0).age == 0
        assert not seen.queue.too_old(10, 125.0)
        seen.queue.goes_on(125.5, 25.5)
        assert seen.look(126.0).age == 0.5

    def test_after_a_hold_what_had_gathered_may_be_served_first(self) -> None:
        """A restart of agents that are nine tenths loaded sheds nothing."""
        stream, now = Stream(), 100.0
        seen = Observer(stream, alive_since=None)
        for _ in range(20):  # without agents
            stream.add(90)
            seen.look(now)
            now += 1
        seen.queue.goes_on(now, 20.0)
        for _ in range(30):
            stream.add(90)
            stream.take(100)
            assert not seen.look(now).too_old(3, now)
            now += 1
        assert seen.queue.wait > 10
        for _ in range(30):  # but agents that are gone for good are no excuse
            stream.add(90)
            stream.take(50)
            seen.look(now)
            now += 1
        assert seen.queue.too_old(3, now)

    def test_looks_in_quick_succession_are_not_all_remembered(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add()
        for step in range(10_000):
            stream.add()
            seen.look(100 + step / 100)
        assert seen.queue.age == pytest.approx(99.99)
        assert len(seen.queue._marks) < 1000


class TestLength:
    def test_what_was_sent_since_the_look_is_counted(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add(3)
        queue = seen.look(100.0)
        admission = Admission(10, 10, 10)
        admission.admit(queue, "/shop", 0, 100.0)
        assert queue.waiting == 3  # its body may be on its way
        queue.sent("one", 100.0)
        assert queue.waiting == 4
        queue.started("one", 0.1)
        assert queue.waiting == 3

    def test_what_was_sent_before_the_look_is_in_its_answer(self, stream: Stream) -> None:
        queue, admission = Queue(), Admission(10, 10, 10)
        for _ in range(3):
            admission.admit(queue, "/shop", 0, 100.0)
            queue.sent("any", 0.0)
        begun = queue.begin()
        admission.admit(queue, "/shop", 0, 100.0)
        queue.sent("any", 0.0)
        stream.add(3)
        queue.look(begun, stream.look(), 100.0)
        assert queue.waiting == 4

    def test_what_runs_does_not_wait(self, stream: Stream) -> None:
        stream.add(2000)
        stream.take(2000)
        queue = Observer(stream).look(100.0)
        assert queue.waiting == 0
        for _ in range(50):
            queue.started("any", None)
        assert queue.waiting == 0

    def test_what_is_sent_takes_the_free_threads_first(self, stream: Stream) -> None:
        stream.add(3)
        stream.take(3)
        seen = Observer(stream)
        seen.queue.threads = 10
        queue = seen.look(100.0)
        for number in range(9):
            assert queue.waiting == max(0, number - 7)
            queue.sent(number, 100.0)
        assert queue.waiting == 2

    def test_more_pending_than_there_are_is_none_waiting(self) -> None:
        assert Look(3, 5).waiting == 0


class TestDrain:
    def overloaded(self, seconds: int, *, arrive: int, served: int) -> Queue:
        stream = Stream()
        seen = Observer(stream)
        for second in range(seconds + 1):
            stream.add(arrive)
            stream.take(served)
            seen.look(100.0 + second)
        return seen.queue

    def test_the_rate_at_which_requests_leave_the_queue(self) -> None:
        queue = self.overloaded(8, arrive=200, served=100)
        assert queue.drain == pytest.approx(100, rel=0.01)
        assert queue.wait == pytest.approx(9, rel=0.01)

    def test_the_wait_of_newcomers_sheds_before_the_oldest_has_waited_as_long(self) -> None:
        queue = self.overloaded(2, arrive=500, served=100)
        assert queue.age <= 2 < 5 < queue.wait
        assert queue.too_old(5, 102.0)
        assert not queue.too_old(20, 102.0)

    def test_it_is_that_of_the_last_seconds(self) -> None:
        stream = Stream()
        seen = Observer(stream)
        for second in range(30):
            stream.add(300)
            stream.take(10 if second < 15 else 200)
            seen.look(100.0 + second)
        assert seen.queue.drain == pytest.approx(200, rel=0.01)

    def test_nothing_is_known_while_nobody_waits(self) -> None:
        queue = self.overloaded(5, arrive=1, served=1)
        assert (queue.drain, queue.wait) == (None, 0)

    def test_it_takes_a_while_to_be_believed(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add(500)
        assert seen.look(100.0).drain is None
        assert seen.look(100.5).drain is None
        assert seen.look(101.0).drain == 1

    def test_a_slow_app_is_given_time(self) -> None:
        """One that finishes nothing in two seconds may be about to."""
        stream = Stream()
        seen = Observer(stream)
        stream.add(2)
        for second in range(3):
            seen.look(100.0 + second)
        assert seen.queue.wait == 4
        assert not seen.queue.too_old(10, 102.0)

    def test_with_the_queue_it_is_forgotten(self) -> None:
        stream = Stream()
        seen = Observer(stream)
        for second in range(4):
            stream.add(200)
            stream.take(100)
            seen.look(100.0 + second)
        stream.take(1000)
        assert seen.look(104.0).drain is None


class TestWork:
    """What a request takes that finds a free thread says what others will wait, before anybody has waited."""

    def queue(self, *took: float, threads: int = 4) -> Queue:
        queue = Queue(threads=threads, alive_since=0.0)
        for number, seconds in enumerate(took):
            queue.sent(number, 100.0)
            queue.started(number, seconds)
        return queue

    def test_the_first_is_believed(self) -> None:
        assert self.queue(0.5).work == 0.5

    def test_later_ones_count_a_little(self) -> None:
        assert self.queue(0.5, 1.0).work == pytest.approx(0.6)

    def test_the_rate_is_known_at_once(self) -> None:
        queue = self.queue(0.5, threads=4)
        for number in range(40):
            queue.sent(number, 100.0)
        assert queue.wait == 5.0

    def test_the_slower_measure_holds(self) -> None:
        queue = TestDrain().overloaded(7, arrive=200, served=100)
        queue.threads, queue.work = 4, 0.01
        assert queue.wait == pytest.approx(8, rel=0.01)
        queue.work = 0.4
        assert queue.wait == pytest.approx(80, rel=0.01)

    def test_who_waited_tells_nothing(self) -> None:
        queue = self.queue(threads=2)
        for number in range(3):
            queue.sent(number, 100.0)
        queue.started(2, 50.0)
        queue.started(0, None)  # its client went
        assert queue.work is None
        queue.sent(3, 100.0)
        queue.started(1, 50.0)
        assert queue.work is None
        queue.started(3, 0.2)
        assert queue.work == 0.2

    def test_who_was_held_tells_nothing(self) -> None:
        queue = self.queue(0.1)
        queue.sent("one", 100.0)
        queue.pauses()
        assert queue.alive_since is None
        queue.goes_on(120.0, 20.0)
        queue.started("one", 20.0)
        assert queue.work == 0.1

    def test_a_queue_that_waits_has_no_free_thread(self, stream: Stream) -> None:
        stream.add()
        queue = Observer(stream).look(100.0)
        queue.threads = 8
        queue.sent("one", 100.0)
        queue.started("one", 30.0)
        assert queue.work is None

    def test_where_the_work_is_long_so_may_the_wait_be(self) -> None:
        queue = self.queue(5.0, threads=4)
        for number in range(8):
            queue.sent(number, 200.0)
        assert queue.wait == 10.0
        assert not queue.too_old(3, 200.0)
        for number in range(4):
            queue.sent(number, 200.0)
        assert queue.too_old(3, 200.0)

    def test_also_while_that_is_not_known_yet(self, stream: Stream) -> None:
        stream.add(2)
        stream.take(1)
        seen = Observer(stream)
        seen.queue.threads = 1
        seen.queue.sent("one", 100.0)
        assert not seen.look(100.0).too_old(3, 100.0)
        assert not seen.look(106.0).too_old(3, 106.0)


class TestRetryAfter:
    def test_is_the_time_that_the_queue_takes(self) -> None:
        queue = TestDrain().overloaded(7, arrive=200, served=100)
        assert queue.retry_after() == 8

    def test_is_a_second_at_least(self) -> None:
        assert Queue().retry_after() == 1

    def test_and_half_a_minute_at_most(self) -> None:
        assert TestDrain().overloaded(5, arrive=500, served=1).retry_after() == LONGEST_RETRY


def refusal(admission: Admission, queue: Queue, size: int = 0, now: float = 100.0) -> BusError | None:
    try:
        admission.admit(queue, "/shop", size, now)
    except BusError as error:
        return error if (error.status, error.executed) == (503, "no") and error.retry_after else None
    return None


class TestAdmission:
    def test_length(self, stream: Stream) -> None:
        admission, queue = Admission(3, 10, 100), Queue()
        for number in range(3):
            assert refusal(admission, queue) is None
            queue.sent(number, 100.0)
        error = refusal(admission, queue)
        assert isinstance(error, QueueFull)
        assert str(error) == "3 requests are waiting for /shop; 3 may"

    def test_age(self, stream: Stream) -> None:
        seen = Observer(stream)
        stream.add(1)
        seen.look(100.0)
        admission = Admission(1000, 10, 100)
        assert refusal(admission, seen.look(109.0)) is None
        seen.queue.sent("any", 0.0)
        error = refusal(admission, seen.look(111.0))
        assert isinstance(error, QueueFull)
        assert str(error) == "requests wait 11.0 s for /shop; 10 s are allowed"
        stream.take(1)
        assert refusal(admission, seen.look(112.0)) is None

    def test_memory(self) -> None:
        admission, queue = Admission(1000, 10, 100, room=100), Queue()
        assert refusal(admission, queue, 60) is None
        assert refusal(admission, queue, 60) is None
        assert isinstance(refusal(admission, queue), BrokerFull)
        admission.room = 50
        assert refusal(admission, queue, 60) is None

    @pytest.mark.parametrize("limit", [1, 2, 3, 20, 1000])
    def test_one_mount_leaves_room_for_another(self, limit: int) -> None:
        admission, first, second = Admission(10_000, 10, limit), Queue(), Queue()
        while refusal(admission, first) is None:
            pass
        assert first.open == math.ceil(limit * 3 / 4)
        assert limit < 4 or refusal(admission, second) is None
        assert admission.open <= limit

    def test_several_together_keep_to_the_limit(self) -> None:
        admission, queues = Admission(10_000, 10, 100), [Queue() for _ in range(20)]
        for queue in queues * 100:
            refusal(admission, queue)
        assert admission.open <= 100
        assert all(queue.open for queue in queues)

    def test_what_ends_makes_room(self) -> None:
        admission, queue = Admission(1, 10, 1), Queue()
        for _ in range(3):
            assert refusal(admission, queue) is None
            assert refusal(admission, queue) is not None
            admission.close(queue)
            assert (admission.open, queue.open, queue.waiting) == (0, 0, 0)
        admission.admit(queue, "/shop", 0, 100.0)
        queue.sent("any", 0.0)
        queue.started("any", None)
        assert refusal(admission, queue) is not None  # it is still open
        admission.close(queue)
        assert refusal(admission, queue) is None


class TestMemory:
    def test_without_a_limit_there_is_room(self) -> None:
        assert memory.room({}) == memory.room({"used_memory": "5", "maxmemory": "0"}) == math.inf

    def test_up_to_four_fifths(self) -> None:
        assert memory.room({"used_memory": "700", "maxmemory": "1000"}) == 100
        assert memory.room({"used_memory": "900", "maxmemory": "1000"}) == -100

    def test_buffers_of_the_append_only_file_do_not_count(self) -> None:
        info = {"used_memory": "900", "maxmemory": "1000", "mem_not_counted_for_evict": "200"}
        assert memory.room(info) == 100


def test_entry_id() -> None:
    assert entry_id(b"1700000000000-3") == (1700000000000, 3)
    assert entry_id(b"9-9") < entry_id(b"10-1")


def test_who_tells_how_long_the_work_takes_may_go_by_another_name() -> None:
    queue = Queue(threads=1, alive_since=0.0)
    queue.sent("first", 1.0)
    queue.goes_by("another", "nobody")
    queue.goes_by("first", "second")
    queue.started("first", 5.0)
    assert queue.work is None
    queue.sent("third", 1.0)
    queue.started("second", 0.5)
    assert queue.work == 0.5
