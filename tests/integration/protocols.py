"""The apps of :mod:`tests.integration.apps.protocols` twice: behind the bus, and under gunicorn with threads."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest

from flaskbus import embedded
from flaskbus.broker import connect
from flaskbus.testing import running_bus
from tests.conftest import free_port
from tests.integration.apps.protocols import MODULE, MOUNTS, prepare
from tests.integration.fleet import Program, eventually

ROOT = Path(__file__).parents[2]
THREADS = 8

GROUP = (
    "aiohttp", "boto3", "dulwich", "httpx_sse", "mercurial", "moto", "pypiserver", "socketio", "tusclient",
    "twine", "webdav3", "wsgidav",
)  # fmt: skip
"""Modules of the dependency group "protocols"."""


@dataclass(frozen=True)
class Served:
    """The apps at one URL; ``root`` has what they store, ``log`` what they say."""

    name: str
    url: str
    root: Path
    program: Program


@dataclass(frozen=True)
class Both:
    """The same apps twice."""

    bus: Served
    direct: Served
    broker_url: str

    def __iter__(self) -> Iterator[Served]:
        return iter((self.direct, self.bus))

    def left(self) -> list[str]:
        """What the broker still has of any request."""
        with connect(self.broker_url) as broker:
            client: Any = broker
            lists = [key.decode() for kind in ("inbound", "reply") for key in client.scan_iter(f"*:{kind}:*")]
            waiting = [key.decode() for key in client.scan_iter("*:requests") if client.xlen(key)]
        return lists + waiting

    def at_rest(self) -> None:
        """Wait until the broker has nothing left of any request."""
        try:
            eventually(lambda: not self.left(), "nothing is left in the broker")
        except AssertionError as error:
            error.add_note(f"left: {self.left()}")
            raise


@contextmanager
def both(folder: Path) -> Iterator[Both]:
    """Start a broker, a gateway, an agent process with all apps, and gunicorn with the same.

    The test is skipped, by name, where something is missing that these need.
    """
    # Not imported: some of them change how others are.
    if missing := [module for module in GROUP if find_spec(module) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (pip install --group protocols)")
    needs("git")
    apps = [f"{MODULE}:{app.removesuffix('_app')}={prefix}" for prefix, app in MOUNTS.items()]
    port = free_port()
    with embedded.start() as broker, running_bus(broker.url) as bus:
        agent = _start(
            folder / "bus",
            "flaskbus_agent",
            f"--threads={THREADS}",
            *apps,
            FLASKBUS_REDIS_URL=broker.url,
        )
        direct = _start(
            folder / "direct",
            "gunicorn",
            "--worker-class=gthread",
            f"--threads={THREADS}",
            f"--bind=127.0.0.1:{port}",
            f"{MODULE}:create_app()",
        )
        found = Both(
            Served("bus", bus.url, folder / "bus", agent),
            Served("direct", f"http://127.0.0.1:{port}", folder / "direct", direct),
            broker.url,
        )
        try:
            for served in found:
                eventually(partial(_serves, served), f"{served.name} serves")
            yield found
        finally:
            for served in found:
                served.program.kill()
                print(f"--- {served.name}\n{served.program.log()}")  # shown where a test fails


def _start(root: Path, module: str, *options: str, **environ: str) -> Program:
    root.mkdir()
    prepare(root)
    run("git", "init", "--quiet", "--bare", "--initial-branch=main", "git/both.git", cwd=root)
    run("git", "-C", "git/both.git", "config", "http.receivepack", "true", cwd=root)
    run("hg", "init", "hg", cwd=root)
    (root / "hg/.hg/hgrc").write_text("[web]\nallow_push = *\npush_ssl = false\n")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ |= {**ALONE, "HOME": str(root), "PYTHONPATH": path, "PROTOCOLS_ROOT": str(root)}
    return Program(root / "log", module, *options, **environ)


def _serves(served: Served) -> bool:
    assert served.program.process.poll() is None, served.program.log()
    try:
        return httpx.get(f"{served.url}/small/open", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def needs(program: str) -> None:
    """Skip the test where a program is missing."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (apt-get install {program})")


def run(*command: str, cwd: Path, input: bytes | None = None, **environ: str) -> str:  # noqa: A002
    """What a program prints, on either output; :class:`AssertionError` where it fails."""
    done = attempt(*command, cwd=cwd, input=input, **environ)
    assert done.returncode == 0, done.stdout.decode(errors="replace")
    return done.stdout.decode(errors="replace")


def attempt(
    *command: str,
    cwd: Path,
    input: bytes | None = None,  # noqa: A002
    **environ: str,
) -> subprocess.CompletedProcess[bytes]:
    """What became of a program; its errors are among its output."""
    scripts = str(Path(sys.executable).parent)
    return subprocess.run(
        command,
        cwd=cwd,
        input=input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", **ALONE, **environ},
        timeout=60,
        check=False,
    )


ALONE: Mapping[str, str] = {
    "HOME": os.devnull,
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "HGRCPATH": os.devnull,
    "no_proxy": "*",
}
"""Programs of a test do not read what their user has configured."""

CUT = struct.pack("ii", 1, 0)
"""SO_LINGER that makes of close() a reset."""


class CuttingLine:
    """A port before a server, whose connections break off: a context manager.

    ``cuts``: bytes after which each connection ends, in their order; positive ones are counted on the way to the
    server, negative ones on the way back; 0 and what comes after them are whole.
    """

    def __init__(self, url: str, cuts: Iterable[int]) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "", parts.port or 80)
        self._cuts = deque(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.left = sum(map(bool, self._cuts))
        """How many connections are still to be cut."""
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                cut = self._cuts.popleft() if self._cuts else 0
                for pair, budget in (((client, server), max(cut, 0)), ((server, client), max(-cut, 0))):
                    threading.Thread(target=self._relay, args=(*pair, budget), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, budget: int) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(min(65536, budget - passed) if budget else 65536):
                sink.sendall(data)
                passed += len(data)
                if passed == budget:
                    self.left -= 1
                    for each in (source, sink):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CUT)
                        each.shutdown(socket.SHUT_RDWR)
                        each.close()
                    return
            sink.shutdown(socket.SHUT_WR)


Verdict = Callable[[Served], Any]
"""What a client makes of one of the two: the same value for both, if the bus changes nothing."""


def same(pair: Both, verdict: Verdict) -> Any:
    """The verdict on both, which must be the same; and nothing is left of it."""
    directly = verdict(pair.direct)
    behind = verdict(pair.bus)
    assert behind == directly, f"\nbehind the bus: {behind}\ndirectly: {directly}"
    pair.at_rest()
    return directly
