"""Which refusals pass."""

from __future__ import annotations

import pytest

from flaskbus.refusals import PASSING, passing


@pytest.mark.parametrize(
    "answer",
    [
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "MISCONF Errors writing to the AOF file: No space left on device",
        "NOREPLICAS Not enough good replicas to write. script: 5d1c, on @user_script:32.",
        *sorted(PASSING),
    ],
)
def test_asked_again(answer: str) -> None:
    assert passing(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "BUSYGROUP Consumer Group name already exists",
        "BUSYKEY Target key name already exists.",
        "ERR value is not an integer. Is it BUSY",
        "NOPERM this user has no permissions to run the 'evalsha' command",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
    ],
)
def test_meant_for_good(answer: str) -> None:
    assert not passing(answer)
