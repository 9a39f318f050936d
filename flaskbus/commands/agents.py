"""``flaskbus agents``: every agent process, on every mount."""

from __future__ import annotations

from dataclasses import asdict

import click

from flaskbus.commands.tools import Bus, age, ago, columns, echo_json, json_option, known_mount, with_bus
from flaskbus.options import FlaskbusCommand
from flaskbus.registry import AgentRecord
from flaskbus.routing import Mount
from flaskbus.survey import survey

HEAD = ("MOUNT", "ID", "APP", "HOST", "PID", "STATE", "BUSY", "FLASKBUS", "PYTHON", "HEARTBEAT")


@click.command(
    "agents",
    cls=FlaskbusCommand,
    short_help="Show the agent processes.",
    examples="""
    flaskbus agents
    flaskbus agents /myapp
    flaskbus agents shop.example.com/api --json
    """,
)
@with_bus
@click.argument("mount", required=False)
@json_option
def agents(bus: Bus, mount: str | None, as_json: bool) -> None:
    """Show the agent processes of all mounts, or of one MOUNT.

    BUSY is how many requests it runs, of those that it can run at a time. HEARTBEAT is how long ago it was
    heard of, told from its host's clock and this one's: a hint. Gateways judge by its counter instead.
    """
    views = survey(bus.client, bus.keys, [known_mount(bus, mount)] if mount else None)
    found = [(view.mount, record) for view in views for record in view.agents]
    if as_json:
        echo_json([document(*each) for each in found])
        return
    if not found:
        click.echo(f"no agent is listed{f' for {mount}' if mount else ''}", err=True)
        return
    click.echo(columns(HEAD, (row(*each) for each in found)))
    for where, record in found:
        if record.reason:
            click.echo(f"{where.name}: {record.id} {record.state}: {record.reason}")


def document(mount: Mount, record: AgentRecord) -> dict[str, object]:
    """An agent for programs: its record, its mount, and the age of its heartbeat in seconds (a hint)."""
    return {"mount": mount.name, **asdict(record), "age": round(age(record), 3)}


def row(mount: Mount, record: AgentRecord) -> tuple[object, ...]:
    return (
        mount.name,
        record.id,
        record.name,
        record.host,
        record.pid,
        record.state,
        f"{record.busy}/{record.threads}",
        record.version or "-",
        record.python or "-",
        f"{ago(age(record))} ago",
    )
