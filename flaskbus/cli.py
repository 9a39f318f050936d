"""``flaskbus``: the command that puts all others together.

Each command lives in a module of :mod:`flaskbus.commands`, which is imported when the command is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import click

from flaskbus.options import FlaskbusGroup, run

COMMANDS = {
    "dev": "flaskbus.commands.dev:dev",
    "request": "flaskbus.commands.request:request",
    "mounts": "flaskbus.commands.mounts:mounts",
    "agents": "flaskbus.commands.agents:agents",
    "dead": "flaskbus.commands.dead:dead",
    "unmount": "flaskbus.commands.unmount:unmount",
    "config": "flaskbus.commands.config:config",
    "doctor": "flaskbus.commands.doctor:doctor",
    "healthcheck": "flaskbus.commands.healthcheck:healthcheck",
    "acl": "flaskbus.commands.acl:acl",
    "key": "flaskbus.commands.key:key",
    "redis": "flaskbus.commands.redis_cli:redis_cli",
}
"""Command -> ``module:attribute``, in the order of ``--help``."""


class LazyGroup(FlaskbusGroup):
    """A group that imports a command when it is asked for; ``lazy`` is like :data:`COMMANDS`."""

    def __init__(self, *args: Any, lazy: Mapping[str, str], **attrs: Any):
        super().__init__(*args, **attrs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if not args[0].startswith("-") and args[0] not in known and not ctx.resilient_parsing:
            near = get_close_matches(args[0], known, 1)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.group(
    "flaskbus",
    cls=LazyGroup,
    lazy=COMMANDS,
    examples="""
    flaskbus dev myapp:app=/myapp           broker, gateway and agent, for development
    flaskbus request GET /myapp/hello       one request through the bus, without an HTTP port
    flaskbus mounts                         what is mounted, and how long the queues are
    flaskbus doctor                         what is wrong, and what mends it
    eval "$(_FLASKBUS_COMPLETE=bash_source flaskbus)"      completion (zsh_source, fish_source)
    """,
)
@click.version_option(package_name="flaskbus")
def cli() -> None:
    """Many WSGI apps behind one port: look after the bus.

    In production, flaskbus-gateway owns the port, and flaskbus-agent runs beside each app.
    """


def main() -> NoReturn:
    """The console script."""
    run(cli)
