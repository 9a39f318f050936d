"""``flaskbus config``: every setting, its value, and where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

import click

from flaskbus.broker import mask
from flaskbus.config import CONFIG_VARIABLE, FILE_NAMES, Resolved
from flaskbus.options import FlaskbusCommand, settings_options
from flaskbus.settings import COMPONENTS, CommonSettings, show, variables

KINDS: tuple[type[CommonSettings], ...] = (CommonSettings, *COMPONENTS)
_SHARED = [item.name for item in fields(CommonSettings)]

All = tuple[Resolved[CommonSettings], ...]
Row = tuple[str, str, str]


@click.command(
    "config",
    cls=FlaskbusCommand,
    short_help="Show every setting and where it came from.",
    examples="""
    flaskbus config
    flaskbus config --config staging.toml
    FLASKBUS_PORT=8000 flaskbus config | grep port
    flaskbus config --json
    """,
)
@settings_options(*KINDS, only=_SHARED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; durations in seconds, sizes in bytes.")
@click.pass_obj
def config(resolved: All, *, settings: tuple[CommonSettings, ...], as_json: bool) -> None:
    """Show every setting, its value, and where it came from.

    The source is a flag, an environment variable, the configuration file or the default. Passwords are
    masked.
    """
    click.echo(json.dumps(document(resolved), indent=2) if as_json else "\n".join(report(resolved)))
    for name, near in misspelt(os.environ):
        click.echo(f"note: {name} is set but names no setting; did you mean {near}?", err=True)


def document(resolved: All) -> dict[str, Any]:
    """Everything for programs: component -> setting -> value and source."""
    common = resolved[0]
    return {"file": common.file.name if common.file else None, "apps": list(common.apps)} | {
        kind.table or "common": {
            item.name: {
                "value": hidden(item, value),
                "source": each.sources[item.name],
            }
            for item in fields(kind)
            for value in [getattr(each.settings, item.name)]
        }
        for kind, each in zip(KINDS, resolved, strict=True)
    }


def report(resolved: All) -> Iterator[str]:
    """Everything for people; a component shows a shared setting only where its own table overrides it."""
    common = resolved[0]
    yield f"Configuration file: {common.file.name if common.file else _NO_FILE}"
    if common.apps:
        yield f"Apps: {' '.join(common.apps)}"
    shared = rows(common)
    tables = [("Common", shared)] + [
        (each.settings.table.capitalize(), [row for row in rows(each) if row not in shared])
        for each in resolved[1:]
    ]
    names, values = (max(len(row[column]) for _, table in tables for row in table) for column in (0, 1))
    for title, table in tables:
        yield f"\n{title}"
        for name, value, source in table:
            yield f"  {name:{names}}  {value:{values}}  {source}"


_NO_FILE = f"none ({' or '.join(FILE_NAMES)} in this directory, or --config)"


def rows(resolved: Resolved[CommonSettings]) -> list[Row]:
    """Name, value and source of each setting, as text."""
    return [
        (item.name, hidden(item, text) or '""', resolved.sources[item.name])
        for item in fields(resolved.settings)
        for text in [show(item, getattr(resolved.settings, item.name))]
    ]


def hidden(item: Field[Any], value: Any) -> Any:
    """A value as it may be shown: without the password, or whatever else is secret in it."""
    if not item.metadata.get("secret") or not value:
        return value
    return mask(value) if "://" in value else "***"


def misspelt(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that look like one of ours with a slip, and the one that is meant."""
    prefix = "FLASKBUS_"
    known = {name for kind in KINDS for item in fields(kind) for name in variables(item)} | {CONFIG_VARIABLE}
    candidates = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    for name in sorted(environ):
        if name.startswith(prefix) and name not in known:
            near = get_close_matches(name.removeprefix(prefix), candidates, 1, cutoff=0.75)
            if near:
                yield name, prefix + near[0]
