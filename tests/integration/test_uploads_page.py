"""docs/howto/uploads.md, tried: its commands as they stand there, and its configuration of nginx."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.conftest import Broker, free_port
from tests.integration.fleet import Fleet, eventually
from tests.integration.test_readme import read, shell

PAGE = (Path(__file__).parents[2] / "docs/howto/uploads.md").read_text(encoding="utf-8")
SECTIONS, FILES = read(PAGE)


@pytest.mark.slow
def test_commands(tmp_path: Path, broker: Broker) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    home = tmp_path / "home"
    home.mkdir()
    for name, text in FILES.items():
        (home / name).write_text(text, encoding="utf-8")
    with shell(home, broker) as own:
        for step in SECTIONS["Try it"]:
            own.try_step(step)


def test_behind_nginx(tmp_path: Path, broker: Broker) -> None:
    """The app has the first part before the last is sent, and more than nginx takes by default."""
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    (tmp_path / "store.py").write_text(FILES["store.py"], encoding="utf-8")
    port = free_port()
    with Fleet(tmp_path, broker.url) as fleet:
        _, url = fleet.gateway()
        fleet.start("agent", "flaskbus_agent", "store:app", "--prefix", "/store")
        eventually(lambda: httpx.post(f"{url}/store/closed").status_code == 403, "agent")
        (location,) = re.findall(r"^```nginx\n(.*?)^```$", PAGE, re.M | re.S)
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/nginx.pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; client_body_temp_path {tmp_path}/bodies; server {{ listen 127.0.0.1:{port};\n"
            f"{location.replace('http://127.0.0.1:5000', url)} }} }}"
        )
        command = [nginx, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        with (tmp_path / "nginx.log").open("wb") as log:
            server = subprocess.Popen(command, stderr=log)
        try:
            eventually(lambda: listens(port), "nginx")
            size = 2 << 20
            with socket.create_connection(("127.0.0.1", port), 30) as sock:
                head = f"PUT /store/files/half HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n"
                sock.sendall(head.encode() + bytes(size // 2))
                part = tmp_path / "half.part"
                eventually(lambda: part.exists() and part.stat().st_size > 0, "the app has begun")
                sock.sendall(bytes(size // 2))
                assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
            assert httpx.post(f"http://127.0.0.1:{port}/store/closed", content=bytes(size)).status_code == 403
        finally:
            server.terminate()
            server.wait(30)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
