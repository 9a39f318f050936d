"""What an agent process has of the requests that it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flaskbus import wire
from flaskbus.keys import MountKeys
from flaskbus.signing import FrameSeal, Seal, opener
from flaskbus_agent.pace import Pace

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from flaskbus_agent.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Served:
    """An app on its mount."""

    app: WSGIApplication
    keys: MountKeys
    seals: tuple[Seal, ...] = ()
    """What its requests may be signed with; empty where nobody signs."""
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one XREADGROUP delivered, at ``read_at`` (monotonic seconds).

    ``mark`` tells it from every other.
    ``age`` is how many milliseconds it had waited then, by the broker's own clock; 0 where that is not known.
    ``done``: this process has run it before, and a broker that lost its last writes does not know that.
    """

    served: Served
    entry_id: bytes
    fields: Sequence[bytes]
    mark: bytes
    read_at: float
    age: float = 0.0
    done: bool = False


def seal_of(entry: Entry, request_id: str) -> FrameSeal | None:
    """What signs the frames of a request that was signed right: the same key. ``None`` where nobody signs."""
    seals = entry.served.seals
    if not seals:
        return None
    seal = seals[0] if len(seals) == 1 else opener(seals, entry.fields, 0)[0]
    return seal.frames(request_id, wire.peek_record(entry.fields))


def entry_time(entry_id: bytes) -> int:
    """When an entry was added, in milliseconds of the broker's clock. A hint: it may lie in the future."""
    return int(entry_id.partition(b"-")[0])


@dataclass(slots=True)
class Running:
    """A request that a thread runs now.

    ``since`` is when the app's code last got control (monotonic seconds); infinite while the thread waits for
    a client or for the broker, which is nothing that the app could be blamed for, and in an event stream, whose
    next event may be long in coming.
    """

    thread_id: int
    request_id: str
    method: str
    target: str
    since: float
    events: Outbox | None = None
    """Where its response is a stream of events that is on its way."""
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.since
