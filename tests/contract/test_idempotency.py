"""The record of a request with an Idempotency-Key: every row of the scripts that write it, on both engines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flaskbus.broker import run_script
from flaskbus.keys import GROUP, LIST_TTL_MS, Keys
from tests.conftest import Broker

Client = Any

M = Keys().of("/shop")
RECORD = M.idempotent("0" * 64)
REPLY = M.reply("r1")
LIFE = 60_000


@pytest.fixture
def client(engine: Broker) -> Iterator[Client]:
    with engine.client() as client:
        client.xgroup_create(M.requests, GROUP, id="0", mkstream=True)
        yield client


def remember(client: Client, request_id: str = "r1", fingerprint: str = "body") -> Any:
    fields = ["id", request_id, "attempt", "1", "idempotency", "0" * 64]
    args = [request_id, fingerprint, LIFE, *fields]
    return run_script(client, "remember", [M.requests, RECORD, M.agents], args)


def sent(client: Client, request_id: str = "r1") -> bytes:
    outcome, entry_id = remember(client, request_id)
    assert outcome == b"sent"
    return bytes(entry_id)


def take(client: Client, consumer: str = "me") -> bytes:
    """Deliver the next entry to an agent that is registered."""
    client.hset(M.agents, consumer, "{}")
    ((_, ((entry_id, _),)),) = client.xreadgroup(GROUP, consumer, {M.requests: ">"}, count=1)
    return bytes(entry_id)


def finish(
    client: Client,
    entry_id: bytes,
    becomes: str = "answered",
    *frames: bytes,
    consumer: str = "me",
    life: int = LIFE,
) -> Any:
    args = [
        GROUP,
        entry_id,
        consumer,
        LIST_TTL_MS,
        "bell",
        "r1",
        100,
        life,
        becomes,
        *(frames or (b"frame",)),
    ]
    return run_script(client, "finish", [M.requests, REPLY, RECORD], args)


def withdraw(client: Client, entry_id: bytes) -> Any:
    return run_script(client, "withdraw", [M.requests, RECORD], [GROUP, entry_id])


def requeue(client: Client, entry_id: bytes, consumer: str = "me") -> Any:
    return run_script(
        client, "requeue", [M.requests, REPLY, M.inbound("r1"), RECORD], [GROUP, entry_id, consumer, 2, ""]
    )


def record(client: Client) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = client.hgetall(RECORD)
    return found


@pytest.fixture
def taken(client: Client) -> bytes:
    """A request that an agent has, and its record."""
    sent(client)
    return take(client)


class TestRemember:
    def test_sent(self, client: Client) -> None:
        entry_id = sent(client)
        assert client.xrange(M.requests) == [
            (entry_id, {b"id": b"r1", b"attempt": b"1", b"idempotency": b"0" * 64})
        ]
        assert record(client) == {
            b"id": b"r1",
            b"entry": entry_id,
            b"fingerprint": b"body",
            b"state": b"running",
        }
        assert 0 < client.pttl(RECORD) <= LIFE

    def test_missing(self, client: Client) -> None:
        client.delete(M.requests)
        assert remember(client) == [b"missing"]
        assert client.exists(M.requests, RECORD) == 0

    @pytest.mark.parametrize("becomes", ["running", "answered", "unkept"])
    def test_mismatch(self, client: Client, taken: bytes, becomes: str) -> None:
        if becomes != "running":
            finish(client, taken, becomes)
        assert remember(client, "r2", "another") == [b"mismatch"]
        assert record(client)[b"id"] == b"r1"

    def test_running_while_it_waits(self, client: Client) -> None:
        sent(client)
        assert remember(client, "r2") == [b"running"]
        assert client.xlen(M.requests) == 1

    def test_running_while_an_agent_has_it(self, client: Client, taken: bytes) -> None:
        client.delete(M.agents)
        assert remember(client, "r2") == [b"running"]  # a gateway settles what dead agents hold

    def test_running_after_its_client_left(self, client: Client, taken: bytes) -> None:
        assert withdraw(client, taken) == b"delivered"
        assert remember(client, "r2") == [b"running"]

    def test_sent_again_when_the_agent_it_was_withdrawn_from_is_gone(
        self, client: Client, taken: bytes
    ) -> None:
        withdraw(client, taken)
        client.hdel(M.agents, "me")
        entry_id = sent(client, "r2")
        assert record(client) == {
            b"id": b"r2",
            b"entry": entry_id,
            b"fingerprint": b"body",
            b"state": b"running",
        }
        assert finish(client, taken) == b"finished"
        assert record(client)[b"state"] == b"running"

    def test_answered(self, client: Client, taken: bytes) -> None:
        finish(client, taken)
        assert remember(client, "r2") == [b"answered", b"frame", b"r1"]
        assert client.xlen(M.requests) == 0

    def test_unkept(self, client: Client, taken: bytes) -> None:
        finish(client, taken, "unkept")
        assert remember(client, "r2") == [b"unkept"]
        assert client.xlen(M.requests) == 0

    def test_out_of_memory_leaves_neither(self, client: Client) -> None:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                remember(client)
        finally:
            client.config_set("maxmemory", "0")
        assert client.exists(RECORD) == 0
        assert client.xlen(M.requests) == 0


class TestFinish:
    def test_answered(self, client: Client, taken: bytes) -> None:
        assert finish(client, taken, life=30_000) == b"done"
        assert record(client)[b"state"] == b"answered"
        assert record(client)[b"reply"] == b"frame"
        assert 0 < client.pttl(RECORD) <= 30_000
        assert client.lrange(REPLY, 0, -1) == [b"frame"]

    def test_unkept(self, client: Client, taken: bytes) -> None:
        assert finish(client, taken, "unkept", b"head", b"end") == b"done"
        assert record(client)[b"state"] == b"unkept"
        assert b"reply" not in record(client)
        assert client.lrange(REPLY, 0, -1) == [b"head", b"end"]

    def test_released(self, client: Client, taken: bytes) -> None:
        assert finish(client, taken, "released") == b"done"
        assert record(client) == {}
        assert client.lrange(REPLY, 0, -1) == [b"frame"]

    @pytest.mark.parametrize(
        ("becomes", "state"), [("answered", b"answered"), ("unkept", b"unkept"), ("released", None)]
    )
    def test_after_a_withdrawal(
        self, client: Client, taken: bytes, becomes: str, state: bytes | None
    ) -> None:
        withdraw(client, taken)
        assert finish(client, taken, becomes) == b"finished"
        assert record(client).get(b"state") == state
        assert client.exists(REPLY) == 0

    def test_after_the_group_was_lost(self, client: Client, taken: bytes) -> None:
        client.xgroup_destroy(M.requests, GROUP)
        assert finish(client, taken) == b"gone"
        assert record(client)[b"state"] == b"answered"

    def test_the_first_answer_stays(self, client: Client, taken: bytes) -> None:
        finish(client, taken)
        for becomes in ("answered", "unkept", "released"):
            assert finish(client, taken, becomes, b"second") == b"finished"
        assert remember(client, "r2") == [b"answered", b"frame", b"r1"]

    def test_of_an_earlier_run(self, client: Client, taken: bytes) -> None:
        requeue(client, taken)
        assert finish(client, taken) == b"finished"
        assert record(client)[b"state"] == b"running"
        assert finish(client, take(client, "other"), "answered", b"second", consumer="other") == b"done"
        assert remember(client, "r2") == [b"answered", b"second", b"r1"]

    def test_lost(self, client: Client, taken: bytes) -> None:
        assert finish(client, taken, consumer="another") == b"lost"
        assert record(client)[b"state"] == b"running"

    def test_without_a_record(self, client: Client, taken: bytes) -> None:
        client.delete(RECORD)
        assert finish(client, taken) == b"done"
        assert client.exists(RECORD) == 0
        assert client.lrange(REPLY, 0, -1) == [b"frame"]

    @pytest.mark.parametrize("gone", [False, True])
    def test_works_while_the_broker_is_out_of_memory(self, client: Client, taken: bytes, gone: bool) -> None:
        if gone:
            withdraw(client, taken)
        client.config_set("maxmemory", "1")
        try:
            assert finish(client, taken) == (b"finished" if gone else b"done")
        finally:
            client.config_set("maxmemory", "0")
        assert remember(client, "r2") == [b"answered", b"frame", b"r1"]


class TestWithdraw:
    def test_undelivered_releases(self, client: Client) -> None:
        assert withdraw(client, sent(client)) == b"undelivered"
        assert record(client) == {}

    def test_delivered_says_who_has_it(self, client: Client, taken: bytes) -> None:
        assert withdraw(client, taken) == b"delivered"
        assert record(client)[b"agent"] == b"me"
        assert 0 < client.pttl(RECORD) <= LIFE

    def test_finished_changes_nothing(self, client: Client, taken: bytes) -> None:
        finish(client, taken)
        before = record(client)
        assert withdraw(client, taken) == b"finished"
        assert record(client) == before

    @pytest.mark.parametrize("delivered", [False, True])
    def test_a_record_of_another_entry_stays(self, client: Client, delivered: bool) -> None:
        entry_id = sent(client)
        if delivered:
            take(client)
        client.hset(RECORD, "entry", "9-9")
        before = record(client)
        assert withdraw(client, entry_id) == (b"delivered" if delivered else b"undelivered")
        assert record(client) == before

    @pytest.mark.parametrize("delivered", [False, True])
    def test_without_a_record(self, client: Client, delivered: bool) -> None:
        entry_id = sent(client)
        if delivered:
            take(client)
        client.delete(RECORD)
        assert withdraw(client, entry_id) == (b"delivered" if delivered else b"undelivered")
        assert client.exists(RECORD) == 0


class TestRequeue:
    def test_the_record_goes_with_it(self, client: Client, taken: bytes) -> None:
        outcome, entry_id = requeue(client, taken)
        assert outcome == b"requeued"
        assert record(client)[b"entry"] == entry_id
        assert record(client)[b"state"] == b"running"

    @pytest.mark.parametrize("other", [False, True])
    def test_not_what_is_not_its_own(self, client: Client, taken: bytes, other: bool) -> None:
        if other:
            client.hset(RECORD, "entry", "9-9")
        else:
            client.delete(RECORD)
        before = record(client)
        assert requeue(client, taken)[0] == b"requeued"
        assert record(client) == before


class TestBury:
    def bury(self, client: Client, entry_id: bytes, consumer: str = "me") -> Any:
        args = [GROUP, entry_id, consumer, LIFE, 10, LIST_TTL_MS, "bell", "r1", b"failure", "reason", "bad"]
        return run_script(client, "bury", [M.requests, M.dead, REPLY, RECORD], args)

    def test_releases(self, client: Client, taken: bytes) -> None:
        assert self.bury(client, taken) == b"done"
        assert record(client) == {}

    def test_not_what_is_not_its_own(self, client: Client, taken: bytes) -> None:
        client.hset(RECORD, "entry", "9-9")
        assert self.bury(client, taken) == b"done"
        assert record(client)[b"entry"] == b"9-9"


AGENTS = ("a", "b")
FATES = {"answer": "answered", "stream": "unkept", "hand back": "released"}
STEPS = (
    "repeat",
    "repeat",
    "take",
    "take",
    *FATES,
    "withdraw",
    "die",
    "die",
    "settle",
    "settle",
    "bury",
    "come",
)

steps = st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(AGENTS)), min_size=10, max_size=40)


class TestAnyOrder:
    """One key, two agents, gateways that withdraw and requeue, agents that die and thaw, in any order at all.

    An agent that was struck off the registry is dead to the bus; it may thaw, and go on with what it ran.
    """

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps=steps)
    def test_one_run_at_a_time_and_one_answer(self, client: Client, steps: list[tuple[str, str]]) -> None:
        client.flushall()
        client.xgroup_create(M.requests, GROUP, id="0", mkstream=True)
        for agent in AGENTS:
            client.hset(M.agents, agent, "{}")
        model = Model(client)
        for number, (step, agent) in enumerate(steps):
            model.do(step, agent, b"answer %d" % number)
        # Whoever still runs something comes to its end; then nothing may be said to run.
        while client.xlen(M.requests) or model.runs:
            for step, agent in itertools.product(("come", "take", "answer", "settle"), AGENTS):
                model.do(step, agent, b"the last")
        assert remember(client)[0] in (b"sent", b"answered", b"unkept")


class Model:
    """What the scripts do, and what they must never do.

    A run is an entry that an agent took and has not said the last word on.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.runs: dict[bytes, str] = {}
        self.dead: set[bytes] = set()
        """Runs of agents that were struck off since."""
        self.settled: dict[bytes, bytes] | None = None
        """The record, once it says how the request ended."""

    def do(self, step: str, agent: str, frame: bytes) -> None:
        client, before = self.client, record(self.client)
        mine = [entry for entry, who in self.runs.items() if who == agent]
        if step == "repeat":
            self.repeat()
        elif step == "take":
            for _, ((entry, _),) in client.xreadgroup(GROUP, agent, {M.requests: ">"}, count=1):
                self.runs[entry] = agent
                if not client.hexists(M.agents, agent):
                    self.dead.add(entry)
        elif step in FATES and mine:
            finish(client, mine[0], FATES[step], frame, consumer=agent)
            if before.get(b"entry") != mine[0]:
                assert record(client) == before, "a late answer changed the record"
            del self.runs[mine[0]]
        elif step == "withdraw":
            for entry, _ in client.xrange(M.requests):
                withdraw(client, entry)
        elif step == "die":
            client.hdel(M.agents, agent)
            self.dead.update(mine)
        elif step in ("settle", "bury"):
            self.reap(step)
        elif step == "come":
            client.hset(M.agents, agent, "{}")
        after = record(client)
        assert not after or client.pttl(RECORD) > 0
        if self.settled:
            assert after == self.settled, "the first answer changed"
        elif after.get(b"state") in (b"answered", b"unkept"):
            self.settled = after

    def repeat(self) -> None:
        outcome, *rest = remember(self.client)
        if self.settled:
            assert outcome == self.settled[b"state"]
            assert rest[:1] == [self.settled[b"reply"]] if outcome == b"answered" else not rest
        else:
            assert outcome in (b"sent", b"running")
        if outcome == b"sent":
            assert self.runs.keys() <= self.dead, "two run"
            assert self.client.xlen(M.requests) == 1, "two wait"

    def reap(self, step: str) -> None:
        """As a gateway does: only what a dead agent holds."""
        for one in self.client.xpending_range(M.requests, GROUP, "-", "+", 100):
            entry, who = one["message_id"], one["consumer"].decode()
            if not self.client.hexists(M.agents, who):
                if step == "bury":
                    TestBury().bury(self.client, entry, who)
                elif requeue(self.client, entry, who)[0] == b"requeued":
                    before = record(self.client)
                    assert before.get(b"entry") != entry, "what a thawed agent says would be kept"


class TestClaim:
    def claim(
        self,
        client: Client,
        agent: str,
        *settings: str,
        name: str = "shop",
        ready: bool = True,
        became: bool = True,
    ) -> None:
        args = [name, 0, LIFE, GROUP, agent, "{}", int(ready), int(became), *settings]
        run_script(client, "claim", [M.owner, M.agents, M.requests], args)

    def settings(self, client: Client) -> dict[bytes, bytes]:
        assert 0 < client.pttl(M.owner) <= LIFE
        assert client.hget(M.owner, "name") == b"shop"
        return {k: v for k, v in client.hgetall(M.owner).items() if k not in (b"name", b"proven")}

    def test_the_latest_to_become_ready_decides(self, client: Client) -> None:
        self.claim(client, "a")
        assert self.settings(client) == {}
        self.claim(client, "b", "idempotency_ttl", "5")
        assert self.settings(client) == {b"idempotency_ttl": b"5"}
        self.claim(client, "a", became=False)
        assert self.settings(client) == {b"idempotency_ttl": b"5"}
        self.claim(client, "c")
        assert self.settings(client) == {}
        assert client.hget(M.owner, "proven") == b"1"

    def test_not_one_that_only_starts(self, client: Client) -> None:
        self.claim(client, "a", "idempotency_ttl", "5")
        self.claim(client, "b", ready=False, became=False)
        assert self.settings(client) == {b"idempotency_ttl": b"5"}

    def test_but_the_first(self, client: Client) -> None:
        self.claim(client, "a", "idempotency_ttl", "5", ready=False, became=False)
        assert self.settings(client) == {b"idempotency_ttl": b"5"}
        assert client.hexists(M.owner, "proven") == 0

    def test_another_app_has_its_own(self, client: Client) -> None:
        self.claim(client, "a", "idempotency_ttl", "5", name="shpo", ready=False, became=False)
        self.claim(client, "b", ready=False, became=False)
        assert self.settings(client) == {}
