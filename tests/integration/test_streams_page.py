"""docs/howto/streams.md, tried: its commands as they stand there, and its configuration of nginx."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.conftest import Broker, free_port
from tests.integration.fleet import Fleet, eventually
from tests.integration.test_readme import read, shell

PAGE = (Path(__file__).parents[2] / "docs/howto/streams.md").read_text(encoding="utf-8")
SECTIONS, FILES = read(PAGE)


def test_commands(tmp_path: Path, broker: Broker) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    home = tmp_path / "home"
    home.mkdir()
    with shell(home, broker) as own:
        for name, text in FILES.items():
            (home / name).write_text(text, encoding="utf-8")
        for step in SECTIONS["Try it"]:
            own.try_step(step)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_behind_nginx(tmp_path: Path, broker: Broker, version: str) -> None:
    """Also where it speaks HTTP/1.0 to the gateway, as older ones do unless they are told otherwise."""
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    (tmp_path / "clock.py").write_text(FILES["clock.py"], encoding="utf-8")
    port = free_port()
    with Fleet(tmp_path, broker.url) as fleet:
        _, url = fleet.gateway()
        agent = fleet.start("agent", "flaskbus_agent", "clock:app", "--prefix", "/clock")
        eventually(lambda: httpx.get(f"{url}/clock/file").status_code == 200, "agent")
        (location,) = re.findall(r"^```nginx\n(.*?)^```$", PAGE, re.M | re.S)
        location = location.replace("proxy_http_version 1.1", f"proxy_http_version {version}")
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/nginx.pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; server {{ listen 127.0.0.1:{port};\n"
            f"{location.replace('http://127.0.0.1:5000', url)} }} }}"
        )
        command = [nginx, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        with (tmp_path / "nginx.log").open("wb") as log:
            server = subprocess.Popen(command, stderr=log)
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}/clock", timeout=20, trust_env=False
            ) as client:
                eventually(lambda: reached(client), (tmp_path / "nginx.log").read_text())
                with client.stream("GET", "/events") as answer:
                    lines = answer.iter_lines()
                    assert [next(lines) for _ in range(2)] == ["id: 1", "data: tick 1"]
                eventually(lambda: "the client is gone" in agent.log(), "the generator is closed")
                assert client.get("/lines").text.count("\n") == 100_000
                with pytest.raises(httpx.RemoteProtocolError):
                    client.get("/broken")
        finally:
            server.terminate()
            server.wait(10)


def reached(client: httpx.Client) -> bool:
    try:
        return client.get("/file").status_code == 200
    except httpx.HTTPError:
        return False
