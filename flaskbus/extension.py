"""Flask's side of the bus: ``FlaskBus(app)``, and ``flask bus …``.

::

    bus = FlaskBus()

    def create_app():
        app = Flask(__name__)
        app.config["FLASKBUS_REDIS_URL"] = "redis://10.0.0.5:6379/0"
        bus.init_app(app)
        return app

An app needs none of this to be served by an agent. It gives the app its settings in one place, and tells it
which request it runs. Nothing is global: one object may serve many apps, and each app has its own state.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import click
from flask import Flask, current_app, has_request_context, request
from flask.cli import ScriptInfo, prepare_import

from flaskbus.cli import COMMANDS, LazyGroup
from flaskbus.commands import DEFAULTS
from flaskbus.config import CONFIG_VARIABLE, DEFAULT, load
from flaskbus.errors import OperatorError, StartError, UsageError
from flaskbus.options import FlaskbusCommand
from flaskbus.settings import COMPONENTS, AgentSettings, check, show, variables

NAME = "flaskbus"
PREFIX = "FLASKBUS_"


@dataclass(frozen=True)
class BusState:
    """What ``app.extensions["flaskbus"]`` holds.

    ``given`` are the settings that the app's configuration names; ``settings`` has defaults for the rest.
    """

    settings: AgentSettings
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)


class FlaskBus:
    """The extension; see the module for how it is used."""

    def __init__(self, app: Flask | None = None):
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the app's ``FLASKBUS_*`` configuration.

        Raises :class:`~flaskbus.errors.UsageError` for a key that does not exist (with the nearest one) and for
        a value that is out of range.
        """
        given = from_config(app.config)
        app.extensions[NAME] = BusState(AgentSettings(**given), given)

    @property
    def state(self) -> BusState:
        """That of the current app. Raises :class:`RuntimeError` outside of an app's context."""
        try:
            state: BusState = current_app.extensions[NAME]
        except KeyError:
            raise RuntimeError(
                f"FlaskBus was not told of the app {current_app.name!r}; call bus.init_app(app) first"
            ) from None
        return state

    @property
    def settings(self) -> AgentSettings:
        """Those of the current app."""
        return self.state.settings

    @property
    def request_id(self) -> str | None:
        """The correlation id of the request that this context runs; ``None`` where it came by another server."""
        value = _from_environ("flaskbus.request_id")
        return value if isinstance(value, str) else None

    @property
    def attempt(self) -> int | None:
        """Which run of the request this is, from 1; ``None`` where it came by another server."""
        value = _from_environ("flaskbus.attempt")
        return value if isinstance(value, int) else None


def _from_environ(key: str) -> object:
    return request.environ.get(key) if has_request_context() else None


_KNOWN = {
    name: item
    for kind in (*COMPONENTS, AgentSettings)
    for item in fields(kind)
    for name in variables(item)
    if name.startswith(PREFIX)
}
_OURS = {item.name for item in fields(AgentSettings)}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``FLASKBUS_*`` keys -> checked values by the name of the setting; ``None`` counts as not given.

    An app's settings are its agent's; those of a gateway may stand in the same configuration and are checked
    too. Raises :class:`~flaskbus.errors.UsageError`.
    """
    given = {}
    for key, value in config.items():
        if not key.startswith(PREFIX) or key == CONFIG_VARIABLE or value is None:
            continue
        item = _KNOWN.get(key)
        if item is None:
            near = get_close_matches(
                key.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in _KNOWN], 1
            )
            hint = f"; did you mean {PREFIX + near[0]!r}?" if near else ""
            raise UsageError(f"unknown config key {key!r}{hint}")
        checked = check(item, value, key)
        if item.name in _OURS:
            given[item.name] = checked
    return given


# flask bus


class BusGroup(LazyGroup):
    """The group behind ``flask bus``: ends as ``flaskbus`` does, within Flask's command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
        except OperatorError as error:
            click.echo(f"flask bus: error: {error}", err=True)
            ctx.exit(error.exit_code)
        if isinstance(code, int):
            ctx.exit(code)
        return code


@click.group(
    "bus",
    cls=BusGroup,
    lazy={name: COMMANDS[name] for name in ("request", "mounts", "agents", "unmount", "doctor")},
    examples="""
    flask --app shop bus mounts
    flask --app shop bus request GET /shop/
    flask --app shop bus agent --prefix /shop --threads 8
    """,
)
@click.pass_context
def flask_cli(ctx: click.Context) -> None:
    """Look at the bus that this app is on, and serve the app from it.

    The app's FLASKBUS_* configuration counts where flag, environment and file say nothing.
    """
    info = ctx.ensure_object(ScriptInfo)
    ctx.meta[DEFAULTS] = lambda: given_by(info.load_app())


def given_by(app: Flask) -> Mapping[str, Any]:
    """The settings that an app's configuration names, whether or not it uses the extension."""
    state = app.extensions.get(NAME)
    return state.given if isinstance(state, BusState) else from_config(app.config)


@flask_cli.command(
    "agent",
    cls=FlaskbusCommand,
    short_help="Serve this app from the bus.",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTION]...")
@click.pass_context
def agent(ctx: click.Context, options: tuple[str, ...]) -> NoReturn:
    """Serve this app from the bus: flaskbus-agent, told which app.

    OPTIONs are those of flaskbus-agent, such as --prefix /shop or --reload.
    """
    program = shutil.which("flaskbus-agent", path=str(Path(sys.executable).parent)) or shutil.which(
        "flaskbus-agent"
    )
    if program is None:
        raise StartError("flaskbus-agent is not on PATH")
    resolved = load(AgentSettings)
    given = ctx.meta[DEFAULTS]()
    environ = {
        variables(item)[0]: show(item, given[item.name])
        for item in fields(AgentSettings)
        if item.name in given and resolved.sources[item.name] == DEFAULT
    }
    target, directory = import_string(ctx.ensure_object(ScriptInfo))
    path = os.pathsep.join(filter(None, (directory, os.environ.get("PYTHONPATH"))))
    sys.stdout.flush()
    os.execve(  # noqa: S606
        program, [program, target, *options], {**os.environ, **environ, "PYTHONPATH": path}
    )


def import_string(info: ScriptInfo) -> tuple[str, str]:
    """``MODULE[:APP]`` of what ``flask --app`` means, and the directory that it is imported from.

    Raises :class:`~flaskbus.errors.UsageError` where there is none that could be named.
    """
    given = info.app_import_path
    if given is None:
        if info.create_app is not None:
            raise UsageError("this command makes the app itself; run flaskbus-agent MODULE:APP")
        given = next((name for name in ("wsgi.py", "app.py") if Path(name).exists()), None)
    if given is None:
        raise UsageError("which app? Name it as in: flask --app shop bus agent --prefix /shop")
    # As Flask does: a colon that is not a Windows drive's.
    path, *name = re.split(r":(?![\\/])", given, maxsplit=1)
    module = prepare_import(path)
    return ":".join([module, *name]), sys.path[0]
