"""One attempt of a request on its way to the stream of its mount."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from flaskbus import errors
from flaskbus.messages import Reply, Request
from flaskbus_gateway.entries import encode, refused
from flaskbus_gateway.idempotency import send_once
from flaskbus_gateway.link import Answer, AnswerError, LinkDown

if TYPE_CHECKING:
    from flaskbus_gateway.mounts import MountState
    from flaskbus_gateway.switchboard import Switchboard


async def send(
    board: Switchboard, state: MountState, request: Request, begun: asyncio.Future[Answer] | None = None
) -> bytes | Reply:
    """Put a request on the stream of its mount; the entry that it has there.

    What has ``begun`` already is the broker's answer to that.

    With an Idempotency-Key that was used before, it is not sent, and the first answer is returned. Raises
    :class:`~flaskbus_gateway.link.LinkLost` where nobody knows whether it is there, and
    :class:`~flaskbus.errors.BusError` where it surely is not.
    """
    # A stream without its group would take requests that nobody can read.
    command = ("XADD", state.keys.requests, "NOMKSTREAM", "*", *encode(request, state.seal))
    deadline = board.now() + board.BROKER_WAIT
    while True:
        try:
            sent: bytes | Reply | None
            if request.idempotency:
                sent = await send_once(
                    board.link, state.keys, request, command[4:],
                    life=state.policy.ttl if state.policy else 0, max_frame=board.max_frame, seal=state.seal,
                )  # fmt: skip
            else:
                sending, begun = begun or board.link.call(*command), None
                sent = await sending
        except LinkDown as error:
            if board.now() > deadline:
                raise errors.BrokerUnavailable(str(error), retry_after=1) from None
            await board.link_up()
            continue
        except AnswerError as error:
            raise refused(error) from None
        if sent is not None:
            return sent
        # The stream is gone: forgotten by everybody, or by a broker that lost its data and hears of it soon.
        if board.now() > deadline:
            raise errors.UnknownMount(f"{state.mount.whole.name} is no longer mounted")
        try:
            await asyncio.wait_for(board.directory.fresh(), max(0.0, deadline - board.now()))
        except TimeoutError:
            raise errors.BrokerUnavailable("the mounts cannot be looked up", retry_after=1) from None
        if state.mount not in board.directory.states:
            raise errors.UnknownMount(f"{state.mount.whole.name} is no longer mounted")
