"""How a connection of redis-py is made, with the reason for each option.

Nothing here is for callers: :mod:`flaskbus.broker` is.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from functools import cache
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection

from flaskbus.address import Address, Node
from flaskbus.errors import UsageError

Unavailable = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.InvalidResponse,  # what answers is no broker
    OSError,
)
"""What a broker that is away, stalled or loading raises."""

LOOK = 1.0
"""Seconds that a sentinel, or a node that is asked for the others, may take: there are more of them."""


class Misconfigured(redis.exceptions.ConnectionError):
    """Somebody answers there, but cannot be what the URL says; the text tells the operator what to do."""


_VERIFY = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}


@cache
def tls_context(address: Address) -> ssl.SSLContext | None:
    """What TLS is spoken with, or ``None`` for none; made once for all connections of a process.

    Raises :class:`~flaskbus.errors.UsageError` for a file that cannot be used.
    """
    tls = address.tls
    if tls is None:
        return None
    context = ssl.create_default_context()
    context.check_hostname = tls.check_hostname
    context.verify_mode = _VERIFY[tls.verify]
    try:
        if tls.ca_certs:
            context.load_verify_locations(cafile=tls.ca_certs)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"ssl_ca_certs={tls.ca_certs} is no file of certificates (PEM): {error}") from None
    try:
        if tls.certfile or tls.keyfile:
            context.load_cert_chain(tls.certfile, tls.keyfile or None)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"ssl_certfile={tls.certfile} and ssl_keyfile={tls.keyfile} are no certificate and its key (PEM): {error}"
        ) from None
    return context


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


class _TlsConnection(SSLConnection):
    """redis-py's, with the context that the gateway's link has too, and not one more for each connection."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._context = context

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        return self._context.wrap_socket(sock, server_hostname=self.host)

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health=check_health)
        # The session tickets of TLS 1.3 come after the handshake. Unread they would be data that nobody asked for,
        # and redis-py's pool gives no such connection away; the answer to any command comes after them.
        self.send_command("PING", check_health=False)  # type: ignore[no-untyped-call]
        with suppress(redis.exceptions.ResponseError):
            self.read_response()


class _MasterConnection(SentinelManagedConnection):
    """A connection to the master, which says itself that it is one: a sentinel may not have heard yet."""

    def connect_to(self, address: Node) -> None:
        try:
            super().connect_to(address)  # type: ignore[no-untyped-call]
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            self.connection_pool.sentinel_manager.doubt()
            raise

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health=check_health)
        self.send_command("ROLE", check_health=False)  # type: ignore[no-untyped-call]
        try:
            role: Any = self.read_response()
        except redis.exceptions.NoPermissionError:
            return  # least privilege: the sentinels' word has to do
        if role[0] != b"master":
            raise redis.exceptions.ConnectionError(f"{self.host}:{self.port} is not the master any more")


class _MasterTlsConnection(_MasterConnection, _TlsConnection):
    pass


class Sentinels(Sentinel):
    """redis-py's Sentinel, which tells an unknown service from sentinels that are away."""

    def __init__(self, address: Address) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]
        self.address = address
        self.sentinels = [redis.Redis.from_pool(_sentinel_pool(address, node)) for node in address.nodes]

    def discover_master(self, service_name: str) -> Node:
        """Ask one sentinel after the other, first the one that knew it last time.

        Raises :class:`Misconfigured` where all that answer do not know the service, or are no sentinels, and
        redis-py's ``ConnectionError`` where none answers.
        """
        answered, mistake = False, ""
        trouble: Exception | None = None
        for sentinel in tuple(self.sentinels):
            try:
                master = self._master(sentinel, service_name)
            except (*Unavailable, redis.exceptions.RedisError) as error:
                trouble = error
                if is_no_sentinel(str(error)):
                    made_with = sentinel.connection_pool.connection_kwargs
                    mistake = not_a_sentinel(self.address, (made_with["host"], made_with["port"]))
            else:
                if master is not None:
                    return master
                answered = True
            self.doubt()
        if answered:
            raise Misconfigured(unknown_service(self.address))
        if mistake:
            raise Misconfigured(mistake)
        raise redis.exceptions.ConnectionError(no_sentinel(self.address, str(trouble))) from trouble

    def left(self, node: Node) -> bool:
        """Whether any of them says that somebody else is master: they do not hear of it at the same time."""
        for sentinel in tuple(self.sentinels):
            with suppress(*Unavailable, redis.exceptions.RedisError):
                if self._master(sentinel, self.address.service) not in (None, node):
                    return True
            self.doubt()
        return False

    def _master(self, sentinel: redis.Redis, service: str) -> Node | None:
        master: Any = sentinel.sentinel_get_master_addr_by_name(service)
        return None if master is None else (_text(master[0]), int(master[1]))

    def doubt(self) -> None:
        """Whose answer led nowhere is asked last from now on."""
        # One assignment, because threads share this.
        self.sentinels = self.sentinels[1:] + self.sentinels[:1]


sentinels = cache(Sentinels)
"""Those of an address, one for a process."""


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def listed(address: Address) -> str:
    return ", ".join(f"{host}:{port}" for host, port in address.nodes)


def unknown_service(address: Address) -> str:
    return (
        f"the sentinels at {listed(address)} know no service {address.service!r}; "
        "SENTINEL MASTERS, asked of one of them, shows the names that they know"
    )


def is_no_sentinel(refusal: str) -> bool:
    """Whether this is how a broker answers to SENTINEL, a command that it does not have."""
    return "unknown command" in refusal.lower()


def not_a_sentinel(address: Address, node: Node) -> str:
    tls = "s" if address.tls else ""
    return (
        f"the server at {node[0]}:{node[1]} is a broker and no sentinel; say redis{tls}:// instead of "
        f"redis{tls}+sentinel://, or the port of its sentinels (26379 as a rule)"
    )


def no_sentinel(address: Address, trouble: str) -> str:
    return f"no sentinel of {listed(address)} answers; do they run, and is the port theirs? ({trouble.rstrip('.')})"


def _sentinel_pool(address: Address, node: Node) -> ConnectionPool:
    sentinel = Address(
        kind="single",
        nodes=(node,),
        username=address.sentinel_username,
        password=address.sentinel_password,
        tls=address.tls,
    )
    return node_pool(sentinel, node, LOOK, "")


def node_pool(address: Address, node: Node, timeout: float, name: str) -> ConnectionPool:
    """Connections to this server, with the credentials and the TLS of ``address``."""
    options = _options(timeout, name) | {
        "username": address.username or None,
        "password": address.password or None,
        "db": address.db,
    }
    if address.kind != "single":
        # There are others, and who is right may have changed.
        options["socket_connect_timeout"] = min(timeout, LOOK)
    if address.path:
        del options["socket_keepalive"], options["socket_keepalive_options"]
        return ConnectionPool(UnixDomainSocketConnection, path=address.path, **options)
    options |= {"host": node[0], "port": node[1]}
    context = tls_context(address)
    if context is not None:
        return ConnectionPool(_TlsConnection, context=context, **options)
    return ConnectionPool(Connection, **options)


def master_pool(address: Address, timeout: float, name: str) -> ConnectionPool:
    """Connections to whoever is master when they are made."""
    options = _options(timeout, name) | {
        "username": address.username or None,
        "password": address.password or None,
        "db": address.db,
        # Without an answer the sentinels are asked again.
        "socket_connect_timeout": min(timeout, LOOK),
    }
    context = tls_context(address)
    if context is not None:
        options |= {"connection_class": _MasterTlsConnection, "context": context}
    else:
        options["connection_class"] = _MasterConnection
    pool: ConnectionPool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        address.service, sentinels(address), **options
    )
    return pool
