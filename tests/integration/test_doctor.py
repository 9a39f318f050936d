"""``flaskbus doctor`` against real brokers: each illness is made, found, and mended by its own mend."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from flask import Flask

from flaskbus import wire
from flaskbus.cli import cli
from flaskbus.keys import GROUP, Keys
from flaskbus.messages import Request
from flaskbus.options import run
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.testing import running_bus
from flaskbus_agent.fingerprint import key_fingerprint
from tests.conftest import Broker

MOUNT = Mount.parse("/app")
KEYS = Keys().of(MOUNT.key)
LEASE = 1.0


class Doctor:
    """Calls ``flaskbus`` in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self.capfd = capfd
        self.code = 0

    def run(self, *args: str) -> str:
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run(cli, args)
        assert isinstance(end.value.code, int)
        self.code = end.value.code
        out, err = self.capfd.readouterr()
        assert err == ""
        return out

    def findings(self, *args: str) -> list[dict[str, str]]:
        report = json.loads(self.run("doctor", "--json", *args))
        found: list[dict[str, str]] = report["findings"]
        assert report["errors"] == sum(finding["severity"] == "error" for finding in found)
        assert self.code == int(report["errors"] > 0)
        return found

    def find(self, check: str, *args: str) -> dict[str, str]:
        """The one finding of a check."""
        [finding] = [finding for finding in self.findings(*args) if finding["check"] == check]
        return finding

    def mend(self, finding: dict[str, str]) -> None:
        """Do what the finding says."""
        program, *args = shlex.split(finding["mend"].partition(" (")[0].partition(", and ")[0])
        assert program == "flaskbus"
        self.run(*args)
        assert self.code == 0


@pytest.fixture
def doctor(
    engine: Broker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Doctor:
    monkeypatch.setenv("FLASKBUS_REDIS_URL", engine.url)
    monkeypatch.setenv("FLASKBUS_LEASE", str(LEASE))
    monkeypatch.chdir(tmp_path)
    return Doctor(capfd)


@pytest.fixture
def client(engine: Broker) -> Iterator[redis.Redis]:
    with closing(engine.client()) as client:
        yield client


@contextmanager
def configured(client: redis.Redis, **values: str) -> Iterator[None]:
    """Set the server's configuration, and set it back."""
    given = {name.replace("_", "-"): value for name, value in values.items()}
    before: dict[Any, Any] = {}
    for name in given:
        before |= client.config_get(name)
    for name, value in given.items():
        client.config_set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            client.config_set(name, value)


def agent(client: redis.Redis, **members: Any) -> AgentRecord:
    """List an agent that is ready and has just sent a heartbeat."""
    given: dict[str, Any] = {"id": "one", "name": "demo", "host": "h", "pid": 1, "state": "ready"}
    record = AgentRecord(**{**given, "version": "0", "at": time.time(), **members})
    Registry(client, Keys()).claim(MOUNT, record)
    return record


def enqueue(client: redis.Redis) -> None:
    flat = wire.encode_request(Request("r1", "GET", "/app/x", "nobody", 30_000))
    client.xadd(KEYS.requests, dict(zip(flat[::2], flat[1::2], strict=True)))


def test_a_fresh_broker(doctor: Doctor, engine: Broker) -> None:
    findings = {finding["check"]: finding for finding in doctor.findings()}
    assert doctor.code == 0
    assert findings["broker"]["what"].startswith("Valkey 9." if engine.engine == "valkey" else "Redis ")
    assert findings["persistence"]["severity"] == "warning"
    assert findings["memory"]["severity"] == "info"
    assert findings["gateways"]["what"] == "no gateway is alive"
    assert {findings[name]["severity"] for name in ("eviction", "clock", "latency", "buffers", "keys")} == {
        "ok"
    }


def test_the_report_for_people(doctor: Doctor, client: redis.Redis) -> None:
    out = doctor.run("doctor")
    assert "ok       eviction     maxmemory-policy is noeviction\n" in out
    assert "mend: flaskbus redis CONFIG SET appendonly yes" in out
    assert out.endswith("\n2 warnings\n")
    with configured(client, maxmemory_policy="allkeys-lru"):
        assert doctor.run("doctor").endswith("\n1 error, 2 warnings\n")
        assert doctor.code == 1


@pytest.mark.parametrize(
    ("setting", "check", "severity"),
    [
        ({"maxmemory_policy": "volatile-ttl"}, "eviction", "error"),
        ({"appendonly": "no", "save": ""}, "persistence", "warning"),
        ({"maxmemory": "0"}, "memory", "info"),
        ({"client_output_buffer_limit": "pubsub 1mb 1mb 10"}, "buffers", "warning"),
    ],
)
def test_settings_of_the_broker_and_their_mends(
    doctor: Doctor, client: redis.Redis, setting: dict[str, str], check: str, severity: str
) -> None:
    with configured(client, appendonly="no", maxmemory="0"), configured(client, **setting):
        finding = doctor.find(check)
        assert finding["severity"] == severity
        doctor.mend(finding)
        assert doctor.find(check)["severity"] == "ok"


def test_snapshots_only_are_worth_a_word(doctor: Doctor, client: redis.Redis) -> None:
    with configured(client, save="3600 1"):
        assert doctor.find("persistence")["what"].startswith("snapshots only")


def test_memory_that_runs_out(doctor: Doctor, client: redis.Redis) -> None:
    client.set("filler", b"x" * 20_000_000, ex=60)
    used = client.info("memory")["used_memory"]
    with configured(client, maxmemory=str(int(used * 1.1))):
        assert doctor.find("memory")["severity"] == "warning"
    client.delete("filler")


def test_a_gateway_and_an_agent(
    doctor: Doctor, client: redis.Redis, engine: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASKBUS_LEASE", "5")  # the gateway takes silent agents off the list after that
    with running_bus(engine.url, lease=5):
        deadline = time.monotonic() + 10
        while not client.hlen("flaskbus:gateways"):
            assert time.monotonic() < deadline
        version = next(iter(Registry(client, Keys()).gateways().values()))["version"]
        agent(client, version=version)
        findings = {finding["check"]: finding for finding in doctor.findings()}
        assert findings["gateways"]["what"] == "1 gateway process is alive"
        assert findings["/app"]["what"] == "1 agent, 0 waiting, 0 running"
        assert "versions" not in findings
        agent(client, version="0.0.1", beat=2)
        assert "agents 0.0.1" in doctor.find("versions")["what"]


def test_a_gateway_that_is_gone(doctor: Doctor, client: redis.Redis) -> None:
    client.hset("flaskbus:gateways", "g", json.dumps({"version": "0", "beat": 4, "at": time.time() - 60}))
    *_, finding = [finding for finding in doctor.findings() if finding["check"] == "gateways"]
    assert finding["what"] == "g is listed and sends no heartbeat"
    doctor.mend(finding)
    assert not client.exists("flaskbus:gateways")


def test_a_queue_that_lost_its_group(doctor: Doctor, client: redis.Redis) -> None:
    agent(client)
    enqueue(client)
    client.xgroup_destroy(KEYS.requests, GROUP)
    finding = doctor.find("/app")
    assert finding["severity"] == "error"
    assert "lost the consumer group 'agents': 1 request may have run" in finding["what"]


@pytest.mark.parametrize("key", [Keys().mounts, Keys().gateways, KEYS.requests, KEYS.agents])
def test_a_key_that_somebody_wrote_over(doctor: Doctor, client: redis.Redis, key: str) -> None:
    agent(client)
    client.set(key, "what is this?")
    finding = next(one for one in doctor.findings() if "somebody wrote over" in one["what"])
    assert (finding["severity"], key in finding["what"]) == ("error", True)
    doctor.mend(finding)
    assert not client.exists(key)
    assert not any("wrote over" in one["what"] for one in doctor.findings())


def test_a_broker_that_waits_for_its_replicas(doctor: Doctor, client: redis.Redis) -> None:
    with configured(client, min_replicas_to_write="1"):
        finding = doctor.find("replicas")
        assert finding["severity"] == "error"
        doctor.mend(finding)
        assert client.set("it-can-be-written", "1", px=1)


def test_a_request_that_is_stuck(doctor: Doctor, client: redis.Redis) -> None:
    agent(client)
    enqueue(client)
    client.xreadgroup(GROUP, "gone", {KEYS.requests: ">"})
    assert doctor.find("/app")["severity"] == "ok"
    finding = doctor.find("/app", "--stuck-after", "0")
    assert "1 request stuck" in finding["what"]
    assert "with gone, which is gone" in finding["what"]
    for line in finding["mend"].removeprefix("they may have run; to drop them: ").split(" and "):
        doctor.run(*shlex.split(line)[1:])
    assert doctor.find("/app", "--stuck-after", "0")["severity"] == "ok"
    assert client.xlen(KEYS.requests) == 0


def test_what_a_live_agent_runs_is_not_stuck(doctor: Doctor, client: redis.Redis) -> None:
    agent(client)
    enqueue(client)
    client.xreadgroup(GROUP, "one", {KEYS.requests: ">"})
    assert doctor.find("/app", "--stuck-after", "0")["what"] == "1 agent, 0 waiting, 1 running"


def test_dead_letters(doctor: Doctor, client: redis.Redis) -> None:
    agent(client)
    client.xadd(KEYS.dead, {"reason": "older"})
    client.xadd(KEYS.dead, {"reason": "not msgpack of ours"})
    client.expire(KEYS.dead, 60)
    finding = doctor.find("/app")
    assert finding["what"] == "2 dead letters, the newest because: not msgpack of ours"
    out = doctor.run(*shlex.split(finding["mend"].removeprefix("look at them: "))[1:])
    assert out.index("not msgpack of ours") < out.index("older")


def test_keys_that_never_expire(doctor: Doctor, client: redis.Redis) -> None:
    agent(client)
    client.rpush(KEYS.reply("lost"), "frame")
    client.rpush(KEYS.reply("fine"), "frame")
    client.expire(KEYS.reply("fine"), 60)
    client.set("somebody:else", "1")
    finding = doctor.find("keys")
    assert finding["what"] == f"keys that never expire and should: {KEYS.reply('lost')}"
    doctor.mend(finding)
    assert doctor.find("keys")["severity"] == "ok"
    client.delete("somebody:else")


@pytest.mark.parametrize(
    ("difference", "severity", "what"),
    [
        ({"code": "b"}, "warning", "run different code"),
        ({"python": "3.12.9"}, "warning", "different versions of Python"),
        ({"key_fingerprint": "other"}, "error", "different SECRET_KEYs"),
    ],
)
def test_agents_that_are_not_the_same(
    doctor: Doctor, client: redis.Redis, difference: dict[str, str], severity: str, what: str
) -> None:
    agent(client, code="a", python="3.13.1", key_fingerprint="key")
    agent(client, **{"id": "two", "code": "a", "python": "3.13.1", "key_fingerprint": "key", **difference})
    finding = doctor.find("/app")
    assert finding["severity"] == severity
    assert what in finding["what"]
    assert "one" in finding["what"]
    assert "two" in finding["what"]


def test_secret_keys_are_compared_and_not_shown(doctor: Doctor, client: redis.Redis) -> None:
    marks = []
    for number, secret in enumerate(("correct horse", "battery staple")):
        app = Flask("shop")
        app.secret_key = secret
        marks.append(key_fingerprint(app, MOUNT.key))
        agent(client, id=f"agent{number}", key_fingerprint=marks[-1])
    out = doctor.run("doctor")
    assert doctor.code == 1
    assert all(mark in out for mark in marks)
    assert "correct" not in out
    assert "battery" not in out


def test_an_agent_whose_heart_stands_still(doctor: Doctor, client: redis.Redis) -> None:
    agent(client, at=time.time() - 60)
    findings = [finding["what"] for finding in doctor.findings() if finding["check"] == "/app"]
    assert findings == [
        "no agent of 'demo' is alive; 0 requests waiting",
        "agent one is listed and sends no heartbeat",
    ]


def test_an_agent_with_a_wrong_clock_is_alive_all_the_same(
    doctor: Doctor, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor looks whether the counter moves before it believes a clock."""
    record = agent(client, at=time.time() - 3600)
    sleep = time.sleep

    def beating(seconds: float) -> None:
        client.hset(KEYS.agents, record.id, replace(record, beat=7).dump())
        sleep(seconds)

    monkeypatch.setattr("flaskbus.survey.time.sleep", beating)
    finding = doctor.find("/app")
    assert finding["severity"] == "warning"
    assert finding["what"].startswith("the clock of h seems ")


def test_an_agent_that_could_not_start(doctor: Doctor, client: redis.Redis) -> None:
    agent(client, state="failed", reason="ImportError: no shop")
    severities = {finding["what"]: finding["severity"] for finding in doctor.findings()}
    assert severities["agent one could not start: ImportError: no shop"] == "error"


def test_a_mount_that_nobody_renewed(doctor: Doctor, client: redis.Redis) -> None:
    agent(client)
    client.delete(KEYS.owner)
    finding = doctor.find("/app")
    assert finding["severity"] == "info"
    doctor.mend({"mend": finding["mend"] + " --yes --force"})
    assert "/app" not in {finding["check"] for finding in doctor.findings()}


def test_a_user_with_few_rights_still_learns_something(
    doctor: Doctor, client: redis.Redis, engine: Broker
) -> None:
    rules = ("~flaskbus:*", "+@read", "+@connection", "+time", "-@dangerous")
    client.execute_command("ACL", "SETUSER", "guest", "on", ">x", *rules)  # type: ignore[no-untyped-call]
    try:
        findings = doctor.findings("--redis", engine.url.replace("//", "//guest:x@"))
    finally:
        client.acl_deluser("guest")
    assert "its user may not ask INFO" in findings[0]["what"]
    assert "x@" not in findings[0]["what"]
    assert doctor.code == 0


def test_a_broker_that_is_too_old_is_an_error(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    info: Callable[..., dict[str, Any]] = redis.Redis.info

    def old(self: redis.Redis, *args: Any, **options: Any) -> dict[str, Any]:
        return {**info(self, *args, **options), "redis_version": "6.2.14"}

    monkeypatch.setattr(redis.Redis, "info", old)
    finding = doctor.find("broker")
    assert finding["severity"] == "error"
    assert doctor.code == 1


def test_nonsense_is_refused(doctor: Doctor) -> None:
    doctor.capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run(cli, ["doctor", "--stuck-after", "soon"])
    assert end.value.code == 2
    assert "--stuck-after must be a duration" in doctor.capfd.readouterr().err
