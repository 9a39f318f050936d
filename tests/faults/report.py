"""The table of a soak: a row for each fault, a column for each verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.faults.oracle import Tally, Verdict


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass
class Row:
    """All rounds of one fault."""

    rounds: int = 0
    recovery: float = 0.0
    tally: Tally = field(default_factory=Tally)


@dataclass
class Report:
    rows: dict[str, Row]
    left: dict[str, Any]
    """What was left behind."""
    killed: int
    seconds: float

    @property
    def total(self) -> Row:
        whole = Row()
        for row in self.rows.values():
            whole.rounds += row.rounds
            whole.recovery = max(whole.recovery, row.recovery)
            whole.tally.merge(row.tally)
        return whole

    @property
    def good(self) -> bool:
        return not self.total.tally.bad and not self.left

    def table(self) -> str:
        columns = [*Verdict]
        head = ["fault", "rounds", "requests", *columns, "recovery", "slowest"]
        lines = [head]
        for name, row in [*self.rows.items(), ("all", self.total)]:
            counts = [str(row.tally.counts[verdict]) for verdict in columns]
            slowest = row.tally.slowest
            times = [f"{row.recovery:.2f} s", f"{slowest.waited if slowest else 0.0:.2f} s"]
            lines.append([name, str(row.rounds), str(row.tally.requests), *counts, *times])
        widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
        rows = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
        ]
        return "\n".join(rows)
