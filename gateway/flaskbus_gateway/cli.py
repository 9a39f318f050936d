"""``flaskbus-gateway``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import click

from flaskbus.config import Resolved, find_file, resolve
from flaskbus.options import FlaskbusCommand, run, settings_options
from flaskbus.settings import GatewaySettings
from flaskbus_gateway.server import serve


@click.command(
    "flaskbus-gateway",
    cls=FlaskbusCommand,
    examples="""
        flaskbus-gateway --port 8000
        flaskbus-gateway --host 0.0.0.0 --redis redis://10.0.0.5:6379/0 --workers 2
        flaskbus-gateway --host unix:/run/flaskbus.sock
        flaskbus-gateway --port 443 --certfile cert.pem --keyfile key.pem --http2
    """,
)
@click.version_option(package_name="flaskbus")
@settings_options(GatewaySettings)
@click.pass_context
def gateway(context: click.Context, settings: GatewaySettings) -> NoReturn:
    """Own a port: put each HTTP request on the bus, and answer with the reply of the agent that ran it.

    Which apps there are is for the agents to say (flaskbus-agent); they may come and go while the gateway runs.

    Signals: TERM lets requests finish and ends, INT ends at once, HUP reads the configuration again and
    replaces the workers, TTIN and TTOU add and remove one, USR1 opens the log files anew.
    """
    resolved: Resolved[GatewaySettings] = context.obj
    directory = Path.cwd()

    def reread() -> GatewaySettings:
        file = find_file(context.params["config_file"], os.environ, directory)
        return resolve(GatewaySettings, flags=context.params, environ=os.environ, file=file).settings

    serve(settings, reread=reread, watch=[directory / resolved.file.name] if resolved.file else [])


def main() -> NoReturn:
    """The console script."""
    run(gateway)
