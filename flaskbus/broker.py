"""Connections to the broker, whatever kind its URL names, and whether it is fit.

Two kinds of connection leave this module. :func:`connect` gives an ordinary redis-py client, for
everything that is not on a request's path. :func:`raw_connection` gives one bare redis-py connection
(which brings URL, TLS, ACL and timeouts with it) to a thread that sends and reads on its own: an agent's
reader and writers. The gateway multiplexes all that it has to say over :mod:`flaskbus_gateway.link`.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, cast

import redis
from redis.connection import AbstractConnection, ConnectionPool

from flaskbus.acl import mend
from flaskbus.address import Address as Address
from flaskbus.address import Node, mask, parse_url
from flaskbus.cluster_client import ClusterClient, cluster_map
from flaskbus.connections import Misconfigured, master_pool, node_pool, sentinels, tls_context
from flaskbus.connections import Unavailable as Unavailable
from flaskbus.errors import StartError

__all__ = [
    "Address", "Unavailable", "check", "connect", "mask", "mistaken", "one_server", "parse_info", "parse_url",
    "primaries", "raw_connection", "run_script", "script_names", "script_sha", "script_source", "verdict",
]  # fmt: skip

OLDEST_REDIS = (7, 0)


def connect(url: str, *, timeout: float = 5.0, name: str = "") -> redis.Redis:
    """A client for everything off a request's path; answers are bytes, writes are never repeated.

    ``timeout`` in seconds bounds every command. It connects with the first command, and anew when that
    connection is lost; with sentinels and clusters, to whoever is the right one then.
    """
    address = parse_url(url)
    if address.kind == "cluster":
        tls_context(address)
        return ClusterClient(address, timeout, name)
    return redis.Redis.from_pool(_pool(address, timeout, name))


def raw_connection(
    url: str | Address, *, timeout: float, name: str, node: Node | None = None
) -> AbstractConnection:
    """One connection that its owner sends to and reads from; connected on first use.

    For a blocking reader ``timeout`` must be longer than its BLOCK. Of a cluster, ``node`` says which.
    """
    address = parse_url(url) if isinstance(url, str) else url
    if node is not None or address.kind == "cluster":
        pool = node_pool(address, node or address.nodes[0], timeout, name)
    else:
        pool = _pool(address, timeout, name)
    return cast(AbstractConnection, pool.make_connection())


def _pool(address: Address, timeout: float, name: str) -> ConnectionPool:
    if address.kind == "sentinel":
        return master_pool(address, timeout, name)
    return node_pool(address, address.nodes[0], timeout, name)


def one_server(url: str) -> Address:
    """One server of the broker, for who can speak to one only: the master that the sentinels name, or any node."""
    address = parse_url(url)
    if address.kind == "sentinel":
        node = sentinels(address).discover_master(address.service)
    elif address.kind == "cluster":
        node = cluster_map(address).any()
    else:
        return address
    return replace(address, kind="single", nodes=(node,))


def primaries(client: redis.Redis) -> Iterator[redis.Redis]:
    """A client for each server that holds a part of the keys: those of a cluster, or the one there is."""
    if isinstance(client, ClusterClient):
        yield from client.each()
    else:
        yield client


# Whether it is fit


def check(client: redis.Redis, url: str) -> None:
    """Whether this broker can be used.

    Raises :class:`~flaskbus.errors.StartError` with the mend: a URL of the wrong kind, refused credentials, older
    than Redis 7.0, a replica, or a ``maxmemory-policy`` that may evict a stream. Raises redis-py's connection
    errors where it is away.
    """
    try:
        infos = [one.info() for one in primaries(client)]
    except redis.exceptions.AuthenticationError as error:
        raise StartError(f"the broker at {mask(url)} refuses the user name or password: {error}") from None
    except redis.exceptions.NoPermissionError:
        return  # least privilege: what cannot be asked is the administrator's word
    except redis.exceptions.ResponseError as error:
        raise StartError(f"the broker at {mask(url)} answers with an error: {error}") from None
    except Unavailable as error:
        if what := mistaken(error, url):
            raise StartError(f"the broker at {mask(url)} cannot be used: {what}") from None
        raise
    for info in infos:
        verdict(info, url)


def mistaken(error: BaseException, url: str) -> str:
    """What is wrong with the URL and how to mend it, if that is why a connection failed; else empty.

    It may try the port with TLS, or without, which takes a second at most.
    """
    address = parse_url(url)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Misconfigured):
            return str(cause)
        if isinstance(cause, ssl.SSLError) and (what := _tls_trouble(cause)):
            return what
        cause = cause.__cause__ or cause.__context__
    for node in () if address.path else address.nodes:
        if address.tls is None and _speaks_tls(node):
            plus = _PLUS[address.kind]
            return f"the port {node[0]}:{node[1]} speaks TLS; say rediss{plus}:// instead of redis{plus}://"
        if address.tls is not None and (what := _tls_refusal(node, address)):
            return what
    return ""


def _tls_trouble(error: ssl.SSLError) -> str:
    """What a failed TLS handshake means to an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}); "
            "name the file of its CA in the URL: ?ssl_ca_certs=FILE"
        )
    if "ALERT" in (error.reason or "") or "alert" in str(error):
        return (
            f"it refuses our side of TLS ({error.reason}); does it want ?ssl_certfile=FILE&ssl_keyfile=FILE?"
        )
    return ""


_PLUS = {"single": "", "sentinel": "+sentinel", "cluster": "+cluster"}


def _speaks_tls(node: Node) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(node, 1.0) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False


def _tls_refusal(node: Node, address: Address) -> str:
    """Why a connection over TLS is not to be had, as far as the port says it."""
    try:
        with socket.create_connection(node, 1.0) as plain:
            # A TLS handshake is no line to a broker, which waits for its end: only asking tells.
            plain.sendall(b"PING\r\n")
            if plain.recv(1) in (b"+", b"-"):
                plus = _PLUS[address.kind]
                return f"the port {node[0]}:{node[1]} does not speak TLS; say redis{plus}:// instead of rediss{plus}://"
    except OSError:
        pass
    context = tls_context(address)
    assert context is not None
    for _ in range(3):  # a reset may overtake what the broker says
        try:
            with (
                socket.create_connection(node, 1.0) as plain,
                context.wrap_socket(plain, server_hostname=node[0]) as tls,
            ):
                # In TLS 1.3 a client hears here that its certificate is not wanted. Not if it writes before: what
                # the other side does not read makes it reset the connection, which overtakes what it said.
                tls.recv(1)
                return ""
        except ssl.SSLError as error:
            if what := _tls_trouble(error):
                return what
        except TimeoutError:
            return ""
        except OSError:
            pass
    return ""


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
    if info.get("redis_mode") == "sentinel":
        raise StartError(f"the broker at {mask(url)} is a sentinel; say redis+sentinel://HOST:26379/SERVICE")
    if parse_url(url).kind != "single":
        return  # who is master is asked with every connection
    if str(info.get("cluster_enabled", 0)) == "1":
        raise StartError(
            f"the broker at {mask(url)} is a node of a cluster; say redis+cluster:// (or rediss+cluster://)"
        )
    if info.get("role", "master") != "master":
        raise StartError(
            f"the broker at {mask(url)} is a replica of {info.get('master_host')}:{info.get('master_port')}, and "
            "takes no requests; name that one, or their sentinels: redis+sentinel://HOST:26379/SERVICE"
        )


# Scripts


@cache
def script_names() -> tuple[str, ...]:
    """Of every ``flaskbus/scripts/<name>.lua``."""
    scripts = files("flaskbus").joinpath("scripts").iterdir()
    return tuple(sorted(item.name.removesuffix(".lua") for item in scripts if item.name.endswith(".lua")))


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
    command = ("EVALSHA", script_sha(name), len(keys), *keys, *args)
    source = script_source(name)
    try:
        if isinstance(client, ClusterClient):
            return client.script(source, *command)
        try:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]
        except redis.exceptions.NoScriptError:
            client.script_load(source)
            return client.execute_command(*command)  # type: ignore[no-untyped-call]
    except redis.exceptions.ResponseError as error:
        if mend(str(error), ()):
            # What a user lacks inside of a script has no name of its own, and the script may not be named either.
            raise redis.exceptions.NoPermissionError(f"{name}.lua on {' '.join(keys)}: {error}") from None
        raise
