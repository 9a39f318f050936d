"""``flaskbus key``: the signing key of a mount, for its agents."""

from __future__ import annotations

import click

from flaskbus.errors import UsageError
from flaskbus.options import FlaskbusCommand, settings_options
from flaskbus.routing import Mount
from flaskbus.settings import GatewaySettings
from flaskbus.signing import make_key


@click.command(
    "key",
    cls=FlaskbusCommand,
    short_help="Show the signing key of a mount, for its agents.",
    examples="""
    export FLASKBUS_SIGNING_SECRET=@/etc/flaskbus/secret
    flaskbus key /myapp
    flaskbus key /myapp shop.example.com/ > shop.keys
    """,
)
@settings_options(GatewaySettings, only=("namespace", "signing_secret"))
@click.argument("mounts", nargs=-1, required=True, metavar="MOUNT...")
def key(settings: GatewaySettings, mounts: tuple[str, ...]) -> None:
    """Show the signing key of MOUNT, made from the gateways' secret, for FLASKBUS_SIGNING_KEY of its agents.

    Of several mounts it shows a line MOUNT=KEY each, as one agent with several apps takes them. Whoever has the
    key of a mount can send requests to its agents and answer its clients, and nothing of any other mount.
    """
    if not settings.signing_secret:
        raise UsageError(
            "there is no signing secret; name it with --signing-secret or FLASKBUS_SIGNING_SECRET"
        )
    for name in mounts:
        mount = Mount.from_name(name).whole  # its partitions have its key
        line = make_key(settings.signing_secret, settings.namespace, mount.key)
        click.echo(line if len(mounts) == 1 else f"{mount.name}={line}")
