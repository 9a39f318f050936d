"""``flaskbus healthcheck``: whether a part of the bus is well, for container engines and supervisors."""

from __future__ import annotations

import http.client
import socket
import ssl
from urllib.parse import urlsplit

import click
import redis

from flaskbus.broker import check, connect
from flaskbus.commands.tools import broker_errors, with_defaults
from flaskbus.errors import OperatorError, UsageError
from flaskbus.keys import Keys
from flaskbus.options import FlaskbusCommand, settings_options
from flaskbus.routing import Mount
from flaskbus.settings import GatewaySettings
from flaskbus.survey import survey, watch

TIMEOUT = 3.0
"""Seconds that the broker or the gateway may take to answer."""

HERE = "here"
"""The gateway that this environment's settings describe; an agent of this host."""

UNHEALTHY = 1


@click.command(
    "healthcheck",
    cls=FlaskbusCommand,
    short_help="Exit with 0 if a part of the bus is well, with 1 if not.",
    examples="""
    flaskbus healthcheck
    flaskbus healthcheck --gateway
    flaskbus healthcheck --gateway https://127.0.0.1:8443
    flaskbus healthcheck --agent
    flaskbus healthcheck --agent --mount /myapp
    """,
)
@settings_options(GatewaySettings, only=("redis", "namespace"))
@click.option(
    "--gateway",
    is_flag=False,
    flag_value=HERE,
    metavar="[URL]",
    help="Does a gateway answer? Any answer counts. Without URL: the one that the settings describe.",
)
@click.option(
    "--agent",
    is_flag=False,
    flag_value=HERE,
    metavar="[ID]",
    help="Does an agent send heartbeats and serve? Without ID: any agent of this host.",
)
@click.option(
    "--mount",
    metavar="MOUNT",
    help="With --agent: look at this mount only, as an agent's own ACL user has to.",
)
@click.option("--broker", is_flag=True, help="Is the broker reachable and fit? This is the default.")
def healthcheck(
    settings: GatewaySettings, gateway: str | None, agent: str | None, mount: str | None, broker: bool
) -> int:
    """Exit with 0 if a part of the bus is well, with 1 if not; says nothing but why not.

    Several parts can be asked for at once, and all have to be well.
    """
    settings = with_defaults(settings)
    try:
        if broker or (gateway is None and agent is None):
            check_broker(settings)
        if gateway is not None:
            check_gateway(local_url(settings) if gateway == HERE else gateway)
        if agent is not None:
            mounts = [Mount.from_name(mount)] if mount else None
            check_agent(settings, "" if agent == HERE else agent, mounts)
    except UsageError:
        raise
    except OperatorError as error:
        click.echo(f"unhealthy: {error}", err=True)
        return UNHEALTHY
    return 0


def check_broker(settings: GatewaySettings) -> None:
    """Raises :class:`~flaskbus.errors.OperatorError` for a broker that is away or unfit."""
    with broker_errors(settings.redis), connect(settings.redis, timeout=TIMEOUT) as client:
        client.ping()
        check(client, settings.redis)


def local_url(settings: GatewaySettings) -> str:
    """Where a gateway with these settings listens."""
    if settings.host.startswith("unix:"):
        return settings.host
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(settings.host, settings.host)  # noqa: S104
    scheme = "https" if settings.certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def check_gateway(url: str) -> None:
    """Raises :class:`~flaskbus.errors.OperatorError` for a gateway that does not answer at all.

    It is asked with ``OPTIONS *`` (RFC 9110 section 9.3.7), which no app gets to see, unless the URL has a path.
    """
    try:
        connection, target = _connection(url)
    except ValueError as error:
        raise UsageError(f"--gateway {url!r} is not an http or https URL, or unix:PATH: {error}") from None
    try:
        connection.request("GET" if target != "*" else "OPTIONS", target)
        connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise OperatorError(f"no gateway answers at {url}: {error or type(error).__name__}") from None
    finally:
        connection.close()


def _connection(url: str) -> tuple[http.client.HTTPConnection, str]:
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:")), "*"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("say it as in http://127.0.0.1:5000")
    target = "*" if parts.path in ("", "/") else parts.path + (f"?{parts.query}" if parts.query else "")
    if parts.scheme == "http":
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT), target
    # Whether it answers is the question, and not whether the certificate is for 127.0.0.1.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT, context=context), target


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str):
        super().__init__("localhost", timeout=TIMEOUT)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self.path)


def check_agent(settings: GatewaySettings, agent_id: str, mounts: list[Mount] | None = None) -> None:
    """Raises :class:`~flaskbus.errors.OperatorError` unless an agent that is ready beats within half a lease.

    It is looked for on these mounts, or on all that are registered.
    """
    keys, host = Keys(settings.namespace), socket.gethostname()
    whose = f"agent {agent_id}" if agent_id else f"agent of {host}"
    with broker_errors(settings.redis), connect(settings.redis, timeout=TIMEOUT) as client:

        def beats() -> dict[str, int]:
            return {
                record.id: record.beat
                for view in survey(client, keys, mounts)
                for record in view.agents
                if record.state == "ready" and (record.id == agent_id if agent_id else record.host == host)
            }

        try:
            ready = beats()
        except redis.exceptions.NoPermissionError as error:
            if mounts is not None:
                raise
            raise OperatorError(
                f"its user may not look for it on all mounts ({error}); say --mount"
            ) from None
        if not ready:
            raise OperatorError(f"no {whose} is ready")
        if not watch(beats, settings.lease / 2, any_of=ready):
            raise OperatorError(f"no {whose} has sent a heartbeat for {settings.lease / 2:g} s")
