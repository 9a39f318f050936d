"""Records of agents: what somebody else wrote in their place is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.registry import AgentRecord

RECORD = AgentRecord(id="a", name="shop", host="h", pid=1, beat=3, lease=10.0, state="ready", signing="k")
MEMBERS: dict[str, Any] = json.loads(RECORD.dump())


def test_there_and_back() -> None:
    assert AgentRecord.load(RECORD.dump()) == RECORD
    assert AgentRecord.load(RECORD.dump().encode()) == RECORD


def test_what_a_newer_version_adds_is_left_out() -> None:
    assert AgentRecord.load(json.dumps({**MEMBERS, "new": 1})) == RECORD


def test_what_an_older_version_did_not_have() -> None:
    older = {name: value for name, value in MEMBERS.items() if name not in ("signing", "lease")}
    record = AgentRecord.load(json.dumps(older))
    assert record is not None
    assert (record.signing, record.lease) == ("", 0.0)


def test_a_whole_number_of_seconds() -> None:
    record = AgentRecord.load(json.dumps({**MEMBERS, "lease": 10}))
    assert record is not None
    assert record.lease == 10


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("value", [None, [], {}, True, "\ud800", b"bytes"])
def test_a_member_of_another_type(name: str, value: Any) -> None:
    text = json.dumps({**MEMBERS, name: value}) if not isinstance(value, bytes) else value
    assert AgentRecord.load(text) is None


@given(st.one_of(st.binary(max_size=40), st.text(max_size=40)))
def test_anything_at_all(data: bytes | str) -> None:
    assert AgentRecord.load(data) is None


def test_a_bomb() -> None:
    assert AgentRecord.load("[" * 100_000) is None
