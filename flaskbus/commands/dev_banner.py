"""What ``flaskbus dev`` prints once everything runs: where the apps are, and what to try next. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flaskbus.broker import mask, parse_url
from flaskbus.keys import Keys
from flaskbus.processes import BOLD, DIM, GREEN, RED, YELLOW
from flaskbus.routing import Mount
from flaskbus.settings import GatewaySettings

Paint = Callable[[str, int], str]
"""Text and style (an SGR parameter) -> text."""

_STATE_COLOURS = {"ready": GREEN, "failed": RED}
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to ask instead


@dataclass(frozen=True)
class Served:
    """An app, its mount, and the state that its agent is in (with the reason of a failure)."""

    target: str
    mount: Mount
    state: str = "starting"
    reason: str = ""


@dataclass(frozen=True)
class Setup:
    """What else the banner says.

    ``broker_source`` is for people. ``agent`` and ``redis_cli`` are the beginnings of their command lines,
    ``agent_options`` the options of a second agent.
    """

    version: str
    gateway: GatewaySettings
    broker: str
    broker_source: str
    agent: Sequence[str]
    agent_options: Sequence[str]
    redis_cli: Sequence[str]


def banner(setup: Setup, apps: Sequence[Served], paint: Paint) -> Iterator[str]:
    """The lines, of which none is cut off or wrapped."""
    urls = [app_url(setup.gateway, app.mount) for app in apps]
    wide, broad = max(map(len, urls)), max(len(app.target) for app in apps)
    yield ""
    yield paint(f"flaskbus {setup.version}", BOLD) + ", for development"
    yield ""
    for app, url in zip(apps, urls, strict=True):
        state = paint(app.state, _STATE_COLOURS.get(app.state, YELLOW))
        reason = f": {app.reason}" if app.reason else ""
        yield f"  {paint(url, BOLD)}{'':{wide - len(url)}}  {app.target:{broad}}  {state}{reason}"
    yield ""
    yield f"  Broker: {mask(setup.broker)} ({setup.broker_source})"
    yield ""
    yield "  Try, in another terminal:"
    first = apps[0]
    for comment, command in (
        ("a request", curl(setup.gateway, first.mount)),
        ("a second agent", [*setup.agent, first.target, *_place(first.mount), *setup.agent_options]),
        ("its queue, and who reads it", [*setup.redis_cli, "XINFO", "GROUPS", _queue(setup, first.mount)]),
    ):
        yield "    " + paint(f"# {comment}", DIM)
        yield "    " + shell(command)
    yield ""
    yield "  Ctrl-C ends everything."
    yield ""


def shell(command: Sequence[str]) -> str:
    """A command line to paste; a ``$NAME`` is left for the shell."""
    return " ".join(f'"{part}"' if part.startswith("$") else shlex.quote(part) for part in command)


def base_url(settings: GatewaySettings, host: str = "") -> str:
    """Where the gateway is reached from this machine, under its own address or another host name."""
    scheme = "https" if settings.certfile else "http"
    if settings.host.startswith("unix:"):
        return f"{scheme}://{host or 'localhost'}"
    host = host or _ANY_ADDRESS.get(settings.host.strip("[]"), settings.host.strip("[]"))
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{settings.port}"


def app_url(settings: GatewaySettings, mount: Mount) -> str:
    """The URL of an app's first page."""
    return base_url(settings, _host(mount)) + mount.prefix.rstrip("/") + "/"


def curl(settings: GatewaySettings, mount: Mount) -> list[str]:
    """The command that asks for an app's first page, whatever its host name resolves to."""
    command = ["curl", "-i"]
    if settings.certfile:
        command.append("--insecure")
    if settings.host.startswith("unix:"):
        command += ["--unix-socket", settings.host.removeprefix("unix:").removeprefix("//")]
    if host := _host(mount):
        command += ["-H", f"Host: {host}"]
    return [*command, base_url(settings) + mount.prefix.rstrip("/") + "/"]


def _host(mount: Mount) -> str:
    return mount.host.replace("*", "www", 1)


def _place(mount: Mount) -> list[str]:
    return ["--prefix", mount.prefix, *(["--host-pattern", mount.host] if mount.host else [])]


def _queue(setup: Setup, mount: Mount) -> str:
    return Keys(setup.gateway.namespace).of(mount.key).requests


def redis_cli(program: str, url: str, option: Sequence[str]) -> list[str]:
    """The beginning of a redis-cli command line for a broker; ``option`` is ``--redis URL`` or nothing."""
    address = parse_url(url)
    if option and not address.path and address.host == "127.0.0.1" and not (address.db or address.password):
        return [program, "-p", str(address.port)]
    return [program, "-u", option[-1] if option else url]
