"""Results as Markdown for people and as JSON for programs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.model import ERRORS, Gap, Metric, Sample
from benchmarks.stats import ratio, summarize, values
from benchmarks.systems.base import System
from benchmarks.targets import TARGETS
from benchmarks.works.base import Work


def markdown(
    facts: Mapping[str, str],
    works: Sequence[Work],
    systems: Sequence[System],
    samples: Sequence[Sample],
    gaps: Sequence[Gap],
) -> str:
    """The whole report; ``facts`` are about the machine and the run."""
    parts = ["# Benchmarks", "\n".join(f"- {name}: {text}" for name, text in facts.items()), LEGEND]
    if targets := target_table(samples):
        parts += ["## Targets", targets]
    for work in works:
        ours = [sample for sample in samples if sample.work == work.name]
        if ours:
            parts += [f"## {work.name}: {work.title}", *filter(None, [work.note]), table(work, systems, ours)]
            if any(sample.metric.when for sample in ours):
                parts += [STATES, states(systems, ours)]
    notes = [f"- {system.title}: {system.note}" for system in systems if system.note]
    if notes:
        parts += ["## About the systems", "\n".join(notes)]
    if gaps:
        parts += ["## Not measured", "\n".join(map(_gap, gaps))]
    return "\n\n".join(parts) + "\n"


LEGEND = """\
A cell is the median of the rounds, ± half of what lies between the least and the greatest. In parentheses: the ratio
to the system in whose column there is none, taken within each round, and the median of these. Load generator, systems
and broker share the machine, so only ratios mean something elsewhere."""
STATES = "Memory is what a process shares with no other (private RSS): before, at its peak during, and after the runs."


def table(work: Work, systems: Sequence[System], samples: Sequence[Sample]) -> str:
    """A line for each variant and metric, a column for each system."""
    columns = [system for system in systems if any(sample.system == system.name for sample in samples)]
    lines = [
        "| | " + " | ".join(system.title for system in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for variant, metric in _rows(samples):
        cells = [_cell(samples, variant, metric, system.name, work) for system in columns]
        unit = f", {metric.unit}" if metric.unit else ""
        lines.append(f"| {variant}: {metric.name}{unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def states(systems: Sequence[System], samples: Sequence[Sample]) -> str:
    """What was looked at more than once: a line for each variant, system and thing, a column for each look."""
    looks = list(dict.fromkeys(sample.metric.when for sample in samples if sample.metric.when))
    lines = ["| | | " + " | ".join(looks) + " |", "| --- | --- |" + " ---: |" * len(looks)]
    variants = dict.fromkeys(sample.variant for sample in samples)
    for variant, system in itertools.product(variants, systems):
        ours = [each for each in samples if (each.variant, each.system) == (variant, system.name)]
        for name, unit in dict.fromkeys((e.metric.name, e.metric.unit) for e in ours if e.metric.when):
            seen = {
                look: summarize(each.value for each in ours if each.metric == Metric(name, unit, when=look))
                for look in looks
            }
            cells = [number(each.median) if each else "–" for each in seen.values()]
            title = f"{name}, {unit}" if unit else name
            lines.append(f"| {variant}: {system.title} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(samples: Sequence[Sample]) -> list[tuple[str, Metric]]:
    """In the order in which they came, by variant; errors only where there were some."""
    errors = {sample.variant for sample in samples if sample.metric == ERRORS and sample.value}
    rows = dict.fromkeys(
        (sample.variant, sample.metric)
        for sample in samples
        if not sample.metric.when and (sample.metric != ERRORS or sample.variant in errors)
    )
    order = list(dict.fromkeys(variant for variant, _ in rows))
    return sorted(rows, key=lambda row: order.index(row[0]))


def _cell(samples: Sequence[Sample], variant: str, metric: Metric, system: str, work: Work) -> str:
    ours = values(samples, work.name, variant, system, metric)
    summary = summarize(ours.values())
    if summary is None:
        return "–"
    text = number(summary.median)
    if summary.count > 1:
        text += f" ±{summary.spread:.0%}"
    base = values(samples, work.name, variant, work.baseline, metric)
    if system != work.baseline and metric.higher is not None and (share := ratio(ours, base)):
        text += f" ({share.median:.2f})"
    return text


def number(value: float) -> str:
    """Three digits that count, or all of a large one: 0.123, 12.3, 6,572."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def target_table(samples: Sequence[Sample]) -> str:
    """Of those that were measured; nothing where none was."""
    lines = []
    for target in TARGETS:
        summary = target.measured(samples)
        if summary is not None:
            sign = "≥" if target.higher else "≤"
            spread = f" ({number(summary.least)} to {number(summary.most)})" if summary.count > 1 else ""
            lines.append(
                f"| {target.title} | {sign} {number(target.floor)} | {number(target.aim)} "
                f"| {number(summary.median)}{spread} | {target.verdict(summary)} |"
            )
    head = ["| flaskbus | floor | aim | measured | |", "| --- | ---: | ---: | ---: | --- |"]
    return "\n".join(head + lines) if lines else ""


def _gap(gap: Gap) -> str:
    place = ", ".join(part for part in (gap.work, gap.variant, gap.system) if part)
    return f"- {place}: {gap.reason}"


def as_json(facts: Mapping[str, str], samples: Sequence[Sample], gaps: Sequence[Gap]) -> str:
    """Every sample: ``{"facts": {}, "samples": [], "targets": [], "not measured": []}``."""
    document: dict[str, Any] = {
        "facts": dict(facts),
        "samples": [
            {
                "work": each.work,
                "variant": each.variant,
                "system": each.system,
                "round": each.round,
                "metric": each.metric.title,
                "unit": each.metric.unit,
                "value": each.value,
            }
            for each in samples
        ],
        "targets": [
            {
                "target": target.title,
                "floor": target.floor,
                "aim": target.aim,
                "measured": summary.median,
                "verdict": target.verdict(summary).strip("*"),
            }
            for target in TARGETS
            if (summary := target.measured(samples)) is not None
        ],
        "not measured": [
            {"work": each.work, "variant": each.variant, "system": each.system, "reason": each.reason}
            for each in gaps
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
