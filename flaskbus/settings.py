"""Every setting: its default, its unit and what it does, in one place.

The commands' options, their environment variables, the keys of the configuration file, ``flaskbus config``
and the table in the docs are all made from these dataclasses. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from ipaddress import ip_network
from typing import Any, ClassVar, TypeVar

from flaskbus import units
from flaskbus.address import parse_url
from flaskbus.errors import UsageError
from flaskbus.idempotency import Keeper, Policy, header_names
from flaskbus.keys import Keys
from flaskbus.signing import check_keys, check_secret

S = TypeVar("S", bound="CommonSettings")

APP = "App"
LISTENING = "Listening"
TLS = "TLS"
BROKER = "Broker"
PROCESS = "Process"
LIMITS = "Limits and deadlines"
LOGGING = "Logging and debugging"
SECTIONS = (APP, LISTENING, TLS, BROKER, PROCESS, LIMITS, LOGGING)
"""The headings of ``--help`` and of the docs, in their order."""


def knob(default: Any, text: str, section: str, **metadata: Any) -> Any:
    """A setting, and where ``--help`` lists it.

    ``metadata``: ``unit`` (``"seconds"`` or ``"bytes"``), ``least`` and ``most`` (bounds), ``choices``,
    ``valid`` (a function that raises ValueError or UsageError), ``many`` (a comma-separated list), ``path``
    (``"file"`` or ``"directory"``), ``short`` (flag), ``metavar``, ``env`` (environment variables, the stronger
    first), ``unset`` (what an empty or zero default means), ``secret`` (masked when shown, and not in the repr).
    """
    return field(
        default=default,
        repr=not metadata.get("secret"),
        metadata={"help": text, "section": section, **metadata},
    )


_ORIGIN = re.compile(r"https?://[^/@?#\s]+", re.IGNORECASE)


def _proxies(value: str) -> None:
    for item in value.split(","):
        if item.strip() not in ("", "*"):
            ip_network(item.strip())


def _origins(value: str) -> None:
    for item in value.split(","):
        if item.strip() not in ("", "*") and not _ORIGIN.fullmatch(item.strip()):
            raise ValueError(f"{item.strip()!r} is no origin, such as https://example.com")


def _url(value: str) -> None:
    if not value.startswith("@"):  # a file, which is read later
        parse_url(value)


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What gateways, agents and tools share."""

    table: ClassVar[str] = ""
    """The table of the configuration file that holds the settings which only this component has."""

    redis: str = knob(
        "redis://127.0.0.1:6379/0",
        "URL of the broker.",
        BROKER,
        metavar="URL",
        env=("FLASKBUS_REDIS_URL", "REDIS_URL"),
        valid=_url,
        secret=True,
    )
    namespace: str = knob(
        "flaskbus",
        "What every key begins with, so that several buses can share a broker.",
        BROKER,
        metavar="NAME",
        valid=Keys,
    )
    log_level: str = knob("info", "What is logged.", LOGGING, choices=("debug", "info", "warning", "error"))
    mount_ttl: float = knob(
        3600.0,
        "How long a mount stays known (requests are held) after its last agent left.",
        LIMITS,
        unit="seconds",
        least=1.0,
    )
    lease: float = knob(
        10.0,
        "A process that sends no heartbeat for this long has lost what was delivered to it.",
        LIMITS,
        unit="seconds",
        least=0.5,
    )
    body_limit: int = knob(
        4 * 1024**3,
        "Largest request body; a larger one is answered 413.",
        LIMITS,
        unit="bytes",
        least=0,
    )
    reply_limit: int = knob(
        64 * 1024,
        "Replies up to this size travel as one frame; larger ones are streamed.",
        LIMITS,
        unit="bytes",
        least=1024,
    )
    message_limit: int = knob(
        16 * 1024 * 1024,
        "Largest message of a WebSocket.",
        LIMITS,
        unit="bytes",
        least=1024,
    )
    window: int = knob(
        1024 * 1024,
        "How many bytes of a streamed response, or of an upload, may wait in the broker.",
        LIMITS,
        unit="bytes",
        least=65536,
    )


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(CommonSettings):
    """What a gateway can be told."""

    table: ClassVar[str] = "gateway"

    host: str = knob("127.0.0.1", "Address to listen on, or unix:PATH.", LISTENING, metavar="ADDRESS")
    port: int = knob(5000, "Port to listen on.", LISTENING, short="-p", metavar="PORT", least=0, most=65535)
    workers: int = knob(1, "Gateway processes that share the port.", PROCESS, short="-w", least=1)
    hold: float = knob(
        30.0, "How long requests wait while no agent serves their mount.", LIMITS, unit="seconds", least=0.0
    )
    head_timeout: float = knob(
        30.0, "How long a request may take to the head of its reply.", LIMITS, unit="seconds", least=0.1
    )
    idle_timeout: float = knob(
        60.0, "How long a streamed reply may stay silent.", LIMITS, unit="seconds", least=0.1
    )
    body_timeout: float = knob(
        60.0,
        "How long a client may send nothing of a request body or, before the app answers, less than 4 KiB a second.",
        LIMITS,
        unit="seconds",
        least=0.1,
    )
    header_timeout: float = knob(
        10.0, "How long a request's header may take to arrive.", LIMITS, unit="seconds", least=0.1
    )
    keepalive: float = knob(
        75.0, "How long an idle connection is kept open.", LIMITS, unit="seconds", least=0.0
    )
    websocket_ping: float = knob(
        30.0,
        "How long a WebSocket's client may be silent before it is pinged, and then until it answers; 0 is for ever.",
        LIMITS,
        unit="seconds",
        least=0.0,
    )
    attempts: int = knob(
        3, "Runs that a request may get when its agents die, if it is safe to run again.", LIMITS, least=1
    )
    dead_body: int = knob(
        64 * 1024,
        "How much of its body is kept of a request that is given up (flaskbus dead).",
        LIMITS,
        unit="bytes",
        least=0,
    )
    queue_limit: int = knob(
        1000, "Requests that may wait for one mount; more are answered 503.", LIMITS, least=1
    )
    queue_age: float = knob(
        3.0,
        "How long a request may have to wait for a free thread, beside twice its work; more are answered 503.",
        LIMITS,
        unit="seconds",
        least=0.1,
    )
    open_limit: int = knob(
        20000,
        "Exchanges that one gateway process may have open; one mount, three quarters of them.",
        LIMITS,
        least=1,
    )
    trusted_proxies: str = knob(
        "127.0.0.1,::1",
        "Peers whose X-Forwarded-* headers are believed (addresses, networks, *).",
        LISTENING,
        metavar="LIST",
        many=True,
        valid=_proxies,
    )
    websocket_origins: str = knob(
        "",
        "Origins beside the host's own whose pages may open WebSockets (https://example.com, *).",
        LISTENING,
        metavar="LIST",
        many=True,
        unset="no others",
        valid=_origins,
    )
    graceful_timeout: float = knob(
        30.0, "How long a stopping worker lets requests finish.", PROCESS, unit="seconds", least=0.0
    )
    signing_secret: str = knob(
        "",
        "Sign requests and believe signed replies only, with keys made from this secret; @FILE reads it from a file.",
        BROKER,
        metavar="SECRET",
        valid=check_secret,
        unset="nothing is signed",
        secret=True,
    )
    development: bool = knob(False, "Say in error answers which command would mend them.", LOGGING)
    certfile: str = knob("", "TLS certificate (PEM).", TLS, path="file", unset="plain HTTP")
    keyfile: str = knob("", "TLS key (PEM).", TLS, path="file", unset="the one in the certificate's file")
    http2: bool = knob(False, "Offer HTTP/2 to clients; needs a certificate.", TLS)
    access_log: str = knob("", "Access log file; - is standard output.", LOGGING, path="file", unset="none")
    pid: str = knob("", "File for the process id.", PROCESS, path="file", unset="none")
    reload: bool = knob(
        False, "Restart workers when the gateway's own code or configuration changes.", PROCESS
    )

    @property
    def longest_wait(self) -> float:
        """Seconds that a request waits for the head of its reply at most, with agents or without."""
        return max(self.hold, self.head_timeout)


@dataclass(frozen=True, kw_only=True)
class AgentSettings(CommonSettings):
    """What an agent can be told."""

    table: ClassVar[str] = "agent"

    prefix: str = knob("", "Path under which the app is mounted.", APP, metavar="PATH", unset="none")
    host_pattern: str = knob(
        "",
        "Host that the mount is for: shop.example.com or *.example.com.",
        APP,
        metavar="HOST",
        unset="any host",
    )
    name: str = knob(
        "",
        "Name of the app; agents of one name share a mount.",
        APP,
        short="-n",
        metavar="NAME",
        unset="the import string",
    )
    partitions: int = knob(
        1,
        "Queues of the mount, spread over the nodes of a cluster (all its agents say the same).",
        APP,
        least=1,
    )
    replace: bool = knob(False, "Take the mount over from another app.", APP)
    signing_key: str = knob(
        "",
        "Take signed requests only: KEY as flaskbus key prints it, MOUNT=KEY once for each of several, or @FILE.",
        BROKER,
        metavar="KEY",
        valid=check_keys,
        unset="nothing is signed",
        secret=True,
    )
    workers: int = knob(1, "Agent processes.", PROCESS, short="-w", least=1)
    threads: int = knob(4, "Requests that one process runs at a time.", PROCESS, short="-t", least=1)
    streams: int = knob(
        100, "Streams and WebSockets that one process runs beside its threads.", PROCESS, least=0
    )
    chdir: str = knob(
        "",
        "Directory to change to before the app is imported.",
        APP,
        path="directory",
        unset="the current one",
    )
    factory: bool = knob(False, "The attribute is a function that makes the app.", APP)
    preload: bool = knob(False, "Import the app once, before the workers are forked.", PROCESS)
    on_worker_start: str = knob(
        "",
        "Function to call in each worker before it serves.",
        PROCESS,
        metavar="MODULE:FUNCTION",
        unset="none",
    )
    reload: bool = knob(False, "Load the app anew when its code changes.", PROCESS)
    debugger: bool = knob(False, "Show werkzeug's interactive debugger (loopback brokers only).", LOGGING)
    max_requests: int = knob(0, "Replace a worker after this many requests.", PROCESS, least=0, unset="never")
    max_requests_jitter: int = knob(0, "Add a random number up to this to max_requests.", PROCESS, least=0)
    graceful_timeout: float = knob(
        30.0, "How long a stopping worker lets requests finish.", PROCESS, unit="seconds", least=0.0
    )
    kill_after: float = knob(
        0.0,
        "Log the stack of a handler that runs longer, and replace its process.",
        PROCESS,
        unit="seconds",
        least=0.0,
        unset="never",
    )
    pid: str = knob("", "File for the process id.", PROCESS, path="file", unset="none")
    idempotency_keys: bool = knob(
        False,
        "Run requests with the same Idempotency-Key once, and answer the others alike.",
        APP,
    )
    idempotency_ttl: float = knob(
        24 * 3600.0, "How long an Idempotency-Key is remembered.", APP, unit="seconds", least=1.0
    )
    idempotency_limit: int = knob(
        64 * 1024,
        "Largest answer that is kept for an Idempotency-Key; nothing above reply_limit is.",
        APP,
        unit="bytes",
        least=0,
    )
    idempotency_identity: str = knob(
        "x-api-key",
        "Headers that tell one caller from another, beside Authorization and Cookie.",
        APP,
        metavar="LIST",
        many=True,
        valid=header_names,
        unset="none",
    )

    @property
    def policy(self) -> Policy | None:
        """What the mounts are told of Idempotency-Key; ``None`` where they do not opt in."""
        if not self.idempotency_keys:
            return None
        return Policy(int(self.idempotency_ttl * 1000), header_names(self.idempotency_identity))

    @property
    def keeper(self) -> Keeper:
        """What is kept of answers to requests that have a record, whoever opted in."""
        life, identity = int(self.idempotency_ttl * 1000), header_names(self.idempotency_identity)
        return Keeper(life, self.idempotency_limit, identity)


COMPONENTS: tuple[type[CommonSettings], ...] = (GatewaySettings, AgentSettings)
"""Whatever has a table of its own in the configuration file."""


def flag(item: Field[Any]) -> str:
    """The option of a setting: ``--log-level``."""
    return "--" + item.name.replace("_", "-")


def variables(item: Field[Any]) -> tuple[str, ...]:
    """The environment variables of a setting, the stronger first: ``FLASKBUS_LOG_LEVEL``."""
    names: tuple[str, ...] = item.metadata.get("env", (f"FLASKBUS_{item.name.upper()}",))
    return names


def show(item: Field[Any], value: Any) -> str:
    """A value as a person would write it: ``30s``, ``16MiB``, ``true``. Secrets are *not* masked here."""
    if isinstance(value, bool):
        return str(value).lower()
    unit = item.metadata.get("unit")
    if unit == "seconds":
        return units.show_seconds(value)
    return units.show_size(value) if unit == "bytes" else str(value)


def show_default(item: Field[Any]) -> str:
    """The default for ``--help`` and the docs; says what an empty one means."""
    unset = item.metadata.get("unset")
    return unset if unset is not None and not item.default else show(item, item.default)


def build(kind: type[S], values: Mapping[str, object]) -> S:
    """Checked settings from plain values.

    Raises :class:`~flaskbus.errors.UsageError` for an unknown key (with the nearest one) or a value that is
    out of range.
    """
    known: dict[str, Field[Any]] = {item.name: item for item in fields(kind)}
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise UsageError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    checked: dict[str, Any] = {key: check(known[key], value) for key, value in values.items()}
    return kind(**checked)


def check(item: Field[Any], value: object, called: str = "") -> Any:
    """The value of one setting in its type, from a flag, a variable, a file or a program.

    ``called`` is how the error names it (``FLASKBUS_PORT``); without it, its own name. Raises
    :class:`~flaskbus.errors.UsageError`.
    """
    assert item.default is not MISSING
    called = called or item.name
    try:
        checked = _convert(item, value)
    except ValueError:
        raise UsageError(f"{called} must be {_kind(item)}, not {value!r}") from None
    choices = item.metadata.get("choices")
    if choices and checked not in choices:
        raise UsageError(f"{called} must be one of {', '.join(choices)}, not {value!r}")
    least, most = item.metadata.get("least"), item.metadata.get("most")
    if least is not None and checked < least:
        raise UsageError(f"{called} must be at least {show(item, least)}, not {value}")
    if most is not None and checked > most:
        raise UsageError(f"{called} must be at most {show(item, most)}, not {value}")
    try:
        item.metadata.get("valid", str)(checked)
    except (ValueError, UsageError) as error:
        raise UsageError(f"{called}: {error}") from None
    return checked


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


def _convert(item: Field[Any], value: object) -> object:
    """The value in the setting's type; raises ValueError rather than lose a part of it."""
    expected, unit = type(item.default), item.metadata.get("unit")
    if unit is not None:
        return units.seconds(value) if unit == "seconds" else units.size(value)
    if isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value.strip().lower() if isinstance(value, str) and "choices" in item.metadata else value
    if isinstance(value, str):
        if expected is int:
            return int(value)
        word = value.strip().lower()
        if word in _TRUE | _FALSE:
            return word in _TRUE
    elif item.metadata.get("many") and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    raise ValueError(value)


def _kind(item: Field[Any]) -> str:
    unit = item.metadata.get("unit")
    if unit is not None:
        return "a duration such as 30, 500ms or 5m" if unit == "seconds" else "a size such as 65536 or 16MiB"
    return {int: "a whole number", str: "text", bool: "true or false"}[type(item.default)]
