"""What the commands that look at a bus have in common: options, connection, errors, columns."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import click
import redis

from flaskbus.broker import connect, mask, mistaken
from flaskbus.client import BusClient
from flaskbus.commands import DEFAULTS
from flaskbus.config import DEFAULT, ConfigFile, Resolved, read_secrets, resolve
from flaskbus.errors import StartError, UsageError
from flaskbus.keys import Keys
from flaskbus.options import Callback, settings_options
from flaskbus.registry import Registry
from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings, CommonSettings, GatewaySettings, S
from flaskbus.signing import Seal, make_seal, parse_keys


@dataclass(frozen=True)
class Bus:
    """The bus that a command looks at."""

    settings: CommonSettings
    client: redis.Redis
    keys: Keys

    @property
    def registry(self) -> Registry:
        return Registry(self.client, self.keys)


def with_bus(function: Callback) -> Callback:
    """Give a command ``--redis``, ``--namespace`` and ``--config``, and call it with the keyword ``bus``.

    What the broker does wrong while it runs becomes one line and exit code 3.
    """

    @settings_options(CommonSettings, only=("redis", "namespace"))
    @functools.wraps(function)
    def command(*args: Any, settings: CommonSettings, **params: Any) -> Any:
        settings = with_defaults(settings)
        with broker_errors(settings.redis), connect(settings.redis, name="flaskbus-cli") as client:
            return function(*args, bus=Bus(settings, client, Keys(settings.namespace)), **params)

    return command


def bus_client(bus: Bus) -> BusClient:
    """What sends requests, signed where the environment or the configuration file has the means for it.

    Those are the gateways' secret, or an agent's key. Raises :class:`~flaskbus.errors.UsageError`.
    """
    file = click.get_current_context().obj.file
    secret = _settings(GatewaySettings, file).signing_secret
    keys = parse_keys(_settings(AgentSettings, file).signing_key)

    def find(mount: str) -> Seal | None:
        if secret:
            return make_seal(secret, bus.settings.namespace, mount)
        mine = keys.get(mount) or keys.get("")
        return Seal(mount, bytes.fromhex(mine[0])) if mine else None

    return BusClient(bus.client, bus.settings, find)


def _settings(kind: type[S], file: ConfigFile | None) -> S:
    return read_secrets(resolve(kind, flags={}, environ=os.environ, file=file)).settings


def with_defaults(settings: S) -> S:
    """The settings, with those that ``ctx.meta[DEFAULTS]`` gives in the place of built-in defaults."""
    ctx = click.get_current_context()
    resolved: Resolved[S] = ctx.obj
    weaker = ctx.meta.get(DEFAULTS, dict)()
    return replace(
        settings,
        **{name: value for name, value in weaker.items() if resolved.sources.get(name) == DEFAULT},
    )


@contextmanager
def broker_errors(url: str) -> Iterator[None]:
    """Raise :class:`~flaskbus.errors.StartError`, one line with the masked URL, for redis-py's errors."""
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise StartError(f"the broker at {mask(url)} refuses the user name or password: {error}") from None
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        if what := mistaken(error, url):
            raise StartError(f"the broker at {mask(url)} cannot be used: {what}") from None
        raise StartError(f"the broker at {mask(url)} cannot be reached: {error}") from None
    except redis.exceptions.NoPermissionError as error:
        raise StartError(f"the broker at {mask(url)} does not allow its user this: {error}") from None
    except redis.exceptions.RedisError as error:
        raise StartError(f"the broker at {mask(url)} answers with an error: {error}") from None


def known_mount(bus: Bus, name: str) -> Mount:
    """The mount of this name; :class:`~flaskbus.errors.UsageError` where there is none, with the nearest."""
    mount = Mount.from_name(name)
    known = bus.registry.mounts()
    if mount not in known:
        near = get_close_matches(mount.name, [other.name for other in known], 1)
        raise UsageError(
            f"nothing is mounted on {mount.name}"
            + (f"; did you mean {near[0]}?" if near else "; flaskbus mounts shows what is there")
        )
    return mount


def known_queues(bus: Bus, name: str) -> list[Mount]:
    """The mount of this name and its partitions, as far as they are there; errors are as of :func:`known_mount`."""
    mount = Mount.from_name(name)
    return sorted(one for one in bus.registry.mounts() if mount in (one, one.whole)) or [
        known_mount(bus, name)
    ]


def age(record: Any) -> float:
    """Seconds since a record was written, by its writer's clock and ours: a hint."""
    return max(0.0, time.time() - float(record.at))


def ago(seconds: float | None) -> str:
    """``0.3s``, ``12s``, ``5m``, ``3h``, ``2d``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds:.0f}s"


def columns(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, as ``ps`` has them: each as wide as its widest cell, and nothing is cut off."""
    table = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
