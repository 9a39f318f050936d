"""Reload, error pages and the debugger."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.integration.agent.support import Client, StartAgent, change, eventually


def test_reload_serves_each_change_and_shows_what_is_broken(
    start: StartAgent, client: Client, directory: Path
) -> None:
    agent = start("mine:app=/app", "--reload")
    agent.ready()
    eventually(lambda: "Watching" in agent.log)
    assert client.get().startswith("one ")
    change(directory, 'VERSION = "one"', "VERSION = 1 / 0  # <oops>")
    eventually(lambda: not client.get().startswith("one "))
    agent.ready()
    page = client.reply(client.send("/"))
    assert page.status == 500
    assert dict(page.headers)[b"Content-Type"] == b"text/html; charset=utf-8"
    assert b"ZeroDivisionError: division by zero" in page.body
    assert b"VERSION = 1 / 0  # &lt;oops&gt;" in page.body
    change(directory, "VERSION = 1 / 0  # <oops>", 'VERSION = "two"')
    eventually(lambda: client.get().startswith("two "))
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert agent.gone()


def test_reload_starts_with_broken_code(start: StartAgent, client: Client, directory: Path) -> None:
    change(directory, 'VERSION = "one"', "VERSION = )")
    agent = start("mine:app=/app", "--reload")
    agent.ready()
    eventually(lambda: "Watching" in agent.log)
    assert "SyntaxError" in client.get()
    assert "[ERROR] mine:app could not be imported: SyntaxError" in agent.log
    change(directory, "VERSION = )", 'VERSION = "two"')
    eventually(lambda: client.get().startswith("two "))


def test_the_watcher_dies_with_its_supervisor(start: StartAgent) -> None:
    agent = start("mine:app=/app", "--reload")
    agent.ready()
    eventually(lambda: "Watching" in agent.log)
    agent.signal(signal.SIGKILL)
    agent.wait()
    eventually(agent.gone)


def test_debugger(start: StartAgent, client: Client) -> None:
    agent = start("mine:app=/app", "--debugger", "--workers", "3")
    agent.ready(1)
    page = client.reply(client.send("/raise"))
    assert page.status == 500
    assert b"one of those days" in page.body
    assert b"EVALEX = true" in page.body
    assert re.search(r"its PIN is \d{3}-\d{3}-\d{3}", agent.log)
