"""Whole replies that are handed in together with the leader's next question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from flaskbus import wire
from flaskbus.broker import script_sha
from flaskbus.keys import GROUP, LIST_TTL_MS, MountKeys
from flaskbus.messages import Reply
from flaskbus.resp import LARGE, template
from flaskbus_agent.entry import Entry


@dataclass(frozen=True, slots=True)
class Post:
    """The reply to an entry, and the command that hands it in, as it travels."""

    entry: Entry
    reply: Reply
    packed: list[bytes]
    error: Exception | None = None
    """What the broker said to it, where it was refused."""


def write(entry: Entry, plain: wire.Plain, agent: str, reply: Reply) -> Post:
    """Pack the script ``finish`` for the reply to a plain entry."""
    keys = entry.served.keys
    pack = _template(keys, plain.gateway, agent)
    frame = wire.encode_frame(reply)
    request_id = plain.id.encode()
    packed = pack(
        keys.reply(plain.id).encode(), entry.entry_id, request_id, b"" if len(frame) > LARGE else frame
    )
    if len(frame) <= LARGE:
        return Post(entry, reply, [packed])
    # Not copied once more.
    return Post(entry, reply, [packed.removesuffix(b"$0\r\n\r\n") + b"$%d\r\n" % len(frame), frame, b"\r\n"])


@lru_cache(256)
def _template(keys: MountKeys, gateway: str, agent: str) -> Callable[..., bytes]:
    """Packs it from the reply list, the entry's id, the request's id and the frame."""
    return template(
        "EVALSHA", script_sha("finish"), 2, keys.requests, None,
        GROUP, None, agent, LIST_TTL_MS, keys.doorbell(gateway), None, wire.MAX_RING_FRAME, None,
    )  # fmt: skip
