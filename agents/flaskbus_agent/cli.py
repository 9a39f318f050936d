"""``flaskbus-agent``: serve WSGI apps from the bus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import NoReturn

import click

from flaskbus.apps import short_name, split_app
from flaskbus.broker import mask, parse_url
from flaskbus.config import Resolved
from flaskbus.errors import UsageError
from flaskbus.options import FlaskbusCommand, run, settings_options
from flaskbus.partitions import MOST_PARTITIONS, partitions
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus_agent import supervisor
from flaskbus_agent.board import MOST_MOUNTS
from flaskbus_agent.heartbeat import MountedApp

EXAMPLES = """
flaskbus-agent myapp:app --prefix /myapp
flaskbus-agent frontend:app=/ backend:app=/backend --threads 8
flaskbus-agent shop.wsgi=shop.example.com/ --workers 4 --preload
flaskbus-agent 'api:create_app("staging")' --prefix /api --reload
"""


@click.command("flaskbus-agent", cls=FlaskbusCommand, examples=EXAMPLES)
@click.argument("apps", nargs=-1, metavar="[MODULE:APP[=[HOST]PREFIX]]...")
@settings_options(AgentSettings)
@click.version_option(package_name="flaskbus")
@click.pass_obj
def agent(resolved: Resolved[AgentSettings], settings: AgentSettings, apps: tuple[str, ...]) -> NoReturn:
    """Serve WSGI apps from the bus.

    MODULE:APP is a WSGI callable, or a call that makes one; with MODULE alone, its app, application or
    create_app is found. Each app is mounted under its PREFIX, or under --prefix where there is only one.

    Signals: TERM stops after the running requests, INT and QUIT at once. HUP loads the code anew, and
    the old workers stop when the new ones are ready. TTIN and TTOU add and remove a worker. USR1 reopens logs.
    """
    mounted = mounted_apps(apps or resolved.apps, settings)
    settings = checked(settings)
    if settings.chdir:
        try:
            os.chdir(settings.chdir)
        except OSError as error:
            raise UsageError(f"--chdir {settings.chdir}: {error.strerror}") from None
    supervisor.run(settings, mounted)


def mounted_apps(given: Sequence[str], settings: AgentSettings) -> list[MountedApp]:
    """``MODULE:APP=PREFIX`` texts -> apps. Raises :class:`~flaskbus.errors.UsageError`."""
    if not given:
        raise UsageError(
            "which app? Name it as in: flaskbus-agent myapp:app --prefix /myapp "
            "(or put apps = [...] into flaskbus.toml)"
        )
    if settings.partitions > MOST_PARTITIONS:
        raise UsageError(f"a mount has up to {MOST_PARTITIONS} partitions")
    if len(given) * settings.partitions > MOST_MOUNTS:
        what = "apps" if settings.partitions == 1 else "partitions of apps"
        raise UsageError(f"one agent serves up to {MOST_MOUNTS} {what}; start a second one for the rest")
    if len(given) > 1 and settings.name:
        raise UsageError("--name names one app; several apps are named by their import strings")
    found: dict[Mount, MountedApp] = {}
    for text in given:
        app = _mounted_app(text, settings, alone=len(given) == 1)
        for mount in partitions(app.mount, settings.partitions):
            other = next((each for each in found.values() if each.mount.whole == mount.whole), app)
            if mount in found or other.target != app.target:
                raise UsageError(f"{other.target} and {app.target} are both mounted on {mount.whole.name}")
            found[mount] = replace(app, mount=mount)
    return list(found.values())


def _mounted_app(text: str, settings: AgentSettings, *, alone: bool) -> MountedApp:
    target, place = split_app(text)
    if place is not None:
        if settings.prefix:
            raise UsageError(
                f"{text} says where it is mounted, and so does --prefix {settings.prefix}; drop one"
            )
        mount = Mount.from_name(place)
        if settings.host_pattern:
            if mount.host:
                raise UsageError(f"{text} names a host, and so does --host-pattern; drop one")
            mount = replace(mount, host=Mount.parse("/", settings.host_pattern).host)
    elif not alone:
        raise UsageError(
            f"where is {target} mounted? With several apps each says it: {target}=/{short_name(target)}"
        )
    elif settings.prefix or settings.host_pattern:
        mount = Mount.parse(settings.prefix or "/", settings.host_pattern)
    else:
        raise UsageError(
            f"where is {target} mounted? Add --prefix /{short_name(target)}, or --prefix / for the whole site"
        )
    return MountedApp(mount, target, settings.name or target)


def checked(settings: AgentSettings) -> AgentSettings:
    """Settings that go together. Raises :class:`~flaskbus.errors.UsageError`."""
    if settings.preload and settings.reload:
        raise UsageError("--preload and --reload exclude each other: what was imported before the fork stays")
    if not settings.debugger:
        return settings
    if not _is_local(settings.redis):
        raise UsageError(
            "--debugger lets whoever reaches it run code, so it is served only from a broker on this machine, "
            f"not from {mask(settings.redis)}"
        )
    if os.environ.get("WERKZEUG_DEBUG_PIN") == "off":
        raise UsageError("--debugger is not served without its PIN; unset WERKZEUG_DEBUG_PIN")
    # The frames of a traceback live in the process that raised it.
    return replace(settings, workers=1)


def _is_local(url: str) -> bool:
    address = parse_url(url)
    if address.kind != "single":
        return False  # who knows where the next master is
    if address.path or address.host == "localhost":
        return True
    try:
        return ip_address(address.host).is_loopback
    except ValueError:
        return False


def main() -> None:
    run(agent)


if __name__ == "__main__":
    main()
