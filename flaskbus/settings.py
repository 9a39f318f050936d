"""Every setting: its default, its unit and what it does, in one place.

The commands' options, their environment variables, the keys of the configuration file, ``flaskbus config``
and the table in the docs are all made from these dataclasses. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from flaskbus.errors import UsageError

S = TypeVar("S", bound="CommonSettings")


def knob(default: Any, text: str, **metadata: Any) -> Any:
    """A setting. ``metadata``: ``least`` (smallest value), ``choices``, ``secret`` (masked when shown)."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What gateways, agents and tools share."""

    redis: str = knob("redis://127.0.0.1:6379/0", "URL of the broker.", secret=True)
    namespace: str = knob("flaskbus", "What every key begins with, so that several buses can share a broker.")
    log_level: str = knob("info", "What is logged.", choices=("debug", "info", "warning", "error"))
    mount_ttl: float = knob(
        3600.0, "How long a mount stays known (requests are held) after its last agent left.", least=1.0
    )
    lease: float = knob(
        10.0, "A process that sends no heartbeat for this long has lost what was delivered to it.", least=0.5
    )
    body_limit: int = knob(16 * 1024 * 1024, "Largest request body; a larger one is answered 413.", least=0)
    reply_limit: int = knob(
        64 * 1024, "Replies up to this size travel as one frame; larger ones are streamed.", least=1024
    )
    window: int = knob(
        1024 * 1024, "How many bytes of a streamed response may wait in the broker.", least=65536
    )


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(CommonSettings):
    """What a gateway can be told."""

    host: str = knob("127.0.0.1", "Address to listen on, or unix:PATH.")
    port: int = knob(5000, "Port to listen on.", least=0)
    workers: int = knob(1, "Gateway processes that share the port.", least=1)
    hold: float = knob(30.0, "How long requests wait while no agent serves their mount.", least=0.0)
    head_timeout: float = knob(30.0, "How long a request may take to the head of its reply.", least=0.1)
    idle_timeout: float = knob(60.0, "How long a streamed reply may stay silent.", least=0.1)
    body_timeout: float = knob(60.0, "How long a request body may take to arrive.", least=0.1)
    header_timeout: float = knob(10.0, "How long a request's header may take to arrive.", least=0.1)
    keepalive: float = knob(75.0, "How long an idle connection is kept open.", least=0.0)
    queue_limit: int = knob(1000, "Requests that may wait for one mount; more are answered 503.", least=1)
    open_limit: int = knob(20000, "Exchanges that one gateway process may have open.", least=1)
    trusted_proxies: str = knob(
        "127.0.0.1,::1",
        "Peers whose Forwarded and X-Forwarded-* headers are believed (addresses, networks, *).",
    )
    graceful_timeout: float = knob(30.0, "How long a stopping worker lets requests finish.", least=0.0)
    development: bool = knob(False, "Say in error answers which command would mend them.")
    certfile: str = knob("", "TLS certificate (PEM).")
    keyfile: str = knob("", "TLS key (PEM).")
    http2: bool = knob(False, "Offer HTTP/2 to clients; needs a certificate.")
    access_log: str = knob("", "Access log file; - is standard output, empty is none.")
    pid: str = knob("", "File for the process id.")
    reload: bool = knob(False, "Restart workers when the gateway's own code or configuration changes.")


@dataclass(frozen=True, kw_only=True)
class AgentSettings(CommonSettings):
    """What an agent can be told."""

    prefix: str = knob("", "Path under which the app is mounted.")
    host_pattern: str = knob("", "Host that the mount is for: shop.example.com or *.example.com.")
    name: str = knob("", "Name of the app; agents of one name share a mount. Default: the import string.")
    replace: bool = knob(False, "Take the mount over from another app.")
    workers: int = knob(1, "Agent processes.", least=1)
    threads: int = knob(4, "Requests that one process runs at a time.", least=1)
    chdir: str = knob("", "Directory to change to before the app is imported.")
    factory: bool = knob(False, "The attribute is a function that makes the app.")
    preload: bool = knob(False, "Import the app once, before the workers are forked.")
    on_worker_start: str = knob("", "MODULE:FUNCTION to call in each worker before it serves.")
    reload: bool = knob(False, "Load the app anew when its code changes.")
    debugger: bool = knob(False, "Show werkzeug's interactive debugger (loopback brokers only).")
    max_requests: int = knob(0, "Replace a worker after this many requests; 0 is never.", least=0)
    max_requests_jitter: int = knob(0, "Add a random number up to this to max_requests.", least=0)
    graceful_timeout: float = knob(30.0, "How long a stopping worker lets requests finish.", least=0.0)
    kill_after: float = knob(
        0.0, "Log the stack of a handler that runs longer, and replace its process; 0 is never.", least=0.0
    )
    pid: str = knob("", "File for the process id.")


def build(kind: type[S], values: Mapping[str, object]) -> S:
    """Checked settings from plain values.

    Raises :class:`~flaskbus.errors.UsageError` for an unknown key (with the nearest one) or a value that is
    out of range.
    """
    known: dict[str, Field[Any]] = {item.name: item for item in fields(kind)}
    for key in values:
        if key not in known:
            from difflib import get_close_matches

            near = get_close_matches(key, known, 1)
            raise UsageError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    checked: dict[str, Any] = {key: _check(known[key], value) for key, value in values.items()}
    return kind(**checked)


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


def _check(item: Field[Any], value: Any) -> Any:
    assert item.default is not MISSING
    expected = type(item.default)
    try:
        if expected is bool and isinstance(value, str):
            word = value.strip().lower()
            if word not in _TRUE | _FALSE:
                raise ValueError
            value = word in _TRUE
        elif expected is not bool and isinstance(value, bool):
            raise ValueError
        else:
            value = expected(value)
    except (TypeError, ValueError):
        raise UsageError(f"{item.name} must be {_KINDS[expected]}, not {value!r}") from None
    choices = item.metadata.get("choices")
    if choices and value not in choices:
        raise UsageError(f"{item.name} must be one of {', '.join(choices)}, not {value!r}")
    least = item.metadata.get("least")
    # Written so that NaN is refused too.
    if least is not None and not value >= least:
        raise UsageError(f"{item.name} must be at least {least:g}, not {value}")
    return value


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
