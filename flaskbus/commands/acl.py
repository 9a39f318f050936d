"""``flaskbus acl``: the rights that a user of the broker needs, and no more."""

from __future__ import annotations

from typing import cast

import click

from flaskbus.acl import ROLES, Role, command_line, rules, user_name
from flaskbus.address import parse_url
from flaskbus.errors import UsageError
from flaskbus.options import FlaskbusCommand, settings_options
from flaskbus.partitions import MOST_PARTITIONS
from flaskbus.partitions import partitions as split
from flaskbus.routing import Mount
from flaskbus.settings import CommonSettings


@click.command(
    "acl",
    cls=FlaskbusCommand,
    short_help="Show the ACL rule of a user: gateway, agent or tools.",
    examples="""
    flaskbus acl agent /myapp | redis-cli
    flaskbus acl agent /shop shop.example.com/api --user shop
    flaskbus acl agent /myapp --partitions 3
    flaskbus acl gateway --user edge
    redis-cli ACL SETUSER flaskbus-agent-myapp '>PASSWORD'
    """,
)
@settings_options(CommonSettings, only=("redis", "namespace"))
@click.argument("role", type=click.Choice(ROLES))
@click.argument("mounts", nargs=-1, metavar="[MOUNT...]")
@click.option(
    "--user",
    metavar="NAME",
    help="What the user is called; of several mounts, say it.  [default: flaskbus-ROLE, -MOUNT]",
)
@click.option(
    "--partitions",
    type=click.IntRange(1, MOST_PARTITIONS),
    default=1,
    show_default=True,
    metavar="N",
    help="As its agents say it.",
)
def acl(
    settings: CommonSettings, role: str, mounts: tuple[str, ...], user: str | None, partitions: int
) -> None:
    """Show the ACL SETUSER line that gives a user of the broker what ROLE needs, and no more. Changes nothing.

    gateway: every mount of the namespace. agent: the mounts that are named, and nothing of any other. tools:
    reads every mount, for flaskbus mounts, agents and doctor; commands that change something want a gateway's
    user. The line leaves a user's passwords as they are; a new user needs one. --redis is not asked: it says
    which database is meant, and whether it is a single broker, behind sentinels or a cluster.
    """
    where = [Mount.from_name(name) for name in mounts]
    address = parse_url(settings.redis)
    parts = list(dict.fromkeys(part for mount in where for part in split(mount, partitions)))
    wanted = rules(cast(Role, role), parts, namespace=settings.namespace, db=address.db, kind=address.kind)
    if user is None and len(where) > 1:
        raise UsageError("a user of several mounts has no name of its own: say which, as in --user shop")
    name = user_name(cast(Role, role), where[0] if where else None) if user is None else user
    click.echo(command_line(name, wanted))
