"""The inbound list as an agent reads it, over a list that does what the broker would."""

from __future__ import annotations

from typing import cast

from hypothesis import example, given
from hypothesis import strategies as st

from flaskbus import wire
from flaskbus.messages import INBOUND, Chunk
from flaskbus_agent.inbound import BATCH, InboundList
from flaskbus_agent.outbox import Outbox


class Listed:
    """The list, with ``took.lua``'s rule: a trim that names another element than the first does nothing."""

    def __init__(self) -> None:
        self.elements: list[bytes] = []

    def read_inbound(self, _: str, start: int, count: int) -> list[bytes]:
        return self.elements[start : start + count]

    def took(self, _: str, count: int, first: bytes) -> None:
        if count and self.elements and self.elements[0].startswith(first):
            del self.elements[:count]


@given(st.lists(st.sampled_from(["push", "push", "push silently", "again", "again silently", "look"])))
@example(["push", "again silently", *["push"] * 40])
def test_what_was_handed_on_makes_room_whatever_lies_there_twice(steps: list[str]) -> None:
    listed, pushed, received = Listed(), 0, []
    inbound = InboundList(cast(Outbox, listed), "inbound", None)

    def hand_on() -> None:
        while inbound.frames:
            received.append(inbound.frames.popleft().seq)
            inbound.handed_on(1, 1)

    def look() -> None:
        while inbound.look():
            hand_on()
        hand_on()

    for step in steps:
        if step == "look":
            look()
            continue
        if step.startswith("push"):
            pushed += 1
        elif not pushed:
            continue
        # "Again": the answer was lost with the connection. "Silently": the ring was.
        element = wire.encode_frame(Chunk(INBOUND, pushed - 1, b"x"))
        listed.elements.append(element)
        if "silently" not in step and not inbound.ring(element):
            look()
        hand_on()
    for _ in range(2):
        look()
    assert received == list(range(pushed))
    assert len(listed.elements) < BATCH
