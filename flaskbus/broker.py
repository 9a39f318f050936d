"""The only place where a Redis client is built, with the reason for each option.

Two kinds of connection leave this module. :func:`connect` gives an ordinary redis-py client, for
everything that is not on a request's path. :func:`raw_connection` gives one bare redis-py connection
(which brings URL, TLS, ACL and timeouts with it) to a thread that sends and reads on its own: an agent's
reader and writers. The gateway multiplexes all that it has to say over :mod:`flaskbus_gateway.link`.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, ConnectionPool
from redis.retry import Retry

from flaskbus.errors import StartError, UsageError

OLDEST_REDIS = (7, 0)

Unavailable = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)
"""What a broker that is away, stalled or loading raises."""


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's URL, taken apart. ``path`` is a Unix socket, or empty."""

    host: str
    port: int
    path: str
    db: int
    username: str
    password: str
    tls: bool


def parse_url(url: str) -> Address:
    """``redis://``, ``rediss://`` or ``unix://`` -> :class:`Address`; :class:`UsageError` for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
        query = parse_qs(parts.query)
        is_socket = parts.scheme == "unix"
        db = query["db"][0] if "db" in query else "" if is_socket else parts.path.strip("/")
        number = int(db or 0)
    except ValueError as error:
        raise UsageError(f"the broker's URL {mask(url)} is not valid: {error}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise UsageError(
            f"the broker's URL {mask(url)} is not valid: it begins with redis://, rediss:// or unix://"
        )
    return Address(
        host=parts.hostname or "127.0.0.1",
        port=port,
        path=unquote(parts.path) if is_socket else "",
        db=number,
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        tls=parts.scheme == "rediss",
    )


def mask(url: str) -> str:
    """The URL without its password, for people and logs."""
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError:
        return "(unreadable URL)"
    query = "&".join(
        item if not item.startswith("password=") else "password=***" for item in parts.query.split("&")
    )
    netloc = parts.netloc
    if password is not None:
        user = netloc.rpartition("@")[0].partition(":")[0]
        netloc = f"{user}:***@{netloc.rpartition('@')[2]}"
    return urlunsplit(parts._replace(netloc=netloc, query=query))


def _options(timeout: float, name: str) -> dict[str, Any]:
    return {
        # An answer that does not come in this time is an error, not a thread that waits for ever.
        "socket_timeout": timeout,
        "socket_connect_timeout": min(timeout, 5.0),
        # A dead peer behind NAT is noticed by the kernel within a minute.
        "socket_keepalive": True,
        "socket_keepalive_options": _KEEPALIVE,
        # Ten silent retries are the default of redis-py, over writes too: one stalled XADD became two entries.
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "client_name": name or None,
        # RESP2 is what every supported engine and hiredis parse fastest; pushes are not needed.
        "protocol": 2,
        # One round trip less per connection, and no name of a library in CLIENT LIST.
        "driver_info": None,
    }


_KEEPALIVE = {socket.TCP_KEEPIDLE: 20, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 4}


def connect(url: str, *, timeout: float = 5.0, name: str = "") -> redis.Redis:
    """A client for everything off a request's path; answers are bytes, writes are never repeated.

    ``timeout`` in seconds bounds every command.
    """
    parse_url(url)
    return redis.Redis(connection_pool=_pool(url, timeout, name))


def raw_connection(url: str, *, timeout: float, name: str) -> AbstractConnection:
    """One connection that its owner sends to and reads from; connected on first use.

    For a blocking reader ``timeout`` must be longer than its BLOCK.
    """
    return cast(AbstractConnection, _pool(url, timeout, name).make_connection())


def _pool(url: str, timeout: float, name: str) -> ConnectionPool:
    options = _options(timeout, name)
    if parse_url(url).path:
        del options["socket_keepalive"], options["socket_keepalive_options"]
    return ConnectionPool.from_url(url, **options)


def check(client: redis.Redis, url: str) -> None:
    """Whether this broker can be used.

    Raises :class:`~flaskbus.errors.StartError` with the mend: refused credentials, older than Redis 7.0, or
    a ``maxmemory-policy`` that may evict a stream. Raises redis-py's connection errors where it is away.
    """
    try:
        info = client.info()
    except redis.exceptions.AuthenticationError as error:
        raise StartError(f"the broker at {mask(url)} refuses the user name or password: {error}") from None
    except redis.exceptions.NoPermissionError:
        return  # least privilege: what cannot be asked is the administrator's word
    except redis.exceptions.ResponseError as error:
        raise StartError(f"the broker at {mask(url)} answers with an error: {error}") from None
    verdict(info, url)


def parse_info(text: bytes) -> dict[str, Any]:
    """INFO's answer as it comes -> its members, all of them text."""
    pairs = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {name: value for name, _, value in pairs if value}


def verdict(info: dict[str, Any], url: str) -> None:
    """Judge the answer of INFO; raises :class:`~flaskbus.errors.StartError`."""
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        raise StartError(
            f"the broker at {mask(url)} is Redis {version}; flaskbus needs Redis 7.0 or newer, or Valkey 7.2 or newer"
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StartError(
            f"the broker at {mask(url)} has maxmemory-policy {policy} and may evict requests; "
            f"mend it with: redis-cli -u {mask(url)} CONFIG SET maxmemory-policy noeviction"
        )


# Scripts


@cache
def script_source(name: str) -> str:
    """The text of ``flaskbus/scripts/<name>.lua``."""
    return files("flaskbus").joinpath("scripts", f"{name}.lua").read_text(encoding="utf-8")


@cache
def script_sha(name: str) -> str:
    """SHA-1 of the script, as EVALSHA wants it."""
    from hashlib import sha1

    return sha1(script_source(name).encode()).hexdigest()  # noqa: S324 - the algorithm is Redis's


def run_script(client: redis.Redis, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
    """EVALSHA, and SCRIPT LOAD first where the broker does not know the script (any longer)."""
    try:
        return client.evalsha(script_sha(name), len(keys), *keys, *args)
    except redis.exceptions.NoScriptError:
        client.script_load(script_source(name))
        return client.evalsha(script_sha(name), len(keys), *keys, *args)
