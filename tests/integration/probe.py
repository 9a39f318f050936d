"""Starting a probe server (see probe_server.py), and speaking to it in raw bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

SCRIPT = Path(__file__).with_name("probe_server.py")


def until(condition: Callable[[], T], what: str, seconds: float = 15.0) -> T:
    """Poll until the condition is true; returns what it returned."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.01)
    return result


class Server:
    """A probe server on a free port, or on what ``settings`` say. A context manager that ends it with TERM."""

    def __init__(self, directory: Path, *, environ: dict[str, str] | None = None, **settings: object) -> None:
        self.directory = directory
        self.log_file = directory / "log"
        self.settings_file = directory / "settings.json"
        self.settings: dict[str, object] = {"port": 0, **settings}
        self.write_settings()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(self.settings_file)],
                stdout=log,
                stderr=log,
                env=os.environ | (environ or {}),
            )
        self.url = ""

    def write_settings(self, **changes: object) -> None:
        self.settings |= changes
        # Whole at any moment: the server may be watching.
        draft = self.settings_file.with_suffix(".draft")
        draft.write_text(json.dumps(self.settings))
        draft.rename(self.settings_file)

    def __enter__(self) -> Server:
        until(lambda: self.process.poll() is not None or self.workers(), "the server starts")
        found = re.search(r"listening on (\S+) ", self.log())
        assert found, self.log()
        self.url = found[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            finally:
                self.process.kill()
        if kind is not None:
            print(self.log())

    def log(self) -> str:
        return self.log_file.read_text()

    def logged(self, text: str) -> None:
        until(lambda: text in self.log(), f"the log says {text!r}")

    def workers(self) -> list[int]:
        """Process ids of all workers that ever were ready, oldest first."""
        return [int(pid) for pid in re.findall(r"probe ready in (\d+)", self.log())]

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Signal the server and wait for its end; returns the seconds that took. The exit code must be 0."""
        begin = time.monotonic()
        self.send_signal(number)
        assert self.process.wait(30) == 0, self.log()
        return time.monotonic() - begin

    def connect(self) -> Client:
        port = int(self.url.rpartition(":")[2])
        return Client(socket.create_connection(("127.0.0.1", port), 10))


class Client:
    """One connection; every read has a time limit."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(10)
        self._buffer = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, target: str, method: str = "GET", body: bytes = b"") -> Answer:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        self.send(f"{method} {target} HTTP/1.1\r\nHost: test\r\n{length}\r\n".encode() + body)
        return self.answer()

    def read_until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            data = self.sock.recv(65536)
            assert data, f"the connection ended after {self._buffer!r}"
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(end)
        return found

    def read_exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.sock.recv(65536)
            assert data, f"the connection ended after {self._buffer!r}"
            self._buffer += data
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def rest(self) -> bytes:
        """Everything until the other side closes."""
        while data := self.sock.recv(65536):
            self._buffer += data
        found, self._buffer = self._buffer, b""
        return found

    def answer(self) -> Answer:
        """A response with a Content-Length, or none."""
        status, *lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        return Answer(
            int(status.split()[1]), headers, self.read_exactly(int(headers.get("content-length", 0)))
        )


class Answer:
    """A response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document
