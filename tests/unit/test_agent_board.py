"""What crosses the fork, and how agents of one app are compared."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flaskbus_agent.board import MOST_MOUNTS, Board
from flaskbus_agent.fingerprint import code_fingerprint, key_fingerprint


# The process of the tests may have threads; the child touches nothing but the board.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_board_is_shared_with_a_child() -> None:
    board = Board()
    assert (board.state, board.busy, board.served, board.claimed, board.read()) == (
        "starting",
        0,
        0,
        False,
        {},
    )
    pid = os.fork()
    if pid == 0:
        board.report(tick=12.5, busy=3, served=7)
        board.write({"reason": "because", "code": {"/app": "abc"}})
        board.wants_successor = True
        board.state = "failed"
        os._exit(0)
    os.waitpid(pid, 0)
    assert (board.state, board.busy, board.served, board.tick) == ("failed", 3, 7, 12.5)
    assert board.wants_successor
    assert board.read() == {"reason": "because", "code": {"/app": "abc"}}


def test_beats_count() -> None:
    board = Board()
    assert [board.next_beat() for _ in range(3)] == [1, 2, 3]


def test_every_mount_can_be_withdrawn() -> None:
    board = Board()
    for index in range(MOST_MOUNTS):
        board.withdraw(index)
        board.withdraw(index)
    assert board.withdrawn() == 2**MOST_MOUNTS - 1


def test_facts_that_do_not_fit_are_cut_to_the_reason() -> None:
    board = Board()
    board.write({"reason": "é" * 5000, "code": {"/app": "abc"}})
    assert board.read() == {"reason": "é" * 500}


def test_code_marks_follow_the_source_and_not_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = []
    for place, source in (("a", "X = 1"), ("b", "X = 1"), ("c", "X = 2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "marked.py").write_text(source)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / place))
            patch.delitem(sys.modules, "marked", raising=False)
            __import__("marked")
            marks.append(code_fingerprint("marked:app"))
            del sys.modules["marked"]
    assert marks[0] == marks[1] != marks[2]
    assert all(len(mark) == 12 for mark in marks)


class App:
    def __init__(self, secret_key: object):
        self.secret_key = secret_key


def test_key_marks() -> None:
    mark = key_fingerprint(App("dev"), "/a")
    assert len(mark) == 8
    assert mark == key_fingerprint(App(b"dev"), "/a")
    assert mark != key_fingerprint(App("dev"), "/b")
    assert mark != key_fingerprint(App("other"), "/a")
    assert key_fingerprint(App(None), "/a") == key_fingerprint(App(""), "/a") == ""
    assert key_fingerprint(object(), "/a") == ""
