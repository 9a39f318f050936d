"""``flaskbus unmount``: forget a mount whose agents will not come back."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from flaskbus.commands.tools import Bus, known_queues, with_bus
from flaskbus.errors import OperatorError, UsageError
from flaskbus.options import FlaskbusCommand
from flaskbus.routing import Mount
from flaskbus.survey import MountView, survey


@click.command(
    "unmount",
    cls=FlaskbusCommand,
    short_help="Forget a mount: it answers 404 from now on.",
    examples="""
    flaskbus unmount /myapp
    flaskbus unmount shop.example.com/api --yes
    """,
)
@with_bus
@click.argument("mount")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Even though agents are alive.")
def unmount(bus: Bus, mount: str, yes: bool, force: bool) -> int:
    """Forget MOUNT: requests to it are answered 404 at once, and not held until --mount-ttl is over.

    Agents that are alive would bring it back with their next heartbeat, so stop them first. Requests that
    wait are not lost by it: their gateways answer them at their deadline.
    """
    parts = known_queues(bus, mount)  # with the whole go its partitions
    where = Mount.from_name(mount)
    views = survey(bus.client, bus.keys, parts)
    now, lease = time.time(), bus.settings.lease
    alive = list({one.id: one for view in views for one in view.serving(now, lease)}.values())
    if alive and not force:
        raise OperatorError(
            f"{where.name} has {_count(len(alive), 'live agent')} ({', '.join(one.id for one in alive)}), which would "
            "bring it back with the next heartbeat; stop them first, or say --force"
        )
    if not yes and not confirmed(question(where, views)):
        click.echo("nothing was changed", err=True)
        return 1
    for part in parts:
        bus.registry.unmount(part)
    click.echo(f"{where.name} is no longer mounted")
    return 0


def confirmed(text: str) -> bool:
    """Ask on the terminal, or read the answer from a pipe; without either it is a usage error."""
    try:
        return click.confirm(text, default=False)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise UsageError("nobody is here to be asked; say --yes") from None


def question(where: Mount, views: Sequence[MountView]) -> str:
    """What is asked before a mount goes, with its partitions."""
    waiting, running = sum(one.waiting for one in views), sum(one.running for one in views)
    held = [
        f"{_count(number, 'request')} {what}"
        for number, what in ((waiting, "waiting"), (running, "running"))
        if number
    ]
    fate = f" with {' and '.join(held)}, to be answered at the deadline" if held else ""
    return f"Unmount {where.name} of the app {views[0].owner or '(unknown)'}{fate}?"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
