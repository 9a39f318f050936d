"""A mount in several queues: their names, and where they lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.cluster import SLOTS, slot_of
from flaskbus.errors import UsageError
from flaskbus.keys import Keys
from flaskbus.partitions import partitions
from flaskbus.routing import Mount, Table

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
