"""The rules of the broker's users. What they are worth is shown on both engines in tests/contract/test_fences.py."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus.acl import ROLES, command_line, mend, rules, user_name
from flaskbus.errors import UsageError
from flaskbus.keys import Keys
from flaskbus.routing import Mount

SHOP = Mount.parse("/shop")

# Every character that a prefix may have.
segments = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=6)


@st.composite
def mounts(draw: st.DrawFn) -> Mount:
    host = draw(st.sampled_from(["", "shop.example.com", "*.example.com"]))
    prefix = "/" + "/".join(draw(st.lists(segments, max_size=3)))
    try:
        return Mount.parse(prefix, host)
    except UsageError:
        return Mount.parse("/plain", host)


def matches(pattern: str, key: str) -> bool:
    """As Redis matches; braces are plain, and so is what fnmatch has beyond it."""
    return fnmatchcase(key, pattern)


def key_patterns(found: list[str]) -> list[str]:
    return [rule[1:] for rule in found if rule[0] == "~"]


class TestAgents:
    @given(mounts(), mounts())
    def test_the_fence_is_around_one_mount(self, mine: Mount, other: Mount) -> None:
        (pattern,) = key_patterns(rules("agent", [mine]))
        assert not re.search(r"[*?\[\]\\]", pattern[:-1])
        for mount in (mine, other):
            keys = Keys().of(mount.key)
            for key in (
                keys.requests,
                keys.agents,
                keys.owner,
                keys.dead,
                keys.reply("x"),
                keys.doorbell("y"),
            ):
                assert matches(pattern, key) == (mount.key == mine.key)

    @pytest.mark.parametrize("other", ["/ab", "/a/b", "/", "/A", "/a}", "/a}:x"])
    def test_neighbours(self, other: str) -> None:
        (pattern,) = key_patterns(rules("agent", [Mount.parse("/a")]))
        # What routing refuses could not get out either.
        assert not matches(pattern, f"flaskbus:{{{other}}}:requests") or other.startswith("/a}:")

    def test_a_mount_that_would_break_out_is_none(self) -> None:
        for prefix in ("/a}:x", "/a{", "/*", "/a?", "/[a]", "/a\\b"):
            with pytest.raises(UsageError):
                Mount.parse(prefix)

    def test_channels_are_fenced_as_keys_are(self) -> None:
        found = rules("agent", [SHOP, Mount.parse("/api")])
        assert [rule for rule in found if rule[0] in "~&"] == [
            "~flaskbus:{/shop}:*", "&flaskbus:{/shop}:*", "~flaskbus:{/api}:*", "&flaskbus:{/api}:*",
        ]  # fmt: skip

    def test_it_may_add_its_name_and_ring_and_no_more(self) -> None:
        found = rules("agent", [SHOP], namespace="prod")
        assert [rule for rule in found if rule[0] == "("] == [
            "(+sadd %W~prod:mounts)",
            "(+evalsha ~prod:mounts)",
            "(+publish &prod:news)",
        ]

    def test_the_other_roles(self) -> None:
        assert [rule for rule in rules("gateway") if rule[0] in "~&%("] == ["~flaskbus:*", "&flaskbus:*"]
        assert [rule for rule in rules("tools") if rule[0] in "~&%("] == ["%R~flaskbus:*"]
        assert not any(rule.startswith(("+@write", "+publish")) for rule in rules("tools"))


@pytest.mark.parametrize("role", ROLES)
def test_every_rule_begins_anew_and_keeps_passwords(role: str) -> None:
    found = rules(role, [SHOP] if role == "agent" else [])  # type: ignore[arg-type]
    assert found[:5] == ["on", "resetkeys", "resetchannels", "clearselectors", "-@all"]
    assert not {"reset", "resetpass", "nopass", "allkeys", "allchannels", "+@all", "allcommands"} & {*found}
    assert not any(rule[0] in "><#" for rule in found)


def test_a_database_other_than_the_first() -> None:
    assert "+select|3" in rules("gateway", db=3)
    assert not any(rule.startswith("+select") for rule in rules("gateway"))


def test_who_follows_masters_asks_who_they_are() -> None:
    assert "+role" in rules("gateway", kind="sentinel")
    assert {"+asking", "+cluster|slots"} <= {*rules("tools", kind="cluster")}
    assert not {"+role", "+asking", "+cluster|slots"} & {*rules("gateway")}


def test_an_agent_has_mounts_and_no_other_has() -> None:
    with pytest.raises(UsageError, match="which mounts"):
        rules("agent")
    with pytest.raises(UsageError, match="gateway has no mount"):
        rules("gateway", [SHOP])


def test_names() -> None:
    assert user_name("gateway") == "flaskbus-gateway"
    assert user_name("agent", SHOP) == "flaskbus-agent-shop"
    assert user_name("agent", Mount.from_name("*.example.com/a%20b")) == "flaskbus-agent-.example.com-a-20b"


def test_a_shell_reads_the_line_as_it_is_meant() -> None:
    words = ["~flaskbus:{/a'b$c`d(e)!}:*", "(+sadd %W~flaskbus:mounts)", "+client|id"]
    line = command_line("shop", words)
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == ["ACL", "SETUSER", "shop", *words]
    assert line.startswith("ACL SETUSER shop \"~flaskbus:{/a'b\\$c\\`d(e)!}:*\" '(+sadd")


@pytest.mark.parametrize("name", ["", "a b", "a\n", "é"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="not possible"):
        command_line(name, [])


@pytest.mark.parametrize(
    "refusal",
    [
        # Redis 7.0, then what came after it, for a command, a key and a channel; then inside of scripts.
        "this user has no permissions to run the 'xadd' command",
        "User shop has no permissions to run the 'xadd' command",
        "this user has no permissions to access one of the keys used as arguments",
        "No permissions to access a key",
        "No permissions to access a channel",
        "The user executing the script can't run this command or subcommand script: 0f, on @user_script:1.",
        "ACL failure in script: No permissions to access a key script: on @user_script:1.",
    ],
)
def test_a_refusal_names_its_mend(refusal: str) -> None:
    assert mend(refusal, ["/shop"]).endswith("flaskbus acl agent /shop)")
    assert mend(refusal, ["/shop", "/api"]).endswith("flaskbus acl agent /shop /api --user NAME)")


def test_another_error_has_none() -> None:
    assert mend("OOM command not allowed when used memory > 'maxmemory'.", ["/shop"]) == ""
