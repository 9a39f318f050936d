"""An agent inside the caller's own process: no supervisor, no fork, the apps as they are."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus_agent.board import Board
from flaskbus_agent.consumer import ENDING, Consumer
from flaskbus_agent.heartbeat import Heartbeat, MountedApp, make_agent_id

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("flaskbus.agent")


@dataclass
class _Member:
    """What the heartbeat sees of this process."""

    agent_id: str
    process_id: int
    board: Board


CLAIM = 5.0
"""Seconds that the first claim may take; a broker that is slow to answer must not let another app's mount pass."""


class InProcessAgent:
    """Serves apps from threads of this process, until :meth:`stop`.

    ``names`` says under which name each mount is owned. The heartbeat is a thread here: an app that holds the
    interpreter for a whole lease loses it, which only a supervisor of its own can prevent.

    :meth:`start` raises :class:`~flaskbus.errors.StartError` for an unfit broker and
    :class:`~flaskbus.errors.MountTaken` for a mount of another app.
    """

    def __init__(
        self, settings: AgentSettings, apps: Mapping[Mount, WSGIApplication], names: Mapping[Mount, str]
    ) -> None:
        self.settings = settings
        self.id = make_agent_id(os.getpid(), secrets.token_hex(2))
        self._member = _Member(self.id, os.getpid(), Board())
        mounted = [MountedApp(mount, names[mount], names[mount]) for mount in apps]
        self._heartbeat = Heartbeat(settings, mounted, os.getpid(), log)
        self.consumer = Consumer(settings, self.id, apps, log)
        self._stopping = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="flaskbus-heartbeat", daemon=True)

    def start(self) -> None:
        """Claim the mounts, then serve them; with a broker that stays away, serve them once it is there."""
        self._member.board.state = "ready"
        deadline = time.monotonic() + CLAIM
        while time.monotonic() < deadline:
            taken = self._heartbeat.beat([self._member], time.monotonic())
            if taken:
                self._heartbeat.close()
                raise taken[0][1]
            if self._member.board.claimed:
                break
            self._stopping.wait(0.05)
        self.consumer.start()
        self._beats.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Quiet, then stop; whether everything that ran was done within ``timeout`` seconds."""
        self._member.board.state = "stopping"
        self.consumer.quiet()
        limit = self.settings.graceful_timeout if timeout is None else timeout
        ending = min(ENDING, limit / 2)
        if not (done := self.consumer.join(limit - ending)):
            self.consumer.end_events()
            done = self.consumer.join(ending)
        self._stopping.set()
        if self._beats.is_alive():
            self._beats.join(5.0)
        self._heartbeat.leave(self._member)
        self._heartbeat.close()
        self.consumer.close()
        return done

    def _beat(self) -> None:
        while not self._stopping.wait(min(0.25, self.settings.lease / 8)):
            self._member.board.report(time.monotonic(), len(self.consumer.running()), self.consumer.served)
            for app, error in self._heartbeat.beat([self._member], time.monotonic()):
                log.error("%s", error)
                for each in self._heartbeat.partitions(app.mount):
                    self._heartbeat.drop(each, [self._member])
                    self.consumer.drop(each.mount)
