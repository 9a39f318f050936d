"""The judge of a run under faults: what each client saw against what the app wrote down. Pure.

The app appends a line to a ledger outside the broker before it does its work; the client writes down how
its request ended. From both, every request gets exactly one verdict.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
"""RFC 9110 section 9.2.2: these may run again, each time as another attempt."""


class Ending(StrEnum):
    """How a request ended for its client."""

    ANSWERED = "answered"  # a whole response
    CUT = "cut"  # the connection broke in the middle of a response, which does not look complete
    BROKEN = "broken"  # the connection broke before any of it
    LEFT = "left"  # the client itself went away
    SILENT = "silent"  # nothing came for as long as the client waits


class Verdict(StrEnum):
    """What became of a request; the names are the columns of the soak's table."""

    OK = "ok"
    REJECTED = "rejected"  # was told that it did not run, and it did not
    UNKNOWN = "unknown"  # was told that nobody knows
    GONE = "gone"  # its gateway was killed or frozen, and the connection with it
    LEFT = "left"
    WRONG = "wrong"  # another's answer, an altered one, or one that nobody gave
    DUPLICATE = "duplicate"  # ran more often than it may
    LOST = "lost"  # no answer though nothing excuses that; or a good one to what never ran
    FALSE_NO = "false no"  # was told that it did not run, and it did


BAD = frozenset({Verdict.WRONG, Verdict.DUPLICATE, Verdict.LOST, Verdict.FALSE_NO})
"""What may never happen."""


class Run(NamedTuple):
    """One line of the ledger."""

    token: str
    attempt: int
    process: int


class Seen(NamedTuple):
    """What a client saw of one request; times are monotonic seconds.

    ``right`` is whether the body is what the app gives to this token. ``executed`` is ``yes`` for an answer
    of the app, otherwise what the problem document says. ``excused``: the client's gateway was killed or
    frozen while it waited.
    """

    token: str
    method: str
    sent: float
    ended: float
    ending: Ending
    status: int = 0
    executed: str = ""
    right: bool = False
    excused: bool = False
    gateway: int = 0
    detail: str = ""

    @property
    def waited(self) -> float:
        return self.ended - self.sent


def parse_ledger(text: str) -> dict[str, list[Run]]:
    """Lines of ``token attempt pid``; a last line without its newline was never finished and does not count."""
    runs: dict[str, list[Run]] = defaultdict(list)
    whole, _, _ = text.rpartition("\n")
    for line in whole.split("\n") if whole else ():
        token, attempt, process = line.split(" ")
        runs[token].append(Run(token, int(attempt), int(process)))
    return runs


def ran_too_often(method: str, runs: Sequence[Run]) -> bool:
    """More than once, where a second run does harm; or the same attempt twice, which is never right."""
    if len(runs) < 2:
        return False
    return method not in IDEMPOTENT or len({run.attempt for run in runs}) < len(runs)


def classify(seen: Seen, runs: Sequence[Run]) -> Verdict:
    """The one verdict on a request; where several are due, the gravest in the order of this function."""
    if seen.ending is Ending.ANSWERED and not (seen.executed in ("no", "unknown") or seen.right):
        return Verdict.WRONG
    if seen.executed == "no" and runs:
        return Verdict.FALSE_NO
    if ran_too_often(seen.method, runs):
        return Verdict.DUPLICATE
    match seen.ending:
        case Ending.LEFT:
            return Verdict.LEFT
        case Ending.CUT:
            return Verdict.UNKNOWN if runs else Verdict.LOST
        case Ending.BROKEN:
            return Verdict.GONE if seen.excused else Verdict.LOST
        case Ending.SILENT:
            return Verdict.LOST
    if seen.executed == "no":
        return Verdict.REJECTED
    if seen.executed == "unknown":
        return Verdict.UNKNOWN
    return Verdict.OK if runs else Verdict.LOST


@dataclass
class Tally:
    """Verdicts on many requests, with the bad ones as they are."""

    counts: Counter[Verdict] = field(default_factory=Counter)
    bad: list[tuple[Verdict, Seen, Sequence[Run]]] = field(default_factory=list)
    slowest: Seen | None = None
    """Who waited longest, of those that did not leave."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why requests were not answered well: status and detail."""

    @property
    def requests(self) -> int:
        return self.counts.total()

    def add(self, seen: Seen, runs: Sequence[Run]) -> None:
        verdict = classify(seen, runs)
        self.counts[verdict] += 1
        if verdict in BAD:
            self.bad.append((verdict, seen, runs))
        elif verdict in (Verdict.REJECTED, Verdict.UNKNOWN):
            self.reasons[f"{verdict} {seen.status or seen.ending}: {seen.detail}"] += 1
        if seen.ending is not Ending.LEFT:
            self._compare(seen)

    def _compare(self, seen: Seen) -> None:
        if self.slowest is None or seen.waited > self.slowest.waited:
            self.slowest = seen

    def merge(self, other: Tally) -> None:
        self.counts += other.counts
        self.bad += other.bad
        self.reasons += other.reasons
        if other.slowest is not None:
            self._compare(other.slowest)


def judge(log: Iterable[Seen], ledger: Mapping[str, Sequence[Run]], strangers: bool = True) -> Tally:
    """Verdicts on a whole log.

    With ``strangers``, a run of a token that no client sent is a WRONG one too: the log is then everything
    that was sent.
    """
    tally, sent = Tally(), set()
    for seen in log:
        sent.add(seen.token)
        tally.add(seen, ledger.get(seen.token, ()))
    for token in ledger.keys() - sent if strangers else ():
        nobody = Seen(token, "", 0.0, 0.0, Ending.ANSWERED, detail="nobody sent this")
        tally.add(nobody, ledger[token])
    return tally


def recovery(log: Iterable[Seen], since: float, gateways: Collection[int]) -> float:
    """Seconds from ``since`` until every gateway has given a good answer to a request sent after it.

    Infinite where one gave none.
    """
    first: dict[int, float] = {}
    for seen in log:
        if seen.sent >= since and seen.right:
            first[seen.gateway] = min(seen.ended - since, first.get(seen.gateway, seen.ended))
    return max((first.get(gateway, float("inf")) for gateway in gateways), default=0.0)
