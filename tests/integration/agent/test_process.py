"""The life of the whole agent: start, stop, new code, signals."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from flaskbus.keys import Keys
from tests.conftest import Broker
from tests.integration.agent.support import Client, StartAgent, change, eventually

# Start and stop


def test_serves_and_leaves_nothing_behind(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start("mine:app=/app", "--workers", "2", "--threads", "3", "--pid", "agent.pid")
    records = agent.ready(2)
    assert (directory / "agent.pid").read_text().strip() == str(agent.process.pid)
    assert {record.supervisor for record in records} == {agent.process.pid}
    assert len({record.id for record in records}) == 2
    assert all(f"-{record.pid}-" in record.id for record in records)
    assert [(record.name, record.threads) for record in records] == [("mine:app", 3)] * 2
    assert client.get() in {f"one {record.pid}" for record in records}
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert agent.records() == []
    assert client.consumers() == []
    assert agent.gone()
    assert list((directory / "tmp").iterdir()) == []
    assert not (directory / "agent.pid").exists()


def test_log_lines(start: StartAgent, broker: Broker) -> None:
    agent = start("mine:app=/app", "--workers", "2", "--name", "shop")
    agent.ready(2)
    for line in agent.log.splitlines():
        assert re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[\d+\] \[(INFO|WARNING)\] ", line), (
            line
        )
    assert "Serving mine:app on /app as shop" in agent.log
    assert f"Broker {broker.url}, 2 x 4 threads, pid {agent.process.pid}" in agent.log
    assert "gunicorn" not in agent.log.lower()
    assert "WARNING" not in agent.log


def test_term_finishes_what_runs_and_reads_no_more(
    start: StartAgent, client: Client, directory: Path
) -> None:
    agent = start("mine:app=/app", "--lease", "1")
    agent.ready()
    running = client.send("/until/go")
    eventually((directory / "at-go").exists)
    agent.signal(signal.SIGTERM)
    (record,) = eventually(lambda: [each for each in agent.records() if each.state == "stopping"])
    assert record.busy == 1
    late = client.send("/")
    # Its lease goes on while it drains.
    eventually(lambda: agent.records()[0].beat >= record.beat + 4)
    assert client.waiting() == 1
    (directory / "go").touch()
    assert client.reply(running).status == 200
    assert agent.wait() == 0
    assert (client.pending(), client.waiting()) == (0, 1)
    assert client.redis.exists(Keys().of("/app").reply(late)) == 0
    assert agent.records() == []


def test_what_outlasts_the_graceful_timeout_is_cut_off(
    start: StartAgent, client: Client, directory: Path
) -> None:
    agent = start("mine:app=/app", "--graceful-timeout", "0.3")
    agent.ready()
    request_id = client.send("/hang")
    eventually((directory / "hanging").exists)
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert f"Request {request_id} (GET /app/hang) was cut off after" in agent.log
    assert "left 1 unfinished requests on /app" in agent.log
    assert agent.records() == []
    assert client.pending() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_are_quick(
    start: StartAgent, client: Client, directory: Path, number: signal.Signals
) -> None:
    agent = start()
    agent.ready()
    client.send("/hang")
    eventually((directory / "hanging").exists)
    agent.signal(number)
    assert agent.wait(5) == 0
    assert agent.gone()
    assert agent.records() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_no_trouble(start: StartAgent, number: signal.Signals) -> None:
    """As from Ctrl-C in a terminal, or from systemd."""
    agent = start("mine:app=/app", "--workers", "2", "--reload")
    agent.ready(2)
    eventually(lambda: "Watching" in agent.log)
    os.killpg(agent.process.pid, number)
    assert agent.wait(5) == 0
    assert agent.gone()
    assert agent.records() == []
    assert "ERROR" not in agent.log
    assert "Traceback" not in agent.log


def test_int_makes_a_graceful_stop_quick(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start()
    agent.ready()
    client.send("/hang")
    eventually((directory / "hanging").exists)
    agent.signal(signal.SIGTERM)
    eventually(lambda: agent.records()[0].state == "stopping")
    agent.signal(signal.SIGINT)
    assert agent.wait(5) == 0
    assert agent.gone()


def test_stops_while_the_app_is_still_importing(start: StartAgent, directory: Path) -> None:
    change(directory, 'VERSION = "one"', 'VERSION = "one"; (HERE / "importing").touch(); time.sleep(600)')
    agent = start()
    eventually((directory / "importing").exists)
    eventually(lambda: [each.state for each in agent.records()] == ["starting"])
    agent.signal(signal.SIGTERM)
    assert agent.wait(5) == 0
    assert agent.gone()
    assert agent.records() == []


# New code first


def test_hup_waits_for_the_new_code(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start()
    (old,) = agent.ready()
    running = client.send("/until/go")
    eventually((directory / "at-go").exists)
    change(directory, 'VERSION = "one"', '(HERE / "importing").touch(); until("allow"); VERSION = "two"')
    agent.signal(signal.SIGHUP)
    eventually((directory / "importing").exists)
    assert client.get() == f"one {old.pid}"
    states = eventually(lambda: len(found := agent.records()) == 2 and sorted(each.state for each in found))
    assert states == ["ready", "starting"]
    (directory / "allow").touch()
    eventually(lambda: sorted(each.state for each in agent.records()) == ["ready", "stopping"])
    assert client.get().startswith("two ")
    (directory / "go").touch()
    assert client.reply(running).body == f"one {old.pid}".encode()
    (new,) = agent.ready()
    assert new.pid != old.pid
    assert new.code != old.code


def test_hup_replaces_all_workers_without_a_gap(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start("mine:app=/app", "--workers", "2")
    old = {each.pid for each in agent.ready(2)}
    change(directory, '"one"', '"two"')
    agent.signal(signal.SIGHUP)
    seen: list[str] = []
    while not seen or seen[-1].startswith("one") or len(agent.records()) > 2:
        assert any(each.state == "ready" for each in agent.records())
        seen.append(client.get())
    assert old.isdisjoint(each.pid for each in agent.ready(2))
    assert {each.split()[0] for each in seen} == {"one", "two"}


@pytest.mark.parametrize("broken", ["VERSION = )", "1 / 0", "import os; os._exit(3)", "raise SystemExit(0)"])
def test_code_that_does_not_start_changes_nothing(
    start: StartAgent, client: Client, directory: Path, broken: str
) -> None:
    agent = start()
    (old,) = agent.ready()
    change(directory, 'VERSION = "one"', broken)
    agent.signal(signal.SIGHUP)
    eventually(lambda: "The new code does not start, the old workers stay" in agent.log)
    assert agent.ready() == agent.records()
    assert client.get() == f"one {old.pid}"
    change(directory, broken, 'VERSION = "two"')
    agent.signal(signal.SIGHUP)
    eventually(lambda: client.get().startswith("two "))
    agent.ready()


def test_a_second_hup_overtakes_the_first(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start()
    agent.ready()
    change(directory, 'VERSION = "one"', '(HERE / "importing").touch(); until("never"); VERSION = "two"')
    agent.signal(signal.SIGHUP)
    eventually((directory / "importing").exists)
    change(directory, '(HERE / "importing").touch(); until("never"); VERSION = "two"', 'VERSION = "three"')
    agent.signal(signal.SIGHUP)
    eventually(lambda: client.get().startswith("three "))
    agent.ready()
    eventually(lambda: len(agent.members()) == 2)


# Signals


def test_ttin_and_ttou(start: StartAgent, client: Client) -> None:
    agent = start()
    agent.ready()
    agent.signal(signal.SIGTTIN)
    agent.ready(2)
    agent.signal(signal.SIGTTOU)
    (left,) = agent.ready()
    agent.signal(signal.SIGTTOU)
    assert client.get() == f"one {left.pid}"
    assert agent.ready() == [left] or agent.ready()[0].pid == left.pid


def test_usr1_reopens_the_logs_of_every_process(start: StartAgent, client: Client, directory: Path) -> None:
    change(
        directory,
        "def until",
        "import logging\nlogging.getLogger('own').addHandler(logging.FileHandler(HERE / 'own.log'))\n\ndef until",
    )
    change(
        directory,
        'path = environ["PATH_INFO"]',
        'path = environ["PATH_INFO"]; logging.getLogger("own").error(path)',
    )
    agent = start()
    agent.ready()
    client.get("/first")
    (directory / "own.log").rename(directory / "own.log.1")
    agent.signal(signal.SIGUSR1)
    eventually((directory / "own.log").exists)
    client.get("/second")
    assert (directory / "own.log").read_text() == "/second\n"
    assert (directory / "own.log.1").read_text() == "/first\n"
