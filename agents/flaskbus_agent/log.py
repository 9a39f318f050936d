"""How the agent's log lines look, and how a stuck handler is shown."""

from __future__ import annotations

import logging
import sys
import traceback

from gunicorn.config import Config
from gunicorn.glogging import Logger

LOGGER = "flaskbus.agent"


class AgentLogger(Logger):
    """gunicorn's lines, ``[time] [pid] [LEVEL] message``, under our own name."""

    def setup(self, cfg: Config) -> None:
        # Everything that gunicorn says goes through error_log.
        self.error_log = logging.getLogger(LOGGER)
        self.error_log.propagate = False
        super().setup(cfg)


def stack(thread_id: int) -> str:
    """What a thread of this process is doing, the innermost call last."""
    frame = sys._current_frames().get(thread_id)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "  (it just ended)"


def first_line(error: Exception) -> str:
    """What went wrong, without where."""
    return str(error).partition("\n")[0]
