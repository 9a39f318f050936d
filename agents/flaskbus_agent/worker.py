"""One worker process: the apps, the consumer that feeds them, and a main thread that watches both."""

from __future__ import annotations

import faulthandler
import gc
import os
import secrets
import select
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any, cast

from gunicorn.workers.base import Worker

from flaskbus.errors import AppImportError, StartError
from flaskbus.forking import release_signals
from flaskbus_agent.board import Board
from flaskbus_agent.consumer import ENDING, Consumer
from flaskbus_agent.entry import Running
from flaskbus_agent.heartbeat import Heartbeat, make_agent_id
from flaskbus_agent.loading import AgentApplication
from flaskbus_agent.log import first_line, stack

TICK = 0.25
"""Seconds between two looks of the main thread at its handlers, and all that a quick stop gives them."""

CLAIM_POLL = 0.01
"""Seconds between two looks whether the supervisor registered this worker; mostly it did during the import."""
STACKS = signal.SIGUSR2
"""The signal at which a worker writes the stacks of its threads to standard error."""


class AgentWorker(Worker):
    """gunicorn's worker, fed by the bus instead of by sockets.

    States on the board: ``starting`` until the apps are imported, ``ready`` while it reads, ``stopping`` from
    then on, or ``failed``. Only the main thread writes them.
    """

    app: AgentApplication

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.board = Board()
        # Known on both sides of the fork, and different for each process.
        self._token = secrets.token_hex(2)
        self._quick = False
        self._overdue: set[str] = set()
        self._dropped = 0
        self._heartbeat: Heartbeat | None = None
        # The supervisor's notes; they mean nothing in the child.
        self.generation = 0
        self.deadline: float | None = None
        self.pulse = (0.0, 0.0)

    @property
    def process_id(self) -> int:
        return cast(int, self.pid)

    @property
    def agent_id(self) -> str:
        """The name of this process on the bus."""
        return make_agent_id(self.process_id, self._token)

    # Life

    def init_signals(self) -> None:
        super().init_signals()
        # Written without the interpreter lock: shows crashes, and handlers that hold that lock for ever.
        stderr = sys.__stderr__ or 2
        faulthandler.enable(stderr)
        faulthandler.register(STACKS, stderr)
        release_signals()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.booted:
            # The import may take long, and nothing that was delivered waits for it.
            os._exit(0)
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        # gunicorn leaves from inside the handler; threads that still run would then delay the exit.
        self._quick = True
        self.handle_exit(sig, frame)

    def load_wsgi(self) -> None:
        try:
            self.apps = self.app.apps()
            self.app.call_worker_hook(self)
        except AppImportError as error:
            self.log.error("%s", error)
            self.board.write({"reason": first_line(error)})
            self.board.state = "failed"
            sys.exit(error.exit_code)
        self.board.write(self.app.facts())
        for pin in sorted(self.app.pins):
            self.log.warning("The debugger is on; its PIN is %s", pin)

    def run(self) -> None:
        self.consumer = Consumer(self.app.settings, self.agent_id, self.apps, self.log.error_log)
        while not self.board.claimed:
            if not self.alive or self._is_orphan():
                return
            self._wait(CLAIM_POLL)
        # What the imports made stays: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        # Before the first request can end the process: that it started is not in doubt any more.
        self.board.state = "ready"
        self.consumer.start()
        self.log.info("Worker %s is ready", self.pid)
        while self.alive and not self._overdue:
            self._wait(TICK)
            self._look()
            if self._is_orphan():
                self.log.warning("The supervisor is gone; finishing what runs")
                self.alive = False
            elif not self.consumer.healthy():
                self.log.error("A thread of the consumer ended unexpectedly; this process is replaced")
                self.alive = False
            elif self.consumer.served >= self.max_requests and not self.board.wants_successor:
                self.log.info("Worker %s served %d requests and is replaced", self.pid, self.consumer.served)
                self.board.wants_successor = True
        self._drain()

    def _wait(self, seconds: float) -> None:
        # gunicorn writes to this pipe at every signal.
        if select.select([self.PIPE[0]], [], [], seconds)[0]:
            os.read(self.PIPE[0], 4096)

    def _look(self) -> None:
        """Tell the board what runs, and find handlers that run too long."""
        now = time.monotonic()
        running = self.consumer.running()
        self.board.report(now, len(running), self.consumer.served)
        withdrawn = self.board.withdrawn()
        for index, app in enumerate(self.app.mounted):
            if (withdrawn & ~self._dropped) >> index & 1:
                self.consumer.drop(app.mount)
        self._dropped = withdrawn
        limit = self.app.settings.kill_after
        for request in running if limit else ():
            if now - request.since > limit and request.request_id not in self._overdue:
                self._overdue.add(request.request_id)
                self.log.error(
                    "%s runs for more than %g s; this process is replaced. What the handler is doing:\n%s",
                    _name(request),
                    limit,
                    stack(request.thread_id),
                )

    # End

    def _drain(self) -> None:
        """Quiet, then stop: nothing is read any more, and what runs may finish.

        Streams of events end shortly before ``graceful_timeout`` is over. Without a signal (a handler is overdue)
        there is no other limit than that the others become overdue too.
        """
        self.board.state = "stopping"
        self.consumer.quiet()
        grace = self.app.settings.graceful_timeout
        ending = time.monotonic() + grace - min(ENDING, grace / 2)
        if busy := len(self.consumer.running()):
            self.log.info("Worker %s stops; %d requests run and have up to %g s", self.pid, busy, grace)
        limit, free, ended = None, 0, False
        # Twice, because what was read a moment ago may not have begun to run.
        while not self.consumer.join(TICK) and free < 2:
            self._look()
            self._beat_if_orphaned()
            now = time.monotonic()
            if not self.alive and limit is None:
                limit = now + grace
            if now >= ending and not ended:
                ended = True
                self._end_events()
            if self._quick or (limit is not None and now >= limit):
                break
            late = now >= ending + ENDING
            stuck = all(
                request.request_id in self._overdue or (late and request.events)
                for request in self.consumer.running()
            )
            free = free + 1 if self._overdue and stuck and not self.consumer.owes else 0
        self._beat_if_orphaned()
        if self._heartbeat:
            self._heartbeat.leave(self)
            self._heartbeat.close()
        if self.consumer.join(0):
            self.consumer.close()
            return
        for request in self.consumer.running():
            if request.events is not None and request.events.settled:
                self.log.info("%s had ended; its code was still at work on the next event", _name(request))
            elif request.request_id not in self._overdue:
                self.log.warning(
                    "%s was cut off after %.1f s", _name(request), time.monotonic() - request.begun
                )
        # An ordinary exit would let the handlers run on in an interpreter that is being taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _end_events(self) -> None:
        if streams := sum(request.events is not None for request in self.consumer.running()):
            self.log.info("Worker %s: %d event streams end at their next event boundary", self.pid, streams)
        self.consumer.end_events()

    def _is_orphan(self) -> bool:
        return os.getppid() != self.ppid

    def _beat_if_orphaned(self) -> None:
        """Nobody else keeps the lease of what still runs once the supervisor is gone."""
        if not self._is_orphan():
            return
        if self._heartbeat is None:
            app = self.app
            self._heartbeat = Heartbeat(app.settings, app.serving(), self.process_id, self.log.error_log)
        with suppress(StartError):
            self._heartbeat.beat([self], time.monotonic())


def _name(request: Running) -> str:
    return f"Request {request.request_id} ({request.method} {request.target})"
