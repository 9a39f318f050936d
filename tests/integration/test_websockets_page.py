"""docs/howto/websockets.md, tried: its commands as they stand there, and its configuration of nginx."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from tests.conftest import Broker, free_port
from tests.integration.fleet import Fleet, eventually
from tests.integration.test_readme import read, shell

PAGE = (Path(__file__).parents[2] / "docs/howto/websockets.md").read_text(encoding="utf-8")
SECTIONS, FILES = read(PAGE)


def test_commands(tmp_path: Path, broker: Broker) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    home = tmp_path / "home"
    home.mkdir()
    with shell(home, broker) as own:
        for name, text in FILES.items():
            (home / name).write_text(own.own(text), encoding="utf-8")
        for step in SECTIONS["Try it"]:
            own.try_step(step)


def test_behind_nginx(tmp_path: Path, broker: Broker) -> None:
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    (tmp_path / "chat.py").write_text(FILES["chat.py"], encoding="utf-8")
    port = free_port()
    with Fleet(tmp_path, broker.url) as fleet:
        _, url = fleet.gateway()
        fleet.start("agent", "flaskbus_agent", "chat:app", "--prefix", "/chat")
        eventually(lambda: httpx.get(f"{url}/chat/echo").status_code == 400, "agent")
        location, upgrade = re.findall(r"^```nginx\n(.*?)^```$", PAGE, re.M | re.S)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/nginx.pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; {upgrade} server {{ listen 127.0.0.1:{port};\n"
            f"{location.replace('http://127.0.0.1:5000', url)} }} }}"
        )
        command = [nginx, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        with (tmp_path / "nginx.log").open("wb") as log:
            server = subprocess.Popen(command, stderr=log)
        try:
            own = f"http://127.0.0.1:{port}"
            plain = httpx.Client(trust_env=False)
            with plain:
                eventually(lambda: reached(plain, f"{own}/chat/echo"), (tmp_path / "nginx.log").read_text())
            target = f"ws://127.0.0.1:{port}/chat/echo"
            with connect(target, origin=Origin(own), subprotocols=[Subprotocol("chat")]) as client:
                assert client.subprotocol == "chat"
                for message in ("text", b"x" * 300_000):
                    client.send(message)
                    assert client.recv(timeout=20) == message
                client.close(4001)
            with pytest.raises(InvalidStatus) as caught, connect(target, origin=Origin(url)):
                pass
            assert caught.value.response.status_code == 403
        finally:
            server.terminate()
            server.wait(10)


def reached(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 400
    except httpx.HTTPError:
        return False
