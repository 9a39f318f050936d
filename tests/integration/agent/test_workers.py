"""The life of single workers: how they begin, die, are replaced, and are stopped when they hang."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.integration.agent.support import Client, StartAgent, change, eventually

# Begin and end


@pytest.mark.parametrize("preload", [True, False])
def test_preload_imports_once_and_the_hook_runs_in_each_worker(
    start: StartAgent, client: Client, directory: Path, preload: bool
) -> None:
    change(
        directory,
        "def until",
        "def note(what):\n"
        "    with (HERE / what).open('a') as file: file.write(f'{os.getpid()}\\n')\n"
        "note('imports')\n"
        "def hook(worker):\n    assert worker.pid == os.getpid()\n    note('hooks')\n\n"
        "def until",
    )
    options = ["--preload"] if preload else []
    agent = start("mine:app=/app", "--workers", "2", "--on-worker-start", "mine:hook", *options)
    pids = {str(each.pid) for each in agent.ready(2)}
    assert client.get().split()[1] in pids
    imports = (directory / "imports").read_text().split()
    assert imports == [str(agent.process.pid)] if preload else set(imports) == pids
    assert set((directory / "hooks").read_text().split()) == pids


def test_max_requests_replaces_workers_and_loses_nothing(start: StartAgent, client: Client) -> None:
    agent = start("mine:app=/app", "--max-requests", "20", "--max-requests-jitter", "5")
    (first,) = agent.ready()
    answers: list[bytes] = []
    while len({*answers}) < 3:
        sent = [client.send("/") for _ in range(10)]
        answers += [client.reply(request_id).body for request_id in sent]
        assert any(each.state == "ready" for each in agent.records())
    assert answers.count(f"one {first.pid}".encode()) >= 20
    agent.ready()
    assert (client.pending(), client.waiting()) == (0, 0)
    assert agent.log.count("requests and is replaced") >= 2


def test_a_worker_without_a_successor_goes_on(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start("mine:app=/app", "--max-requests", "5")
    (old,) = agent.ready()
    change(directory, 'VERSION = "one"', "VERSION = 1 / 0")
    for _ in range(20):
        assert client.get() == f"one {old.pid}"
    eventually(lambda: "A worker could not start: mine:app could not be imported" in agent.log)
    assert client.get() == f"one {old.pid}"
    assert sorted(each.state for each in agent.records() if each.state != "starting") == ["failed", "ready"]
    change(directory, "VERSION = 1 / 0", 'VERSION = "two"')
    eventually(lambda: client.get().startswith("two "))


def test_a_dead_worker_is_reported_at_once_and_replaced(start: StartAgent, client: Client) -> None:
    agent = start("mine:app=/app", "--lease", "600")
    (old,) = agent.ready()
    client.send("/die")
    eventually(lambda: old.id not in {each.id for each in agent.records()}, 3)
    new = agent.successor(old)
    assert client.get() == f"one {new.pid}"
    assert f"Worker {old.pid} was ended by SIGKILL" in agent.log
    assert "left 1 unfinished requests" in agent.log
    # What it held is for the gateways to judge.
    assert old.id in client.consumers()


def test_workers_of_a_dead_supervisor_finish_and_leave(
    start: StartAgent, client: Client, directory: Path
) -> None:
    agent = start("mine:app=/app", "--lease", "1")
    (worker,) = agent.ready()
    running = client.send("/until/go")
    eventually((directory / "at-go").exists)
    agent.signal(signal.SIGKILL)
    agent.wait()
    (record,) = eventually(lambda: [each for each in agent.records() if each.state == "stopping"])
    assert record.beat > worker.beat
    client.send("/")
    eventually(lambda: agent.records()[0].beat >= record.beat + 3)
    assert client.waiting() == 1
    (directory / "go").touch()
    assert client.reply(running).body == f"one {worker.pid}".encode()
    eventually(agent.gone)
    assert agent.records() == []


# Handlers that hang


def test_kill_after_shows_the_stack_and_replaces_the_process(
    start: StartAgent, client: Client, directory: Path
) -> None:
    agent = start("mine:app=/app", "--kill-after", "0.5", "--threads", "2")
    (old,) = agent.ready()
    hanging = client.send("/hang")
    eventually((directory / "hanging").exists)
    eventually(lambda: "this process is replaced" in agent.log)
    assert f"Request {hanging} (GET /app/hang) runs for more than 0.5 s" in agent.log
    assert "in hang_here" in agent.log
    eventually(lambda: old.pid not in agent.members())
    new = agent.successor(old)
    assert client.get() == f"one {new.pid}"
    assert client.pending() == 1
    assert "ERROR] Worker" not in agent.log


def test_kill_after_lets_the_other_threads_finish(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start("mine:app=/app", "--kill-after", "2", "--threads", "2")
    (old,) = agent.ready()
    client.send("/hang")
    eventually((directory / "hanging").exists)
    began = time.monotonic()
    # The other is younger, so it is not overdue too.
    eventually(lambda: time.monotonic() > began + 1)
    other = client.send("/until/go")
    eventually((directory / "at-go").exists)
    eventually(lambda: "this process is replaced" in agent.log)
    new = eventually(
        lambda: [each for each in agent.records() if each.state == "ready" and each.id != old.id]
    )[0]
    assert old.pid in agent.members()
    assert client.get() == f"one {new.pid}"
    (directory / "go").touch()
    assert client.reply(other).body == f"one {old.pid}".encode()
    eventually(lambda: old.pid not in agent.members())


def test_a_handler_that_holds_the_interpreter(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start("mine:app=/app", "--kill-after", "1.5", "--lease", "1")
    (old,) = agent.ready()
    client.send("/hold")
    eventually((directory / "holding").exists)
    beat = agent.records()[0].beat
    eventually(lambda: agent.records()[0].id == old.id and agent.records()[0].beat >= beat + 3)
    eventually(lambda: old.pid not in agent.members())
    assert f"Worker {old.pid}: a handler has kept every other thread from running" in agent.log
    assert re.search(r'File ".*mine\.py", line \d+ in app', agent.log)
    new = agent.successor(old)
    assert client.get() == f"one {new.pid}"


def test_without_kill_after_slow_is_not_dead(start: StartAgent, client: Client, directory: Path) -> None:
    agent = start("mine:app=/app", "--lease", "0.5")
    (old,) = agent.ready()
    slow = client.send("/until/go")
    eventually((directory / "at-go").exists)
    beat = agent.records()[0].beat
    eventually(lambda: agent.records()[0].beat > beat + 12)
    (directory / "go").touch()
    assert client.reply(slow).body == f"one {old.pid}".encode()
