"""The sink of a request that is run by the leader: its whole reply is left for the leader's next question.

Most replies are whole. For any other, and where the lead was lost meanwhile, there is an outbox from then on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from flaskbus.messages import Headers, Reply
from flaskbus.wire import Plain
from flaskbus_agent.entry import Entry, Running
from flaskbus_agent.lead import Lead
from flaskbus_agent.outbox import Outbox
from flaskbus_agent.post import Post, write


class Prompt:
    """The sink of one run. ``open_outbox`` makes what else its answer needs."""

    __slots__ = ("_agent", "_entry", "_lead", "_open", "_plain", "_running", "is_left", "outbox")

    def __init__(
        self,
        entry: Entry,
        plain: Plain,
        agent: str,
        running: Running,
        lead: Lead[Post],
        open_outbox: Callable[[], Outbox],
    ) -> None:
        self._entry = entry
        self._plain = plain
        self._agent = agent
        self._running = running
        self._lead = lead
        self._open = open_outbox
        self.outbox: Outbox | None = None
        self.is_left = False
        """Whether the reply is the leader's to send."""

    def _sink(self) -> Outbox:
        if self.outbox is None:
            self._lead.release()
            self.outbox = self._open()
        return self.outbox

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        self._running.since = math.inf
        if self._lead.takes():
            reply = Reply(self._plain.attempt, 0, status, headers, body)
            self.is_left = self._lead.leave(write(self._entry, self._plain, self._agent, reply))
        if not self.is_left:
            self._sink().reply(status, headers, body)
        self._running.since = time.monotonic()

    def head(self, status: int, headers: Headers, /) -> None:
        self._sink().head(status, headers)

    def chunk(self, data: bytes, /) -> None:
        self._sink().chunk(data)

    def end(self) -> None:
        self._sink().end()

    def fail(self, code: str, detail: str, /) -> None:
        self._sink().fail(code, detail)
