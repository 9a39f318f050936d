"""Pictures of the results (PNG): one for each work, and one with all ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.model import Sample
from benchmarks.stats import Summary, ratio, summarize, values
from benchmarks.systems.base import System
from benchmarks.works.base import Work

_COLOURS = {
    "flaskbus": "#c0392b",
    "nginx-gthread": "#2c3e50",
    "nginx-gevent": "#7f8c8d",
    "nginx-granian": "#2980b9",
    "uwsgi": "#27ae60",
    "gunicorn": "#8e44ad",
    "gunicorn-asgi": "#16a085",
    "in-process": "#bdc3c7",
}
_LINES = ("scaling", "held")
"""Works whose variants are numbers to be put on an axis."""


def draw(
    works: Sequence[Work], systems: Sequence[System], samples: Sequence[Sample], directory: Path
) -> list[Path]:
    """The files that were written, ``WORK.png`` and ``ratios.png``."""
    files = []
    for work in works:
        shown = [each for each in samples if each.work == work.name and each.metric == work.main]
        if shown:
            figure = _lines(work, systems, shown) if work.name in _LINES else _bars(work, systems, shown)
            files.append(_save(figure, directory / f"{work.name}.png"))
    if (overview := _ratios(works, samples)) is not None:
        files.append(_save(overview, directory / "ratios.png"))
    return files


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=120, bbox_inches="tight")
    return file


def _variants(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.variant for sample in samples))


def _summary(samples: Sequence[Sample], work: Work, variant: str, system: System) -> Summary | None:
    return summarize(values(samples, work.name, variant, system.name, work.main).values())


def _bars(work: Work, systems: Sequence[System], samples: Sequence[Sample]) -> Figure:
    """Medians, with a line from the least to the greatest."""
    shown = [system for system in systems if any(each.system == system.name for each in samples)]
    variants = _variants(samples)
    figure = Figure(figsize=(max(6.0, 1.2 + 0.45 * len(shown) * len(variants)), 4.0))
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for place, system in enumerate(shown):
        for group, variant in enumerate(variants):
            if (each := _summary(samples, work, variant, system)) is None:
                continue
            axes.bar(
                group + (place - (len(shown) - 1) / 2) * width,
                each.median,
                width * 0.92,
                yerr=[[each.median - each.least], [each.most - each.median]],
                capsize=2,
                ecolor="#555555",
                color=_COLOURS[system.name],
                label=system.title if group == 0 else None,
            )
    axes.set_xticks(range(len(variants)), variants)
    _finish(axes, work)
    return figure


def _lines(work: Work, systems: Sequence[System], samples: Sequence[Sample]) -> Figure:
    figure = Figure(figsize=(6.0, 4.0))
    axes = figure.subplots()
    variants = _variants(samples)
    for system in systems:
        points = [
            (float(variant.replace(",", "")), each.median)
            for variant in variants
            if (each := _summary(samples, work, variant, system)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=_COLOURS[system.name], label=system.title)
    axes.set_xscale("log", base=2 if work.name == "scaling" else 10)
    if work.name == "scaling":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xticks([float(variant.replace(",", "")) for variant in variants], variants)
    _finish(axes, work)
    return figure


def _finish(axes: Any, work: Work) -> None:
    better = {True: ", higher is better", False: ", lower is better", None: ""}[work.main.higher]
    unit = f" ({work.main.unit})" if work.main.unit else ""
    axes.set_title(work.title)
    axes.set_ylabel(f"{work.main.name}{unit}{better}")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def _ratios(works: Sequence[Work], samples: Sequence[Sample]) -> Figure | None:
    """The bus over each work's baseline, so that right of the line is better."""
    rows: list[tuple[str, Summary]] = []
    for work in works:
        for variant in _variants([each for each in samples if each.work == work.name]):
            ours = values(samples, work.name, variant, "flaskbus", work.main)
            base = values(samples, work.name, variant, work.baseline, work.main)
            share = ratio(ours, base) if work.main.higher else ratio(base, ours)
            if share is not None and work.baseline != "flaskbus":
                rows.append((f"{work.name}, {variant}, over {work.baseline}", share))
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 0.8 + 0.32 * len(rows)))
    axes = figure.subplots()
    for place, (_, share) in enumerate(reversed(rows)):
        colour = "#27ae60" if share.median >= 1 else "#c0392b"
        axes.plot([share.least, share.most], [place, place], color=colour, linewidth=2)
        axes.plot([share.median], [place], "o", color=colour)
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_title("flaskbus, better to the right of the line (for times and sizes, the inverse)")
    axes.grid(axis="x", alpha=0.3)
    return figure
