"""What the doctor says of facts, broker by broker and mount by mount."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from flaskbus.diagnosis import BrokerFacts, Facts, Finding, MountFacts, Severity, Stuck, diagnose
from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord
from flaskbus.routing import Mount
from flaskbus.survey import MountView, entry_age

NOW = 1_800_000_000.0
MOUNT = Mount.parse("/app")
INFO: dict[str, Any] = {
    "redis_version": "7.2.4",
    "valkey_version": "9.1.2",
    "role": "master",
    "aof_enabled": 1,
    "maxmemory_policy": "noeviction",
    "used_memory": 1024**2,
    "maxmemory": 100 * 1024**2,
}
BROKER = BrokerFacts(
    url="redis://h/0",
    info=INFO,
    config={"save": "", "client-output-buffer-limit": "normal 0 0 0 slave 1 1 60 pubsub 33554432 8388608 60"},
    pings=(0.0002,) * 11,
    offset=0.001,
    doubt=0.0001,
)
ONE = AgentRecord(
    id="one", name="shop", host="h1", pid=1, state="ready", version="0.1.0", python="3.13.1", code="c",
    key_fingerprint="k", at=NOW,
)  # fmt: skip
TWO = replace(ONE, id="two", pid=2)
VIEW = MountView(mount=MOUNT, owner="shop", agents=(ONE, TWO), length=0, pending=0, oldest=None)
WELL = MountFacts(view=VIEW, alive=frozenset({"one", "two"}))
FACTS = Facts(
    broker=BROKER,
    mounts=(WELL,),
    gateways={"g": {"version": "0.1.0", "beat": 1}},
    alive_gateways=frozenset({"g"}),
    leaked=(),
    foreign={},
    keys=Keys(),
    now=NOW,
    lease=10.0,
)


SIGNING = {"version": "0.1.0", "beat": 1, "signing": "a1"}


def bad(facts: Facts) -> list[Finding]:
    """Whatever is not well."""
    return [finding for finding in diagnose(facts) if finding.severity != "ok"]


def only(facts: Facts) -> Finding:
    [finding] = bad(facts)
    return finding


def of_broker(**changes: Any) -> Facts:
    return replace(FACTS, broker=replace(BROKER, **changes))


def of_info(**changes: Any) -> Facts:
    return of_broker(info=INFO | changes)


def of_mount(**changes: Any) -> Facts:
    view = {name: changes.pop(name) for name in [*changes] if name in MountView.__dataclass_fields__}
    return replace(FACTS, mounts=(replace(WELL, view=replace(VIEW, **view), **changes),))


def test_a_bus_that_is_well() -> None:
    assert bad(FACTS) == []
    assert [(finding.check, finding.what) for finding in diagnose(FACTS)] == [
        ("broker", "Valkey 9.1.2 at redis://h/0"),
        ("persistence", "append-only file"),
        ("eviction", "maxmemory-policy is noeviction"),
        ("memory", "1.0 MiB of 100.0 MiB used"),
        ("buffers", "unread doorbells of a process: 32.0 MiB, or 8.0 MiB for 60 s"),
        ("clock", "the broker's clock differs by 1 ms"),
        ("latency", "PING takes 0.2 ms, at worst 0.2 ms"),
        ("gateways", "1 gateway process is alive"),
        ("keys", "every key expires that should"),
        ("/app", "2 agents, 0 waiting, 0 running"),
    ]


def test_each_node_of_a_cluster_is_looked_at() -> None:
    first = replace(BROKER, node="10.0.0.1:7000")
    second = replace(BROKER, node="10.0.0.2:7000", info=INFO | {"maxmemory_policy": "allkeys-lru"})
    facts = replace(FACTS, broker=first, others=(second,))
    assert (only(facts).severity, only(facts).check) == ("error", "eviction 10.0.0.2:7000")
    assert {finding.check for finding in diagnose(facts)} > {
        "memory 10.0.0.1:7000",
        "memory 10.0.0.2:7000",
        "keys",
    }


@pytest.mark.parametrize(
    ("changes", "severity", "check", "what"),
    [
        ({"redis_version": "6.2.14"}, "error", "broker", "is too old"),
        ({"role": "slave"}, "error", "role", "is a replica"),
        ({"aof_last_write_status": "err"}, "error", "persistence", "append-only file failed"),
        ({"rdb_last_bgsave_status": "err"}, "error", "persistence", "snapshot failed"),
        ({"aof_enabled": 0}, "warning", "persistence", "neither append-only file nor snapshots"),
        ({"maxmemory_policy": "allkeys-lru"}, "error", "eviction", "allkeys-lru"),
        ({"maxmemory": 0}, "info", "memory", "without a limit"),
        ({"used_memory": 80 * 1024**2}, "warning", "memory", "80.0 MiB of 100.0 MiB used: from 80% on"),
        ({"used_memory": 101 * 1024**2}, "error", "memory", "it is full"),
        ({"connected_clients": 91, "maxclients": 100}, "warning", "connections", "91 of at most 100"),
    ],
)
def test_a_broker_that_is_not(changes: dict[str, Any], severity: Severity, check: str, what: str) -> None:
    finding = only(of_info(**changes))
    assert (finding.severity, finding.check) == (severity, check)
    assert what in finding.what
    assert finding.mend


def test_connections_that_are_left_are_well() -> None:
    assert bad(of_info(connected_clients=80, maxclients=100)) == []


def test_a_broker_that_waits_for_its_replicas() -> None:
    finding = only(of_broker(config={**BROKER.config, "min-replicas-to-write": "2"}))
    assert (finding.severity, finding.check) == ("error", "replicas")
    assert "0 of at least 2" in finding.what
    there = of_broker(
        config={**BROKER.config, "min-replicas-to-write": "2"}, info=INFO | {"min_slaves_good_slaves": 2}
    )
    assert bad(there) == []


def test_a_key_that_somebody_wrote_over() -> None:
    finding = only(replace(FACTS, foreign={"flaskbus:mounts": "string"}))
    assert (finding.severity, finding.check) == ("error", "keys")
    assert finding.what.startswith("somebody wrote over flaskbus:mounts: it is a string now")
    assert finding.mend.startswith("flaskbus redis DEL flaskbus:mounts")


def test_memory_below_the_limit_is_well() -> None:
    assert bad(of_info(used_memory=79 * 1024**2)) == []


def test_snapshots_only() -> None:
    facts = of_broker(info=INFO | {"aof_enabled": 0}, config={"save": "3600 1"})
    assert only(facts).what.startswith("snapshots only")
    unknown = only(of_broker(info=INFO | {"aof_enabled": 0}, config={}))
    assert (unknown.severity, unknown.check) == ("info", "persistence")


def test_a_broker_that_tells_nothing() -> None:
    finding = only(of_broker(info={}, config={}))
    assert (finding.severity, finding.check) == ("info", "broker")


def test_redis_is_called_redis() -> None:
    info = {key: value for key, value in INFO.items() if key != "valkey_version"}
    assert diagnose(of_broker(info=info))[0].what == "Redis 7.2.4 at redis://h/0"


@pytest.mark.parametrize(("offset", "says"), [(-4.0, "4.0 s behind"), (3.0, "3.0 s ahead of")])
def test_clocks_that_differ(offset: float, says: str) -> None:
    finding = only(of_broker(offset=offset))
    assert (finding.severity, finding.check) == ("warning", "clock")
    assert says in finding.what


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert bad(of_broker(offset=4.0, doubt=3.5)) == []


def test_one_slow_ping_is_no_finding_but_many_are() -> None:
    assert bad(of_broker(pings=(*BROKER.pings[1:], 0.5))) == []
    assert only(of_broker(pings=(0.02,) * 11)).check == "latency"


@pytest.mark.parametrize(
    ("limit", "severity"), [("1000 0 0", "warning"), ("0 0 0", "ok"), ("67108864 8388608 60", "ok")]
)
def test_output_buffers(limit: str, severity: Severity) -> None:
    facts = of_broker(config={"client-output-buffer-limit": f"normal 0 0 0 slave 0 0 0 pubsub {limit}"})
    [finding] = [finding for finding in diagnose(facts) if finding.check == "buffers"]
    assert finding.severity == severity


def test_gateways() -> None:
    none = bad(replace(FACTS, gateways={}, alive_gateways=frozenset()))
    assert [(finding.severity, finding.what) for finding in none] == [("warning", "no gateway is alive")]
    gone = only(replace(FACTS, gateways={**FACTS.gateways, "old": {}}))
    assert gone.what == "old is listed and sends no heartbeat"
    assert gone.mend == "flaskbus redis HDEL flaskbus:gateways old"


def test_versions() -> None:
    finding = only(replace(FACTS, gateways={"g": {"version": "0.2.0"}}))
    assert finding.what == "flaskbus differs: gateways 0.2.0, agents 0.1.0"


def test_leaks() -> None:
    finding = only(replace(FACTS, leaked=tuple(f"flaskbus:{{/a}}:x{number}" for number in range(7))))
    assert "and 2 more" in finding.what
    assert shlex.split(finding.mend)[:4] == ["flaskbus", "redis", "DEL", "flaskbus:{/a}:x0"]
    assert only(replace(FACTS, whole=False)).severity == "info"


@pytest.mark.parametrize(
    ("changes", "severity", "what"),
    [
        ({"length": None, "pending": None}, "warning", "it has no queue"),
        (
            {"length": 2, "pending": None},
            "error",
            "lost the consumer group 'agents': 2 requests may have run",
        ),
        (
            {"length": 1, "pending": 0, "oldest": 9.0},
            "warning",
            "1 request waiting, the oldest request is 9 s old",
        ),
        (
            {"dead": 1, "reason": "too many attempts"},
            "warning",
            "1 dead letter, the newest because: too many",
        ),
        ({"owner": None}, "info", "no longer mounted, and a gateway forgets it"),
        ({"owner": None, "length": 3}, "info", "no longer mounted; 3 requests left"),
        ({"agents": (), "length": 3}, "warning", "no agent of 'shop' is alive; 3 requests waiting"),
        ({"alive": frozenset({"one"})}, "warning", "agent two is listed and sends no heartbeat"),
        (
            {"agents": (ONE, replace(TWO, state="failed", reason="boom"))},
            "error",
            "agent two could not start: boom",
        ),
        ({"agents": (ONE, replace(TWO, at=NOW - 90))}, "warning", "the clock of h1 seems 90s off"),
        ({"agents": (ONE, replace(TWO, code="d"))}, "warning", "run different code (c: one; d: two)"),
        ({"agents": (ONE, replace(TWO, python="3.12.0"))}, "warning", "(3.12.0: two; 3.13.1: one)"),
        ({"agents": (ONE, replace(TWO, key_fingerprint=""))}, "error", "different SECRET_KEYs"),
        ({"agents": (ONE, replace(TWO, name="store"))}, "warning", "have different names"),
    ],
)
def test_a_mount_that_is_not_well(changes: dict[str, Any], severity: Severity, what: str) -> None:
    finding = only(of_mount(**changes))
    assert (finding.severity, finding.check) == (severity, "/app")
    assert what in finding.what
    assert finding.mend


def test_a_short_wait_and_a_long_run_are_well() -> None:
    assert bad(of_mount(length=1, pending=0, oldest=1.0)) == []
    assert bad(of_mount(length=1, pending=1, oldest=900.0)) == []


def test_agents_that_start_or_stop_are_not_compared() -> None:
    assert bad(of_mount(agents=(ONE, replace(TWO, state="starting", code="")))) == []


def test_requests_that_are_stuck() -> None:
    finding = only(
        of_mount(length=2, pending=2, stuck=(Stuck("1-0", "gone", 70.0), Stuck("2-0", "gone", 90.0)))
    )
    assert finding.what == "2 requests stuck for up to 90 s with gone, which is gone"
    assert "XACK 'flaskbus:{/app}:requests' agents 1-0 2-0" in finding.mend


def test_a_mend_survives_the_shell() -> None:
    finding = only(of_mount(length=1, pending=1, stuck=(Stuck("1-0", "gone", 70.0),)))
    line = finding.mend.removeprefix("they may have run; to drop them: ").partition(" and ")[0]
    assert shlex.split(line) == ["flaskbus", "redis", "XACK", "flaskbus:{/app}:requests", "agents", "1-0"]


def test_the_age_of_an_entry_is_never_negative() -> None:
    assert entry_age(b"1800000000000-0", NOW + 2) == 2.0
    assert entry_age(b"1800000009000-7", NOW) == 0.0


@pytest.mark.parametrize(
    ("gateways", "agents", "severity", "check", "what"),
    [
        ({"g": SIGNING}, ("", ""), "error", "/app", "agent one has no signing key, and the gateways sign"),
        (
            {"g": {}},
            ("k", "k"),
            "error",
            "/app",
            "agent one takes signed requests only, and no gateway signs",
        ),
        ({"g": SIGNING}, ("k", "k,l"), "warning", "/app", "have different signing keys"),
        ({"g": SIGNING, "h": {}}, ("k", "k"), "error", "signing", "or only some of them have one"),
        ({"g": SIGNING, "h": {"signing": []}}, ("k", "k"), "error", "signing", "different signing secrets"),
    ],
)
def test_whoever_signs_otherwise(
    gateways: dict[str, Any], agents: tuple[str, str], severity: Severity, check: str, what: str
) -> None:
    records = tuple(replace(record, signing=key) for record, key in zip((ONE, TWO), agents, strict=True))
    facts = replace(
        of_mount(agents=records),
        gateways={name: {**FACTS.gateways["g"], **record} for name, record in gateways.items()},
        alive_gateways=frozenset(gateways),
    )
    first = bad(facts)[0]
    assert (first.severity, first.check) == (severity, check)
    assert what in first.what


def test_nobody_is_blamed_for_gateways_that_are_away() -> None:
    records = (replace(ONE, signing="k"), replace(TWO, signing="k"))
    facts = replace(of_mount(agents=records), gateways={}, alive_gateways=frozenset())
    assert only(facts).what == "no gateway is alive"


def test_all_sign() -> None:
    records = (replace(ONE, signing="k"), replace(TWO, signing="k"))
    assert bad(replace(of_mount(agents=records), gateways={"g": SIGNING})) == []
