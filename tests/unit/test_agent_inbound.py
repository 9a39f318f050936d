"""The inbound list as an agent reads it, over a list that does what the broker would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flaskbus import wire
from flaskbus.keys import Keys
from flaskbus.messages import BODY, INBOUND, Chunk, Request
from flaskbus_agent.bells import Bell
from flaskbus_agent.entry import Entry, Running
from flaskbus_agent.inbound import BATCH, InboundBody, InboundList
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


class Forgetful(Listed):
    """A gateway that never hears who reads: it rings for nobody. A part is there each second time somebody looks."""

    is_signed = None

    def __init__(self) -> None:
        super().__init__()
        self.looks, self.calls = 0, 0

    def read_inbound(self, name: str, start: int, count: int) -> list[bytes]:
        self.looks += 1
        if not self.looks % 2:
            self.elements.append(wire.encode_frame(Chunk(INBOUND, len(self.elements), b"x")))
        return super().read_inbound(name, start, count)

    def took(self, name: str, count: int, first: bytes) -> None:
        self.calls += not count
        super().took(name, count, first)

    def bell(self) -> Bell:
        return Bell()

    def become_stream(self) -> None:
        """Its place is lent."""


def test_who_is_not_rung_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where something was found, as it would be a second late each time."""
    monkeypatch.setattr("flaskbus_agent.inbound.LOOK", 0.01)
    outbox = Forgetful()
    request = Request("id", "POST", "/m", "gateway", 30_000, inbound=BODY)
    entry: Any = SimpleNamespace(served=SimpleNamespace(keys=Keys("test").of("/m")))
    running: Any = SimpleNamespace(since=0.0)
    body = InboundBody(request, cast(Entry, entry), cast(Outbox, outbox), cast(Running, running))
    for _ in range(3):
        assert body.read(1) == b"x"
    assert outbox.calls == 3
