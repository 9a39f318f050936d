"""Names of keys: one slot a mount, nothing of a client's, and a short list of what may stay."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from flaskbus.errors import UsageError
from flaskbus.keys import Keys


def test_all_keys_of_a_mount_share_one_hash_tag() -> None:
    mount = Keys().of("/shop")
    names = [mount.requests, mount.agents, mount.owner, mount.dead, mount.reply("r"), mount.inbound("r")]
    names += [mount.idempotent("0" * 64), mount.doorbell("gw")]
    assert {name.split("{")[1].split("}")[0] for name in names} == {"/shop"}
    assert len(set(names)) == len(names)


def test_a_mounts_keys_are_made_once() -> None:
    keys = Keys()
    assert keys.of("/a") is keys.of("/a")
    assert keys.of("/a") != keys.of("/b")


def test_so_are_inbound_lists() -> None:
    pattern = Keys("ns").inbound_of("0a1b")
    assert fnmatchcase(Keys("ns").of("/a/b").inbound("0a1bff"), pattern)
    assert not fnmatchcase(Keys("ns").of("/a/b").inbound("0a1cff"), pattern)
    assert not fnmatchcase(Keys("ns").of("/a/b").reply("0a1bff"), pattern)


def test_reply_lists_are_found_by_what_their_ids_begin_with() -> None:
    pattern = Keys("ns").replies_of("0a1b")
    assert fnmatchcase(Keys("ns").of("/a/b").reply("0a1bff"), pattern)
    assert not fnmatchcase(Keys("ns").of("/a/b").reply("0a1cff"), pattern)
    assert not fnmatchcase(Keys("ns").of("/a/b").inbound("0a1bff"), pattern)
    assert not fnmatchcase(Keys("other").of("/a/b").reply("0a1bff"), pattern)


@pytest.mark.parametrize("namespace", ["", "a b", "a{b}", "a*", "ä", "-a", "x" * 65, "a:b"])
def test_a_namespace_that_could_be_read_as_something_else(namespace: str) -> None:
    with pytest.raises(UsageError, match="not usable"):
        Keys(namespace)


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("ns:mounts", True),
        ("ns:gateways", True),
        ("ns:{/a}:mount", True),
        ("ns:{/a}:requests", True),
        ("ns:{/a}:reply:1", False),
        ("ns:{/a}:dead", False),
        ("other:mounts", False),
    ],
)
def test_what_may_be_without_a_ttl(key: str, may: bool) -> None:
    assert Keys("ns").may_persist(key) is may
