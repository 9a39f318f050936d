"""A mount in several queues: their names, and where they lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.acl import mend
from flaskbus.cluster import SLOTS, slot_of
from flaskbus.commands.dev_plan import parse_apps
from flaskbus.errors import UsageError
from flaskbus.keys import Keys
from flaskbus.partitions import partitions
from flaskbus.routing import Mount, Table
from flaskbus.signing import parse_keys
from flaskbus_gateway.directory import _queues
from flaskbus_gateway.mounts import MountState, Queues

MOUNTS = st.sampled_from(["/", "/myapp", "/a/b", "shop.example.com/", "*.example.com/api", "/%C3%A9"])
NUMBERS = st.integers(1, 24)


@given(MOUNTS.map(Mount.from_name), NUMBERS)
def test_each_range_of_the_slots_has_one(mount: Mount, number: int) -> None:
    parts = partitions(mount, number)
    assert parts[0] == mount
    assert {part.whole for part in parts} == {mount}
    slots = [slot_of(Keys("any").of(part.key).requests) for part in parts]
    assert sorted(slot * number // SLOTS for slot in slots) == list(range(number))


@given(MOUNTS.map(Mount.from_name), NUMBERS)
def test_twice_as_many_keep_those_that_are_there(mount: Mount, number: int) -> None:
    assert set(partitions(mount, number)) <= set(partitions(mount, 2 * number))


@given(MOUNTS.map(Mount.from_name), NUMBERS)
def test_names_and_keys_lead_back(mount: Mount, number: int) -> None:
    for part in partitions(mount, number):
        assert Mount.from_name(part.name) == Mount.from_key(part.key) == part


@given(MOUNTS.map(Mount.from_name), st.integers(2, 24))
def test_requests_are_for_the_whole(mount: Mount, number: int) -> None:
    parts = partitions(mount, number)
    host = mount.host.replace("*", "www") or "any"
    for some in (parts, parts[1:]):
        assert Table(some).match(host, mount.prefix) == mount


def test_a_partition_has_the_path_of_its_mount() -> None:
    part = Mount.from_name("*.example.com/api;7")
    assert (part.host, part.prefix, part.partition) == ("*.example.com", "/api", 7)
    assert (part.key, part.script_name) == (".example.com/api;7", "/api")


@pytest.mark.parametrize("name", ["/a;0", "/a;01", "/a;-1", "/a;x", "/a;", "/a;1;2", "/a;٣", "/a;1/b", "a;1"])
def test_no_partitions(name: str) -> None:
    with pytest.raises(UsageError):
        Mount.from_name(name)


def queue(alive: bool = True) -> MountState:
    state = MountState(Mount.parse("/a"), Keys().of("/a"))
    if alive:
        state.queue.goes_on(0.0, 0.0)
    return state


def test_queues_take_turns() -> None:
    states = [queue() for _ in range(3)]
    queues = Queues(states)
    seen = [queues.next() for _ in range(6)]
    assert seen[:3] == seen[3:]
    assert set(map(id, seen)) == set(map(id, states))


def test_queues_without_agents_are_passed_over_unless_there_is_no_other() -> None:
    first, second, third = queue(False), queue(), queue(False)
    queues = Queues([first, second, third])
    assert {id(queues.next()) for _ in range(6)} == {id(second)}
    second.queue.pauses()
    assert {id(queues.next()) for _ in range(6)} == {id(first)}


def test_one_queue_is_always_next() -> None:
    alone = queue(False)
    assert Queues([alone]).next() is alone


def test_a_queue_of_another_app_is_given_nothing() -> None:
    states = {mount: MountState(mount, Keys().of(mount.key)) for mount in partitions(Mount.parse("/a"), 4)}
    first, same, other, unknown = states.values()
    first.owner = same.owner = b"shop"
    other.owner = b"blog"
    [queues] = _queues(states, {}).values()
    assert queues.states == [first, same, unknown]
    assert _queues(states, {first.mount: queues}) == {first.mount: queues}, (
        "who has had its turn is not forgotten"
    )
    other.owner = b"shop"
    [more] = _queues(states, {first.mount: queues}).values()
    assert more.states == [first, same, other, unknown]


def test_what_an_agent_may_not_is_mended_for_all_its_queues() -> None:
    names = [mount.name for mount in partitions(Mount.parse("/a"), 3)]
    refusal = "NOPERM No permissions to access a key"
    assert mend(refusal, names).endswith("flaskbus acl agent /a --partitions 3)")
    assert mend(refusal, names[1:2]).endswith(f"flaskbus acl agent '{names[1]}')")
    assert mend(refusal, [*names, "/b"]).endswith("flaskbus acl agent /a /b --partitions 3 --user NAME)")


def test_a_signing_key_is_for_the_whole() -> None:
    key = "0" * 64
    assert parse_keys(f"/a;7={key}") == {"/a": (key,)}


def test_dev_serves_whole_mounts() -> None:
    with pytest.raises(UsageError, match="say a:app=/z"):
        parse_apps(["a:app=/z;2"])
