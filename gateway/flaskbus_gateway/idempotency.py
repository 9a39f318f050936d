"""Sending a request that has an Idempotency-Key.

Entry and record are written by one script, so that of any number of requests with one key, through any number of
gateways, one is sent:

======================================  ========================================================
the key is new                          sent, like any other request
the first request waits or runs         409 ``key-in-use``
it was answered                         that answer once more, with ``Idempotency-Replayed: true``
it ran, and its answer was not kept     409 ``answer-not-kept``
it had another body                     422 ``key-reused``
the broker is away, or has no room      503, as without a key: nothing runs without its record
======================================  ========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flaskbus import errors, wire
from flaskbus.idempotency import REPLAYED, fingerprint
from flaskbus.keys import LIST_TTL_MS, MountKeys
from flaskbus.messages import Reply, Request
from flaskbus.signing import Seal
from flaskbus_gateway.link import Link


async def send_once(
    link: Link,
    keys: MountKeys,
    request: Request,
    fields: Sequence[str | bytes | int],
    *,
    life: int,
    max_frame: int,
    seal: Seal | None,
) -> bytes | Reply | None:
    """Add the entry with these ``fields``; its id, or the first answer, or ``None`` where there is no stream.

    ``life`` is how long a key is remembered, in milliseconds; while its request runs never less than two hours.
    Raises :class:`~flaskbus.errors.KeyInUse`, :class:`~flaskbus.errors.AnswerNotKept`,
    :class:`~flaskbus.errors.KeyReused`, and the link's errors.
    """
    outcome, *rest = await link.script(
        "remember",
        [keys.requests, keys.idempotent(request.idempotency), keys.agents],
        [request.id, fingerprint(request.headers, request.body), max(life, LIST_TTL_MS), *fields],
    )
    if outcome == b"sent":
        entry_id: bytes = rest[0]
        return entry_id
    if outcome == b"missing":
        return None
    if outcome == b"running":
        raise errors.KeyInUse("the first request with this key waits or runs", retry_after=1)
    if outcome == b"mismatch":
        raise errors.KeyReused("the first request with this key had another body")
    if outcome != b"answered":
        raise errors.AnswerNotKept("it was streamed, too large, broken off, or began a session")
    element, request_id = rest
    if seal is not None and not seal.frames(request_id.decode(), request.idempotency).is_signed(element):
        raise errors.AnswerNotKept("it is not signed as it should be")
    return _replayed(element, max_frame)


def _replayed(element: bytes, max_frame: int) -> Reply:
    """The answer that was kept, as it is given again."""
    try:
        frame = wire.decode_frame(element, max_size=max_frame)
    except errors.WireError as error:
        raise errors.AnswerNotKept(f"it cannot be read: {error}") from None
    if not isinstance(frame, Reply):
        raise errors.AnswerNotKept("it is not a whole one")
    return replace(frame, headers=(*frame.headers, REPLAYED))
