"""Entries that are no requests of ours become dead letters."""

from __future__ import annotations

from datetime import UTC, datetime

from flaskbus import letters, wire
from flaskbus.keys import DEAD_KEPT, DEAD_TTL_MS, GROUP, LIST_TTL_MS
from flaskbus.messages import Failure
from flaskbus_agent.channel import Channel
from flaskbus_agent.entry import Entry, seal_of


def bury(entry: Entry, channel: Channel, agent_id: str, reason: str, *, signed: bool) -> None:
    """Make a dead letter of an entry, and tell whoever waits for it, as far as that can be read.

    An entry that may be a stranger's must not lead to a ``signed`` word about a request of that id. Raises what
    :meth:`Channel.script` raises; then it is still pending.
    """
    keys = entry.served.keys
    request_id = wire.peek_id(entry.fields) or ""
    sender, attempt = wire.peek_sender(entry.fields)
    doorbell = keys.doorbell(sender) if request_id and sender else ""
    name = wire.peek_record(entry.fields)
    record = (keys.idempotent(name),) if name else ()
    letter = letters.of_stranger(entry.fields, reason, at=datetime.now(UTC), entry=entry.entry_id)
    failure = Failure(attempt, 0, "agent-lost", f"unreadable request: {reason}")
    seal = seal_of(entry, request_id) if signed else None
    channel.script(
        "bury",
        [keys.requests, keys.dead, keys.reply(request_id or "none"), *record],
        [
            GROUP, entry.entry_id, agent_id, DEAD_TTL_MS, DEAD_KEPT, LIST_TTL_MS,
            doorbell, request_id, wire.encode_frame(failure, seal.sign if seal else None), *letter,
        ],
    )  # fmt: skip
