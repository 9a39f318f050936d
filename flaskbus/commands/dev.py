"""``flaskbus dev``: broker, gateway and agents in one terminal."""

from __future__ import annotations

import io
import os
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import click
import redis

from flaskbus import embedded
from flaskbus.broker import check, connect, mask, parse_url
from flaskbus.commands.dev_banner import Served, Setup, banner, redis_cli
from flaskbus.commands.dev_plan import OPTIONS, Plan, make_plan
from flaskbus.commands.tools import broker_errors
from flaskbus.config import DEFAULT, FLAG, Resolved
from flaskbus.embedded import EmbeddedBroker
from flaskbus.errors import OperatorError, StartError, UsageError
from flaskbus.keys import Keys
from flaskbus.options import FlaskbusCommand, SettingOption, settings_options
from flaskbus.processes import Console, Process, Processes, wants_colour
from flaskbus.registry import Registry
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings, CommonSettings, GatewaySettings, variables

READY_TIMEOUT = 10.0
"""Seconds after which the banner is printed whatever the agents' states are."""
POLL = 0.05
"""Seconds between two looks at the registry, until the banner."""
LOG_POLL = 0.5
"""Seconds between two looks at the private broker's log."""
GATEWAY, BROKER, SELF = "gateway", "broker", "dev"


@click.command(
    "dev",
    cls=FlaskbusCommand,
    short_help="Broker, gateway and agents in one terminal.",
    examples="""
    flaskbus dev myapp:app
    flaskbus dev frontend:app=/ backend:app=/backend --port 8000
    flaskbus dev --chdir examples shop:app=/shop blog:app=/blog
    flaskbus dev shop:app=shop.localhost/ --no-debugger
    """,
)
@click.argument("apps", nargs=-1, metavar="[MODULE:APP[=[HOST]PREFIX]]...")
@settings_options(GatewaySettings, AgentSettings, only=OPTIONS)
@click.option(
    "--reload/--no-reload", default=None, help="Load an app anew when its code changes.  [default: on]"
)
@click.option(
    "--debugger/--no-debugger",
    default=None,
    help="Show werkzeug's interactive debugger; its PIN is in the log.  "
    "[default: on where gateway and broker are on loopback addresses]",
)
@click.pass_context
def dev(
    ctx: click.Context,
    *,
    settings: tuple[GatewaySettings, AgentSettings],
    apps: tuple[str, ...],
    reload: bool | None,
    debugger: bool | None,
) -> int:
    """Run a broker, a gateway and an agent for each app; Ctrl-C ends them all.

    An app without a PREFIX is mounted on /. Without any, the apps of the configuration file are served.

    The broker is the one of --redis or FLASKBUS_REDIS_URL, else a private one is started: valkey-server or
    redis-server from PATH, else the bundled Valkey. It keeps nothing when it ends.
    """
    gateway, agent = ctx.obj
    plan = make_plan(gateway, agent, apps or gateway.apps, ctx.params, reload, debugger)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the apps say may not exist in the terminal's encoding.
        sys.stdout.reconfigure(errors="replace")
    with find_broker(gateway) as broker:
        console = Console(
            sys.stdout,
            [SELF, GATEWAY, *plan.names, *([BROKER] if broker.private else [])],
            colour=wants_colour(sys.stdout, os.environ),
        )
        with Processes(console) as processes:
            return Session(plan, broker, console, processes).run()


_DEFAULTS = {"redis": "a private one", "access_log": "-"}
for _option in dev.params:
    if isinstance(_option, SettingOption) and _option.name in _DEFAULTS:
        _option.default_text = _DEFAULTS[_option.name]


# The broker


@dataclass(frozen=True)
class DevBroker:
    """The broker of this run; ``option`` is how a command in another shell is told of it."""

    url: str
    source: str
    option: tuple[str, ...]
    private: EmbeddedBroker | None = None


@contextmanager
def find_broker(resolved: Resolved[GatewaySettings]) -> Iterator[DevBroker]:
    """The one that was named, or a private one for as long as the context lasts.

    Raises :class:`~flaskbus.errors.StartError`.
    """
    url, source = resolved.settings.redis, resolved.sources["redis"]
    if source == DEFAULT:
        with embedded.start() as private:
            yield DevBroker(private.url, f"private, {private.source}", ("--redis", private.url), private)
        return
    with broker_errors(url), connect(url) as client:
        check(client, url)
    if mask(url) == url:
        option: tuple[str, ...] = ("--redis", url)
    elif source in variables(_REDIS):
        option = ("--redis", f"${source}")
    else:
        option = ("--redis", mask(url)) if source == FLAG else ()
    yield DevBroker(url, f"from {'--redis' if source == FLAG else source}", option)


_REDIS = next(item for item in fields(CommonSettings) if item.name == "redis")


# The run


class Session:
    """Starts the children, says what is there, and watches them until somebody or something ends it all."""

    def __init__(self, plan: Plan, broker: DevBroker, console: Console, processes: Processes):
        self.plan = plan
        self.broker = broker
        self.console = console
        self.processes = processes
        self.agents: dict[Process, Served] = {}
        self.failed: dict[Mount, int] = {}
        self.gateway: Process | None = None
        # An agent's or gateway's argv can be read by every user of the machine, its environment cannot.
        self.environ = {**os.environ, "FLASKBUS_REDIS_URL": broker.url, "PYTHONUNBUFFERED": "1"}
        self._log_read = broker.private.log.stat().st_size if broker.private else 0

    def run(self) -> int:
        """The exit code. Raises :class:`~flaskbus.errors.StartError` where the gateway or broker ends."""
        namespace = self.plan.gateway.namespace
        with connect(self.broker.url, timeout=2.0, name="flaskbus-dev") as client:
            registry = Registry(client, Keys(namespace))
            self._start_gateway(registry)
            self._start_agents()
            self._await_agents(registry)
        while not self.processes.stopping and self.agents:
            self._step(LOG_POLL)
        if self.processes.stopping:
            self.console.say(SELF, "Stopping; Ctrl-C again ends everything at once.")
            return 0
        self.console.say(SELF, "No agent is left; stopping.")
        code = max(self.failed.values(), default=0)
        return code if code in (2, 3, 4) else StartError.exit_code

    # Start

    def _start_gateway(self, registry: Registry) -> None:
        """Wait for the gateway before there are agents: if its port is taken, that is all there is to say."""
        before = self._gateways(registry)
        self.gateway = self.processes.start(GATEWAY, self.plan.gateway_command(), self.environ, hold=True)
        while not self.processes.stopping and self._gateways(registry) <= before:
            self._step(POLL)
        self.processes.release(self.gateway)

    def _gateways(self, registry: Registry) -> set[str]:
        with suppress(redis.exceptions.RedisError):
            host = socket.gethostname()
            return {name for name, record in registry.gateways().items() if record.get("host") == host}
        return set()

    def _start_agents(self) -> None:
        for app, name in zip(self.plan.apps, self.plan.names, strict=True):
            if not self.processes.stopping:
                process = self.processes.start(name, self.plan.agent_command(app), self.environ)
                self.agents[process] = app

    def _await_agents(self, registry: Registry) -> None:
        """The banner, when every agent is ready or has failed."""
        deadline = time.monotonic() + READY_TIMEOUT
        states = self._states(registry)
        while any(state.state == "starting" for state in states) and time.monotonic() < deadline:
            self._step(POLL)
            if self.processes.stopping or not self.agents:
                return
            states = self._states(registry)
        for line in banner(self._setup(), states, self.console.paint):
            self.console.write(line)

    def _states(self, registry: Registry) -> list[Served]:
        supervisors = {app.mount: process.pid for process, app in self.agents.items()}
        found = []
        for app in self.plan.apps:
            try:
                records = registry.agents(app.mount)
            except redis.exceptions.RedisError:
                records = []
            ours = [record for record in records if record.supervisor == supervisors.get(app.mount)]
            ready = [record for record in ours if record.state == "ready"]
            # With reload, an agent whose app is broken is ready too: to show a page that says so.
            if app.mount in self.failed or any(record.reason for record in ready):
                found.append(replace(app, state="failed", reason="see the log"))
            else:
                found.append(replace(app, state="ready" if ready else "starting"))
        return found

    def _setup(self) -> Setup:
        option, url = self.broker.option, self.broker.url
        cli = next((name for name in ("redis-cli", "valkey-cli") if shutil.which(name)), None)
        # It knows only one kind of URL; flaskbus redis knows all.
        usable = cli and (option or mask(url) == url) and parse_url(url).kind == "single"
        return Setup(
            version=version("flaskbus"),
            gateway=self.plan.gateway,
            broker=url,
            broker_source=self.broker.source,
            agent=_program("flaskbus-agent", "flaskbus_agent"),
            agent_options=[*self.plan.agent_options, *option],
            redis_cli=redis_cli(cli, url, option)
            if cli and usable
            else [*_program("flaskbus", "flaskbus"), "redis", *option],
        )

    # Watching

    def _step(self, timeout: float) -> None:
        for process in self.processes.step(timeout):
            if process is self.gateway:
                if not self.processes.stopping:
                    self._gateway_ended(process)
            elif process in self.agents:
                app = self.agents.pop(process)
                self.failed[app.mount] = process.code or 0
                if not self.processes.stopping:
                    self.console.say(
                        SELF, f"The agent of {app.target} on {app.mount.name} {_ending(process)}."
                    )
        private = self.broker.private
        if private:
            self._relay_log(private)
            if private.poll() is not None and not self.processes.stopping:
                raise StartError(f"the private broker (pid {private.pid}) ended; everything stops")

    def _gateway_ended(self, process: Process) -> None:
        lines = process.held or []
        prefix = "flaskbus-gateway: error: "
        if lines and lines[-1].startswith(prefix):
            kind: type[OperatorError] = UsageError if process.code == UsageError.exit_code else StartError
            raise kind(lines[-1].removeprefix(prefix))
        self.processes.release(process)
        raise StartError(f"the gateway {_ending(process)}; everything stops")

    def _relay_log(self, private: EmbeddedBroker) -> None:
        with suppress(OSError), private.log.open("rb") as log:
            log.seek(self._log_read)
            lines = log.read().decode(errors="replace").splitlines()
            self._log_read = log.tell()
            for line in lines:
                self.console.say(BROKER, line)


def _ending(process: Process) -> str:
    code = process.code or 0
    return f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"


def _program(script: str, module: str) -> list[str]:
    """How to call a command of this installation, in a shell that may have another one on its PATH."""
    ours = Path(sysconfig.get_path("scripts"), script)
    on_path = shutil.which(script)
    if on_path and (not ours.exists() or ours.samefile(on_path)):
        return [script]
    if not ours.exists():
        return [sys.executable, "-m", module]
    near = os.path.relpath(ours)
    return [str(ours) if near.startswith("..") else near]
