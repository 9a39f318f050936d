"""Medians, spreads and ratios of samples.

A ratio is taken within a round, between runs that are seconds apart, and only then over the rounds: what the rest of
the machine does changes from minute to minute, and hits both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.model import Metric, Sample


@dataclass(frozen=True, slots=True)
class Summary:
    """The middle, the least and the greatest of some values."""

    median: float
    least: float
    most: float
    count: int

    @property
    def spread(self) -> float:
        """Half the range as a share of the median: 0.05 is ±5 %."""
        return (self.most - self.least) / 2 / abs(self.median) if self.median else 0.0


def summarize(values: Iterable[float]) -> Summary | None:
    """None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Summary(median(ordered), ordered[0], ordered[-1], len(ordered))


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the least value that at least ``share`` (0 to 1) of all do not exceed.

    NaN of no values.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def values(
    samples: Iterable[Sample], work: str, variant: str, system: str, metric: Metric
) -> dict[int, float]:
    """Round -> value."""
    return {
        sample.round: sample.value
        for sample in samples
        if (sample.work, sample.variant, sample.system, sample.metric) == (work, variant, system, metric)
    }


def ratio(over: dict[int, float], under: dict[int, float]) -> Summary | None:
    """Of the rounds that both have; None where there are none."""
    return summarize(over[key] / under[key] for key in sorted(over.keys() & under.keys()) if under[key])
