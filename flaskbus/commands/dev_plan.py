"""What ``flaskbus dev`` is to run, from its command line, the environment and the configuration file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from flaskbus.apps import short_name, split_app
from flaskbus.broker import parse_url
from flaskbus.commands.dev_banner import Served
from flaskbus.config import DEFAULT, FLAG, Resolved
from flaskbus.embedded import free_port
from flaskbus.errors import UsageError
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings, CommonSettings, GatewaySettings, flag

OPTIONS = (
    *("redis", "namespace", "log_level"),
    *("host", "port", "access_log"),
    *("chdir", "factory", "replace", "threads"),
)
"""The settings that are options of ours too, and are passed on to the children that know them."""
LONGEST_NAME = 20


@dataclass(frozen=True)
class Plan:
    """The children: import string and mount of each app, and everybody's options."""

    apps: tuple[Served, ...]
    gateway: GatewaySettings
    gateway_options: tuple[str, ...]
    agent_options: tuple[str, ...]
    """What was said on our command line, for a second agent too."""
    dev_options: tuple[str, ...]
    """What makes an agent one for development."""
    named: bool

    @property
    def names(self) -> list[str]:
        """Of the agents, in the log: their mounts."""
        names = [app.mount.name for app in self.apps]
        return [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names]

    def gateway_command(self) -> list[str]:
        return _python("flaskbus_gateway", *self.gateway_options)

    def agent_command(self, app: Served) -> list[str]:
        name = [] if self.named else ["--name", app.target]
        place = ["--prefix", app.mount.prefix, "--host-pattern", app.mount.host]
        return _python("flaskbus_agent", app.target, *place, *name, *self.agent_options, *self.dev_options)


def _python(module: str, *arguments: str) -> list[str]:
    # The same interpreter, whatever is on PATH; -P: a user's file must not be taken for a module of ours.
    return [sys.executable, "-P", "-m", module, *arguments]


def make_plan(
    gateway: Resolved[GatewaySettings],
    agent: Resolved[AgentSettings],
    given: Sequence[str],
    params: Mapping[str, Any],
    reload: bool | None,
    debugger: bool | None,
) -> Plan:
    """Raises :class:`~flaskbus.errors.UsageError`."""
    apps = parse_apps(given)
    if agent.settings.chdir and not Path(agent.settings.chdir).is_dir():
        raise UsageError(f"--chdir {agent.settings.chdir}: there is no such directory")
    port = gateway.settings.port or free_port()
    reload = _choose(reload, agent, "reload", otherwise=True)
    return Plan(
        apps=apps,
        gateway=replace(gateway.settings, port=port),
        gateway_options=(
            *_given(GatewaySettings, gateway, params, but=("redis", "port")),
            *("--development", "--port", str(port), "--pid", ""),
            *(() if gateway.sources["access_log"] != DEFAULT else ("--access-log", "-")),
        ),
        agent_options=(*_given(AgentSettings, agent, params, but=("redis",)),),
        dev_options=(
            *(("--reload", "--no-preload") if reload else ("--no-reload",)),
            "--debugger" if _debug(gateway, agent, debugger) else "--no-debugger",
            *("--pid", ""),
        ),
        named=len(apps) == 1 and agent.sources["name"] != DEFAULT,
    )


def parse_apps(given: Sequence[str]) -> tuple[Served, ...]:
    """``MODULE:APP=PREFIX`` texts, or ``MODULE:APP`` alone for the root."""
    if not given:
        raise UsageError(
            "which app? Name it as in: flaskbus dev myapp:app=/myapp (or put apps = [...] into flaskbus.toml)"
        )
    found: dict[Mount, Served] = {}
    for text in given:
        target, place = split_app(text)
        if place is None and len(given) > 1:
            raise UsageError(
                f"where is {target} mounted? With several apps each says it: {target}=/{short_name(target)}"
            )
        mount = Mount.from_name("/" if place is None else place)
        if mount.partition:
            raise UsageError(
                f"{mount.name} is one queue of {mount.whole.name}; say {target}={mount.whole.name}"
            )
        if mount in found:
            raise UsageError(f"{found[mount].target} and {target} are both mounted on {mount.name}")
        found[mount] = Served(target, mount)
    return tuple(found.values())


def _given(
    kind: type[CommonSettings], resolved: Resolved[Any], params: Mapping[str, Any], *, but: Sequence[str]
) -> Iterator[str]:
    """The flags of our command line, for the children that know them."""
    if params.get("config_file"):
        yield from ("--config", params["config_file"])
    for item in fields(kind):
        if item.name in OPTIONS and item.name not in but and resolved.sources[item.name] == FLAG:
            value = params[item.name]
            if isinstance(value, bool):
                yield flag(item) if value else f"--no-{flag(item)[2:]}"
            else:
                yield from (flag(item), str(value))


def _choose(given: bool | None, resolved: Resolved[AgentSettings], name: str, *, otherwise: bool) -> bool:
    if given is not None:
        return given
    return otherwise if resolved.sources[name] == DEFAULT else bool(getattr(resolved.settings, name))


def _debug(gateway: Resolved[GatewaySettings], agent: Resolved[AgentSettings], debugger: bool | None) -> bool:
    """Whether to have the debugger, which lets whoever reaches it run code."""
    local = _is_loopback(gateway.settings.host)
    private = gateway.sources["redis"] == DEFAULT
    address = parse_url(gateway.settings.redis)
    wanted = _choose(
        debugger,
        agent,
        "debugger",
        otherwise=local
        and address.kind == "single"
        and (private or bool(address.path) or _is_loopback(address.host)),
    )
    if wanted and not local:
        raise UsageError(
            "--debugger lets whoever reaches it run code, so it is served on a loopback address only, "
            f"not on {gateway.settings.host}"
        )
    return wanted


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
