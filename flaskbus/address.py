"""Where a broker is: its URL, taken apart. Pure.

====================================================================  =====================================
``redis://[[user]:password@]host[:port][/db]``                        one broker
``rediss://…``                                                        the same over TLS
``unix://[[user]:password@]/path/to/socket[?db=0]``                   the same over a Unix socket
``redis+sentinel://[…@]host[:port][,host[:port]…]/service[/db]``      whoever the sentinels say is master
``redis+cluster://[…@]host[:port][,host[:port]…]``                    a cluster; one node that answers is enough
====================================================================  =====================================

``rediss+sentinel://`` and ``rediss+cluster://`` speak TLS to everybody. Options of TLS are redis-py's query
parameters: ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_cert_reqs``, ``ssl_check_hostname``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, cast
from urllib.parse import parse_qsl, unquote

from flaskbus.errors import UsageError

Node = tuple[str, int]
"""Host and port of a server."""

Kind = Literal["single", "sentinel", "cluster"]
Verify = Literal["required", "optional", "none"]

_SCHEMES: Mapping[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_PORTS: Mapping[Kind, int] = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL = ("sentinel_username", "sentinel_password")
_COMMON = ("db", "username", "password")


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS; files are PEM, and an empty one is the system's or none."""

    ca_certs: str = ""
    certfile: str = ""
    keyfile: str = ""
    verify: Verify = "required"
    check_hostname: bool = True


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's URL, taken apart.

    ``nodes`` are the broker, or the sentinels, or some nodes of the cluster. ``path`` is a Unix socket, or empty.
    """

    kind: Kind
    nodes: tuple[Node, ...]
    path: str = ""
    db: int = 0
    username: str = ""
    password: str = ""
    tls: Tls | None = None
    service: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""

    @property
    def host(self) -> str:
        return self.nodes[0][0]

    @property
    def port(self) -> int:
        return self.nodes[0][1]


def parse_url(url: str) -> Address:
    """A broker's URL -> :class:`Address`.

    Raises :class:`~flaskbus.errors.UsageError`, which shows the URL without its passwords.
    """
    try:
        return _parse(url)
    except ValueError as error:
        why = _ESCAPES if _is_split(url) else error
        raise UsageError(f"the broker's URL {mask(url)} is not valid: {why}") from None


def _is_split(url: str) -> bool:
    """Whether a piece of the password was taken for something else, which an error may show."""
    parts = _URL.fullmatch(url)
    end = max(parts.end("scheme"), parts.end("authority")) if parts else 0
    return "***@" in mask(url) and "@" in _VALUE.sub(_masked, url)[end:]


_ESCAPES = (
    "it begins like redis://USER:PASSWORD@HOST, and what means something in a URL is percent-encoded in a password:"
    " / is %2F, ? is %3F and # is %23"
)


_URL = re.compile(
    r"(?P<scheme>[^:/?#]+):(?://(?P<authority>[^/?#]*))?(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?:#.*)?"
)
"""RFC 3986, appendix B. Of several hosts, newer versions of urllib.parse let none but the first stand in brackets."""


def _parse(url: str) -> Address:
    parts = _URL.fullmatch(url)
    scheme = parts["scheme"].lower() if parts else ""
    if parts is None or scheme not in _SCHEMES:
        raise ValueError(
            "it begins with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
            " (rediss+… for the last two over TLS)"
        )
    kind, tls = _SCHEMES[scheme]
    options = _options(parts["query"] or "", kind, tls)
    login, _, hosts = (parts["authority"] or "").rpartition("@")
    username, _, password = login.partition(":")
    is_socket = scheme == "unix"
    service, db = "", "" if is_socket else parts["path"].strip("/")
    if kind == "sentinel":
        service, _, db = db.partition("/")
        if not service:
            raise ValueError(f"it ends with the name of the service: {scheme}://{hosts}/mymaster")
    database = _database(options.get("db", db))
    if kind == "cluster" and database:
        raise ValueError("a cluster has no databases but 0")
    if is_socket and not parts["path"]:
        raise ValueError("it wants the path of the socket: unix:///run/redis/redis.sock")
    return Address(
        kind=kind,
        nodes=tuple(_node(host, _PORTS[kind]) for host in hosts.split(",")),
        path=unquote(parts["path"]) if is_socket else "",
        db=database,
        username=options.get("username", unquote(username)),
        password=options.get("password", unquote(password)),
        tls=_tls(options) if tls else None,
        service=unquote(service),
        sentinel_username=options.get("sentinel_username", ""),
        sentinel_password=options.get("sentinel_password", ""),
    )


def _options(query: str, kind: Kind, tls: bool) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    allowed = (*_COMMON, *(_TLS if tls else ()), *(_SENTINEL if kind == "sentinel" else ()))
    for name in options:
        if name in allowed:
            continue
        if name in _TLS:
            raise ValueError(f"{name} is for TLS, and TLS begins with rediss")
        if name in _SENTINEL:
            raise ValueError(f"{name} is for redis+sentinel://")
        near = get_close_matches(name, allowed, 1)
        raise ValueError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return options


def _database(text: str) -> int:
    if not text:
        return 0
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not the number of a database")
    return int(text)


def _node(text: str, default: int) -> Node:
    """``host``, ``host:port``, ``[::1]:port`` or nothing -> host and port."""
    host, bracket, rest = text.partition("]")
    if bracket:
        host = host.removeprefix("[")
    else:
        host, _, rest = text.partition(":")
        rest = f":{rest}" if rest else ""
    port = rest.removeprefix(":")
    if (port and not port.isdecimal()) or not 0 < int(port or default) < 65536:
        raise ValueError(f"{text!r} is not a host and its port")
    return unquote(host) or "127.0.0.1", int(port or default)


def _tls(options: Mapping[str, str]) -> Tls:
    verify = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if verify not in ("required", "optional", "none"):
        raise ValueError(f"ssl_cert_reqs is required, optional or none, not {verify!r}")
    check = options.get("ssl_check_hostname", "true").lower()
    if check not in _BOOLEANS:
        raise ValueError(f"ssl_check_hostname is true or false, not {check!r}")
    return Tls(
        ca_certs=options.get("ssl_ca_certs", ""),
        certfile=options.get("ssl_certfile", ""),
        keyfile=options.get("ssl_keyfile", ""),
        verify=cast(Verify, verify),
        # Whose certificate is not looked at may have any name.
        check_hostname=_BOOLEANS[check] and verify != "none",
    )


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def mask(url: str) -> str:
    """The URL without its passwords, for people and logs; a URL that is not valid too."""
    scheme, slashes, rest = _VALUE.sub(_masked, url).partition("://")
    if not slashes:
        scheme, rest = "", scheme
    login, _, hosts = rest.rpartition("@")
    user, colon, _ = login.partition(":")
    return f"{scheme}{slashes}{user}:***@{hosts}" if colon else scheme + slashes + rest


_VALUE = re.compile(r"([?&])([^=&]*)=([^&]*)")


def _masked(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2]}=***" if unquote(match[2]).endswith("password") else match[0]
