"""The process life of an agent: gunicorn's arbiter, with the bus in the place of its sockets.

The rules, beside gunicorn's own signals:

- New code first. A generation of workers is replaced only when all of the next one are ready; where one of
  those cannot start, the old one stays. The same rule replaces a worker that has served ``max_requests``.
- Only the first generation may end the agent by failing to start (exit 4, or 3).
- Heartbeats go on for as long as a worker lives, while it drains too.
- Nobody is killed for being slow, but for what ``kill_after`` and ``graceful_timeout`` say.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from gunicorn import systemd
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.pidfile import Pidfile

from flaskbus.broker import mask
from flaskbus.errors import AppImportError, StartError
from flaskbus.forking import signals_held
from flaskbus.rlimit import raise_file_limit
from flaskbus.settings import AgentSettings
from flaskbus_agent import reloader
from flaskbus_agent.heartbeat import Heartbeat, Member, MountedApp, Preloader
from flaskbus_agent.loading import AgentApplication
from flaskbus_agent.log import AgentLogger, first_line
from flaskbus_agent.worker import STACKS, AgentWorker

MOVING, RESTING = 0.1, 1.0
"""Seconds between two rounds of the main loop while workers come or go, and otherwise."""
MARGIN = 2.0
"""Seconds that a worker gets past ``graceful_timeout``, to say itself what it cuts off."""
SPAWN_BACKOFF = 30.0
"""Longest pause in seconds before a worker that could not start is tried again."""
WEBSOCKET_FILES = 3
"""Two ends of a pair of sockets, and what simple-websocket waits with."""


def run(settings: AgentSettings, mounted: Sequence[MountedApp]) -> NoReturn:
    """Run an agent in this process until it is told to stop; leaves with an exit code.

    Raises :class:`~flaskbus.errors.StartError` where the pid file cannot be written.
    """
    raise_file_limit(WEBSOCKET_FILES * settings.streams)
    try:
        Supervisor(AgentApplication(settings, mounted)).run()
    except RuntimeError as error:
        raise StartError(str(error)) from None
    sys.exit(0)


class Supervisor(Arbiter):
    """gunicorn's arbiter without sockets, and with a place in the registry."""

    WORKERS: ClassVar[dict[int, AgentWorker]] = {}  # type: ignore[assignment]
    app: AgentApplication
    log: AgentLogger

    def __init__(self, app: AgentApplication):
        super().__init__(app)
        self.settings = app.settings
        self.master_name = "flaskbus-agent"
        self.heartbeat = Heartbeat(app.settings, app.mounted, os.getpid(), self.log.error_log)
        self.wanted, self.good = 1, 0
        self.newest = 1
        self.stopping = False
        self.casualty: Member | None = None
        self.failures, self.spawn_at = 0, 0.0
        self.watcher = 0
        self.looked = time.monotonic()
        # The child must not share the supervisor's connection to the broker.
        self.cfg.set("post_fork", lambda _server, _worker: self.heartbeat.forsake())

    # Start and the main loop

    def start(self) -> None:
        """Without sockets: the pid file, the signals, and what a person wants to read."""
        self.pid = os.getpid()
        if self.settings.pid:
            self.pidfile = Pidfile(self.settings.pid)
            self.pidfile.create(self.pid)
        self.init_signals()
        parts = Counter((app.target, app.mount.whole) for app in self.app.mounted)
        for app in self.app.mounted:
            if number := parts.pop((app.target, app.mount.whole), 0):
                named = "" if app.name == app.target else f" as {app.name}"
                where = app.mount if number == 1 else app.mount.whole
                split = "" if number == 1 else f", in {number} partitions"
                self.log.info("Serving %s on %s%s%s", app.target, where.name, named, split)
        self.log.info(
            "Broker %s, %d x %d threads, pid %d",
            mask(self.settings.redis),
            self.num_workers,
            self.settings.threads,
            self.pid,
        )
        if self.settings.reload:
            self.watcher = reloader.start(self.log)

    def wait_for_signals(self, timeout: float | None = RESTING) -> list[int]:
        # Heartbeats and the readiness of new workers do not wait for a signal.
        settled = self.good == self.wanted and all(
            worker.board.state == "ready" and worker.deadline is None for worker in self.WORKERS.values()
        )
        return super().wait_for_signals(min(RESTING, self.settings.lease / 4) if settled else MOVING)

    def murder_workers(self) -> None:
        # gunicorn calls this in every round of its main loop, which is what heartbeats need too.
        self.beat()
        now = time.monotonic()
        # Time in which this process itself was stopped is nobody's fault.
        passed, self.looked = min(now - self.looked, RESTING + 0.5), now
        for pid, worker in list(self.WORKERS.items()):
            if worker.deadline is not None and now > worker.deadline:
                self.log.error("Worker %s did not stop in time and is killed", pid)
                self.kill_worker(pid, signal.SIGKILL)
            elif worker.deadline is not None and worker.board.state != "stopping":
                # Said again, because a worker that was just forked hears nothing yet.
                self.kill_worker(pid, signal.SIGTERM)
            elif self.settings.kill_after and worker.board.state in ("ready", "stopping"):
                self._check_pulse(pid, worker, passed)

    def _check_pulse(self, pid: int, worker: AgentWorker, passed: float) -> None:
        """A worker whose main thread stands still: its code holds the interpreter and nothing in it can act."""
        tick, still = worker.pulse
        worker.pulse = worker.board.tick, still + passed if tick == worker.board.tick else 0.0
        if worker.aborted:
            self.kill_worker(pid, signal.SIGKILL)
        elif worker.pulse[1] > self.settings.kill_after:
            self.log.critical(
                "Worker %s: a handler has kept every other thread from running for %.0f s; "
                "the process is killed, its stacks follow",
                pid,
                worker.pulse[1],
            )
            worker.aborted = True
            self.kill_worker(pid, STACKS)

    def beat(self) -> None:
        """Renew the agent's place in the registry, as far as that is due."""
        members = [*self.WORKERS.values(), *([self.casualty] if self.casualty else [])]
        try:
            taken = self.heartbeat.beat(members, time.monotonic())
        except StartError as error:
            if self.stopping:
                return
            raise HaltServer(str(error), error.exit_code) from None
        for app, refusal in () if self.stopping else taken:
            # A mount is one app's with all its partitions.
            lost = self.heartbeat.partitions(app.mount)
            if not lost:
                continue
            if not self.good or len(self.heartbeat.apps) == len(lost):
                raise HaltServer(str(refusal), refusal.exit_code)
            self.log.error("%s; this agent no longer serves it", refusal)
            for each in lost:
                self.heartbeat.drop(each, members)
                index = self.app.withdraw(each.mount)
                for worker in self.WORKERS.values():
                    worker.board.withdraw(index)

    # Workers come and go

    def manage_workers(self) -> None:
        """Bring the workers to what is wanted; see the rules above."""
        if self.stopping:
            return
        if not self.WORKERS:
            # An unfit broker is said before any app is imported; one that is away delays no import.
            self.beat()
        workers = sorted(self.WORKERS.values(), key=lambda worker: worker.age)
        workers = [each for each in workers if each.deadline is None and each.board.state != "stopping"]
        current = [
            each for each in workers if each.generation == self.wanted and not each.board.wants_successor
        ]
        for surplus in current[: -self.num_workers]:
            self.dismiss(surplus)
            workers.remove(surplus)
        current = current[-self.num_workers :]
        if time.monotonic() >= self.spawn_at:
            for _ in range(self.num_workers - len(current)):
                self.spawn_worker()
                self.beat()
        ready = sum(worker.board.state == "ready" for worker in current)
        if ready == self.num_workers:
            self._complete()
        for worker in workers:
            if worker not in current and (ready == self.num_workers or worker.generation != self.good):
                self.dismiss(worker)

    def spawn_worker(self) -> int:
        if self.settings.preload:
            try:
                self.app.apps()
            except AppImportError as error:
                self.log.error("%s", error)
                self._not_started(Preloader(self.pid, first_line(error)), error.exit_code)
        with signals_held():
            pid = super().spawn_worker()
        self.WORKERS[pid].generation = self.wanted
        return pid

    def dismiss(self, worker: AgentWorker) -> None:
        """Let a worker finish what it has, and no more than ``graceful_timeout``."""
        worker.deadline = time.monotonic() + self.settings.graceful_timeout + MARGIN
        self.kill_worker(worker.process_id, signal.SIGTERM)

    def reap_workers(self) -> None:
        # gunicorn's own halts the server for any worker that did not start, and says nothing of the bus.
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            worker = self.WORKERS.pop(pid, None)
            if worker is not None:
                worker.tmp.close()
                self._bury(worker, os.waitstatus_to_exitcode(status))
            elif pid == self.watcher and not self.stopping:
                self.watcher = 0
                self.log.error(
                    "The process that watches the source files ended; --reload has no effect any more"
                )

    def _bury(self, worker: AgentWorker, code: int) -> None:
        state, told = worker.board.state, worker.deadline is not None or self.stopping
        if code and state in ("starting", "failed") and not told and worker.generation == self.wanted:
            if state == "starting":
                worker.board.write({"reason": f"a worker {_ending(code)} before it was ready"})
            self._not_started(worker, self.WORKER_BOOT_ERROR if state == "starting" else self.APP_LOAD_ERROR)
            return
        if not told and not worker.aborted and state != "stopping":
            self.log.error("Worker %s %s", worker.pid, _ending(code))
            if state == "starting":
                self._delay_spawn()
        self.heartbeat.leave(worker)

    def _not_started(self, member: Member, exit_status: int) -> None:
        member.board.state = "failed"
        reason = member.board.read().get("reason", "")
        if not self.good:
            # The record stays behind for one lease, so that gateways need not hold requests in vain.
            self.casualty = member
            self.beat()
            raise HaltServer(reason, exit_status)
        if self.wanted != self.good:
            self.log.error("The new code does not start, the old workers stay: %s", reason)
            self.wanted = self.good
            self.heartbeat.leave(member)
        else:
            self._delay_spawn()
            if self.casualty:
                self.heartbeat.leave(self.casualty)
            self.casualty = member
            self.log.error("A worker could not start: %s", reason)

    def _delay_spawn(self) -> None:
        self.spawn_at = time.monotonic() + min(2.0**self.failures, SPAWN_BACKOFF)
        self.failures += 1

    def _complete(self) -> None:
        """Every worker that is wanted is ready."""
        self.failures, self.spawn_at = 0, 0.0
        if self.casualty:
            self.heartbeat.leave(self.casualty)
            self.casualty = None
        if not self.good:
            systemd.sd_notify("READY=1\nSTATUS=Ready", self.log)
        elif self.good != self.wanted:
            self.log.info("The new workers are ready, the old ones stop")
        self.good = self.wanted

    # Signals

    def reload(self) -> None:
        """HUP: a new generation. The settings stay as they were at the start."""
        if self.settings.preload:
            self.log.warning(
                "With --preload the code stays as it was imported; restart the agent for new code"
            )
        self.log.reopen_files()
        self.newest += 1
        self.wanted = self.newest
        self.spawn_at = 0.0

    def handle_usr2(self) -> None:
        # gunicorn hands its sockets to a second arbiter; here a second agent can simply be started.
        self.log.warning("USR2 is ignored: start a second agent, then stop this one")

    def stop(self, graceful: bool = True) -> None:
        """Quiet, then stop. gunicorn's own would let the leases of workers run out that still drain."""
        self.stopping = True
        sig = signal.SIGTERM if graceful else signal.SIGQUIT
        limit = time.monotonic() + MARGIN + (self.settings.graceful_timeout if graceful else 0.0)
        if self.watcher:
            self.kill_worker(self.watcher, signal.SIGKILL)
        while self.WORKERS and time.monotonic() < limit:
            for worker in list(self.WORKERS.values()):
                # Repeated, because a worker that was just forked hears nothing yet.
                if worker.board.state != "stopping" or sig == signal.SIGQUIT:
                    self.kill_worker(worker.process_id, sig)
            if {signal.SIGINT, signal.SIGQUIT} & {*self.wait_for_signals(MOVING)} and sig != signal.SIGQUIT:
                self.log.info("Quick stop")
                sig, limit = signal.SIGQUIT, time.monotonic() + MARGIN
            self.reap_workers()
            self.murder_workers()
        self.kill_workers(signal.SIGKILL)
        while self.WORKERS:
            self.reap_workers()
            time.sleep(0.01)
        if self.casualty and self.good:
            self.heartbeat.leave(self.casualty)
        self.heartbeat.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
