"""A master fails, its sentinels choose another, and everybody goes there without being restarted.

Replication is asynchronous: what the old master had not passed on is lost. What that does to requests is counted
here, and allowed only for those that were in flight at that moment.
"""

from __future__ import annotations

import json
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from flaskbus.broker import check, connect
from flaskbus.errors import StartError
from tests.faults.brokers import SentinelGroup, Server, data_server, sentinel_group, until
from tests.integration.fleet import Fleet, Load
from tests.integration.test_restarts import RECOVERY, SLACK


@pytest.fixture
def group(tmp_path: Path) -> Iterator[SentinelGroup]:
    with sentinel_group(tmp_path) as group:
        yield group


@pytest.fixture
def fleet(group: SentinelGroup, tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "fleet").mkdir()
    with Fleet(tmp_path / "fleet", group.url) as fleet:
        yield fleet


def account(
    load: Load, fleet: Fleet, broke: float, elected: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every answer is true, but for what was in flight when the master was lost; says what became of that."""
    runs = fleet.runs()
    late = [seen for seen in load.seen if not seen.sent <= broke <= seen.ended]
    load_outside = Load(load.urls, seen=late)
    load_outside.judge(runs)
    caught = [seen for seen in load.seen if seen.sent <= broke <= seen.ended]
    wrong = [seen for seen in caught if seen.status == 200 and seen.text.split()[0] != seen.token]
    assert not wrong, "replies that are another's"
    # Requests that could not be sent while nobody was master may be refused, and then did not run.
    assert all(seen.sent <= elected + RECOVERY + SLACK for seen in load.bad()), load.bad()[-1]
    back = min(seen.ended for seen in load.seen if seen.status == 200 and seen.ended > elected)
    with capsys.disabled():
        print(
            f"\n  in flight {len(caught)}: {sum(seen.status == 200 for seen in caught)} answered, "
            f"{sum(seen.executed == 'unknown' for seen in caught)} unknown, "
            f"{sum(seen.executed == 'no' for seen in caught)} not run; "
            f"{sum(seen.executed == 'no' and runs[seen.token] > 0 for seen in caught)} not run is false, "
            f"{sum(runs[seen.token] > 1 for seen in caught)} ran twice; of {len(late)} others "
            f"{sum(seen.status != 200 for seen in late)} were refused. "
            f"Nobody was master for {elected - broke:.1f} s, served again {back - elected:.1f} s after that"
        )
    assert back - elected < RECOVERY + SLACK


def failover(
    group: SentinelGroup, fleet: Fleet, break_it: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = fleet.gateway()
    fleet.agent("one", "--threads", "4")
    with Load([url]) as load:
        load.more(50)
        broke = time.monotonic()
        break_it()
        until(group.elected, "the replica is master, and the sentinels say so")
        elected = time.monotonic()
        load.more(50)
    account(load, fleet, broke, elected, capsys)
    until(fleet.records, "a client of the old master finds the new one")
    fleet.at_rest(lists=len(load.bad()))


def test_a_master_that_dies(group: SentinelGroup, fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    failover(group, fleet, group.master.kill, capsys)


@pytest.mark.slow
def test_a_master_that_falls_silent_and_comes_back(
    group: SentinelGroup, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a host that dies or a network that is cut, nobody is told that the connection is gone."""
    failover(group, fleet, lambda: group.master.signal(signal.SIGSTOP), capsys)
    group.master.signal(signal.SIGCONT)
    until(lambda: group.master.ask("ROLE")[0] == b"slave", "it is told that it is a replica now")
    before = fleet.runs()
    with Load([fleet.gateway()[1]]) as load:
        load.more(30)
    assert not load.bad()
    load.judge(fleet.runs() - before)


@pytest.mark.slow
def test_a_failover_on_purpose(
    group: SentinelGroup, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    failover(
        group,
        fleet,
        lambda: group.sentinels[0].ask("SENTINEL", "FAILOVER", "flaskbus-master"),
        capsys,
    )


class Oracle(socketserver.ThreadingTCPServer):
    """A sentinel that says what it is told to."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, says: Server) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.says = says
        self.asked = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.server_address[1]}/any"


class Answering(socketserver.StreamRequestHandler):
    server: Oracle

    def handle(self) -> None:
        while line := self.rfile.readline():
            for _ in range(int(line[1:])):
                self.rfile.readline()
                self.rfile.readline()
            self.server.asked += 1
            port = str(self.server.says.port).encode()
            self.wfile.write(b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%b\r\n" % (len(port), port))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    one, other = data_server(tmp_path / "one"), data_server(tmp_path / "other")
    for server in (one, other):
        until(lambda: server.ask("PING"), "it answers")  # noqa: B023
    yield one, other
    for server in (one, other):
        server.stop()


def test_a_replica_is_never_taken_for_the_master(two: tuple[Server, Server]) -> None:
    """A sentinel may be behind the times; the server itself knows best."""
    replica, master = two
    replica.ask("REPLICAOF", "127.0.0.1", master.port)
    with Oracle(replica) as oracle, connect(oracle.url, timeout=1.0) as client:
        with pytest.raises(redis.exceptions.ConnectionError, match="is not the master any more"):
            client.set("key", "value")
        oracle.says = master
        assert client.set("key", "value")
        oracle.shutdown()


def test_a_master_that_is_demoted_behind_everybodys_back(two: tuple[Server, Server], tmp_path: Path) -> None:
    """READONLY is the only sign: the connections stay, and reads are answered."""
    old, new = two
    with Oracle(old) as oracle, Fleet(tmp_path, oracle.url) as fleet:
        _, url = fleet.gateway()
        fleet.agent("one", "--threads", "4")
        with Load([url]) as load:
            load.more(30)
            oracle.says = new
            old.ask("REPLICAOF", "127.0.0.1", new.port)
            load.more(30)
        load.judge(fleet.runs())
        until(fleet.records, "a client of the old master finds the new one")
        fleet.at_rest(lists=len(load.bad()))
        oracle.shutdown()


def test_the_tools(group: SentinelGroup, fleet: Fleet) -> None:
    fleet.gateway()
    fleet.agent("one", "--name", "shop")
    run_tools(group.url)


def run_tools(url: str) -> None:
    """Every command that looks at a bus, on one with the mount /fleet of the app ``shop``."""

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flaskbus", words[0], "--redis", url, *words[1:]],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr
        return done.stdout

    run("healthcheck", "--broker", "--agent")
    [mount] = json.loads(run("mounts", "--json"))
    assert (mount["mount"], mount["app"], mount["agents"]["alive"]) == ("/fleet", "shop", 1)
    [agent] = json.loads(run("agents", "--json"))
    assert (agent["mount"], agent["state"]) == ("/fleet", "ready")
    assert run("request", "/fleet/token").split()[0] == "token"
    findings = json.loads(run("doctor", "--json"))["findings"]
    assert not [finding for finding in findings if finding["severity"] == "error"]
    assert any(finding["check"] == "/fleet" for finding in findings)
    assert run("redis", "HGET", "flaskbus:{/fleet}:mount", "name").strip() == "shop"
    assert "no longer mounted" in run("unmount", "/fleet", "--yes", "--force")


def test_what_is_said_of_a_service_that_nobody_knows(group: SentinelGroup) -> None:
    url = group.url.replace("flaskbus-master", "other")
    with pytest.raises(StartError, match="know no service 'other'; SENTINEL MASTERS"), connect(url) as client:
        check(client, url)


def test_what_is_said_of_sentinels_that_are_away(group: SentinelGroup, fleet: Fleet) -> None:
    """One is enough; without any, everybody waits for them."""
    for sentinel in group.sentinels[:2]:
        sentinel.kill()
    with connect(group.url) as client:
        assert client.ping()
    group.sentinels[2].kill()
    done = subprocess.run(
        [sys.executable, "-m", "flaskbus", "mounts", "--redis", group.url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "no sentinel of" in done.stderr
    assert done.stderr.count("\n") == 1
