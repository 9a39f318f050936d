"""Several child processes in one terminal: their lines are relayed under their names, and none outlives us.

::

    with Processes(console) as processes:
        processes.start("web", ["python", "-m", "web"], os.environ)
        while not processes.stopping and not processes.step(1.0):
            pass

No threads: pipes, ends of children and signals all wake one :meth:`Processes.step`. Each child is in a session of
its own, so that a terminal's Ctrl-C reaches this process only, which then ends them in good order.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from flaskbus.guard import Guard

GRACE, QUICK = 3.0, 2.0
"""Seconds that children get after SIGTERM, and then after SIGQUIT."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT = 0.3
"""Seconds within which stop signals are one: a wrapper may pass on the Ctrl-C that the terminal sent us too."""
LONGEST_LINE = 65536
"""Bytes of output without a line's end that are held back."""

BOLD, DIM, RED, GREEN, YELLOW = 1, 2, 31, 32, 33
_NAME_COLOURS = (36, 35, 34, 33, 32, 96, 95, 94)


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether it is a terminal that shows colours, and nobody said NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


class Console:
    """Writes whole lines under names of one width; ``colour`` for a terminal.

    ``closed`` once nobody reads them any more (``flaskbus dev | head``).
    """

    def __init__(self, stream: TextIO, names: Iterable[str], *, colour: bool):
        self.closed = False
        self._stream = stream
        self._colour = colour
        names = list(names)
        self._width = max(map(len, names), default=0)
        self._colours = {name: _NAME_COLOURS[i % len(_NAME_COLOURS)] for i, name in enumerate(names)}

    def paint(self, text: str, style: int) -> str:
        """The text in a style (an SGR parameter of ECMA-48), where there are colours."""
        return f"\x1b[{style}m{text}\x1b[0m" if self._colour else text

    def say(self, name: str, line: str) -> None:
        prefix = self.paint(f"{name:{self._width}} |", self._colours.get(name, BOLD))
        self.write(f"{prefix} {line}")

    def write(self, text: str) -> None:
        if not self.closed:
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except BrokenPipeError:
                self.closed = True


class Process:
    """A child and what it wrote; ``code`` is its exit code (minus a signal number) once it has ended."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes]):
        self.name = name
        self.pid = popen.pid
        self.code: int | None = None
        self.silent = False
        self.held: list[str] | None = None
        """Lines that are collected instead of shown, while this is a list."""
        self._popen = popen
        self._rest = b""
        assert popen.stdout is not None
        self._pipe = popen.stdout
        os.set_blocking(self._pipe.fileno(), False)

    def fileno(self) -> int:
        return self._pipe.fileno()

    def read(self) -> list[str]:
        """The lines that are there now, without waiting; sets ``silent`` where the child closed its output."""
        data = self._take()
        return [] if data is None else self._lines(data)

    def _take(self) -> bytes | None:
        try:
            data = os.read(self.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return None
        self.silent = not data
        return data

    def _lines(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > LONGEST_LINE):
            lines, self._rest = [*lines, self._rest], b""
        return [line.decode(errors="replace").rstrip("\r") for line in lines]

    def ended(self) -> bool:
        """Whether it has ended; whatever it started and left in its session is then killed."""
        if self.code is None:
            self.code = self._popen.poll()
            if self.code is not None:
                self.signal(signal.SIGKILL, group=True)
        return self.code is not None

    def signal(self, number: int, *, group: bool = False) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM where only a zombie is left
            (os.killpg if group else os.kill)(self.pid, number)

    def close(self) -> list[str]:
        """Close the pipe of an ended child; the last lines."""
        lines: list[str] = []
        while not self.silent and (data := self._take()):
            lines += self._lines(data)
        self._pipe.close()
        return lines + self._lines(b"")

    def kill(self) -> None:
        """End it, with all that it started, and forget what it wrote."""
        self.signal(signal.SIGKILL, group=True)
        self._popen.wait()
        self._pipe.close()


class Processes:
    """The children; leaving the context ends those that still run.

    Within the context the stop signals are counted in ``stops`` and do nothing else.
    """

    def __init__(self, console: Console):
        self.console = console
        self.running: list[Process] = []
        self.stops = 0
        self._stopped = -math.inf
        self._guard = Guard()
        self._selector = selectors.DefaultSelector()
        self._wakeup = os.pipe()
        for end in self._wakeup:
            os.set_blocking(end, False)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            for process in self.running:  # only after an exception
                process.kill()
            self._guard.close()
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._selector.close()
            for end in self._wakeup:
                os.close(end)

    @property
    def stopping(self) -> bool:
        """Whether somebody wants everything to end: a signal, or nobody reads the output any more."""
        return self.stops > 0 or self.console.closed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return
        now = time.monotonic()
        if now - self._stopped > REPEAT:
            self.stops += 1
        self._stopped = now

    def start(
        self, name: str, argv: Sequence[str], environ: Mapping[str, str], *, hold: bool = False
    ) -> Process:
        """Start a child, whose output and errors are shown under ``name``, or with ``hold`` collected."""
        popen = subprocess.Popen(  # noqa: S603
            argv,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
        process = Process(name, popen)
        process.held = [] if hold else None
        self.running.append(process)
        self._guard.watch(each.pid for each in self.running)
        self._selector.register(process, selectors.EVENT_READ)
        return process

    def step(self, timeout: float) -> list[Process]:
        """Relay what there is, and wait for it up to ``timeout`` seconds; the children that have just ended.

        Returns early at every signal.
        """
        for key, _ in self._selector.select(timeout):
            if isinstance(key.fileobj, Process):
                self._relay(key.fileobj, key.fileobj.read())
                if key.fileobj.silent:
                    self._selector.unregister(key.fileobj)
            else:
                with suppress(BlockingIOError):
                    os.read(self._wakeup[0], 4096)
        ended = [process for process in self.running if process.ended()]
        for process in ended:
            self.running.remove(process)
            if not process.silent:
                self._selector.unregister(process)
            self._relay(process, process.close())
        if ended:
            self._guard.watch(each.pid for each in self.running)
        return ended

    def _relay(self, process: Process, lines: list[str]) -> None:
        if process.held is not None:
            process.held += lines
            return
        for line in lines:
            self.console.say(process.name, line)

    def release(self, process: Process) -> None:
        """Show what was held, and whatever comes from now on."""
        lines, process.held = process.held or [], None
        self._relay(process, lines)

    def stop(self) -> None:
        """End all children: SIGTERM, SIGQUIT after a while, SIGKILL after another or at one more Ctrl-C."""
        before = self.stops
        for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGQUIT, QUICK), (signal.SIGKILL, math.inf)):
            end = time.monotonic() + seconds
            if self.stops > before and number != signal.SIGKILL:
                continue
            for process in self.running:
                process.signal(number, group=number == signal.SIGKILL)
            while self.running and (left := end - time.monotonic()) > 0:
                if self.stops > before and number != signal.SIGKILL:
                    break
                self.step(min(left, 1.0))
