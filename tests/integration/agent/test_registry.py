"""What an agent makes of its broker, of other agents, and of an app that does not start."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Broker, free_port, start_broker, stop_broker
from tests.integration.agent.support import APP, Client, StartAgent, change, eventually


def test_a_broker_that_is_away_is_waited_for(
    start: StartAgent, tmp_path: Path, socket_broker: Callable[[], Broker]
) -> None:
    agent = start(url=f"unix://{tmp_path}/own/s")
    eventually(lambda: "cannot be used" in agent.log)
    broker = socket_broker()
    agent.ready()
    client = Client(broker)
    assert client.get().startswith("one ")
    stop_broker(broker)
    eventually(lambda: agent.log.count("cannot be used") == 2)
    broker = socket_broker()
    agent.ready()
    eventually(lambda: agent.log.count("is back") == 2)
    assert client.get().startswith("one ")
    stop_broker(broker)
    eventually(lambda: agent.log.count("cannot be used") == 3)
    agent.signal(signal.SIGTERM)
    assert agent.wait(8) == 0
    client.redis.close()
    assert "Traceback" not in agent.log


def test_a_broker_that_is_away_does_not_delay_signals(start: StartAgent) -> None:
    port = free_port()
    agent = start(url=f"redis://:hunter2@127.0.0.1:{port}/0")
    eventually(lambda: "cannot be used" in agent.log)
    assert f"The broker at redis://:***@127.0.0.1:{port}/0 cannot be used: " in agent.log
    assert "hunter2" not in agent.log
    agent.signal(signal.SIGTERM)
    assert agent.wait(5) == 0
    assert agent.log.count("cannot be used") == 1


@pytest.mark.parametrize(
    ("setting", "value", "mend"),
    [
        ("requirepass", "hunter2", "password"),
        ("maxmemory-policy", "allkeys-lru", "CONFIG SET maxmemory-policy noeviction"),
    ],
)
def test_a_broker_that_cannot_be_used_ends_the_start(
    start: StartAgent, tmp_path: Path, setting: str, value: str, mend: str
) -> None:
    (tmp_path / "broker").mkdir()
    own = start_broker("valkey", tmp_path / "broker")
    try:
        with own.client() as client:
            client.config_set(setting, value)
        agent = start(url=own.url)
        assert agent.wait() == 3
    finally:
        stop_broker(own)
    assert mend in agent.log
    assert "Traceback" not in agent.log
    assert "Booting" not in agent.log


def test_a_mount_of_another_app_is_refused(start: StartAgent, client: Client) -> None:
    first = start("mine:app=/app", "--name", "shop")
    first.ready()
    second = start()
    assert second.wait() == 3
    assert "/app belongs to the app 'shop', not to 'mine:app'" in second.log
    assert "--replace" in second.log
    assert [each.name for each in first.ready()] == ["shop"]
    assert client.get().startswith("one ")


def test_a_replaced_agent_ends(start: StartAgent, client: Client) -> None:
    first = start("mine:app=/app", "--name", "shop", "--lease", "1")
    first.ready()
    second = start("mine:app=/app", "--replace")
    assert first.wait() == 3
    assert "/app belongs to the app 'mine:app', not to 'shop'" in first.log
    (record,) = second.ready()
    assert record.name == "mine:app"
    assert client.get() == f"one {record.pid}"


def test_a_replaced_mount_is_dropped_and_the_others_stay(
    start: StartAgent, client: Client, directory: Path
) -> None:
    (directory / "other.py").write_text(APP)
    first = start("mine:app=/app", "other:app=/other", "--lease", "1")
    (old,) = first.ready()
    second = start("mine:app=/app", "--name", "shop", "--replace")
    eventually(lambda: "this agent no longer serves it" in first.log)
    eventually(lambda: [each.name for each in second.records()] == ["shop"])
    (record,) = second.ready()
    # What the first had asked for already may still be its own.
    eventually(lambda: client.get() == f"one {record.pid}")
    assert {client.get() for _ in range(20)} == {f"one {record.pid}"}
    assert client.get("/", "/other") == f"one {old.pid}"
    first.signal(signal.SIGHUP)
    eventually(lambda: client.get("/", "/other") != f"one {old.pid}")
    assert {client.get() for _ in range(20)} == {f"one {record.pid}"}
    assert second.ready() == second.records()


@pytest.mark.parametrize("preload", [True, False])
def test_an_app_that_cannot_be_imported(start: StartAgent, directory: Path, preload: bool) -> None:
    change(directory, 'VERSION = "one"', "VERSION = 1 / 0")
    agent = start("mine:app=/app", "--workers", "2", *(["--preload"] if preload else []))
    assert agent.wait() == 4
    assert "ZeroDivisionError: division by zero" in agent.log
    assert agent.gone()
    # One record says why, until its lease is over, so that nobody is held in vain.
    (record,) = agent.records()
    assert record.state == "failed"
    assert "ZeroDivisionError: division by zero" in record.reason


def test_a_module_that_does_not_exist(start: StartAgent) -> None:
    agent = start("mien:app=/app")
    assert agent.wait() == 4
    assert "Traceback" not in agent.log
    (record,) = agent.records()
    assert record.state == "failed"
    assert "mien" in record.reason


def test_a_failed_hook_ends_the_start(start: StartAgent) -> None:
    agent = start("mine:app=/app", "--on-worker-start", "mine:nothing")
    assert agent.wait() == 4
    assert "nothing" in agent.log


def test_code_that_breaks_later_does_not_end_the_agent(
    start: StartAgent, client: Client, directory: Path
) -> None:
    agent = start()
    agent.ready()
    change(directory, 'VERSION = "one"', "VERSION = 1 / 0")
    client.send("/die")
    (record,) = eventually(lambda: [each for each in agent.records() if each.state == "failed"])
    assert "ZeroDivisionError" in record.reason
    change(directory, "VERSION = 1 / 0", 'VERSION = "two"')
    agent.ready()
    assert client.get().startswith("two ")


def test_a_pid_file_that_is_in_use(start: StartAgent, directory: Path) -> None:
    (directory / "agent.pid").write_text(str(os.getpid()))
    agent = start("mine:app=/app", "--pid", "agent.pid")
    assert agent.wait() == 3
    assert f"Already running on PID {os.getpid()}" in agent.log
    assert "Traceback" not in agent.log
