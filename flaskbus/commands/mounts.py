"""``flaskbus mounts``: what is mounted, who serves it, and how long its queue is."""

from __future__ import annotations

import time

import click

from flaskbus.commands.tools import Bus, ago, columns, echo_json, json_option, with_bus
from flaskbus.options import FlaskbusCommand
from flaskbus.survey import MountView, survey

HEAD = ("MOUNT", "APP", "AGENTS", "WAITING", "RUNNING", "OLDEST")


@click.command(
    "mounts",
    cls=FlaskbusCommand,
    short_help="Show the mounts, their agents and their queues.",
    examples="""
    flaskbus mounts
    flaskbus mounts --json | jq '.[] | select(.waiting > 100)'
    watch -n1 flaskbus mounts
    """,
)
@with_bus
@json_option
def mounts(bus: Bus, as_json: bool) -> None:
    """Show the mounts, their agents and their queues.

    AGENTS are those that live, of those that are listed; told from their clocks, so take it as a hint.
    WAITING is what no agent has taken yet, RUNNING what one has; OLDEST is the age of the oldest of both.
    """
    views = survey(bus.client, bus.keys)
    now = time.time()
    lease = bus.settings.lease
    if as_json:
        echo_json([document(view, now, lease) for view in views])
    elif views:
        click.echo(columns(HEAD, (row(view, now, lease) for view in views)))
    else:
        click.echo("nothing is mounted; flaskbus-agent MODULE:APP --prefix /PATH mounts an app", err=True)


def document(view: MountView, now: float, lease: float) -> dict[str, object]:
    """A mount for programs; ages in seconds."""
    return {
        "mount": view.mount.name,
        "host": view.mount.host,
        "prefix": view.mount.prefix,
        "app": view.owner,
        "agents": {"alive": len(view.serving(now, lease)), "listed": len(view.agents)},
        "waiting": view.waiting,
        "running": view.running,
        "oldest": None if view.oldest is None else round(view.oldest, 3),
    }


def row(view: MountView, now: float, lease: float) -> tuple[object, ...]:
    return (
        view.mount.name,
        view.owner or "-",
        f"{len(view.serving(now, lease))}/{len(view.agents)}",
        view.waiting,
        view.running,
        ago(view.oldest),
    )
