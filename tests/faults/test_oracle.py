"""The judge is judged: fed with every kind of lie, it finds each, and takes no truth for one."""

from __future__ import annotations

import pytest

from tests.faults.contents import content
from tests.faults.load import Ask
from tests.faults.oracle import BAD, Ending, Run, Seen, Verdict, classify, judge, parse_ledger, recovery

ONCE = [Run("t", 1, 10)]
AGAIN = [Run("t", 1, 10), Run("t", 2, 11)]
SAME_ATTEMPT = [Run("t", 1, 10), Run("t", 1, 11)]


def seen(ending: Ending) -> Seen:
    return Seen("t", "POST", 1.0, 2.0, ending)


GOOD = seen(Ending.ANSWERED)._replace(status=200, executed="yes", right=True)
NO = seen(Ending.ANSWERED)._replace(status=503, executed="no")
UNKNOWN = seen(Ending.ANSWERED)._replace(status=502, executed="unknown")
EXCUSED = seen(Ending.BROKEN)._replace(excused=True)


@pytest.mark.parametrize(
    ("what", "runs", "verdict"),
    [
        # Truths
        (GOOD, ONCE, Verdict.OK),
        (GOOD._replace(method="GET"), AGAIN, Verdict.OK),
        (NO, [], Verdict.REJECTED),
        (UNKNOWN, [], Verdict.UNKNOWN),
        (UNKNOWN, ONCE, Verdict.UNKNOWN),
        (seen(Ending.CUT), ONCE, Verdict.UNKNOWN),
        (EXCUSED, ONCE, Verdict.GONE),
        (seen(Ending.LEFT), [], Verdict.LEFT),
        (seen(Ending.LEFT), ONCE, Verdict.LEFT),
        # Lies
        (GOOD._replace(right=False), ONCE, Verdict.WRONG),
        (GOOD._replace(status=422, right=False), ONCE, Verdict.WRONG),
        (GOOD._replace(status=500, right=False), ONCE, Verdict.WRONG),
        (NO, ONCE, Verdict.FALSE_NO),
        (GOOD, AGAIN, Verdict.DUPLICATE),
        (UNKNOWN, AGAIN, Verdict.DUPLICATE),
        (seen(Ending.LEFT), AGAIN, Verdict.DUPLICATE),
        (EXCUSED, AGAIN, Verdict.DUPLICATE),
        (GOOD._replace(method="GET"), SAME_ATTEMPT, Verdict.DUPLICATE),
        (GOOD, [], Verdict.LOST),
        (seen(Ending.CUT), [], Verdict.LOST),
        (seen(Ending.BROKEN), ONCE, Verdict.LOST),
        (seen(Ending.SILENT), [], Verdict.LOST),
    ],
)
def test_each_request_has_one_verdict(what: Seen, runs: list[Run], verdict: Verdict) -> None:
    assert classify(what, runs) is verdict


def test_a_run_that_nobody_asked_for_is_wrong() -> None:
    tally = judge([GOOD], {"t": ONCE, "stranger": [Run("stranger", 1, 10)]})
    assert tally.counts == {Verdict.OK: 1, Verdict.WRONG: 1}
    assert [verdict in BAD for verdict, *_ in tally.bad] == [True]
    assert judge([GOOD], {"t": ONCE, "later": ONCE}, strangers=False).counts == {Verdict.OK: 1}


def test_a_tally_says_why_and_how_long() -> None:
    tally = judge([NO._replace(detail="full"), GOOD._replace(ended=5.0)], {}, strangers=False)
    assert tally.reasons == {"rejected 503: full": 1}
    assert tally.slowest is not None
    assert tally.slowest.waited == 4.0
    assert tally.requests == 2


def test_the_ledger_is_read_up_to_its_last_whole_line() -> None:
    assert parse_ledger("") == {}
    assert parse_ledger("t 1 10") == {}
    assert parse_ledger("t 1 10\nt 2 11\nu 1 1") == {"t": AGAIN}


def test_recovery_counts_what_was_sent_afterwards_at_every_gateway() -> None:
    log = [
        GOOD._replace(sent=0.5, ended=3.0),
        GOOD._replace(sent=3.0, ended=5.0),
        GOOD._replace(sent=2.0, ended=4.0),
        GOOD._replace(sent=1.0, ended=2.0, right=False),
        GOOD._replace(sent=6.0, ended=7.0, gateway=1),
    ]
    assert recovery(log, 1.0, [0]) == 3.0
    assert recovery(log, 1.0, [0, 1]) == 6.0
    assert recovery(log, 1.0, [0, 1, 2]) == float("inf")


def test_contents_tell_every_difference() -> None:
    ask = Ask("1.2.3", "POST", "large", 0, False, None)
    whole = content("1.2.3", "reply", 100 * 1024)
    quarter = len(whole) // 4
    assert ask.right(whole)
    for altered in (
        whole[:-1],
        whole + b"x",
        whole[quarter : 2 * quarter] + whole[:quarter] + whole[2 * quarter :],
        whole[:quarter] * 4,
        whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        content("1.2.4", "reply", len(whole)),
        content("1.2.3", "request", len(whole)),
        b"",
    ):
        assert not ask.right(altered)
