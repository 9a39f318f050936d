"""``flaskbus dev`` as a person uses it: started in a directory with apps, looked at, edited, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.conftest import Broker, free_port, start_broker, stop_broker

from .procs import PATIENCE, alive, command_line, descendants, wait_until

SHOP = """
from wsgiref.validate import validator

from flask import Flask, url_for

app = Flask(__name__)
app.wsgi_app = validator(app.wsgi_app)

@app.get("/")
def home():
    return f"shop {url_for('home')} ONE"

@app.get("/boom")
def boom():
    raise RuntimeError("the app's own mistake")
"""
BARE = """
from wsgiref.validate import validator

@validator
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"bare " + environ["SCRIPT_NAME"].encode()]
"""


class Dev:
    """A running ``flaskbus dev`` on a port of its own, and what it writes."""

    def __init__(self, directory: Path, *arguments: str, port: int = 0, **environ: str):
        self.directory = directory
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._output, self._errors = directory / "dev.log", directory / "dev.err"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "flaskbus", "dev", "--port", str(self.port), *arguments],
                cwd=directory,
                env={**os.environ, **environ},
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait_for(self, *words: str) -> str:
        """Wait for a line with all these words; the whole output."""

        def found() -> bool:
            return any(all(word in line for word in words) for line in self.output.splitlines())

        wait_until(lambda: found() or self.popen.poll() is not None, " ".join(words))
        assert found(), self.output + self.errors
        return self.output

    def ready(self) -> str:
        """Wait for the banner's end."""
        return self.wait_for("Ctrl-C ends everything.")

    def family(self) -> list[int]:
        return descendants(self.popen.pid)

    def child(self, words: str) -> int:
        """The direct child with these words on its command line."""
        found = [pid for pid in self.family() if words in command_line(pid) and self.popen.pid == parent(pid)]
        assert len(found) == 1, found
        return found[0]

    def broker_url(self) -> str:
        match = re.search(r"Broker: (\S+)", self.output)
        assert match
        return match[1]

    def end(self) -> int:
        return self.popen.wait(PATIENCE)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Callable[..., Dev]]:
    """Start ``flaskbus dev`` with options, in a directory with the apps ``shop`` and ``bare``."""
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "bare.py").write_text(BARE)
    started: list[Dev] = []

    def start(*arguments: str, **options: Any) -> Dev:
        started.append(Dev(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for each in started:
        family = each.family()
        each.popen.kill()
        each.popen.wait()
        wait_until(lambda family=family: not alive(family), "all gone")  # type: ignore[misc]


def test_two_apps_new_code_a_traceback_and_ctrl_c(dev: Callable[..., Dev], tmp_path: Path) -> None:
    bus = dev("shop:app=/shop", "bare:app=/bare")
    banner = bus.ready()
    assert re.search(rf"{bus.url}/shop/  shop:app  ready", banner)
    assert re.search(rf"{bus.url}/bare/  bare:app  ready", banner)
    assert f"curl -i {bus.url}/shop/" in banner
    assert f"agent shop:app --prefix /shop --redis {bus.broker_url()}\n" in banner
    assert "XINFO GROUPS 'flaskbus:{/shop}:requests'" in banner
    assert "(private, " in banner
    assert "\x1b" not in banner

    assert httpx.get(f"{bus.url}/shop/").text == "shop /shop/ ONE"
    assert httpx.get(f"{bus.url}/bare/").text == "bare /bare"
    bus.wait_for('"GET /bare/ HTTP/1.1" 200')
    page = httpx.get(f"{bus.url}/shop/boom")
    assert page.status_code == 500
    assert "the app's own mistake" in page.text
    assert "__debugger__" in page.text
    bus.wait_for("PIN is")
    missing = httpx.get(f"{bus.url}/elsewhere")
    assert missing.status_code == 404
    assert "flaskbus-agent" in missing.json()["detail"]

    bus.wait_for("/shop   | [", "Watching")
    (tmp_path / "shop.py").write_text(SHOP.replace("ONE", "TWO"))
    wait_until(lambda: httpx.get(f"{bus.url}/shop/").text == "shop /shop/ TWO", "the new code")

    family = bus.family()
    broker = bus.broker_url()
    assert len(family) >= 7  # gateway and two agents with their workers, and the broker
    bus.popen.send_signal(signal.SIGINT)
    assert bus.end() == 0
    assert not alive(family)
    assert not bus.errors
    with redis.Redis.from_url(broker) as client, pytest.raises(redis.exceptions.ConnectionError):
        client.ping()
    with pytest.raises(httpx.ConnectError):
        httpx.get(bus.url)


def test_a_named_broker_is_used_left_and_kept_secret(dev: Callable[..., Dev], tmp_path: Path) -> None:
    broker = start_broker("valkey", tmp_path)
    try:
        with broker.client() as client:
            client.config_set("requirepass", "hush-hush")
        url = broker.url.replace("redis://", "redis://:hush-hush@")
        bus = dev("bare:app", FLASKBUS_REDIS_URL=url, REDIS_URL="redis://127.0.0.1:1")
        banner = bus.ready()
        assert bus.broker_url() == url.replace("hush-hush", "***")
        assert "(from FLASKBUS_REDIS_URL)" in banner
        assert '--redis "$FLASKBUS_REDIS_URL"' in banner
        assert httpx.get(f"{bus.url}/page").text == "bare "
        with redis.Redis.from_url(url) as client:
            assert client.hlen("flaskbus:{/}:agents") == 1
            family = bus.family()
            assert not any("hush-hush" in command_line(pid) for pid in family)
            bus.popen.send_signal(signal.SIGTERM)
            assert bus.end() == 0
            assert not alive(family)
            assert client.hlen("flaskbus:{/}:agents") == 0
            assert client.hlen("flaskbus:gateways") == 0
        assert "hush-hush" not in bus.output + bus.errors
    finally:
        stop_broker(broker)


def test_no_process_outlives_a_killed_dev(dev: Callable[..., Dev]) -> None:
    bus = dev("bare:app=/bare")
    bus.ready()
    family = bus.family()
    bus.popen.kill()
    bus.popen.wait()
    wait_until(lambda: not alive(family), "all gone")


def test_a_hanging_request_does_not_delay_a_second_ctrl_c(dev: Callable[..., Dev], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef app(environ, start_response):\n    print('hanging')\n    time.sleep(600)\n"
    )
    bus = dev("slow:app=/")
    bus.ready()
    with subprocess.Popen(["curl", "-s", f"{bus.url}/"], stdout=subprocess.DEVNULL) as client:
        bus.wait_for("/       | hanging")
        family = bus.family()
        bus.popen.send_signal(signal.SIGINT)
        bus.wait_for("Stopping")

        def ended() -> bool:
            bus.popen.send_signal(signal.SIGINT)
            try:
                return bus.popen.wait(0.5) == 0
            except subprocess.TimeoutExpired:
                return False

        wait_until(ended, "dev ended")
        assert not alive(family)
        client.wait()


def test_an_app_that_cannot_be_imported_is_loaded_once_it_can(
    dev: Callable[..., Dev], tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text("import no_such_module\n")
    bus = dev("late:app=/late", "bare:app=/bare")
    assert re.search(r"late:app  failed: see the log", bus.ready())
    assert "ModuleNotFoundError: No module named 'no_such_module'" in bus.output
    page = httpx.get(f"{bus.url}/late/")
    assert page.status_code == 500
    assert "no_such_module" in page.text
    bus.wait_for("/late   | [", "Watching")
    (tmp_path / "late.py").write_text(BARE)
    wait_until(lambda: httpx.get(f"{bus.url}/late/").text == "bare /late", "the mended app")


def test_without_reload_an_app_that_cannot_be_imported_ends_its_agent(
    dev: Callable[..., Dev], tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text("import no_such_module\n")
    bus = dev("late:app=/late", "bare:app=/bare", "--no-reload")
    assert re.search(r"late:app  failed: see the log", bus.ready())
    assert "The agent of late:app on /late ended with exit code 4." in bus.output
    assert "ModuleNotFoundError: No module named 'no_such_module'" in bus.output
    assert httpx.get(f"{bus.url}/bare/").text == "bare /bare"

    alone = dev("late:app", "--no-reload")
    assert alone.end() == 4
    assert "No agent is left" in alone.output


def test_who_dies_is_named(dev: Callable[..., Dev]) -> None:
    bus = dev("shop:app=/shop", "bare:app=/bare")
    bus.ready()
    os.kill(bus.child("flaskbus_agent shop:app"), signal.SIGKILL)
    bus.wait_for("The agent of shop:app on /shop was killed by signal 9.")
    assert httpx.get(f"{bus.url}/bare/").text == "bare /bare"
    family = bus.family()
    with redis.Redis.from_url(bus.broker_url()) as client:
        broker = client.info("server")["process_id"]
    os.kill(broker, signal.SIGKILL)
    assert bus.end() == 3
    assert bus.errors == f"flaskbus: error: the private broker (pid {broker}) ended; everything stops\n"
    assert not alive(family)


def test_a_gateway_that_dies_ends_everything(dev: Callable[..., Dev]) -> None:
    bus = dev("bare:app=/bare")
    bus.ready()
    family = bus.family()
    os.kill(bus.child("flaskbus_gateway"), signal.SIGKILL)
    assert bus.end() == 3
    assert bus.errors == "flaskbus: error: the gateway was killed by signal 9; everything stops\n"
    assert not alive(family)


def test_a_port_in_use_is_one_line(dev: Callable[..., Dev], broker: Broker) -> None:
    taken = int(broker.url.rpartition(":")[2].partition("/")[0])
    bus = dev("bare:app=/bare", port=taken)
    assert bus.end() == 3
    assert bus.output == ""
    assert re.fullmatch(rf"flaskbus: error: .*{taken}.*--port\n", bus.errors)


def test_apps_and_their_place_from_the_configuration_file(dev: Callable[..., Dev], tmp_path: Path) -> None:
    apps = tmp_path / "apps"
    apps.mkdir()
    (tmp_path / "shop.py").rename(apps / "shop.py")
    # What is meant for production must not keep development from working.
    (tmp_path / "flaskbus.toml").write_text(
        'apps = ["shop:app=/shop"]\n[agent]\nchdir = "apps"\npreload = true\nworkers = 2\n[gateway]\npid = "pid"\n'
    )
    bus = dev("--namespace", "other", "--no-debugger")
    banner = bus.ready()
    assert "XINFO GROUPS 'other:{/shop}:requests'" in banner
    assert "--prefix /shop --namespace other --redis" in banner
    assert httpx.get(f"{bus.url}/shop/").text == "shop /shop/ ONE"
    assert "__debugger__" not in httpx.get(f"{bus.url}/shop/boom").text
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "which app?"),
        (["shop:app", "bare:app"], 2, "where is shop:app mounted?"),
        (["shop:app=/x", "bare:app=/x"], 2, "both mounted on /x"),
        (["shop:app=x"], 2, "did you mean /x"),
        (["shop:app", "--chdir", "nowhere"], 2, "--chdir nowhere"),
        (["shop:app", "--debugger", "--host", "0.0.0.0"], 2, "loopback"),
        (["shop:app", "--redis", "redis://:secret@127.0.0.1:1/0"], 3, "redis://:***@127.0.0.1:1/0"),
    ],
)
def test_a_mistake_is_one_line(dev: Callable[..., Dev], arguments: list[str], code: int, says: str) -> None:
    bus = dev(*arguments)
    assert bus.end() == code
    assert says in bus.errors
    assert bus.errors.count("\n") == 1
    assert "secret" not in bus.errors
    assert bus.output == ""
