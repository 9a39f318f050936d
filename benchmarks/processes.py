"""Processes that a benchmark starts: each ends with it, whatever ends it.

A child is in a process group of its own. It is ended by its id, with its group, and a
:class:`~flaskbus.guard.Guard` does that where this process is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from flaskbus.guard import Guard

ROOT = Path(__file__).parent.parent
"""Where ``benchmarks.apps`` is found."""
START_TIMEOUT = 30.0
STOP_TIMEOUT = 8.0


class StartFailed(Exception):
    """A system does not come up; the text has the end of its log."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of a ``role`` (``gateway``, ``nginx`` …), and where it writes."""

    role: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def said(self, lines: int = 5) -> str:
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])


class Children:
    """The processes of one system, in a directory for its sockets, configuration and logs."""

    def __init__(self, directory: Path, guard: Guard):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.all: list[Child] = []
        self._guard = guard

    def start(self, role: str, words: Sequence[str], environ: Mapping[str, str] | None = None) -> Child:
        """Raises :class:`StartFailed` where there is no such program."""
        log = self.directory / f"{role}-{len(self.all)}.log"
        # The systems get what is installed beside this interpreter, and nothing of ours.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("FLASKBUS_")}
        variables |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})}
        try:
            with log.open("wb") as output:
                popen = subprocess.Popen(
                    list(words),
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=variables,
                )
        except OSError as error:
            raise StartFailed(f"{words[0]}: {error.strerror}") from None
        child = Child(role, popen, log)
        self.all.append(child)
        GROUPS.add(popen.pid)
        self._guard.watch(GROUPS)
        return child

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Poll; raises :class:`StartFailed` where it takes too long or a child ends meanwhile."""
        deadline = time.monotonic() + START_TIMEOUT
        while not ready():
            for child in self.all:
                if child.popen.poll() is not None:
                    raise StartFailed(f"{child.role} ended with {child.popen.returncode}: {child.said()}")
            if time.monotonic() > deadline:
                logs = "; ".join(f"{child.role}: {child.said(2)}" for child in self.all)
                raise StartFailed(f"not within {START_TIMEOUT:g} s: {what} ({logs})")
            time.sleep(0.01)

    def stop(self, child: Child) -> None:
        """TERM and wait, then KILL what is left of its group."""
        child.popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.popen.wait(STOP_TIMEOUT)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.popen.wait()
        GROUPS.discard(child.pid)
        self._guard.watch(GROUPS)
        self.all.remove(child)

    def close(self) -> None:
        """The last started first: a proxy before its app, an app before its broker."""
        for child in reversed(self.all):
            child.popen.terminate()
        for child in reversed(list(self.all)):
            self.stop(child)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


GROUPS: set[int] = set()
"""The process groups that run now, of all systems: what the guard watches."""
