"""Slots, keys of commands, redirections and topologies: a cluster's rules, as plain values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.cluster import SLOTS, Redirect, Topology, key_of, parse_redirect, parse_slots, slot_of
from flaskbus.keys import Keys

A, B, C = ("10.0.0.1", 7000), ("10.0.0.2", 7001), ("10.0.0.3", 7002)


@pytest.mark.parametrize(
    ("key", "slot"),
    # CLUSTER KEYSLOT of both engines says so.
    [
        ("foo", 12182), ("bar", 5061), ("{foo}bar", 12182), ("a{}b", 13694), ("{", 4092), ("{foo", 13308),
        ("x{y}z}", 12222), (b"\xff", 7920),
    ],
)  # fmt: skip
def test_slots(key: str | bytes, slot: int) -> None:
    assert slot_of(key) == slot


@given(st.text(), st.text())
def test_all_keys_of_a_mount_share_a_slot(request_id: str, process: str) -> None:
    keys = Keys().of("/shop")
    names = (
        keys.requests,
        keys.owner,
        keys.agents,
        keys.dead,
        keys.reply(request_id),
        keys.doorbell(process),
    )
    assert {slot_of(name) for name in names} == {slot_of(keys.requests)}


KEYS: list[tuple[tuple[Any, ...], object]] = [
    (("XADD", "key", "*", "a", "b"), "key"),
    (("DEL", b"key", "other"), b"key"),
    ((b"get", "key"), "key"),
    (("LRANGE", 7, 0, 1), "7"),
    (("EVALSHA", "sha", 2, "key", "other"), "key"),
    (("EVALSHA", "sha", "0"), None),
    (("EVALSHA", "sha"), None),
    (("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "STREAMS", "key", ">"), "key"),
    (("XREAD", b"streams", b"key", b"0"), b"key"),
    (("XREAD", "COUNT", 1), None),
    (("XGROUP", "CREATE", "key", "g"), "key"),
    (("XINFO GROUPS", "key"), "key"),
    (("MEMORY", "USAGE", "key"), "key"),
    (("MEMORY", "STATS"), None),
    (("PUBLISH", "channel", "text"), "channel"),
    (("PING",), None),
    (("SCRIPT LOAD", "text"), None),
    (("CONFIG GET", "save"), None),
    (("SMEMBERS",), None),
]


@pytest.mark.parametrize(("command", "key"), KEYS)
def test_the_key_of_a_command(command: tuple[Any, ...], key: object) -> None:
    assert key_of(command) == key


REDIRECTS = {
    "MOVED 3999 10.0.0.2:7001": Redirect(3999, B, ask=False),
    "ASK 3999 10.0.0.2:7001": Redirect(3999, B, ask=True),
    "ASK 3999 :7001": Redirect(3999, ("10.0.0.1", 7001), ask=True),
    "MOVED 1 ::1:7001": Redirect(1, ("::1", 7001), ask=False),
    "MOVED 3999": None,
    "MOVED x 10.0.0.2:7001": None,
    "MOVED 3999 10.0.0.2:": None,
    "TRYAGAIN Multiple keys": None,
    "ERR unknown command here": None,
}


@pytest.mark.parametrize("text", REDIRECTS)
def test_redirections(text: str) -> None:
    assert parse_redirect(text, A) == REDIRECTS[text]


def test_a_topology() -> None:
    topology = parse_slots(
        [
            [0, 99, [b"10.0.0.1", 7000, b"id"], [b"10.0.0.3", 7002, b"id"]],
            [100, SLOTS - 1, ["10.0.0.2", 7001, "id", []]],
        ],
        A,
    )
    assert [topology.owner(slot) for slot in (0, 99, 100, SLOTS - 1)] == [A, A, B, B]
    assert topology.primaries == (A, B)
    assert topology.nodes == (A, B, C)


@pytest.mark.parametrize("host", [None, b"", "", b"?"])
def test_a_node_that_does_not_know_its_address_is_the_one_that_was_asked(host: object) -> None:
    assert parse_slots([[0, SLOTS - 1, [host, 7009, b"id"]]], A).owner(5) == ("10.0.0.1", 7009)


def test_a_slot_that_moved() -> None:
    topology = Topology([(0, SLOTS - 1, A)])
    topology.moved(5, B)
    topology.moved(6, B)
    assert [topology.owner(slot) for slot in (4, 5, 6)] == [A, B, B]
    assert topology.nodes == (B, A)
    assert set(topology.primaries) == {A, B}


def test_nobody_is_known_at_first() -> None:
    topology = Topology()
    assert topology.owner(0) is None
    assert topology.primaries == ()
