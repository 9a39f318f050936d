"""Every row of every script's table of outcomes, on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from flaskbus.broker import run_script
from flaskbus.keys import GROUP, LIST_TTL_MS, Keys
from tests.conftest import Broker

Client = Any
"""A redis-py client: each of its answers is typed as a union of everything that it can be."""

M = Keys().of("/shop")
REPLY = M.reply("r1")
INBOUND = M.inbound("r1")
BELL = M.doorbell("gw")


@pytest.fixture
def client(engine: Broker) -> Iterator[Client]:
    with engine.client() as client:
        yield client


@pytest.fixture
def stream(client: Client) -> str:
    client.xgroup_create(M.requests, GROUP, id="0", mkstream=True)
    return M.requests


@pytest.fixture
def entry(client: Client, stream: str) -> bytes:
    """An entry that nobody has read yet."""
    entry_id: bytes = client.xadd(stream, {"id": "r1", "from": "gw"})
    return entry_id


@pytest.fixture
def taken(client: Client, entry: bytes) -> bytes:
    """The entry, delivered to the agent ``me``."""
    client.xreadgroup(GROUP, "me", {M.requests: ">"}, count=1)
    return entry


def finish(client: Client, entry_id: bytes, *frames: bytes, consumer: str = "me", ring: int = 100) -> Any:
    args = [GROUP, entry_id, consumer, LIST_TTL_MS, BELL, "r1", ring, *(frames or (b"frame",))]
    return run_script(client, "finish", [M.requests, REPLY], args)


def push(client: Client, entry_id: bytes, *frames: bytes, consumer: str = "me", ring: int = 3) -> Any:
    args = [GROUP, entry_id, consumer, LIST_TTL_MS, BELL, "r1", ring, *(frames or (b"head",))]
    return run_script(client, "push", [M.requests, REPLY], args)


def sent(client: Client, *elements: bytes) -> None:
    """What the client of the request sends after it."""
    client.rpush(INBOUND, *elements)
    client.expire(INBOUND, 60)


def withdraw(client: Client, entry_id: bytes) -> Any:
    return run_script(client, "withdraw", [M.requests], [GROUP, entry_id])


def bury(client: Client, entry_id: bytes, *, consumer: str = "me", bell: str = BELL) -> Any:
    args = [GROUP, entry_id, consumer, 60_000, 10, LIST_TTL_MS, bell, "r1", b"failure", "reason", "bad"]
    return run_script(client, "bury", [M.requests, M.dead, REPLY], args)


def pending(client: Client) -> int:
    return int(client.xpending(M.requests, GROUP)["pending"])


def rings(client: Client) -> redis.client.PubSub:
    pubsub: redis.client.PubSub = client.pubsub()
    pubsub.subscribe(BELL)
    assert pubsub.get_message(timeout=5) is not None
    return pubsub


def heard(pubsub: redis.client.PubSub) -> bytes | None:
    message = pubsub.get_message(timeout=0.5)
    pubsub.close()
    return None if message is None else bytes(message["data"])


class TestFinish:
    def test_done(self, client: Client, taken: bytes) -> None:
        bell = rings(client)
        assert finish(client, taken, b"one", b"two") == b"done"
        assert client.lrange(REPLY, 0, -1) == [b"one", b"two"]
        assert 0 < client.pttl(REPLY) <= LIST_TTL_MS
        assert client.xlen(M.requests) == 0
        assert pending(client) == 0
        assert heard(bell) == b"r1"

    @pytest.mark.parametrize(("ring", "message"), [(5, b"r1 frame"), (4, b"r1")])
    def test_a_small_single_frame_travels_with_the_bell(
        self, client: Client, taken: bytes, ring: int, message: bytes
    ) -> None:
        bell = rings(client)
        assert finish(client, taken, b"frame", ring=ring) == b"done"
        assert heard(bell) == message
        assert client.lrange(REPLY, 0, -1) == [b"frame"]

    def test_lost(self, client: Client, taken: bytes) -> None:
        assert finish(client, taken, consumer="another") == b"lost"
        assert (client.exists(REPLY), client.xlen(M.requests), pending(client)) == (0, 1, 1)

    def test_finished_after_a_withdrawal(self, client: Client, taken: bytes) -> None:
        assert withdraw(client, taken) == b"delivered"
        assert finish(client, taken) == b"finished"
        assert client.exists(REPLY) == 0

    def test_finished_a_second_time_changes_nothing(self, client: Client, taken: bytes) -> None:
        finish(client, taken)
        assert finish(client, taken) == b"finished"
        assert client.llen(REPLY) == 1

    def test_finished_for_what_was_never_delivered(self, client: Client, entry: bytes) -> None:
        assert finish(client, entry) == b"finished"
        assert client.xlen(M.requests) == 1

    def test_gone_without_the_group(self, client: Client, taken: bytes) -> None:
        client.xgroup_destroy(M.requests, GROUP)
        assert finish(client, taken) == b"gone"
        assert client.exists(REPLY) == 0

    def test_gone_without_the_stream(self, client: Client, taken: bytes) -> None:
        client.delete(M.requests)
        assert finish(client, taken) == b"gone"
        assert client.exists(REPLY) == 0

    def test_works_while_the_broker_is_out_of_memory(self, client: Client, taken: bytes) -> None:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.rpush("other", "x")
            assert finish(client, taken) == b"done"
        finally:
            client.config_set("maxmemory", "0")
        assert client.llen(REPLY) == 1

    def test_another_error_is_raised(self, client: Client) -> None:
        client.set(M.requests, "text", px=10_000)
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            finish(client, b"1-1")


class TestPush:
    def test_the_length_of_the_list(self, client: Client, taken: bytes) -> None:
        bell = rings(client)
        assert push(client, taken, b"head", b"chunk") == 2
        assert push(client, taken, b"chunk") == 3
        assert 0 < client.pttl(REPLY) <= LIST_TTL_MS
        assert pending(client) == 1
        assert heard(bell) == b"r1"

    def test_lost(self, client: Client, taken: bytes) -> None:
        assert push(client, taken, consumer="another") == b"lost"
        assert client.exists(REPLY) == 0

    def test_finished(self, client: Client, taken: bytes) -> None:
        withdraw(client, taken)
        assert push(client, taken) == b"finished"
        assert client.exists(REPLY) == 0

    def test_gone(self, client: Client, taken: bytes) -> None:
        client.delete(M.requests)
        assert push(client, taken) == b"gone"
        assert client.exists(REPLY) == 0

    def test_another_error_is_raised(self, client: Client) -> None:
        client.set(M.requests, "text", px=10_000)
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            push(client, b"1-1")

    def test_another_push_waits_while_the_broker_is_out_of_memory(self, client: Client, taken: bytes) -> None:
        client.config_set("maxmemory", "1")
        try:
            assert push(client, taken) == 1
            assert push(client, taken) == b"full"
            client.delete(REPLY)  # the client took it
            assert push(client, taken) == 1
        finally:
            client.config_set("maxmemory", "0")
        assert push(client, taken) == 2


class TestPushed:
    """What :class:`TestPush` shows of push, of large frames that were pushed in the same transaction."""

    def pushed(self, client: Client, entry_id: bytes, *frames: bytes, consumer: str = "me") -> Any:
        client.rpush(REPLY, *frames)
        client.pexpire(REPLY, 60_000)
        args = [GROUP, entry_id, consumer, LIST_TTL_MS, BELL, "r1", len(frames)]
        return run_script(client, "pushed", [M.requests, REPLY], args)

    def test_the_length_of_the_list(self, client: Client, taken: bytes) -> None:
        push(client, taken, b"head", b"chunk")
        bell = rings(client)
        assert self.pushed(client, taken, b"c1", b"c2") == 4
        assert 60_000 < client.pttl(REPLY) <= LIST_TTL_MS
        assert pending(client) == 1
        assert heard(bell) == b"r1"

    def test_lost(self, client: Client, taken: bytes) -> None:
        push(client, taken, b"head")
        assert self.pushed(client, taken, b"c1", b"c2", consumer="another") == b"lost"
        assert client.lrange(REPLY, 0, -1) == [b"head"]

    def test_finished(self, client: Client, taken: bytes) -> None:
        withdraw(client, taken)
        assert self.pushed(client, taken, b"c1") == b"finished"
        assert client.exists(REPLY) == 0

    def test_gone(self, client: Client, taken: bytes) -> None:
        client.delete(M.requests)
        assert self.pushed(client, taken, b"c1", b"c2") == b"gone"
        assert client.exists(REPLY) == 0

    def test_another_error_is_raised(self, client: Client) -> None:
        client.set(M.requests, "text", px=10_000)
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            self.pushed(client, b"1-1", b"c1")
        assert client.exists(REPLY) == 0


class TestWithdraw:
    def test_undelivered(self, client: Client, entry: bytes) -> None:
        assert withdraw(client, entry) == b"undelivered"
        assert client.xlen(M.requests) == 0
        assert client.xreadgroup(GROUP, "me", {M.requests: ">"}) == []

    def test_delivered(self, client: Client, taken: bytes) -> None:
        assert withdraw(client, taken) == b"delivered"
        assert (client.xlen(M.requests), pending(client)) == (0, 0)

    def test_finished(self, client: Client, taken: bytes) -> None:
        finish(client, taken)
        assert withdraw(client, taken) == b"finished"
        assert client.llen(REPLY) == 1

    def test_twice(self, client: Client, entry: bytes) -> None:
        withdraw(client, entry)
        assert withdraw(client, entry) == b"finished"

    def test_gone_without_the_group(self, client: Client, entry: bytes) -> None:
        client.xgroup_destroy(M.requests, GROUP)
        assert withdraw(client, entry) == b"gone"
        assert client.xlen(M.requests) == 1

    def test_gone_without_the_stream(self, client: Client, entry: bytes) -> None:
        client.delete(M.requests)
        assert withdraw(client, entry) == b"gone"

    def test_another_error_is_raised(self, client: Client) -> None:
        client.set(M.requests, "text", px=10_000)
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            withdraw(client, b"1-1")


class TestBury:
    def test_done(self, client: Client, taken: bytes) -> None:
        bell = rings(client)
        assert bury(client, taken) == b"done"
        ((_, letter),) = client.xrange(M.dead)
        assert letter == {b"reason": b"bad"}
        assert 0 < client.pttl(M.dead) <= 60_000
        assert client.lrange(REPLY, 0, -1) == [b"failure"]
        assert (client.xlen(M.requests), pending(client)) == (0, 0)
        assert heard(bell) == b"r1"

    def test_done_with_nobody_to_tell(self, client: Client, taken: bytes) -> None:
        assert bury(client, taken, bell="") == b"done"
        assert client.exists(REPLY) == 0

    def test_the_letters_are_bounded(self, client: Client, stream: str) -> None:
        for _ in range(300):
            client.xadd(stream, {"id": "r1"})
        for _, entries in client.xreadgroup(GROUP, "me", {stream: ">"}):
            for entry_id, _ in entries:
                assert bury(client, entry_id, bell="") == b"done"
        # MAXLEN ~ trims whole nodes, of 100 entries by default.
        assert 10 <= client.xlen(M.dead) <= 210

    def test_letters_whose_life_is_over_are_removed(self, client: Client, taken: bytes) -> None:
        now = client.time()[0] * 1000
        old, young = f"{now - 70_000}-0", f"{now - 40_000}-0"
        for letter_id in (old, young):
            client.xadd(M.dead, {"reason": "good"}, id=letter_id)
        assert bury(client, taken) == b"done"
        found = [letter_id.decode() for letter_id, _ in client.xrange(M.dead)]
        assert (len(found), found[0]) == (2, young)

    def test_works_while_the_broker_is_out_of_memory(self, client: Client, taken: bytes) -> None:
        client.config_set("maxmemory", 1)
        try:
            assert bury(client, taken) == b"done"
        finally:
            client.config_set("maxmemory", 0)
        assert (client.xlen(M.dead), client.llen(REPLY)) == (1, 1)

    def test_lost(self, client: Client, taken: bytes) -> None:
        assert bury(client, taken, consumer="another") == b"lost"
        assert client.exists(M.dead, REPLY) == 0

    def test_finished(self, client: Client, taken: bytes) -> None:
        finish(client, taken)
        assert bury(client, taken) == b"finished"
        assert client.exists(M.dead) == 0

    def test_gone(self, client: Client, taken: bytes) -> None:
        client.delete(M.requests)
        assert bury(client, taken) == b"gone"


def claim(client: Client, name: str, agent: str = "a1", *, replace: bool = False, ready: bool = True) -> Any:
    args = [name, int(replace), 60_000, GROUP, agent, '{"beat":1}', int(ready)]
    return run_script(client, "claim", [M.owner, M.agents, M.requests], args)


class TestClaim:
    def test_claimed(self, client: Client) -> None:
        assert claim(client, "shop:app") == [b"claimed", b"shop:app"]
        assert client.hgetall(M.owner) == {b"name": b"shop:app", b"proven": b"1"}
        assert client.hgetall(M.agents) == {b"a1": b'{"beat":1}'}
        assert 0 < client.pttl(M.owner) <= 60_000
        assert [group["name"] for group in client.xinfo_groups(M.requests)] == [GROUP.encode()]

    def test_renewed_by_a_second_agent(self, client: Client) -> None:
        claim(client, "shop:app")
        assert claim(client, "shop:app", "a2") == [b"renewed", b"shop:app"]
        assert client.hlen(M.agents) == 2

    def test_claimed_from_an_app_that_was_never_ready(self, client: Client) -> None:
        claim(client, "shpo:app", ready=False)
        assert claim(client, "shop:app", "a2", ready=False) == [b"claimed", b"shop:app"]
        assert claim(client, "shop:app", "a2") == [b"renewed", b"shop:app"]
        assert claim(client, "shpo:app") == [b"taken", b"shop:app"]

    def test_taken(self, client: Client) -> None:
        claim(client, "shop:app")
        assert claim(client, "blog:app", "b1") == [b"taken", b"shop:app"]
        assert client.hkeys(M.agents) == [b"a1"]

    def test_taken_from_an_agent_that_still_runs_something(self, client: Client) -> None:
        claim(client, "shop:app")
        claim(client, "blog:app", "b1", replace=True)
        client.hset(M.agents, "a1", "old")
        assert claim(client, "shop:app") == [b"taken", b"blog:app"]
        assert client.hget(M.agents, "a1") == b'{"beat":1}'

    def test_replaced(self, client: Client) -> None:
        claim(client, "shop:app")
        assert claim(client, "blog:app", "b1", replace=True, ready=False) == [b"claimed", b"blog:app"]
        assert claim(client, "shop:app") == [b"taken", b"blog:app"]

    def test_a_group_that_was_lost_is_not_made_anew(self, client: Client, entry: bytes) -> None:
        client.xgroup_destroy(M.requests, GROUP)
        claim(client, "shop:app")
        assert client.xinfo_groups(M.requests) == []


class TestLeave:
    def leave(self, client: Client, agent: str) -> Any:
        return run_script(client, "leave", [M.agents, M.requests], [GROUP, agent])

    def test_left(self, client: Client, taken: bytes) -> None:
        client.hset(M.agents, "me", "{}")
        finish(client, taken)
        assert self.leave(client, "me") == [b"left", 0]
        assert client.hlen(M.agents) == 0
        assert client.xinfo_consumers(M.requests, GROUP) == []

    def test_pending(self, client: Client, taken: bytes) -> None:
        client.hset(M.agents, "me", "{}")
        assert self.leave(client, "me") == [b"pending", 1]
        assert client.hlen(M.agents) == 0
        assert pending(client) == 1

    def test_left_without_a_group(self, client: Client) -> None:
        client.hset(M.agents, "me", "{}")
        assert self.leave(client, "me") == [b"left", 0]


class TestForget:
    def forget(self, client: Client) -> Any:
        return run_script(client, "forget", [M.owner, M.agents, M.requests], [])

    def test_kept_while_it_is_owned(self, client: Client) -> None:
        claim(client, "shop:app")
        assert self.forget(client) == b"kept"
        assert client.exists(M.agents, M.requests) == 2

    def test_kept_while_requests_wait(self, client: Client, entry: bytes) -> None:
        assert self.forget(client) == b"kept"
        assert client.xlen(M.requests) == 1

    def test_gone(self, client: Client) -> None:
        claim(client, "shop:app")
        client.delete(M.owner)
        assert self.forget(client) == b"gone"
        assert client.keys("*") == []


class TestRepair:
    def repair(self, client: Client, most: int = 100) -> Any:
        return run_script(client, "repair", [M.requests], [GROUP, most])

    def test_whole(self, client: Client, entry: bytes) -> None:
        assert self.repair(client) == [b"whole", []]
        assert client.xlen(M.requests) == 1

    def test_mended_without_a_stream(self, client: Client) -> None:
        assert self.repair(client) == [b"mended", []]
        assert len(client.xinfo_groups(M.requests)) == 1

    def test_left(self, client: Client) -> None:
        """It was removed after it was seen to be claimed: no stream comes back that would take requests."""
        assert run_script(client, "repair", [M.requests, M.owner], [GROUP, 10]) == [b"left", []]
        assert client.keys("*") == []
        claim(client, "shop:app")
        client.delete(M.requests)
        assert run_script(client, "repair", [M.requests, M.owner], [GROUP, 10]) == [b"mended", []]

    def test_doubtful_until_all_entries_are_answered_for(self, client: Client, entry: bytes) -> None:
        client.xadd(M.requests, {"id": "r2"})
        client.xgroup_destroy(M.requests, GROUP)
        outcome, ((entry_id, fields),) = self.repair(client, 1)
        assert (outcome, entry_id, fields) == (b"doubtful", entry, [b"id", b"r1", b"from", b"gw"])
        outcome, entries = self.repair(client, 1)
        assert (outcome, len(entries)) == (b"doubtful", 1)
        assert client.xinfo_groups(M.requests) == []
        assert self.repair(client, 1) == [b"mended", []]
        assert client.xreadgroup(GROUP, "me", {M.requests: ">"}) == []


class TestTook:
    def took(self, client: Client, entry_id: bytes, count: int, first: bytes, consumer: str = "me") -> Any:
        args = [GROUP, entry_id, consumer, BELL, "r1@me", count, first]
        return run_script(client, "took", [M.requests, INBOUND], args)

    def test_done(self, client: Client, taken: bytes) -> None:
        bell = rings(client)
        sent(client, b"0: a", b"1: b", b"2: c")
        assert self.took(client, taken, 2, b"0: ") == b"done"
        assert client.lrange(INBOUND, 0, -1) == [b"2: c"]
        assert bell.get_message(timeout=5)["data"] == b"r1@me"
        assert pending(client) == 1

    def test_done_twice_because_the_answer_was_lost(self, client: Client, taken: bytes) -> None:
        sent(client, b"0: a", b"1: b", b"2: c")
        assert self.took(client, taken, 1, b"0: ") == self.took(client, taken, 1, b"0: ") == b"done"
        assert client.lrange(INBOUND, 0, -1) == [b"1: b", b"2: c"]

    def test_nothing_is_taken_yet(self, client: Client, taken: bytes) -> None:
        bell = rings(client)
        assert self.took(client, taken, 0, b"") == b"done"
        assert bell.get_message(timeout=5)["data"] == b"r1@me"
        assert not client.exists(INBOUND)

    def test_lost_finished_and_gone(self, client: Client, taken: bytes) -> None:
        sent(client, b"0: a")
        assert self.took(client, taken, 1, b"0: ", consumer="other") == b"lost"
        assert withdraw(client, taken) == b"delivered"
        assert self.took(client, taken, 1, b"0: ") == b"finished"
        client.delete(M.requests)
        assert self.took(client, taken, 1, b"0: ") == b"gone"
        assert client.lrange(INBOUND, 0, -1) == [b"0: a"]

    def test_another_error_is_not_hidden(self, client: Client) -> None:
        client.set(M.requests, "not a stream")
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            self.took(client, b"1-1", 0, b"")


class TestRequeue:
    def requeue(self, client: Client, entry_id: bytes, consumer: str = "me", first: bytes = b"") -> Any:
        return run_script(
            client, "requeue", [M.requests, REPLY, INBOUND], [GROUP, entry_id, consumer, 2, first]
        )

    def test_requeued(self, client: Client, stream: str) -> None:
        entry_id = client.xadd(stream, {"id": "r1", "attempt": "1", "body": b"\x00"})
        client.xreadgroup(GROUP, "me", {M.requests: ">"})
        outcome, new_id = self.requeue(client, entry_id)
        assert outcome == b"requeued"
        ((_, ((delivered, fields),)),) = client.xreadgroup(GROUP, "other", {M.requests: ">"})
        assert (delivered, fields) == (new_id, {b"id": b"r1", b"attempt": b"2", b"body": b"\x00"})
        assert finish(client, entry_id) == b"finished"

    def test_requeued_where_nothing_was_taken(self, client: Client, taken: bytes) -> None:
        sent(client, b"0: a", b"1: b")
        assert self.requeue(client, taken, first=b"0: ")[0] == b"requeued"
        assert client.lrange(INBOUND, 0, -1) == [b"0: a", b"1: b"]

    def test_taken(self, client: Client, taken: bytes) -> None:
        sent(client, b"1: b")
        assert self.requeue(client, taken, first=b"0: ") == [b"taken"]
        client.delete(INBOUND)
        assert self.requeue(client, taken, first=b"0: ") == [b"taken"]
        assert pending(client) == 1

    def test_requeued_with_what_else_is_new(self, client: Client, stream: str) -> None:
        signed = {"id": "r1", "attempt": "1", "body": "attempt", "expires": "5", "signature": b"\xff"}
        entry_id = client.xadd(stream, signed)
        client.xreadgroup(GROUP, "me", {M.requests: ">"})
        args = [GROUP, entry_id, "me", 2, "", "expires", 9, "signature", b"\xfe\0"]
        run_script(client, "requeue", [M.requests, REPLY, INBOUND], args)
        ((_, ((_, fields),)),) = client.xreadgroup(GROUP, "other", {M.requests: ">"})
        assert list(fields.items()) == [
            (b"id", b"r1"), (b"attempt", b"2"), (b"body", b"attempt"), (b"expires", b"9"), (b"signature", b"\xfe\0"),
        ]  # fmt: skip

    def test_answered(self, client: Client, taken: bytes) -> None:
        push(client, taken)
        assert self.requeue(client, taken) == [b"answered"]
        assert pending(client) == 1

    def test_lost(self, client: Client, taken: bytes) -> None:
        assert self.requeue(client, taken, "another") == [b"lost"]

    def test_finished(self, client: Client, entry: bytes) -> None:
        assert self.requeue(client, entry) == [b"finished"]
        assert client.xlen(M.requests) == 1

    def test_finished_where_only_the_entry_is_gone(self, client: Client, taken: bytes) -> None:
        client.xdel(M.requests, taken)
        assert self.requeue(client, taken) == [b"finished"]
        assert pending(client) == 0

    def test_gone(self, client: Client, taken: bytes) -> None:
        client.delete(M.requests)
        assert self.requeue(client, taken) == [b"gone"]


class TestVanished:
    def vanished(self, client: Client, *entries: bytes, copied: int = 1 << 20) -> Any:
        return run_script(client, "vanished", [M.requests], [GROUP, copied, *entries])

    def test_the_places_of_what_is_missing(self, client: Client, entry: bytes) -> None:
        gone = client.xadd(M.requests, {"id": "r2"})
        client.xdel(M.requests, gone)
        assert self.vanished(client, gone, entry, gone) == [1, 3]
        client.delete(M.requests)
        assert self.vanished(client, entry) == [1]

    def test_where_there_is_no_group(self, client: Client) -> None:
        entry = client.xadd(M.requests, {"id": "r1"})
        assert self.vanished(client, b"1-1", entry) == [1]

    def test_what_an_agent_can_end_is_there(self, client: Client, taken: bytes) -> None:
        client.xdel(M.requests, taken)
        assert self.vanished(client, taken) == []
        assert finish(client, taken) == b"done"
        assert self.vanished(client, taken) == [1]

    def test_no_more_is_copied_than_it_may(self, client: Client, taken: bytes) -> None:
        waiting = [client.xadd(M.requests, {"id": "r2", "body": b"x" * 100}) for _ in range(3)]
        assert self.vanished(client, b"1-1", *waiting, b"1-2", copied=300) == [1]
        assert self.vanished(client, b"1-1", *waiting, b"1-2", copied=400) == [1, 5]
        # Neither what is missing nor what an agent has takes any of it.
        assert self.vanished(client, *[taken] * 9, b"1-1", b"1-2", copied=1) == [10, 11]

    def test_no_stream(self, client: Client) -> None:
        client.set(M.requests, "a stranger's")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            self.vanished(client, b"1-1")


class TestLook:
    def look(self, client: Client) -> Any:
        return run_script(client, "look", [M.requests], [GROUP])

    def test_nobody_waits(self, client: Client, taken: bytes) -> None:
        assert self.look(client) == [1, 1, [[b"me", b"1"]]]

    def test_nothing_is_there(self, client: Client, stream: str) -> None:
        assert self.look(client) == [0, 0, []]

    def test_somebody_waits(self, client: Client, taken: bytes) -> None:
        gone = client.xadd(M.requests, {"id": "r2"})
        second = client.xadd(M.requests, {"id": "r3"})
        third = client.xadd(M.requests, {"id": "r4"})
        withdraw(client, gone)
        withdraw(client, third)
        assert self.look(client) == [2, 1, [[b"me", b"1"]], 4, third, second]

    def test_nobody_has_taken_any(self, client: Client, entry: bytes) -> None:
        assert self.look(client) == [1, 0, [], 1, entry, entry]

    def test_what_waits_was_deleted_while_its_place_was_counted(self, client: Client, taken: bytes) -> None:
        client.xadd(M.requests, {"id": "r2"})
        client.xack(M.requests, GROUP, taken)  # by hand: the first entry stays, and is behind the group
        client.xdel(M.requests, self.look(client)[5])
        assert self.look(client) == [1, 0, []]

    def test_gone_without_the_group(self, client: Client, entry: bytes) -> None:
        client.xgroup_destroy(M.requests, GROUP)
        assert self.look(client) == b"gone"

    def test_gone_without_the_stream(self, client: Client) -> None:
        assert self.look(client) == b"gone"

    def test_another_error_is_raised(self, client: Client) -> None:
        client.set(M.requests, "text", px=10_000)
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            self.look(client)


class TestEnlist:
    def test_a_mount(self, client: Client) -> None:
        assert run_script(client, "enlist", [Keys().mounts], ["/shop"]) == b"enlisted"
        assert client.smembers(Keys().mounts) == {b"/shop"}

    def test_a_gateway(self, client: Client) -> None:
        for beat in "12":
            assert run_script(client, "enlist", [Keys().gateways], ["gw", beat]) == b"enlisted"
        assert client.hgetall(Keys().gateways) == {b"gw": b"2"}


class TestOutOfMemory:
    """What keeps leases, and what ends requests, works on."""

    @pytest.fixture(autouse=True)
    def full(self, client: Client, taken: bytes) -> Iterator[None]:
        client.config_set("maxmemory", "1")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.hset(M.agents, "me", "record")
        yield
        client.config_set("maxmemory", "0")

    def test_heartbeats(self, client: Client) -> None:
        assert claim(client, "shop:app") == [b"claimed", b"shop:app"]
        assert claim(client, "shop:app") == [b"renewed", b"shop:app"]
        assert run_script(client, "enlist", [Keys().mounts], ["/shop"]) == b"enlisted"
        assert run_script(client, "enlist", [Keys().gateways], ["gw", "1"]) == b"enlisted"

    def test_a_first_claim_and_the_repair_of_a_group(self, client: Client) -> None:
        client.delete(M.requests)
        assert run_script(client, "repair", [M.requests], [GROUP, 10]) == [b"mended", []]
        client.delete(M.requests)
        assert claim(client, "shop:app") == [b"claimed", b"shop:app"]

    def test_requests_that_run_again(self, client: Client, taken: bytes) -> None:
        outcome, _ = run_script(client, "requeue", [M.requests, REPLY, INBOUND], [GROUP, taken, "me", 2, ""])
        assert outcome == b"requeued"

    def test_taking_back(self, client: Client, taken: bytes) -> None:
        assert withdraw(client, taken) == b"delivered"

    def test_leaving(self, client: Client) -> None:
        assert run_script(client, "leave", [M.agents, M.requests], [GROUP, "me"]) == [b"pending", 1]

    def test_looks(self, client: Client) -> None:
        assert run_script(client, "look", [M.requests], [GROUP])[:2] == [1, 1]
